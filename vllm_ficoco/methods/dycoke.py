# SPDX-License-Identifier: Apache-2.0
"""DyCoke: of frames that follow one another, the first stays whole, of the others what has changed.

Tao et al., "DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models", arXiv
2411.15024, its temporal part. Frames come in windows of four. The first stays whole; the second is
compared with the first, the fourth with the third and the third with the first: place by place, by
the cosine of the two tokens. Of each of the three the tokens that are least alike stay, as many of
one as of the other. Nothing is merged. Looks at no attention.

Deviations from the authors' code: the number that stays follows from the budget (theirs: 0.3 of
each of the three, 47.5 % of the video), shared out to the token. All windows are treated alike: the
last one, too, and what is left of one at the end of the video (theirs: no third frame is compared
in the last one, and an odd last frame is left out). Windows of other lengths are compared likewise,
a frame with the one whose number in the window lacks its lowest binary digit. Its second part,
which chooses anew while answers are decoded, is not here: what leaves has left. The paper's text
was not at hand beyond a description of the code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vllm_ficoco import schedule
from vllm_ficoco.methods.frames import best_of_frames, for_videos, in_turns
from vllm_ficoco.methods.paradigm import AcrossFrames, Evidence, Options, on_device


class DyCokeOptions(Options):
    """Options of DyCoke."""

    window: Annotated[int, Field(ge=2, le=1024)] = 4
    """Frames of which the first stays whole; the longer, the smaller are the budgets that can be
    reached."""


def shares(patches: int, frames: int, each: int, options: DyCokeOptions) -> list[int]:
    """All of every window's first frame, and equal shares of the others.

    Raises:
        ValueError: the first ones alone are more.
    """
    heads = -(-frames // options.window)
    if patches < heads * each:
        raise ValueError(f"at least {heads * each}, the first of every {options.window} frames")
    others = iter(schedule.evenly(patches - heads * each, frames - heads) if frames > heads else ())
    return [each if i % options.window == 0 else next(others) for i in range(frames)]


def compared_with(frame: int, window: int) -> int:
    """The frame that a frame is compared with; itself, if it is a window's first."""
    within = frame % window
    return frame - within + (within & (within - 1)) if within else frame


def choose(frames: Tensor, _: Evidence, kept: Sequence[int], options: DyCokeOptions) -> Tensor:
    """The places that are least like those of the frame before."""
    others = [compared_with(frame, options.window) for frame in range(len(kept))]
    other, alike = on_device(others, frames.device), []
    for some in in_turns(frames):
        before = frames.index_select(1, other[some]).float()
        alike.append(torch.nn.functional.cosine_similarity(frames[:, some].float(), before, dim=-1))
    return best_of_frames(-torch.cat(alike, 1), kept, sum(kept))


DYCOKE = for_videos(
    name="dycoke",
    idea="keeps the first of four frames, and of the others what is unlike the frame before",
    paper="Tao et al., DyCoke, arXiv 2411.15024",
    across=AcrossFrames(shares, choose),
    options=DyCokeOptions,
)
