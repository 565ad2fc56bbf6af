# SPDX-License-Identifier: Apache-2.0
"""VisionZip: keep the dominant tokens, merge the rest into a few contextual ones.

Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models",
arXiv 2412.04467. Dominant tokens have most [CLS] attention. Of the rest, contextual tokens are
taken at an even stride; every other token joins the contextual one whose key is most alike
(cosine, keys averaged over heads), and a contextual token becomes the mean of its group.

The published splits for LLaVA-1.5 are 162 + 30, 108 + 20 and 54 + 10: 5 of 32 are contextual.

Deviations: the mean counts the contextual token and its group alike, where the authors' code adds
the mean of the group to it; their dominant tokens count [CLS] among them, which LLaVA drops;
tokens stay in raster order. Contextual token i of c stands at i * n // c of the n that are left,
so that they spread over all of them; the authors' stride is n // c, from the first on. The layer
is the last one that runs.
Without [CLS], the attention that a patch receives on average takes its place.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vllm_ficoco import schedule
from vllm_ficoco.methods.paradigm import (
    Evidence,
    Method,
    Tokens,
    VisionOptions,
    complement,
    highest,
    one_hot_among,
)


class VisionZipOptions(VisionOptions):
    """Options of VisionZip."""

    contextual: Annotated[float, Field(ge=0, lt=1)] = 5 / 32
    """Share of the budget that goes to merged tokens, rounded down; some token must be dominant."""


def stay(
    tokens: Tokens, evidence: Evidence, budget: int, options: VisionZipOptions
) -> tuple[Tensor, Tensor]:
    """(B, d) indices of the dominant and (B, c) of the contextual tokens, d + c = budget."""
    contextual = int(budget * options.contextual)
    dominant = highest(evidence.attention_of_cls(), budget - contextual)
    rest = complement(dominant, len(tokens))
    stride = torch.arange(contextual, device=rest.device) * rest.shape[1] // max(contextual, 1)
    return dominant, rest[:, stride]


def filter(tokens: Tokens, evidence: Evidence, leave: int, options: VisionZipOptions) -> Tensor:
    """Everything that is neither dominant nor contextual."""
    staying = torch.cat(stay(tokens, evidence, len(tokens) - leave, options), 1)
    return complement(staying, len(tokens))


def correlate(
    _: Tokens, evidence: Evidence, source: Tensor, target: Tensor, __: VisionZipOptions
) -> Tensor:
    """Cosine of keys."""
    return evidence.cosine_of_keys(source, target)


def weigh(
    tokens: Tokens,
    evidence: Evidence,
    _: Tensor,
    target: Tensor,
    correlation: Tensor,
    options: VisionZipOptions,
) -> Tensor:
    """1 for the contextual token whose key is most like one's own; dominant tokens cannot receive,
    and where the budget is too small for any contextual token, nothing is merged."""
    dominant, _ = stay(tokens, evidence, target.shape[1], options)
    return one_hot_among(correlation, target, dominant, len(tokens))


VISIONZIP = Method(
    name="visionzip",
    idea="keeps what [CLS] looks at, merges the rest into a few strided tokens by key similarity",
    paper="Yang et al., VisionZip, arXiv 2412.04467",
    place="output",
    schedule=lambda _, budget, layers, __: schedule.at_output(budget, layers),
    filter=filter,
    correlate=correlate,
    weigh=weigh,
    options=VisionZipOptions,
)
