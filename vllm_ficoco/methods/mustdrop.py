# SPDX-License-Identifier: Apache-2.0
"""MustDrop: merge neighbours that are alike but for what [CLS] looks at; then drop what no word
looks at.

Liu et al., "Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model",
arXiv 2411.10803. Two of its three stages:

1. Vision encoding. Windows of 3 x 3 tokens whose cosines are high on average become one token
   each, their mean. The tokens with most [CLS] attention (8 %, the authors' code) are key tokens.
2. Prefill. Dual attention filtering: at some decoder layers a token leaves that neither the text
   as a whole (global: the sum over words) nor a single word (individual: the largest) looks at.

The third, an output-aware policy for the KV cache while the answer is made, cannot be had here:
blocks of what leaves are freed at the prefill, and a paged cache gives nothing back token by token
later. (In the authors' code it drops, layer by layer, what the prefill dropped behind it.)

Deviations: counts are fixed where the paper has thresholds. So windows merge in the order of
their likeness, the last one in part; where less is to stay than windows and key tokens are, the
rest leave by [CLS] attention, key tokens last. A token's place in the second stage is the larger
of its two attentions, each divided by its mean over the tokens. Windows merge on the tower's
output, not behind its first layer. Key tokens are spared from merging, and not from what leaves
in the decoder, which does not see [CLS]. The decoder's layers (2, 6, 10 and 14) are the stages that
the server has; each place leaves an equal share. Attention as in
:mod:`vllm_ficoco.methods.decoding`. Without [CLS], the attention that a patch receives on average
takes its place.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vllm_ficoco.methods import topk
from vllm_ficoco.methods.decoding import DecoderEvidence, DecoderOptions
from vllm_ficoco.methods.paradigm import (
    DecoderPart,
    Evidence,
    Method,
    Steps,
    Tokens,
    VisionOptions,
    highest,
    places,
    take,
)

SIDE = 3
"""Rows and columns of a window; at the edges of a grid there are smaller ones."""

KEYS = 0.08
"""Share of the tokens that are key tokens, rounded up."""


class MustDropOptions(DecoderOptions, VisionOptions):
    """Options of MustDrop."""


def _ranks(score: Tensor) -> Tensor:
    """(B, k): how many come before by score, the lowest first; ties by index."""
    return places(score.argsort(dim=-1, stable=True))


def _roles(tokens: Tokens, evidence: Evidence) -> tuple[Tensor, Tensor]:
    """(B, n) in which order tokens leave, and (B, n) into which each merges; -1: into none."""
    return evidence.remember(("MustDrop's roles",), lambda: _find_roles(tokens, evidence))


def _find_roles(tokens: Tokens, evidence: Evidence) -> tuple[Tensor, Tensor]:
    n, attention = len(tokens), evidence.attention_of_cls()
    keys = highest(attention, math.ceil(KEYS * n))
    plain = torch.ones_like(attention).scatter(1, keys, 0.0)
    (rows, columns), device = evidence.grid, attention.device
    across = math.ceil(columns / SIDE)
    window = torch.arange(math.ceil(rows / SIDE) * across, device=device)

    # One of each window's tokens after the other, not a copy of all of them at once.
    count, last = plain.new_zeros(len(plain), len(window)), None
    total = torch.zeros((), device=device)
    for spot in range(SIDE**2):
        row, column = window // across * SIDE + spot // SIDE, window % across * SIDE + spot % SIDE
        there = (row < rows) & (column < columns)
        index = torch.where(there, row * columns + column, 0).expand(len(plain), -1)
        member = plain.gather(1, index) * there
        vector = torch.nn.functional.normalize(take(tokens.hidden, index).float(), dim=-1)
        count, total = count + member, total + vector * member[..., None]
        last = torch.where(member > 0, index, torch.full_like(index, -1) if last is None else last)
    assert last is not None
    # Over pairs of a window's tokens, the mean of cosines: their sum's square has each one twice.
    alike = (total.square().sum(-1) - count) / (count * (count - 1)).clamp_min(1)
    alike = (alike * 1e5).round()  # of windows that are equally alike, rounding must not choose
    turn = _ranks(-alike.masked_fill(count < 2, -torch.inf))

    own = tokens.position // columns // SIDE * across + tokens.position % columns // SIDE
    into = last.gather(1, own)
    here = torch.arange(n, device=device).expand_as(into)
    by_attention = _ranks(attention) + len(window)
    order = torch.where(into == here, by_attention, turn.gather(1, own))
    key = plain == 0
    order = torch.where(key, by_attention + n, order)
    return order, into.masked_fill(key | (into == here), -1)


def filter(tokens: Tokens, evidence: Evidence, leave: int, _: MustDropOptions) -> Tensor:
    order, __ = _roles(tokens, evidence)
    return highest(-order, leave)


def correlate(
    tokens: Tokens, evidence: Evidence, source: Tensor, target: Tensor, _: MustDropOptions
) -> Tensor:
    """1 for the token of its window into which a token merges, where that stays."""
    _, into = _roles(tokens, evidence)
    return (into.gather(1, source)[..., None] == target[:, None]).float()


def weigh(
    _: Tokens, __: Evidence, ___: Tensor, ____: Tensor, same: Tensor, _____: MustDropOptions
) -> Tensor:
    """The mean over the window."""
    return same


def filter_by_text(_: Tokens, evidence: DecoderEvidence, leave: int, __: MustDropOptions) -> Tensor:
    attention = evidence.attention_from_text()
    both = attention.mean(1), attention.amax(1)
    looked_at = torch.maximum(*(x / x.mean(1, keepdim=True) for x in both))
    return highest(-looked_at, leave)


MUSTDROP = Method(
    name="mustdrop",
    idea="merges alike neighbours but for what [CLS] looks at, then keeps what any word looks at",
    paper="Liu et al., Multi-Stage Vision Token Dropping, arXiv 2411.10803",
    place="output",
    schedule=topk.TOPK.schedule,
    filter=filter,
    correlate=correlate,
    weigh=weigh,
    options=MustDropOptions,
    decoder=DecoderPart(layers=(2,), steps=(Steps(filter_by_text),), every_stage=True),
)
