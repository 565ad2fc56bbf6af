# SPDX-License-Identifier: Apache-2.0
"""What methods for videos have in common: they compare frames, on the tower's output.

Shapes: B videos, F frames, n places of a frame's grid, D channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vllm_ficoco import schedule
from vllm_ficoco.methods.paradigm import (
    EVIDENCE_BYTES,
    AcrossFrames,
    Method,
    Need,
    Options,
    on_device,
)
from vllm_ficoco.methods.parts import best_of_parts


def for_videos(
    name: str,
    idea: str,
    paper: str,
    across: AcrossFrames,
    options: type[Options] = Options,
    needs: frozenset[Need] = frozenset(),
) -> Method:
    """A method that reduces videos alone."""

    def no_image(*_: Any) -> Tensor:
        raise NotImplementedError(f"{name} does not reduce images")

    return Method(
        name=name,
        idea=idea,
        paper=paper,
        place="output",
        needs=needs | {"frames"},
        schedule=lambda _, budget, layers, __: schedule.at_output(budget, layers),
        filter=no_image,
        options=options,
        across_frames=across,
    )


def in_turns(frames: Tensor) -> Iterator[slice]:
    """Runs of frames of (B, F, n, D) of which copies in float32 can be held."""
    each = 12 * len(frames) * frames.shape[2] * frames.shape[3]
    at_once = max(1, EVIDENCE_BYTES // each)
    for first in range(0, frames.shape[1], at_once):
        yield slice(first, first + at_once)


def best_of_frames(score: Tensor, shares: Tensor | Sequence[int], total: int) -> Tensor:
    """(B, total): the places with the highest scores of every frame, ascending, in F * n.

    Args:
        score: (B, F, n), not negative infinity.
        shares: (B, F) or F numbers: how many stay of each.
        total: their sum.
    """
    if not isinstance(shares, Tensor):
        shares = on_device([*shares], score.device).expand(len(score), -1)
    inside = torch.ones(score.shape[1:], dtype=torch.bool, device=score.device)
    return best_of_parts(score, shares, inside, total)
