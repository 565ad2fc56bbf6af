# SPDX-License-Identifier: Apache-2.0
"""FastVID: what [CLS] looks at in every frame, and of each scene what stands for its tokens.

Shen et al., "FastVID: Dynamic Density Pruning for Fast Video Large Language Models", arXiv
2503.11187. The video is cut into segments: where the cosine of neighbouring frames is among the c
- 1 = 7 lowest, or below tau = 0.9. Then of the budget

- the share 1 - d keeps the tokens of every frame that [CLS] looks at most; d = 0.4;
- the share d keeps anchors. Segments share it by their lengths; in a segment every p-th frame
  (p = 4), counted from its last one, keeps an equal part: tokens with the highest rho * delta, rho
  = exp(-mean of the squared distances to the 4 nearest tokens of the frame, itself among them),
  delta the distance to the nearest token with a higher rho, or the longest distance in the frame if
  there is none. Distances are divided by the square root of the number of channels.

All tokens of a segment that [CLS] has not picked go to the most similar (cosine) anchor of every
frame that has anchors. An anchor x with m of them, itself among them, becomes w x + (1 - w) times
their mean, w = max(1 / (m + 1), beta), beta = 0.6.

Deviations from the authors' code: the total is the budget exactly, shared out to the token by
largest remainder (theirs: rounded down in every frame and segment); what frames with anchors cannot
hold goes to the others. Neighbouring frames are compared by the mean of their tokens (theirs: what
the tower's pooling head makes of a frame, which vLLM does not run). Tokens of equal density count
by their places (theirs: by lot). Without [CLS], the attention that a patch receives on average
takes its place (theirs: that of the pooling head). The paper's text was not at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from vllm_ficoco import schedule
from vllm_ficoco.methods.frames import best_of_frames, for_videos
from vllm_ficoco.methods.paradigm import (
    EVIDENCE_BYTES,
    AcrossFrames,
    Evidence,
    Options,
    distances,
    on_device,
    take,
)
from vllm_ficoco.methods.parts import best_of_parts, largest_remainder, ranks

_NEIGHBOURS = 4
"""Tokens of which the density of one is made, itself among them."""


class FastVIDOptions(Options):
    """Options of FastVID; the paper's defaults."""

    segments: Annotated[int, Field(ge=1)] = 8
    """c: into how many segments a video is cut at least, if it has as many frames."""
    alike: Annotated[float, Field(ge=-1, le=1)] = 0.9
    """tau: frames less alike than this are cut apart."""
    merged: Annotated[float, Field(ge=0, le=1)] = 0.4
    """d: share of the budget, rounded down, that keeps anchors."""
    every: Annotated[int, Field(ge=1)] = 4
    """p: of so many frames of a segment one has anchors."""
    own: Annotated[float, Field(ge=0, le=1)] = 0.6
    """beta: the least weight of an anchor's own value."""


class Roles(NamedTuple):
    """Of one video, who does what."""

    place: Tensor
    """(kept,) all places that stay, ascending in F * n."""
    anchor: Tensor
    """(anchors,) those of the anchors."""
    salient: Tensor
    """(F, n): what [CLS] has picked."""
    segment: Tensor
    """(F,): to which segment a frame belongs, from 0."""


def shares(patches: int, frames: int, _: int, __: FastVIDOptions) -> list[int]:
    """Equal ones in place of those that the device finds."""
    return schedule.evenly(patches, frames)


def segments(frames: Tensor, options: FastVIDOptions) -> Tensor:
    """(F,): to which segment a frame (F, n, D) belongs, from 0."""
    means = frames.mean(1, dtype=torch.float32)
    alike = torch.nn.functional.cosine_similarity(means[1:], means[:-1], dim=-1)
    cut = (ranks(-alike) < options.segments - 1) | (alike < options.alike)
    return torch.nn.functional.pad(cut.long().cumsum(0), (1, 0))


def weights(segment: Tensor, every: int) -> Tensor:
    """(F,): in proportion to which frames keep anchors; 0 for those that have none."""
    number, none = torch.arange(len(segment), device=segment.device), torch.zeros_like(segment)
    length = none.scatter_add(0, segment, torch.ones_like(segment))[segment]
    last = none.scatter_reduce(0, segment, number, "amax")[segment]
    has = (last - number) % every == 0
    among = none.scatter_add(0, segment, has.long())[segment]
    return torch.where(has, length.double() / among, 0.0)


def peaks(frames: Tensor, salient: Tensor) -> Tensor:
    """(F, n): rho * delta of the tokens (F, n, D) that are not salient (F, n)."""
    _, n, width = frames.shape
    at_once, found = max(1, EVIDENCE_BYTES // (24 * n * max(n, width))), []
    place = torch.arange(n, device=frames.device)
    for some, out in zip(frames.split(at_once), salient.split(at_once), strict=True):
        apart = distances(some) / width**0.5
        apart = apart.masked_fill(out[:, None] | out[..., None], torch.inf)
        near = apart.topk(min(_NEIGHBOURS, n), dim=-1, largest=False).values
        there = near.isfinite()
        squares = near.masked_fill(~there, 0.0).square().sum(-1)
        density = (-squares / there.sum(-1).clamp(min=1)).exp()
        first, other = density[..., None], density[:, None]
        denser = (other > first) | ((other == first) & (place < place[:, None]))
        distance = apart.masked_fill(~denser, torch.inf).amin(-1)
        farthest = apart.masked_fill(apart.isinf(), 0.0).amax((1, 2))
        distance = torch.where(distance.isinf(), farthest[:, None], distance)
        found.append(density * distance)
    return torch.cat(found)


def _roles(frames: Tensor, evidence: Evidence, total: int, options: FastVIDOptions) -> list[Roles]:
    """Of every video; to choose and to merge ask for the same."""
    return evidence.remember(
        ("FastVID", total, options), lambda: _find_roles(frames, evidence, total, options)
    )


def _find_roles(
    frames: Tensor, evidence: Evidence, total: int, options: FastVIDOptions
) -> list[Roles]:
    count, each = frames.shape[1:3]
    anchors = int(total * options.merged)
    picked = on_device(schedule.evenly(total - anchors, count), frames.device)
    attention = evidence.attention_of_cls().unflatten(0, (-1, count))
    roles = []
    for video, looked_at in zip(frames, attention, strict=True):
        salient = ranks(looked_at) < picked[:, None]
        segment = segments(video, options)
        share = largest_remainder(weights(segment, options.every)[None], each - picked, anchors)
        score = peaks(video, salient)
        anchor = best_of_parts(score[None], share, ~salient, anchors)[0]
        place = best_of_frames(looked_at[None], picked.expand(1, -1), total - anchors)[0]
        roles.append(Roles(torch.cat([place, anchor]).sort().values, anchor, salient, segment))
    return roles


def choose(
    frames: Tensor, evidence: Evidence, even: Sequence[int], options: FastVIDOptions
) -> Tensor:
    """What [CLS] looks at, and the anchors."""
    return torch.stack([one.place for one in _roles(frames, evidence, sum(even), options)])


def compress(frames: Tensor, evidence: Evidence, place: Tensor, options: FastVIDOptions) -> Tensor:
    """The anchors take in the tokens of their segment, but those that [CLS] has picked."""
    kept = take(frames.flatten(1, 2), place)
    for video, roles, tokens in zip(
        frames, _roles(frames, evidence, place.shape[1], options), kept, strict=True
    ):
        if len(roles.anchor):
            at = torch.searchsorted(roles.place, roles.anchor)
            merged = _merged(video, roles, options).to(tokens.dtype)
            tokens.index_copy_(0, at, merged)
    return kept


def _merged(frames: Tensor, roles: Roles, options: FastVIDOptions) -> Tensor:
    """(anchors, D) float32: what anchors of a video (F, n, D) become."""
    count, n, width = frames.shape
    anchor = frames.flatten(0, 1).index_select(0, roles.anchor).float()
    unit = torch.nn.functional.normalize(anchor, dim=-1)
    frame, number = roles.anchor // n, torch.arange(len(anchor), device=frames.device)
    total = torch.zeros_like(anchor)
    members = torch.zeros(len(anchor), device=frames.device)
    at_once = max(1, EVIDENCE_BYTES // (12 * n * max(len(anchor), count, width)))
    for first in range(0, count, at_once):
        some = slice(first, first + at_once)
        source = frames[some].flatten(0, 1).float()
        alike = torch.nn.functional.normalize(source, dim=-1) @ unit.T
        # Of every frame with anchors the most similar one, in a tie the first.
        of_frame = frame.expand_as(alike)
        best = alike.new_full((len(alike), count), -torch.inf)
        best = best.scatter_reduce(1, of_frame, alike, "amax").gather(1, of_frame)
        candidate = torch.where(alike == best, number, len(anchor))
        lowest = torch.full((len(alike), count), len(anchor), device=frames.device)
        lowest = lowest.scatter_reduce(1, of_frame, candidate, "amin").gather(1, of_frame)
        theirs = roles.segment[some, None].expand(-1, n).flatten()
        same = theirs[:, None] == roles.segment[frame]
        goes = ((number == lowest) & same & ~roles.salient[some].flatten()[:, None]).float()
        members += goes.sum(0)
        total += goes.T @ source
    members = members[:, None]
    own = (1 / (members + 1)).clamp(min=options.own)
    return own * anchor + (1 - own) * total / members.clamp(min=1)


FASTVID = for_videos(
    name="fastvid",
    idea="keeps what [CLS] looks at in every frame, and merges the rest scene by scene",
    paper="Shen et al., FastVID, arXiv 2503.11187",
    across=AcrossFrames(shares, choose, compress, by_content=True),
    options=FastVIDOptions,
    needs=frozenset({"attention"}),
)
