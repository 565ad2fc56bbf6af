# SPDX-License-Identifier: Apache-2.0
"""VidCom2: frames that are unlike the rest of the video keep more, and of each what is unlike both.

Liu et al., "Video Compression Commander: Plug-and-Play Inference Acceleration for Video Large
Language Models", arXiv 2505.14454. Of the half of the channels that vary least over the video, a
token is a vector x of length 1. With g the mean of all tokens and g_t that of frame t, how much a
token is like them is

    s(x, c) = sum_a exp(-|x - c|^2 / (2 a)),  a = 1/8, 1/4, 1/2, 1, 2

A frame is the more unique the smaller the mean of s(x, g) over its tokens; with p the softmax over
frames of minus that mean, divided by 0.01, a frame keeps the share

    r_t = r (1 + p_t - 1 / F), at most 1

of its tokens, r being the share that stays of the video: those with the smallest s(x, g) +
s(x, g_t). Looks at no attention.

Deviations from the authors' code: the total is the budget exactly, at least one token a frame:
beyond that one, frames share what is left in proportion to what r_t gives them, by largest
remainder, and what a full frame cannot hold goes to the others (theirs: rounded, so that totals
depend on the video). All in float32 whatever the model computes in. Newlines inside of frames
(LLaVA-Video) are no model's here. The paper's text was at hand beyond its formulas in a talk alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vllm_ficoco import schedule
from vllm_ficoco.methods.frames import best_of_frames, for_videos, in_turns
from vllm_ficoco.methods.paradigm import AcrossFrames, Evidence, Options, places
from vllm_ficoco.methods.parts import largest_remainder

_WIDTHS = tuple(2.0**k for k in range(-3, 2))


class VidCom2Options(Options):
    """Options of VidCom2."""

    temperature: Annotated[float, Field(ge=0.0001)] = 0.01
    """What frames' uniqueness is divided by; the higher, the more alike are their shares."""


def shares(patches: int, frames: int, _: int, __: VidCom2Options) -> list[int]:
    """Equal ones in place of those that the device finds.

    Raises:
        ValueError: there is not one token a frame.
    """
    if patches < frames:
        raise ValueError(f"at least {frames}, one token a frame")
    return schedule.evenly(patches, frames)


def steady(frames: Tensor) -> Tensor:
    """(B, D): 1 for the half of the channels with the smallest variance over the tokens, else 0."""
    count = frames.shape[1] * frames.shape[2]
    mean = frames.mean((1, 2), dtype=torch.float32)
    squares = torch.zeros_like(mean)
    for some in in_turns(frames):
        squares += (frames[:, some].float() - mean[:, None, None]).square().sum((1, 2))
    rank = places((squares / count).argsort(dim=-1, stable=True))
    return (rank < max(1, frames.shape[-1] // 2)).float()


def likeness(frames: Tensor) -> tuple[Tensor, Tensor]:
    """(B, F, n) each: s(x, g) and s(x, g_t) of tokens (B, F, n, D)."""
    channels = steady(frames)[:, None, None]

    def units(some: slice) -> Tensor:
        return torch.nn.functional.normalize(frames[:, some].float() * channels, dim=-1)

    of_frames = torch.cat([units(some).mean(2) for some in in_turns(frames)], 1)
    of_video = of_frames.mean(1)[:, None, None]
    found = []
    for some in in_turns(frames):
        x = units(some)
        found.append([_near(x, of_video), _near(x, of_frames[:, some, None])])
    video, frame = (torch.cat(x, 1) for x in zip(*found, strict=True))
    return video, frame


def _near(x: Tensor, centre: Tensor) -> Tensor:
    """(...,): s(x, c) of vectors (..., D)."""
    apart = (x - centre).square().sum(-1)
    near = torch.zeros_like(apart)
    for width in _WIDTHS:
        near = near + (-apart / (2 * width)).exp()
    return near


def choose(frames: Tensor, _: Evidence, even: Sequence[int], options: VidCom2Options) -> Tensor:
    """Shares by the frames' uniqueness, places by what is unlike the video and its frame."""
    total, each = sum(even), frames.shape[2]
    video, frame = likeness(frames)
    unique = -video.double().mean(-1) / options.temperature
    rate = total / (len(even) * each) * (1 + unique.softmax(-1) - 1 / len(even))
    beyond = (rate.clamp(max=1.0) * each - 1).clamp(min=0.0)
    room = torch.full((len(even),), each - 1, device=frames.device)
    share = 1 + largest_remainder(beyond, room, total - len(even))
    return best_of_frames(-(video + frame), share, total)


VIDCOM2 = for_videos(
    name="vidcom2",
    idea="keeps what is unlike its frame and the video, more in frames unlike the others",
    paper="Liu et al., Video Compression Commander, arXiv 2505.14454",
    across=AcrossFrames(shares, choose, by_content=True),
    options=VidCom2Options,
)
