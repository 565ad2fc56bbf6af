# SPDX-License-Identifier: Apache-2.0
"""Uniform: keep the middle token of as many windows of the grid as the budget.

A baseline that looks at nothing but the grid (:func:`vllm_ficoco.methods.paradigm.grid_windows`).
"""

from __future__ import annotations

from torch import Tensor

from vllm_ficoco import schedule
from vllm_ficoco.methods.paradigm import (
    Evidence,
    Method,
    Options,
    Tokens,
    complement,
    grid_windows,
)


def filter(tokens: Tokens, evidence: Evidence, leave: int, _: Options) -> Tensor:
    """All but the middle token of every window."""
    device = tokens.hidden.device
    middle = grid_windows(evidence.grid, len(tokens) - leave, device)[2]
    return complement(middle.expand(len(tokens.hidden), -1), len(tokens))


UNIFORM = Method(
    name="uniform",
    idea="keeps tokens spread evenly over the grid",
    paper="",
    place="output",
    needs=frozenset(),
    schedule=lambda _, budget, layers, __: schedule.at_output(budget, layers),
    filter=filter,
)
