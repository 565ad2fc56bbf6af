# SPDX-License-Identifier: Apache-2.0
"""ApET: keep what a few basis tokens reconstruct worst, merge the rest.

Ma et al., "ApET: Approximation-Error Guided Token Compression for Efficient VLMs", arXiv
2602.19870. A basis of ``basis`` tokens is chosen by farthest point sampling; every token is
approximated by the linear combination of them that comes closest, and what is left of it is its
error. The largest errors stay; every other token joins the kept one that it is most alike (cosine),
which becomes the mean. No attention, no [CLS].

Deviations: the paper's text was not at hand beyond its abstract and summaries. Sampling starts at
the token farthest from the mean. Basis tokens have no error and leave first, into the token that
they are most alike. Tokens stay in raster order.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vllm_ficoco import schedule
from vllm_ficoco.methods import greedy
from vllm_ficoco.methods.paradigm import (
    Evidence,
    Method,
    Tokens,
    VisionOptions,
    highest,
    one_hot_of_highest,
    take,
)

ROUNDING = 1e-5
"""What is less, of a token's square, is rounding and no error."""


class ApetOptions(VisionOptions):
    """Options of ApET."""

    basis: Annotated[int, Field(ge=1, le=256)] = 10
    """Tokens that the others are approximated by."""


def errors(hidden: Tensor, basis: int) -> Tensor:
    """(B, n): squared distance of every token (B, n, D) from the span of the basis."""
    x = greedy.held(hidden)
    whole = greedy.lengths(x).square_()
    least = ROUNDING * whole
    mean = torch.cat([run.mean(1, keepdim=True) for (run,) in greedy.runs(x)], 2)
    # Farthest from the mean: its own square is the same for all.
    best = (whole - 2 * greedy.products(x, mean)[..., 0]).argmax(1, keepdim=True)
    span = greedy.Span(whole, min(basis, x.shape[1]))
    apart = torch.full_like(whole, torch.inf)
    for _ in range(min(basis, x.shape[1])):
        row = greedy.products(x, take(x, best))[..., 0]
        torch.minimum(apart, whole + whole.gather(1, best) - 2 * row, out=apart)
        span.add(best, row)
        best = torch.where(apart > least, apart, 0.0).argmax(1, keepdim=True)
    return torch.where(span.left > least, span.left, 0.0)


def filter(tokens: Tokens, _: Evidence, leave: int, options: ApetOptions) -> Tensor:
    return highest(-errors(tokens.hidden, options.basis), leave)


def correlate(
    tokens: Tokens, _: Evidence, source: Tensor, target: Tensor, __: ApetOptions
) -> Tensor:
    """Cosine, but for the length of the source, which changes no order."""
    leaving, staying = take(tokens.hidden, source), take(tokens.hidden, target)
    scale = greedy.inverse(greedy.lengths(staying))[:, None]
    return greedy.products(leaving, staying).mul_(scale)


def weigh(
    _: Tokens, __: Evidence, ___: Tensor, ____: Tensor, correlation: Tensor, _____: ApetOptions
) -> Tensor:
    return one_hot_of_highest(correlation)


APET = Method(
    name="apet",
    idea="keeps what a few tokens reconstruct worst, merges the rest by likeness",
    paper="Ma et al., ApET, arXiv 2602.19870",
    place="output",
    schedule=lambda _, budget, layers, __: schedule.at_output(budget, layers),
    filter=filter,
    correlate=correlate,
    weigh=weigh,
    options=ApetOptions,
    needs=frozenset(),
)
