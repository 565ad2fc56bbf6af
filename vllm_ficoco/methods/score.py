# SPDX-License-Identifier: Apache-2.0
"""SCoRe: greedily the token that is most unlike what is chosen, by saliency (weighted k-centre).

"SCoRe: Salience-Coverage Reduction for Vision Token Pruning in Vision-Language Models", CVPR 2026.
Of the tower's output x and the [CLS] attention a, the first token is the most salient one, and
every further one the argmax over the tokens not chosen of

    (1 - max_{s chosen} cos(x_i, x_s)) * a_i ** alpha

``alpha`` 0 is max-min diversity (as in DivPrune: Alvar et al., arXiv 2503.02175), which looks at no
attention and begins with the token least like the mean; 1 is the second stage of AnchorPrune (arXiv
2607.07033); the larger, the closer to Top-K.

The paper's alpha is 0.8 on saliencies scaled to 0..1. The default, 0.2, was chosen on the shipped
model, where that keeps less (benchmarks/RESULTS.md): the model's evidence is a few patches wide,
and its [CLS] looks at the background as well, so unlikeness says more. On CLIP-L, whose [CLS]
attention is concentrated on few patches, published tables are best at 0.7 to 0.9: measure.

In a tower without [CLS] the default is 0: the attention that a patch receives, which takes the
place of a where alpha is given, keeps less than none (RESULTS.md).

Deviations: a is divided by its largest value and not scaled to 0..1, so a token without any
attention is last and not out; tokens stay in raster order. The paper's text was not at hand beyond
its abstract and what others say of its rule.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vllm_ficoco import schedule
from vllm_ficoco.methods.greedy import Likeness, k_centres
from vllm_ficoco.methods.paradigm import Evidence, Method, Tokens, VisionOptions, complement

LEAST = 1e-30
"""The least weight: what float32 can still multiply."""


class ScoreOptions(VisionOptions):
    """Options of SCoRe."""

    alpha: Annotated[float, Field(ge=0, le=8)] | None = None
    """How much saliency counts against diversity; by default 0.2, without [CLS] 0."""


def weight(saliency: Tensor, alpha: float) -> Tensor:
    """(B, n): saliency ** alpha, 1 at most and above 0, so that every token can be chosen."""
    largest = saliency.amax(1, keepdim=True).clamp_min(LEAST)
    return (saliency / largest).pow_(alpha).clamp_min_(LEAST)


def filter(tokens: Tokens, evidence: Evidence, leave: int, options: ScoreOptions) -> Tensor:
    likeness = Likeness(tokens.hidden)
    alpha = options.alpha
    if alpha is None:
        alpha = 0.2 if evidence.has_cls else 0.0
    if alpha:
        saliency = evidence.attention_of_cls()
        first, importance = saliency.argmax(1, keepdim=True), weight(saliency, alpha)
    else:
        first, importance = likeness.least_like_the_mean(), torch.ones_like(tokens.size)
    return complement(k_centres(likeness, importance, first, len(tokens) - leave), len(tokens))


SCORE = Method(
    name="score",
    idea="keeps what is unlike all that is kept, the more so the more [CLS] looks at it",
    paper="SCoRe: Salience-Coverage Reduction for Vision Token Pruning, CVPR 2026",
    place="output",
    schedule=lambda _, budget, layers, __: schedule.at_output(budget, layers),
    filter=filter,
    options=ScoreOptions,
)
