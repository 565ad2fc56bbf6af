# SPDX-License-Identifier: Apache-2.0
"""PruMerge: keep what [CLS] looks at, refill it with its nearest discarded neighbours.

Shang et al., "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models",
arXiv 2403.15388. Tokens with most [CLS] attention a stay; each takes in the k discarded tokens
whose keys are most like its own (cosine):

    x_i <- (x_i + sum_j a_j x_j) / (1 + sum_j a_j)

A discarded token may go to several, or to none. A kept token weighs 1, as in the authors' code, so
that it stays what it was: weighed by its own a, it would keep a tenth of itself.

Deviations: the sum is divided by its weights, which the authors' is not; the count is the budget,
where the paper's outlier rule makes it depend on the image, which paged serving cannot plan for;
the layer is the last one that runs (LLaVA's features come from the last but one of CLIP, and vLLM
loads no more), the authors' is the one after it; a is the mean over heads of their softmax, and
keys are averaged over heads, where the authors take one softmax and the cosine over the full
width; neighbours come from the discarded tokens only; the authors add one token, the sum of all
that leave by a, and hand tokens on in the order of a, not in raster order.
Without [CLS], the attention that a patch receives on average takes its place.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from vllm_ficoco import schedule
from vllm_ficoco.methods.paradigm import (
    Evidence,
    Method,
    Tokens,
    VisionOptions,
    highest,
    take,
)


class PruMergeOptions(VisionOptions):
    """Options of PruMerge."""

    neighbours: Annotated[int, Field(ge=1, le=4096)] = 32
    """How many discarded tokens a kept one takes in; all where there are fewer."""


def filter(_: Tokens, evidence: Evidence, leave: int, __: PruMergeOptions) -> Tensor:
    return highest(-evidence.attention_of_cls(), leave)


def correlate(
    _: Tokens, evidence: Evidence, source: Tensor, target: Tensor, __: PruMergeOptions
) -> Tensor:
    return evidence.cosine_of_keys(source, target)


def weigh(
    _: Tokens,
    evidence: Evidence,
    source: Tensor,
    __: Tensor,
    correlation: Tensor,
    options: PruMergeOptions,
) -> Tensor:
    nearest = highest(correlation.transpose(1, 2), options.neighbours)  # (B, T, k)
    received = take(evidence.attention_of_cls(), source)[:, None].expand(-1, nearest.shape[1], -1)
    weight = received.new_zeros(received.shape).scatter(2, nearest, received.gather(2, nearest))
    return weight.transpose(1, 2)


PRUMERGE = Method(
    name="prumerge",
    idea="keeps what [CLS] looks at, averages in the nearest discarded tokens by [CLS] attention",
    paper="Shang et al., LLaVA-PruMerge, arXiv 2403.15388",
    place="output",
    schedule=lambda _, budget, layers, __: schedule.at_output(budget, layers),
    filter=filter,
    correlate=correlate,
    weigh=weigh,
    by="target",  # its nearest
    options=PruMergeOptions,
)
