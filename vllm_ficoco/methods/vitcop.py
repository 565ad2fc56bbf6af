# SPDX-License-Identifier: Apache-2.0
"""ViTCoP: [CLS] attention after the tower, then clusters and key lengths in the decoder.

"ViTCoP: Accelerating Large Vision-Language Models via Visual and Textual Semantic Collaborative
Pruning". Three places:

1. The tower's output: the patches with most [CLS] attention stay.
2. A shallow decoder layer: clusters are found around density peaks (VIC, algorithm 2); of each, a
   share of tokens with the shortest keys stays, and the rest become one, their mean (algorithm 3).
3. A deep layer: the tokens with the shortest keys stay.

The first place keeps 0.2 + 0.9 * budget / tokens of them, the third a fifth of the second: this is
what the paper's table 8 comes to.

Deviations: the quotas of eq. 5 are rounded down, and what this leaves over goes to the best of
the rest, so that exactly as many stay as are to. The paper names neither the share of centres
(``centres``, here of the tokens that stay; its algorithm 2 takes it of those that come) nor the
unit of positions (here a side of the grid is 1). Kept tokens keep their positions at the third
place, too.

Where the authors' code is not their paper, the paper is followed: the code clusters CLIP's keys,
which d_c = 8 fits, and not the decoder's hidden states (algorithm 1, line 13); its key length is
that of the mean over heads in the layer before, not that of eq. 4 in this one, which ranks tokens
otherwise; and it adds the mean of a cluster's rest to the middle token of that, where eq. 6 has the
mean alone (it takes the place of the rest's shortest key here).
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vllm_ficoco.methods import k_norm, topk
from vllm_ficoco.methods.decoding import DecoderEvidence, DecoderOptions
from vllm_ficoco.methods.paradigm import (
    DecoderPart,
    Method,
    Steps,
    Tokens,
    VisionOptions,
    distances,
    highest,
    merge,
    places,
)


class ViTCoPOptions(DecoderOptions, VisionOptions):
    """Options of ViTCoP; the first two numbers are the paper's."""

    distance: Annotated[float, Field(gt=0)] = 8.0
    """d_c of eq. 2, in units of hidden states."""
    reach: Annotated[float, Field(gt=0)] = 0.6
    """tau of eq. 3, in sides of the image."""
    centres: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Clusters per token that stays."""


def shares(tokens: int, first: int, _: int) -> list[int]:
    """Tokens of the three places, of which the first keeps ``first``.

    In table 8 a share p = 0.2 + 0.9 b stays at the first place for a budget b, and x and x / 5 at
    the others, so that the average (2 p + 20 x + 10 x / 5) / 32 is b. Beyond that table (p above
    0.6) the third comes closer to the second, to end with all tokens, too.
    """
    p = first / tokens
    second = min(first, max(0, round(((p - 0.2) / 0.9 * 32 - 2 * p) / 22 * tokens)))
    return [first, second, round(second * max(0.2, 2 * p - 1))]


def clusters(
    tokens: Tokens, evidence: DecoderEvidence, count: int, options: ViTCoPOptions
) -> Tensor:
    """(B, n): the cluster of every token, from 0; algorithm 2."""
    place = evidence.spots(tokens.position)
    apart = distances(tokens.hidden)
    others = apart + torch.diag(apart.new_full((len(tokens),), torch.inf))
    density = (-((others / options.distance) ** 2)).exp().sum(-1)
    denser = density[:, None] > density[..., None]  # (B, i, j): j is denser than i
    # Not by products: the reach may be a whole number of places.
    near = torch.cdist(place, place, compute_mode="donot_use_mm_for_euclid_dist") <= options.reach
    distance, parent = apart.masked_fill(~(denser & near), torch.inf).min(-1)
    # A token with nothing denser in reach has an infinite distance: it is a centre before others.
    importance = torch.where(distance.isinf(), torch.inf, density * distance)
    centre = highest(importance, count)
    number = torch.arange(count, device=centre.device).expand_as(centre)
    own = torch.full_like(parent, -1).scatter(1, centre, number)
    lone = (own < 0) & distance.isinf()  # more such tokens than centres: the nearest centre
    nearest = apart.gather(2, centre[:, None].expand(-1, len(tokens), -1)).argmin(-1)
    here = torch.arange(len(tokens), device=parent.device).expand_as(parent)
    parent = torch.where(own >= 0, here, torch.where(lone, centre.gather(1, nearest), parent))
    for _ in range(math.ceil(math.log2(max(len(tokens), 2)))):
        parent = parent.gather(1, parent)  # each step doubles how far a token has climbed
    return own.gather(1, parent)


def _ranks(score: Tensor, cluster: Tensor) -> Tensor:
    """(B, n): how many of a token's cluster come before it by score; ties by index."""
    place = places(score.argsort(dim=-1, stable=True))
    before = (cluster[:, None] == cluster[..., None]) & (place[:, None] < place[..., None])
    return before.sum(-1)


def _roles(
    tokens: Tokens, evidence: DecoderEvidence, keep: int, options: ViTCoPOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, n) cluster, whether a token is an elite, and whether it becomes its cluster's rest.

    Filter and correlate ask for the same, and it is most of the work: it is found once.
    """
    return evidence.remember(
        ("ViTCoP's roles", keep), lambda: _find_roles(tokens, evidence, keep, options)
    )


def _find_roles(
    tokens: Tokens, evidence: DecoderEvidence, keep: int, options: ViTCoPOptions
) -> tuple[Tensor, Tensor, Tensor]:
    n = len(tokens)
    count = min(keep, math.ceil(keep * options.centres))
    cluster = clusters(tokens, evidence, count, options)
    rank = _ranks(evidence.key_norms, cluster)
    size = (cluster[:, None] == cluster[..., None]).sum(-1)
    quota = size * (keep - count) // n  # eq. 5; less than the cluster's size
    # What the rounding leaves over: one token of each cluster more, the shortest keys first.
    last = rank == size - 1
    missing = (keep - count) - (rank < quota).sum(-1, keepdim=True)
    one = torch.zeros_like(cluster)
    spare = (rank - quota) * n + _ranks(evidence.key_norms, one)
    extra = _ranks(spare.masked_fill((rank < quota) | last, n * n), one) < missing
    elite = (rank < quota) | extra
    rests = ~elite & (_ranks(rank.masked_fill(elite, n), cluster) == 0)
    return cluster, elite, rests


def gather_rest(
    tokens: Tokens, evidence: DecoderEvidence, leave: int, options: ViTCoPOptions
) -> Tensor:
    """Filter of the second place: all but the elites and one token a cluster."""
    _, elite, rests = _roles(tokens, evidence, len(tokens) - leave, options)
    return highest(-(elite | rests).float(), leave)


def to_rest(
    tokens: Tokens,
    evidence: DecoderEvidence,
    source: Tensor,
    target: Tensor,
    options: ViTCoPOptions,
) -> Tensor:
    """Correlate of the second place: with the one token that becomes the rest of the cluster."""
    cluster, _, rests = _roles(tokens, evidence, target.shape[1], options)
    same = cluster.gather(1, source)[..., None] == cluster.gather(1, target)[:, None]
    return (same & rests.gather(1, target)[:, None]).float()


def mean_of_rest(
    tokens: Tokens, _: DecoderEvidence, source: Tensor, target: Tensor, same: Tensor, __: object
) -> Tokens:
    """Compress of the second place: the mean over the rest of a cluster, eq. 6."""
    return merge(tokens, [source], target, lambda _: same)


VITCOP = Method(
    name="vitcop",
    idea="keeps what [CLS] looks at, then cluster by cluster the shortest keys, then the shortest",
    paper="ViTCoP: Visual and Textual Semantic Collaborative Pruning",
    place="output",
    schedule=topk.TOPK.schedule,
    filter=topk.filter,
    options=ViTCoPOptions,
    decoder=DecoderPart(
        layers=(2, 22),
        steps=(Steps(gather_rest, to_rest, mean_of_rest), Steps(k_norm.filter)),
        looks_at_question=False,
        shares=shares,
    ),
)
