# SPDX-License-Identifier: Apache-2.0
"""EViT: keep what [CLS] looks at, fuse all the rest into one token.

Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via Token
Reorganizations", arXiv 2202.07800. At three layers the tokens with most [CLS] attention stay and
the others become one extra token, their average weighted by [CLS] attention. In the terms of the
paradigm the target set is one zero vector, C_i = a_i (arXiv 2411.17686, eq. 4, 7, 10).

Deviations: the extra token is a weighted *average* (both papers' text), where eq. 10 leaves the
weights unnormalised: those sum to far less than 1, which shrinks the token in a tower that was not
trained for it. The three layers lie at a quarter, a half and three quarters of the depth
(DeiT: 4th, 7th, 10th of 12) and each keeps the same share of tokens; the budget counts the extra
token, and an extra token of an earlier stage is a token like any other at a later one.
Without [CLS], the attention that a patch receives on average takes its place.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vllm_ficoco import schedule
from vllm_ficoco.methods.paradigm import Evidence, Method, Options, Tokens, highest, prune, take


def stages(tokens: int, budget: int, layers: int, _: Options) -> list[schedule.Stage]:
    """Three layers (fewer in towers that have fewer), the same kept share at each."""
    places = sorted({schedule.same_depth(layer, 12, layers) for layer in (3, 6, 9)})
    return schedule.geometric(tokens, budget, tuple(places))


def filter(_: Tokens, evidence: Evidence, leave: int, __: Options) -> Tensor:
    return highest(-evidence.attention_of_cls(), leave)


def correlate(_: Tokens, evidence: Evidence, source: Tensor, __: Tensor, ___: Options) -> Tensor:
    """(B, S, 1): the only target is the extra token."""
    return take(evidence.attention_of_cls(), source)[..., None]


def compress(
    tokens: Tokens, _: Evidence, source: Tensor, target: Tensor, correlation: Tensor, __: Options
) -> Tokens:
    kept = prune(tokens, target)
    # Equal weights, not 0 / 0, where the attention of all of them underflows.
    correlation = correlation + torch.finfo(correlation.dtype).tiny
    share = correlation / correlation.sum(1, keepdim=True)
    fused = (share.transpose(1, 2) @ take(tokens.hidden, source).float()).to(tokens.hidden.dtype)
    last = take(tokens.position, source).amax(1, keepdim=True)
    size = take(tokens.size, source).sum(1, keepdim=True)
    return replace(
        kept,
        hidden=torch.cat([kept.hidden, fused], 1),
        position=torch.cat([kept.position, last], 1),
        size=torch.cat([kept.size, size], 1),
    )


EVIT = Method(
    name="evit",
    idea="keeps what [CLS] looks at, fuses the rest into one extra token, at three layers",
    paper="Liang et al., Not All Patches are What You Need, arXiv 2202.07800",
    place="tower",
    needs=frozenset({"layers", "attention"}),
    schedule=stages,
    filter=filter,
    correlate=correlate,
    compress=compress,
    added=1,
)
