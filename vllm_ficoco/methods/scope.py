# SPDX-License-Identifier: Apache-2.0
"""SCOPE: greedily the token that covers most of what is not covered yet, by saliency.

Deng et al., "SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodal LLMs",
arXiv 2510.24214. What a set S covers is the sum over all tokens j of max_{s in S} cos(x_j, x_s),
at least 0 each. Greedily the token with the largest

    (cover(S + i) - cover(S)) * a_i ** alpha

a the [CLS] attention.

Deviations: of images of more than 1,024 tokens, as many spread evenly over the grid stand for all
that are to be covered (:data:`vllm_ficoco.methods.greedy.COVERED`), or the work would grow with
the cube of the image. Tokens stay in raster order. Without [CLS], a is the attention that a patch
receives on average.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from vllm_ficoco import schedule
from vllm_ficoco.methods import greedy
from vllm_ficoco.methods.greedy import Likeness, coverage
from vllm_ficoco.methods.paradigm import (
    Evidence,
    Method,
    Tokens,
    VisionOptions,
    complement,
    grid_windows,
)
from vllm_ficoco.methods.score import weight


class ScopeOptions(VisionOptions):
    """Options of SCOPE."""

    alpha: Annotated[float, Field(ge=0, le=8)] = 1.0
    """How much saliency counts against coverage."""


def filter(tokens: Tokens, evidence: Evidence, leave: int, options: ScopeOptions) -> Tensor:
    n, seen = len(tokens), None
    if n > greedy.COVERED:
        seen = grid_windows(evidence.grid, greedy.COVERED, tokens.hidden.device)[2]
    importance = weight(evidence.attention_of_cls(), options.alpha)
    return complement(coverage(Likeness(tokens.hidden), importance, seen, n - leave), n)


SCOPE = Method(
    name="scope",
    idea="keeps what covers most of the rest by likeness, the more so the more [CLS] looks at it",
    paper="Deng et al., SCOPE, arXiv 2510.24214",
    place="output",
    schedule=lambda _, budget, layers, __: schedule.at_output(budget, layers),
    filter=filter,
    options=ScopeOptions,
)
