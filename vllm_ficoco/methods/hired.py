# SPDX-License-Identifier: Apache-2.0
"""HiRED: the first layer says how much every tile keeps, the last layer what.

Arif et al., "HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution
Vision-Language Models", arXiv 2408.10945. The thumbnail keeps the share alpha of the budget, at
most all of its n patches. The tiles share the rest in proportion to their visual content: of the
n (1 - alpha) patches of the thumbnail that [CLS] looks at most in the first layer, how many lie
in the tile's region. Every part keeps the patches with most [CLS] attention in the last layer.
Attention is after softmax, summed over heads; no newlines stay. In the authors' code alpha is
0.5, the first layer is CLIP's first and the last its 23rd, which is the last one that runs.

An image that goes through the tower as it is has a thumbnail alone: Top-K.

Deviations: the total is the budget exactly, by largest remainder where the authors' code rounds
down; what a full part cannot hold goes to the others, where it is left out there. Regions are
what the tiles show of the image, and a patch at the edge of several counts in each by its area
(authors' code: as many equal runs of patches in raster order as there are tiles, which are strips
and not the tiles' regions). Patches of padding are never chosen (authors' code: they are, and then
left out).
Without [CLS], the attention that a patch receives on average takes its place.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vllm_ficoco import schedule
from vllm_ficoco.methods.paradigm import Across, Evidence, Method, Tokens, VisionOptions, highest
from vllm_ficoco.methods.parts import Parts


class HiREDOptions(VisionOptions):
    """Options of HiRED."""

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the budget that the thumbnail keeps, rounded down; and the share of its patches
    that say nothing about the tiles."""


def filter(_: Tokens, evidence: Evidence, leave: int, __: HiREDOptions) -> Tensor:
    return highest(-evidence.attention_of_cls(), leave)


def thumbnail(patches: int, places: int, of_tiles: int, options: HiREDOptions) -> int:
    """The share alpha, as far as there is room in it and in the tiles."""
    return max(min(int(patches * options.alpha), places), patches - of_tiles)


def choose(parts: Parts, whole: int, rest: int, options: HiREDOptions) -> Tensor:
    """Shares by what the thumbnail's [CLS] looks at in the first layer, places by the last."""
    early = parts.attention_of_cls_in_thumbnail(0)
    looked_at = highest(early, int(parts.places * (1 - options.alpha)))
    content = parts.over_regions(torch.zeros_like(early).scatter(1, looked_at, 1.0))
    return parts.best(parts.attention_of_cls(-1), content, whole, rest)


HIRED = Method(
    name="hired",
    idea="keeps what [CLS] looks at: half in the thumbnail, in tiles by what its first layer sees",
    paper="Arif et al., HiRED, arXiv 2408.10945",
    place="output",
    schedule=lambda _, budget, layers, __: schedule.at_output(budget, layers),
    filter=filter,
    options=HiREDOptions,
    across=Across(lambda layers, _: tuple(sorted({0, layers - 1})), thumbnail, choose),
)
