# SPDX-License-Identifier: Apache-2.0
"""SCoRe: greedily the token that is most unlike what is chosen, by saliency (weighted k-centre).

"SCoRe: Salience-Coverage Reduction for Vision Token Pruning in Vision-Language Models", CVPR 2026.
Of the tower's output x and the [CLS] attention a, the first token is the most salient one, and
every further one the argmax over the tokens not chosen of

    (1 - max_{s chosen} cos(x_i, x_s)) * a_i ** alpha

``alpha`` 0 is max-min diversity (DivPrune: Alvar et al., arXiv 2503.02175, which starts otherwise),
1 the second stage of AnchorPrune (arXiv 2607.07033); the larger, the closer to Top-K.

The paper's alpha is 0.8 on saliencies scaled to 0..1. The default here was chosen on the shipped
model, where that keeps less (benchmarks/RESULTS.md): the model's evidence is a few patches wide,
and its [CLS] looks at the background as well, so unlikeness says more. On CLIP-L, whose [CLS]
attention is concentrated on few patches, published tables are best at 0.7 to 0.9: measure.

Deviations: a is taken as it is, not scaled to 0..1, so a token without any attention is last and
not out; tokens stay in raster order. The paper's text was not at hand beyond its abstract and what
others say of its rule. Without [CLS], a is the attention that a patch receives on average.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from vllm_ficoco import schedule
from vllm_ficoco.methods.greedy import Likeness, k_centres
from vllm_ficoco.methods.paradigm import Evidence, Method, Tokens, VisionOptions, complement

LEAST = 1e-30
"""The least weight: what float32 can still multiply."""


class ScoreOptions(VisionOptions):
    """Options of SCoRe."""

    alpha: Annotated[float, Field(ge=0, le=8)] = 0.2
    """How much saliency counts against diversity."""


def weight(saliency: Tensor, alpha: float) -> Tensor:
    """(B, n): saliency ** alpha, 1 at most and above 0, so that every token can be chosen."""
    largest = saliency.amax(1, keepdim=True).clamp_min(LEAST)
    return (saliency / largest).pow_(alpha).clamp_min_(LEAST)


def filter(tokens: Tokens, evidence: Evidence, leave: int, options: ScoreOptions) -> Tensor:
    saliency = evidence.attention_of_cls()
    chosen = k_centres(
        Likeness(tokens.hidden),
        weight(saliency, options.alpha),
        saliency.argmax(1, keepdim=True),
        len(tokens) - leave,
    )
    return complement(chosen, len(tokens))


SCORE = Method(
    name="score",
    idea="keeps what is unlike all that is kept, the more so the more [CLS] looks at it",
    paper="SCoRe: Salience-Coverage Reduction for Vision Token Pruning, CVPR 2026",
    place="output",
    schedule=lambda _, budget, layers, __: schedule.at_output(budget, layers),
    filter=filter,
    options=ScoreOptions,
)
