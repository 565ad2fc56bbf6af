# SPDX-License-Identifier: Apache-2.0
"""ToMe: merge the tokens that are most alike, a few at every layer.

Bolya et al., "Token Merging: Your ViT But Faster", arXiv 2210.09461. At every layer, between
attention and MLP, the tokens are dealt alternately into A and B; each of A is linked to the token
of B whose key is most alike (cosine, keys averaged over heads); the r strongest links merge, as an
average weighted by how many patches a token stands for. Later layers attend with log(size) added
to the scores ("proportional attention").

Deviations: [CLS] takes no part in the dealing (it never merges in the paper either); tokens stay
in raster order, where the authors put the unmerged of A before B, so later layers deal
differently; r follows from the budget, spread evenly, instead of being fixed.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vllm_ficoco import schedule
from vllm_ficoco.methods.paradigm import (
    Evidence,
    Method,
    Options,
    Tokens,
    highest,
    merge,
    take,
)


def stages(tokens: int, budget: int, layers: int, _: Options) -> list[schedule.Stage]:
    """Every layer; none can let go of more than half."""
    return schedule.halving(tokens, budget, range(layers))


def links(evidence: Evidence) -> Tensor:
    """(B, a, b): cosine of the keys of all of A and all of B."""

    def find() -> Tensor:
        keys = evidence.unit_keys
        return keys[:, ::2] @ keys[:, 1::2].transpose(-1, -2)

    return evidence.remember(("ToMe's links",), find)


def filter(_: Tokens, evidence: Evidence, leave: int, __: Options) -> Tensor:
    """Of A, the tokens with the strongest link to B."""
    return highest(links(evidence).amax(-1), leave) * 2


def correlate(_: Tokens, evidence: Evidence, source: Tensor, target: Tensor, __: Options) -> Tensor:
    """1 for the token of B to which one of A has its strongest link."""
    best = take(links(evidence), source // 2).argmax(-1, keepdim=True) * 2 + 1
    return best == target[:, None]


def compress(
    tokens: Tokens, _: Evidence, source: Tensor, target: Tensor, correlation: Tensor, __: Options
) -> Tokens:
    weight = correlation * take(tokens.size, source)[..., None]
    own = take(tokens.size, target)
    merged = merge(tokens, [source], target, lambda _: weight, own)
    return replace(merged, size=own + torch.sum(weight, 1))


TOME = Method(
    name="tome",
    idea="merges the most similar tokens pairwise at every tower layer",
    paper="Bolya et al., Token Merging: Your ViT But Faster, arXiv 2210.09461",
    place="tower",
    needs=frozenset({"layers", "attention"}),
    schedule=stages,
    filter=filter,
    correlate=correlate,
    compress=compress,
    proportional_attention=True,
)
