# SPDX-License-Identifier: Apache-2.0
"""Spatial pooling: cut the grid into as many windows as the budget, average each.

The baseline "Spatial Pooling" of the FiCoCo paper's tables (arXiv 2411.17686). The windows
(:func:`vllm_ficoco.methods.paradigm.grid_windows`) are as square and as equal as the budget allows;
a window's token stands at its first place.
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
    """All but the first token of every window."""
    device = tokens.hidden.device
    first = grid_windows(evidence.grid, len(tokens) - leave, device)[1]
    return complement(first.expand(len(tokens.hidden), -1), len(tokens))


def correlate(
    tokens: Tokens, evidence: Evidence, source: Tensor, target: Tensor, _: Options
) -> Tensor:
    """1 for a token and the first of its window."""
    owner = grid_windows(evidence.grid, target.shape[1], tokens.hidden.device)[0]
    return (owner[source][..., None] == owner[target][:, None]).float()


def weigh(
    _: Tokens, __: Evidence, ___: Tensor, ____: Tensor, same: Tensor, _____: Options
) -> Tensor:
    return same


POOLING = Method(
    name="pooling",
    idea="averages the tokens of as many windows of the grid as the budget",
    paper="",
    place="output",
    needs=frozenset(),
    schedule=lambda _, budget, layers, __: schedule.at_output(budget, layers),
    filter=filter,
    correlate=correlate,
    weigh=weigh,
)
