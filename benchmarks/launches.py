# SPDX-License-Identifier: Apache-2.0
"""How many kernels a reduction launches, counted without a GPU.

    python benchmarks/launches.py                    # one stage of every method in the tower
    python benchmarks/launches.py --methods tome

Counted are the operators of PyTorch that do work: on a GPU each launches a kernel or some. The
geometry is CLIP-L's at 336 px: 576 tokens and [CLS], 16 heads of 64, bfloat16. Of methods that
reduce between layers, it is their first layer at a budget of 64.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_ficoco.methods import METHODS, Evidence, Tokens
from vllm_ficoco.settings import Reduction
from vllm_ficoco.vision.geometry import Geometry

CLIP_L = Geometry((24, 24), 23, True)
HEADS, WIDTH, BUDGET, BATCHES = 16, 1024, 64, (1, 8)


class Launches(TorchDispatchMode):
    """Counts operators, but for those that only look at memory in another way or reserve it."""

    FREE = ("empty", "empty_like", "new_empty", "empty_strided", "detach", "_unsafe_view")

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        if not func.is_view and name not in self.FREE:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def launches(method: str, batch: int) -> tuple[int, int]:
    """Of the method's first stage, and how many stages it has."""
    reduction = Reduction(method=method, budget=BUDGET)
    stages = CLIP_L.stages(reduction)
    patches = CLIP_L.tokens + 1
    torch.manual_seed(0)
    qkv = torch.randn(batch, patches, 3 * WIDTH, dtype=torch.bfloat16).chunk(3, -1)
    query, key, _ = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in qkv)
    evidence = Evidence(
        query=query,
        key=key,
        scale=(WIDTH // HEADS) ** -0.5,
        grid=CLIP_L.grid,
        has_cls=True,
        pixels=torch.randn(batch, 3, 336, 336, dtype=torch.bfloat16),
        heads=HEADS,
        question=torch.ones(batch, WIDTH),
    )
    hidden = torch.randn(batch, patches, WIDTH, dtype=torch.bfloat16)
    left = Tokens.of(hidden[:, 1:])
    with Launches() as counting:
        reduction.spec.reduce(left, evidence, stages[0].keep, reduction.parsed_options())
    return counting.seen.total(), len(stages)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    able = [name for name, method in METHODS.items() if method.fits_a_graph and name != "none"]
    parser.add_argument("--methods", default=",".join(able), help="with commas (default: all)")
    print("| method | stages | " + " | ".join(f"{n} at once" for n in BATCHES) + " |")
    print("| --- | --- |" + " --- |" * len(BATCHES))
    for method in parser.parse_args().methods.split(","):
        counts = [launches(method, batch) for batch in BATCHES]
        print(f"| {method} | {counts[0][1]} | " + " | ".join(str(n) for n, _ in counts) + " |")


if __name__ == "__main__":
    main()
