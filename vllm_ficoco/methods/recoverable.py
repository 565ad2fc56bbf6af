# SPDX-License-Identifier: Apache-2.0
"""Recoverable Compression: keep what [CLS] looks at, recover what is asked for, merge the rest.

Chen et al., "Recoverable Compression: A Multimodal Vision Token Recovery Mechanism Guided by Text
Information", arXiv 2409.01179: a visual filter keeps tokens by [CLS] attention; of those that it
drops, the ones most like the question are recovered; what is left is clustered by its nearest
neighbours, and of each cluster its mean stays.

The counts are shares of the budget here, where the paper's thresholds (outliers of either score)
make them depend on the image and the question, which paged serving cannot plan for. The options are
ours, and so is how clusters are made, which the paper's extracts at hand did not say: by density
peaks (Rodriguez and Laio, 2014). Of the dropped tokens' mean keys k, of unit length, N(i) being the
nearest,

    rho_i = exp(-mean_{j in N(i)} |k_i - k_j|^2)
    delta_i = min_{j: rho_j > rho_i} |k_i - k_j|        (the densest token: its largest distance)

those with the highest rho * delta lead clusters, and everybody else joins
the leader whose key is most like its own. A leader stays at its place as its cluster's plain mean.

Other deviations: likeness to the question is that of :mod:`vllm_ficoco.methods.cdpruner`, as LLaVA
has no text tower here; the layer is the last one that runs; tokens stay in raster order. Without
[CLS], the attention that a patch receives on average takes its place.
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
    blocks_of,
    complement,
    highest,
    one_hot_among,
    places,
    take,
)


class RecoverableOptions(VisionOptions):
    """Options of Recoverable Compression; shares are rounded down, the rest goes by [CLS]."""

    recovered: Annotated[float, Field(ge=0, lt=0.5)] = 0.25
    """Share of the budget that the question chooses."""
    merged: Annotated[float, Field(ge=0, lt=0.5)] = 0.125
    """Share of the budget that goes to clusters of what is dropped."""
    neighbours: Annotated[int, Field(ge=1, le=64)] = 5
    """Of how many neighbours a token's density is the mean; all where there are fewer."""


def leaders(evidence: Evidence, among: Tensor, count: int, neighbours: int) -> Tensor:
    """(B, count) of the tokens ``among`` (B, m), ascending, those that lead clusters."""
    images, m = among.shape
    if not count:
        return among[:, :0]
    number = torch.arange(m, device=among.device).expand(images, m)
    near = min(neighbours, m - 1)

    def distances(block: Tensor) -> Tensor:
        """(B, b, m): squared, of tokens by number in ``among``."""
        return (2 - 2 * evidence.cosine_of_keys(take(among, block), among)).clamp_min(0)

    density = torch.ones(images, m, device=among.device)
    if near:
        found = []
        for block in blocks_of(number, number):
            others = distances(block).scatter(2, block[..., None], torch.inf)
            found.append((-others.topk(near, dim=-1, largest=False).values.mean(-1)).exp())
        density = torch.cat(found, 1)
    # Among equally dense ones the lower index is the denser.
    rank = places(highest(density, m))
    apart = []
    for block in blocks_of(number, number):
        far, denser = distances(block), rank[:, None] < take(rank, block)[..., None]
        nearest = torch.where(denser, far, torch.inf).amin(-1)
        apart.append(torch.where(nearest.isinf(), far.amax(-1), nearest).sqrt())
    return take(among, highest(density * torch.cat(apart, 1), count).sort(-1).values)


def stay(
    tokens: Tokens, evidence: Evidence, budget: int, options: RecoverableOptions
) -> tuple[Tensor, Tensor]:
    """(B, d) indices of those that are kept or recovered, (B, c) of those that lead clusters."""

    def find() -> tuple[Tensor, Tensor]:
        recovered, merged = int(budget * options.recovered), int(budget * options.merged)
        seen = highest(evidence.attention_of_cls(), budget - recovered - merged)
        relevance = evidence.relevance(tokens.hidden).scatter(1, seen, -torch.inf)
        own = torch.cat([seen, highest(relevance, recovered)], 1)
        dropped = complement(own, len(tokens))
        return own, leaders(evidence, dropped, merged, options.neighbours)

    return evidence.remember(("recoverable", budget, options), find)


def filter(tokens: Tokens, evidence: Evidence, leave: int, options: RecoverableOptions) -> Tensor:
    """Everything that is neither kept nor recovered and leads no cluster."""
    staying = torch.cat(stay(tokens, evidence, len(tokens) - leave, options), 1)
    return complement(staying, len(tokens))


def correlate(
    _: Tokens, evidence: Evidence, source: Tensor, target: Tensor, __: RecoverableOptions
) -> Tensor:
    """Cosine of keys."""
    return evidence.cosine_of_keys(source, target)


def weigh(
    tokens: Tokens,
    evidence: Evidence,
    _: Tensor,
    target: Tensor,
    correlation: Tensor,
    options: RecoverableOptions,
) -> Tensor:
    """1 for the leader whose key is most like one's own; the others take nothing in."""
    own, _ = stay(tokens, evidence, target.shape[1], options)
    return one_hot_among(correlation, target, own, len(tokens))


RECOVERABLE = Method(
    name="recoverable",
    idea="keeps what [CLS] looks at, recovers what resembles the question, merges the rest",
    paper="Chen et al., Recoverable Compression, arXiv 2409.01179",
    place="output",
    schedule=lambda _, budget, layers, __: schedule.at_output(budget, layers),
    filter=filter,
    correlate=correlate,
    weigh=weigh,
    options=RecoverableOptions,
    asks_question=True,
)
