# SPDX-License-Identifier: Apache-2.0
"""The optimiser of the layers' matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonal updates, for the layers' matrices (Jordan et al., 2024).

    PyTorch's own computes in bfloat16, which processors without bf16 units do a hundred times
    slower, and one matrix at a time; this one takes all of a shape together, in float32.
    """

    def __init__(self, matrices: list[dict[str, Any]], lr: float) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": 0.95, "decay": 0.02})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                average = state.setdefault("average", torch.zeros_like(matrix))
                average.lerp_(matrix.grad, 1 - group["momentum"])
                ahead = torch.lerp(matrix.grad, average, group["momentum"])
                tall = matrix.shape[0] > matrix.shape[1]
                ahead = ahead.T if tall else ahead
                by_shape.setdefault(tuple(ahead.shape), []).append((matrix, ahead))
            for pairs in by_shape.values():
                for (matrix, _), update in zip(
                    pairs, _orthogonal(torch.stack([a for _, a in pairs])), strict=True
                ):
                    rows, columns = matrix.shape
                    size = group["lr"] * max(1, rows / columns) ** 0.5
                    matrix.mul_(1 - group["lr"] * group["decay"])
                    matrix.add_(update.T if rows > columns else update, alpha=-size)


def _orthogonal(x: Tensor) -> Tensor:
    """Singular values of matrices (n, rows <= columns) pushed to about 1 (Newton-Schulz)."""
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x
