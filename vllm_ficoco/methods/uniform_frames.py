# SPDX-License-Identifier: Apache-2.0
"""Uniform frames: keep whole frames at equal distances, and of the last one what is left over.

What users do today (fewer frames), and what every method for videos must beat. As many frames as
the budget has room for, at the places where vLLM would sample that many: the first, the last and
between them ``i * (frames - 1) / (count - 1)``, rounded down. Of the last of them only as much may
fit: tokens spread evenly over its grid, as :mod:`vllm_ficoco.methods.uniform` keeps them. All of
them have gone through the tower, so it is not cheaper; ``num_frames`` of vLLM's video loader is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_ficoco.methods.frames import for_videos
from vllm_ficoco.methods.paradigm import AcrossFrames, Evidence, Options, grid_windows, on_device


def shares(patches: int, frames: int, each: int, _: Options) -> list[int]:
    """All of the frames that stay, what is left over of the last of them, nothing of the others."""
    count = -(-patches // each)
    kept = [0] * frames
    for i in range(count):
        kept[i * (frames - 1) // max(count - 1, 1)] = min(each, patches - i * each)
    return kept


def choose(frames: Tensor, evidence: Evidence, kept: Sequence[int], _: Options) -> Tensor:
    """Those places, whatever is in them."""
    each, device = frames.shape[2], frames.device
    whole = [frame for frame, count in enumerate(kept) if count == each]
    within = torch.arange(each, device=device)
    place = (on_device(whole, device)[:, None] * each + within).flatten()
    cut = [(frame, count) for frame, count in enumerate(kept) if 0 < count < each]
    for frame, count in cut:
        middles = grid_windows(evidence.grid, count, device)[2]
        place = torch.cat([place, frame * each + middles])
    return place.sort().values.expand(len(frames), -1)


UNIFORM_FRAMES = for_videos(
    name="uniform-frames",
    idea="keeps whole frames at equal distances",
    paper="",
    across=AcrossFrames(shares, choose),
)
