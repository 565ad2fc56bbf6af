# SPDX-License-Identifier: Apache-2.0
"""TOPS: greedily what matters, is unlike what is kept and covers the rest, at three places.

Wang et al., "TOPS: First-Principles Visual Token Pruning via Constructing Token Optimal
Preservation Sets for Efficient MLLM Inference", arXiv 2606.27161. After the tower and at
two layers of the decoder, with S the tokens that are chosen already, the next one is the argmax of

    relevance_i + 0.5 * diversity_i + 0.5 * coverage_i

    diversity_i = 1 - max_{s in S} cos(x_i, x_s)
    coverage_i  = sum_j max(0, cos(x_i, x_j) - max_{s in S} cos(x_s, x_j))

Relevance is the attention of [CLS] after the tower, and in the decoder that of the words that
resemble the image (SparseVLM's raters). The three places keep 2 T, T and T / 4: with decoder layers
12 and 24 of 32 that is 1.19 T on average, which is what ``budget`` says.

Readings and deviations, as the paper's text was not at hand: each term is divided by its mean over
the tokens before they are added, the paper's scaling being unknown; of more than 1,024 tokens, as
many spread evenly stand for all that are to be covered; where the first place keeps more than two
thirds of an image, the later ones come closer to it, to end with all tokens, too. Without [CLS],
the attention that a patch receives on average takes its place.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vllm_ficoco.methods import greedy, topk
from vllm_ficoco.methods.decoding import DecoderEvidence, DecoderOptions
from vllm_ficoco.methods.greedy import SMALLEST, Likeness
from vllm_ficoco.methods.paradigm import (
    DecoderPart,
    Evidence,
    Method,
    Steps,
    Tokens,
    VisionOptions,
    complement,
)
from vllm_ficoco.methods.sparsevlm import attention_of_raters, raters


class TopsOptions(DecoderOptions, VisionOptions):
    """Options of TOPS; the numbers are the paper's."""

    diversity: Annotated[float, Field(ge=0, le=64)] = 0.5
    """Weight against relevance."""
    coverage: Annotated[float, Field(ge=0, le=64)] = 0.5
    """Weight against relevance."""


def shares(tokens: int, first: int, _: int) -> list[int]:
    """Tokens of the three places, of which the first keeps ``first``: a half of it, an eighth."""
    p = first / tokens
    second = round(first * max(1 / 2, (3 * p - 1) / 2))
    return [first, second, round(second * max(1 / 4, (9 * p - 5) / 4))]


def choose(tokens: Tokens, relevance: Tensor, leave: int, options: TopsOptions) -> Tensor:
    """(B, leave) those that are not chosen, by relevance (B, n)."""
    n, likeness, seen = len(tokens), Likeness(tokens.hidden), None
    if n > greedy.COVERED:
        seen = torch.arange(greedy.COVERED, device=relevance.device) * n // greedy.COVERED
    cover, nearest = greedy.Cover(likeness, seen), torch.zeros_like(relevance)
    fixed, chosen = _scaled(relevance), list[Tensor]()
    for _ in range(n - leave):
        score = fixed + options.diversity * _scaled((1 - nearest).clamp_min_(SMALLEST))
        best = score.add_(_scaled(cover.gain()), alpha=options.coverage).argmax(1, keepdim=True)
        chosen.append(best)
        fixed.scatter_(1, best, -torch.inf)  # not again
        torch.maximum(nearest, likeness.row(best), out=nearest)
        cover.add(best)
    return complement(torch.cat(chosen, 1), n)


def _scaled(x: Tensor) -> Tensor:
    """(B, n) with mean 1, or 0 where all are."""
    return x / x.mean(1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def filter(tokens: Tokens, evidence: Evidence, leave: int, options: TopsOptions) -> Tensor:
    return choose(tokens, evidence.attention_of_cls(), leave, options)


def filter_in_decoder(
    tokens: Tokens, evidence: DecoderEvidence, leave: int, options: TopsOptions
) -> Tensor:
    return choose(tokens, attention_of_raters(evidence), leave, options)


TOPS = Method(
    name="tops",
    idea="keeps what matters, is unlike what is kept and covers the rest, at three places",
    paper="Wang et al., TOPS, arXiv 2606.27161",
    place="output",
    schedule=topk.TOPK.schedule,
    filter=filter,
    options=TopsOptions,
    decoder=DecoderPart(
        layers=(12, 24), steps=(Steps(filter_in_decoder),), note=raters, shares=shares
    ),
)
