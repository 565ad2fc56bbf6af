#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Package:   torch 2.13.0 (the CPU build)
# Date:      2026-11-27, Python 3.11
# Source:    torch/_dynamo/convert_frame.py counts recompilations by code object; torch._dynamo.config.recompile_limit
# Behaviour: twelve modules, each of a class of its own with a name of its own, each given to torch.compile by itself.
#            Eight are compiled. From the ninth on they run uncompiled, with a warning and right results: the classes
#            come from one function, so their `forward`s share one code object, and the limit of eight is per code
#            object, not per compiled module. A code object of its own (`code.replace()`) is enough to compile them all.
# Expected:  what is compiled by itself has a limit of its own.
# Means:     classes made in a factory to keep compiled code apart, as one for each stage of a decoder, do not keep it
#            apart; vllm_ficoco/engine/decoder.py gives each stage a code object of its own.
# Seen:
#   one code object: 8 of 12 compiled
#   a code object each: 12 of 12 compiled
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" || exit 2
bin=$folder/venv/bin
"$bin/pip" install --quiet torch==2.13.0+cpu || {
  "$bin/pip" install --quiet uv && "$bin/uv" pip install --python "$bin/python" --torch-backend=cpu torch==2.13.0
} || exit 2
cat > "$folder/limit.py" <<'PY'
import sys

import torch


def layer_class(number, own_code):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.number = number

        def forward(self, x):
            return x * self.number

    Layer.__qualname__ = f"Layer{number}"
    if own_code:
        Layer.forward.__code__ = Layer.forward.__code__.replace()
    return Layer


def compiled(own_code):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    for number in range(1, 13):
        layer = torch.compile(layer_class(number, own_code)(), backend=backend)
        assert layer(torch.ones(1)) == number
    return len(graphs)


shared, own = compiled(False), compiled(True)
print(f"one code object: {shared} of 12 compiled")
print(f"a code object each: {own} of 12 compiled")
sys.exit((shared, own) != (8, 12))
PY
"$bin/python" "$folder/limit.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
