# SPDX-License-Identifier: Apache-2.0
"""GlobalCom2: of an image in tiles, the thumbnail decides how much every tile keeps.

Liu et al., "Global Compression Commander: Plug-and-Play Inference Acceleration for
High-Resolution Large Vision-Language Models", arXiv 2501.05179. A patch's score is how [CLS]
looks at it: scaled query-key products before softmax, mean over heads. Of the thumbnail the share
r stays that stays of the image, the highest scores first. With s_i the thumbnail's scores summed
over the region that tile i shows, the tile keeps the share

    r_i = r (1 + softmax_i(s / 10) - 1 / tiles), at most 1

of its patches: those whose score, divided by the length of the tile's vector of scores, plus the
thumbnail's score there (interpolated bilinearly to the grid of the tiles without padding, divided
likewise) is highest.

An image that goes through the tower as it is has a thumbnail alone: Top-K of the score.

Deviations from the authors' code: the total is the budget exactly. All tiles together keep the
budget less the thumbnail's share; they share it in proportion to their patches times r_i, by
largest remainder (theirs: rounded down), and what a full tile cannot hold goes to the others
(theirs: nowhere). Their tiles have equal regions. Here regions are what the tiles show of the
image, padding apart, so they differ in size: s_i is the mean over the region times the size of an
equal one; a tile of padding alone is none. The thumbnail's tokens stay in raster order (theirs: by
descending score). Newlines are an option (theirs: those of all rows stay, of padding too). The
layer is the last one that runs, of CLIP the 23rd (theirs: the 24th).
Without [CLS], the attention that a patch receives on average takes its place.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vllm_ficoco import schedule
from vllm_ficoco.methods.paradigm import (
    Across,
    AttentionKind,
    Evidence,
    Method,
    Tokens,
    VisionOptions,
    highest,
)
from vllm_ficoco.methods.parts import Parts


class GlobalCom2Options(VisionOptions):
    """Options of GlobalCom2."""

    attention: AttentionKind = "logits"
    """``logits``: scaled query-key products, as published; ``probabilities``: after softmax."""
    temperature: Annotated[float, Field(ge=0.01)] = 10.0
    """What the sums of scores are divided by; the higher, the more alike are the tiles' shares."""


def filter(_: Tokens, evidence: Evidence, leave: int, options: GlobalCom2Options) -> Tensor:
    return highest(-evidence.attention_of_cls(options.attention), leave)


def thumbnail(patches: int, places: int, of_tiles: int, _: GlobalCom2Options) -> int:
    """Its part of all patches."""
    return schedule.largest_remainder(patches, [places, of_tiles])[0]


def choose(parts: Parts, whole: int, rest: int, options: GlobalCom2Options) -> Tensor:
    """Shares from the thumbnail, places by the tile's own scores and the thumbnail's."""
    score = parts.attention_of_cls(-1, options.attention)
    of_thumbnail, of_tiles = score[:, 0], score[:, 1:]
    sizes, shown = parts.sizes[1:], parts.inside[1:]
    tiles = sum(window.tokens > 0 for window in parts.layout.parts[1:])
    per_patch = parts.layout.window.tokens / (max(tiles, 1) * sizes.clamp(min=1))
    seen = parts.over_regions(of_thumbnail) * per_patch / options.temperature
    attraction = seen.masked_fill(sizes == 0, float("-inf")).softmax(-1)
    weights = sizes * (1 + attraction - 1 / max(tiles, 1))
    # Vectors of length 1, so that neither has more say.
    own = torch.nn.functional.normalize(of_tiles.masked_fill(~shown, 0.0), dim=-1)
    commander = torch.nn.functional.normalize(parts.over_tiles(of_thumbnail), dim=-1)
    score = torch.cat([of_thumbnail[:, None], own + commander], 1)
    return parts.best(score, weights, whole, rest)


GLOBALCOM2 = Method(
    name="globalcom2",
    idea="keeps what [CLS] looks at, more in tiles where the thumbnail sees more",
    paper="Liu et al., Global Compression Commander, arXiv 2501.05179",
    place="output",
    schedule=lambda _, budget, layers, __: schedule.at_output(budget, layers),
    filter=filter,
    options=GlobalCom2Options,
    across=Across(lambda layers, _: (layers - 1,), thumbnail, choose),
)
