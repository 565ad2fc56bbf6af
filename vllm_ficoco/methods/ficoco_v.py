# SPDX-License-Identifier: Apache-2.0
"""FiCoCo-V: leave what draws on others and means little, fold it into what it attends to.

Han et al., "Rethinking Token Reduction in MLLMs: Towards a Unified Paradigm for Training-Free
Acceleration", arXiv 2411.17686, section 3.1. n patches at a layer, S leave, T stay:

    s_i = lambda * mean_j A_ij - (1 - lambda) * a_i                          (11)
    C_ij = A_ij, i in S, j in T                                              (12)
    alpha_ij = C_ij / sum_{j: C_ij >= tau_i} C_ij, tau_i the eps-quantile of row i
    X_j <- (X_j + sum_i alpha_ij X_i) / (1 + sum_i alpha_ij)                 (13)

A is the attention among patches, a that of [CLS] to them, both averaged over heads. Before the
highest s leave, the highest s of every window of the grid is scaled up, so that the leaving
tokens spread over the image ("local penalty").

The paper does not say what A is numerically. ``attention`` chooses:

- ``logits``: scaled query-key products before the softmax. C then weighs by exp(A_ij), since
  products may be negative; the targets picked are the same.
- ``probabilities``: after the softmax over [CLS] and patches. mean_j A_ij is then
  (1 - A_i,cls) / n, nearly constant, so the first term says little.

``normalise`` divides both terms of s by their length over the tokens, which puts them on one
scale; the authors do. ``logits`` is the default because it measures better (benchmarks/RESULTS.md).

How many targets a source has, K, does not differ by token. The eps-quantile of a row of T entries
leaves 1 + (1 - eps) (T - 1) of them, rounded down: with 0.998 one, while there are 500 targets or
fewer, and two beyond. So equation 13 is, but for the first layers of a large image, the paper's own
ablation "fixed K = 1" (its table 2: 46.97 on TextVQA, 53.56 for pruning alone, 55.46 for FiCoCo-V).
``quantile`` chooses:

- ``row``: as the paper writes it.
- ``matrix``: tau is one quantile, over all of C. K then differs by token, and is 0, which prunes,
  for sources that nothing stands out for: for most, where T is far below 500. It measures better.

Deviations: the start layer is a share of the depth that runs (the paper's 12th of CLIP-L's 24, of
which LLaVA runs 23); what leaves per layer follows from the budget (the authors: 42). Without
[CLS], a is the attention that a patch receives on average.

The authors' code is no guide to the paper: it weighs [CLS] by 0.35 and the local term by 0.65, the
reverse of equation 11; it sends a token not to its targets but to other places, as it looks indices
of the old order up in the new one; and its local penalty marks windows of one image for all later
ones. This file is the paper's reading in all three.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from vllm_ficoco import schedule
from vllm_ficoco.methods.paradigm import (
    AttentionKind,
    Evidence,
    Method,
    Tokens,
    VisionOptions,
    blocks_of,
    complement,
    highest,
    quantile_of_blocks,
    quantile_per_row,
)


class FiCoCoVOptions(VisionOptions):
    """Options of FiCoCo-V; the numbers are the paper's."""

    attention: AttentionKind = "logits"
    normalise: bool = True
    lambda_: Annotated[float, Field(ge=0, le=1, alias="lambda")] = 0.35
    """Weight of the local term against [CLS], eq. 11."""
    coefficient: Annotated[float, Field(ge=1)] = 2.0
    """Scale of a window's highest score; 1 switches the local penalty off."""
    window: Annotated[int, Field(ge=1, le=64)] = 2
    """Side of a window of the local penalty, in patches."""
    epsilon: Annotated[float, Field(ge=0, le=1)] = 0.998
    """Quantile of C from which on a target receives."""
    quantile: Literal["row", "matrix"] = "row"
    """Of what: of each source's row, or of all of C."""
    receivers: Annotated[int, Field(ge=0, le=4096)] | None = None
    """A fixed number of targets per source instead (the paper's K, table 2); 0 only prunes."""
    weighted: bool = True
    """Share a source out by C; otherwise in equal parts."""

    @field_validator("quantile", "receivers")
    @classmethod
    def _one_way_to_choose(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses both; either may come first, as FiCoCo-VL inherits them in another order."""
        both = info.data | {str(info.field_name): value}
        if both.get("quantile") == "matrix" and both.get("receivers") is not None:
            if info.field_name == "quantile":
                raise PydanticCustomError("two_ways", "'row' where receivers is given")
            raise PydanticCustomError("two_ways", "left out where quantile is 'matrix'")
        return value


def stages(tokens: int, budget: int, layers: int, _: FiCoCoVOptions) -> list[schedule.Stage]:
    """From the paper's 12th layer of CLIP-L on, or as deep in other towers."""
    return schedule.even(tokens, budget, range(schedule.same_depth(11, 23, layers), layers))


def redundancy(tokens: Tokens, evidence: Evidence, options: FiCoCoVOptions) -> Tensor:
    """(B, n): s of eq. 11, local penalty included."""
    local = evidence.attention_given(options.attention)
    task = evidence.attention_of_cls(options.attention)
    if options.normalise:
        local, task = (torch.nn.functional.normalize(x, dim=-1) for x in (local, task))
    score = options.lambda_ * local - (1 - options.lambda_) * task
    return local_penalty(score, tokens.position, evidence.grid, options.window, options.coefficient)


def local_penalty(
    score: Tensor, position: Tensor, grid: tuple[int, int], window: int, coefficient: float
) -> Tensor:
    """Scale the highest score of every window up: times if positive, divided by if negative.

    Args:
        score: (B, n).
        position: (B, n) places on the grid; places that are empty by now are padding.
        grid: rows and columns.
        window: side of the windows; those at the right and lower edge may be smaller.
        coefficient: 1 or more.
    """
    if coefficient == 1:
        return score
    (rows, columns), across = grid, -(-grid[1] // window)
    row, column = position // columns, position % columns
    # Where in the windows, one after another, the tokens lie.
    number, within = row // window * across + column // window, row % window * window
    place = number * window**2 + within + column % window
    count = -(-rows // window) * across
    laid = score.new_full((len(score), count * window**2), float("-inf"))
    laid = laid.scatter(1, place, score).unflatten(1, (count, window**2))
    highest_of = laid.argmax(-1)  # in a tie the first in raster order
    leads = highest_of.gather(1, place // window**2) == place % window**2
    scaled = torch.where(score > 0, score * coefficient, score / coefficient)
    return torch.where(leads, scaled, score)


def filter(tokens: Tokens, evidence: Evidence, leave: int, options: FiCoCoVOptions) -> Tensor:
    return highest(redundancy(tokens, evidence, options), leave)


def correlate(
    tokens: Tokens, evidence: Evidence, source: Tensor, target: Tensor, options: FiCoCoVOptions
) -> Tensor:
    between = evidence.attention_between(source, target, options.attention)
    if options.attention == "probabilities":
        return between
    if options.quantile == "matrix":
        # Rows are compared with each other by a quantile of the matrix, and not by one of a row.
        if _is_whole(tokens, source, target):
            return (between - between.amax((1, 2), keepdim=True)).exp()
        return (between - _highest_of_all(tokens, evidence, target)).exp()
    return (between - between.amax(2, keepdim=True)).exp()


def _is_whole(tokens: Tokens, source: Tensor, target: Tensor) -> bool:
    """Whether these are all that leave and stay, and not a block of them."""
    return source.shape[1] + target.shape[1] == len(tokens)


def _highest_of_all(tokens: Tokens, evidence: Evidence, target: Tensor) -> Tensor:
    """(B, 1, 1): the highest logit between any that leaves and any that stays."""

    def find() -> Tensor:
        blocks = blocks_of(complement(target, len(tokens)), target)
        between = (evidence.attention_between(block, target, "logits") for block in blocks)
        return torch.stack([x.amax((1, 2), keepdim=True) for x in between]).amax(0)

    return evidence.remember(("the highest logit",), find)


def _quantile_of_all(
    tokens: Tokens, evidence: Evidence, target: Tensor, options: FiCoCoVOptions
) -> Tensor:
    """(B, 1, 1): tau, one quantile over all of C."""

    def find() -> Tensor:
        source = complement(target, len(tokens))

        def parts() -> Iterator[Tensor]:
            for block in blocks_of(source, target):
                yield correlate(tokens, evidence, block, target, options)

        count = source.shape[1] * target.shape[1]
        return quantile_of_blocks(parts, count, options.epsilon)[:, None, None]

    return evidence.remember(("the quantile of C",), find)


def weigh(
    tokens: Tokens,
    evidence: Evidence,
    source: Tensor,
    target: Tensor,
    correlation: Tensor,
    options: FiCoCoVOptions,
) -> Tensor:
    if options.quantile == "row":
        return weigh_by_row(correlation, options)
    if _is_whole(tokens, source, target):
        threshold = quantile_per_row(correlation.flatten(1), options.epsilon)[..., None]
    else:
        threshold = _quantile_of_all(tokens, evidence, target, options)
    return _shares(correlation, correlation >= threshold, options)


def weigh_by_row(correlation: Tensor, options: Any) -> Tensor:
    """(B, S, T): alpha, by a quantile of each row or a number of receivers; FiCoCo-L's, too."""
    if options.receivers is None:
        receives = correlation >= quantile_per_row(correlation, options.epsilon)
    else:
        chosen = highest(correlation, options.receivers)
        receives = torch.zeros_like(correlation, dtype=torch.bool).scatter(2, chosen, True)
    return _shares(correlation, receives, options)


def _shares(correlation: Tensor, receives: Tensor, options: Any) -> Tensor:
    """Alpha, given which targets receive of each source, (B, S, T) bool."""
    weight = torch.where(receives, correlation if options.weighted else 1.0, 0.0)
    # A source without targets, or that attends to none at all, has nothing to send: 0, not 0 / 0.
    total = weight.sum(-1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
    return weight / total


FICOCO_V = Method(
    name="ficoco-v",
    idea="redundant by patch attention, little [CLS] attention; merges into attended patches",
    paper="Han et al., Rethinking Token Reduction in MLLMs, arXiv 2411.17686",
    place="tower",
    at_output=True,
    schedule=stages,
    filter=filter,
    correlate=correlate,
    weigh=weigh,
    options=FiCoCoVOptions,
)
