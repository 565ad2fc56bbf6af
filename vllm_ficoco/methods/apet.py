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
from vllm_ficoco.methods.paradigm import (
    Evidence,
    Method,
    Tokens,
    VisionOptions,
    cosine,
    highest,
    one_hot_of_highest,
    take,
)


class ApetOptions(VisionOptions):
    """Options of ApET."""

    basis: Annotated[int, Field(ge=1, le=256)] = 10
    """Tokens that the others are approximated by."""


def errors(hidden: Tensor, basis: int) -> Tensor:
    """(B, n): squared distance of every token (B, n, D) from the span of the basis."""
    x = hidden.float()
    image = torch.arange(len(x), device=x.device)
    left = x.clone()
    apart = (x - x.mean(1, keepdim=True)).square().sum(-1)
    for step in range(min(basis, x.shape[1])):
        best = apart.argmax(1)
        # Gram-Schmidt: the direction that this one adds is taken off all.
        direction = torch.nn.functional.normalize(left[image, best], dim=-1)
        left -= (left @ direction[..., None]) * direction[:, None]
        distance = (x - x[image, best][:, None]).square().sum(-1)
        apart = distance if step == 0 else torch.minimum(apart, distance)
    return left.square().sum(-1)


def filter(tokens: Tokens, _: Evidence, leave: int, options: ApetOptions) -> Tensor:
    return highest(-errors(tokens.hidden, options.basis), leave)


def correlate(
    tokens: Tokens, _: Evidence, source: Tensor, target: Tensor, __: ApetOptions
) -> Tensor:
    return cosine(take(tokens.hidden, source), take(tokens.hidden, target))


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
