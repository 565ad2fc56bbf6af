# SPDX-License-Identifier: Apache-2.0
"""What a reduction of the largest image that Qwen-VL takes holds and costs, beside its tower.

    python benchmarks/largest.py --tokens 16384

Qwen2.5-VL-7B's shapes in bfloat16: 16 heads of 80, 3,584 channels behind the merger, 4 patches a
token. Memory is what the process holds at its peak above what it held with queries, keys, tokens
and pixels in place; it is to be within three times ``EVIDENCE_BYTES`` and what comes out. Time is
compared with that of one of the tower's 32 layers, worked out here on random weights.
"""

from __future__ import annotations

import argparse
import math
import os
import time

import torch

from budgets import CPUMemory, GPUMemory, table
from vllm_ficoco.methods import METHODS, Evidence, Tokens
from vllm_ficoco.methods.paradigm import EVIDENCE_BYTES
from vllm_ficoco.vision.geometry import FAMILIES

HEADS, HEAD_SIZE, WIDTH, MLP, LAYERS, UNIT, CHANNELS = 16, 80, 1280, 3420, 32, 4, 3584
OFFERED = FAMILIES["qwen2_5_vl"]


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def layer_seconds(patches: int, device: str, dtype: torch.dtype) -> float:
    """Of a layer's products over so many patches: projections, MLP, and attention in windows."""
    x = torch.randn(patches, WIDTH, device=device, dtype=dtype)
    weights = [(WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, 2 * MLP), (MLP, WIDTH)]
    matrices = [torch.randn(shape, device=device, dtype=dtype) for shape in weights]
    heads = torch.randn(patches // 64, HEADS, 64, HEAD_SIZE, device=device, dtype=dtype)
    wait()
    start = time.perf_counter()
    for matrix in matrices[:3]:
        made = x @ matrix
    _ = made[:, :MLP] @ matrices[3]
    torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
    wait()
    return time.perf_counter() - start


def main() -> None:
    """``python benchmarks/largest.py``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--methods", default="", help="these alone, with commas")
    parser.add_argument("--budgets", default="", help="with commas; else a half and an eighth")
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda" if gpu else "cpu"), getattr(torch, args.dtype)
    memory = GPUMemory() if gpu else CPUMemory()
    side = math.isqrt(args.tokens)
    n = side * side
    patches = n * UNIT
    budgets = [int(budget) for budget in args.budgets.split(",") if budget] or [n // 2, n // 8]

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, device=device).to(dtype)

    query, key = (drawn(patches, HEADS, HEAD_SIZE).transpose(1, 2) for _ in range(2))
    hidden = drawn(n, CHANNELS)
    pixels = torch.randint(0, 256, (1, patches, 1176), device=device, dtype=torch.uint8)
    tower = LAYERS * layer_seconds(patches, device, torch.float32 if not gpu else dtype)
    rows = [["method", "budget", "seconds", "of the tower", "peak, MiB", "of EVIDENCE_BYTES"]]
    for name, method in METHODS.items():
        before = method.place == "output" or method.at_output
        if not before or method.decoder or method.needs - OFFERED or name == "none":
            continue
        if args.methods and name not in args.methods.split(","):
            continue
        for budget in budgets:
            evidence = Evidence(
                query,
                key,
                HEAD_SIZE**-0.5,
                (side, side),
                False,
                pixels,
                HEADS,
                UNIT,
                question=drawn(CHANNELS).float(),
            )
            memory.start()
            start = time.perf_counter()
            with torch.inference_mode():
                left = method.reduce(Tokens.of(hidden), evidence, budget, method.options())
            wait()
            seconds = time.perf_counter() - start
            held = memory.peak() - sum(x.nbytes for x in left.tensors)
            rows.append(
                [
                    name,
                    str(budget),
                    f"{seconds:.2f}",
                    f"{seconds / tower:.4f}",
                    f"{held / 2**20:.0f}",
                    f"{held / EVIDENCE_BYTES:.2f}",
                ]
            )
    print(f"{n} tokens, {patches} patches, {os.cpu_count()} cores, {device}, {args.dtype}\n")
    print(table(rows))


if __name__ == "__main__":
    main()
