# SPDX-License-Identifier: Apache-2.0
"""CDPruner: greedily the token that adds most to the volume spanned, by relevance to the question.

Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in
MLLMs", arXiv 2506.10967, section 3: the most probable set of a determinantal point process with the
kernel

    L_ij = r_i * cos(x_i, x_j) * r_j

greedily, where x is the tower's output and r the relevance of a token to the user's question,
scaled to 0..1 within the image: :mod:`vllm_ficoco.methods.dpp`, with the question for its quality.

Deviations: LLaVA's CLIP has no text tower in vLLM, so for every model r is what the paper takes
where there is none: the cosine of a token with a word, mean over the words, in the language model's
space (tokens behind the projector, words as rows of its table). ``alpha`` raises r to a power; the
paper's is 1, and 0 is ``dpp``. The least relevant token counts 1e-4 and not 0, so that budgets are
kept exactly; without a question all count 1. What the question is, is said in
:mod:`vllm_ficoco.models.question`. Tokens stay in raster order. The paper's text was at hand in
extracts only; the sign of r is that of its formula.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vllm_ficoco import schedule
from vllm_ficoco.methods.greedy import Likeness, log_det
from vllm_ficoco.methods.paradigm import Evidence, Method, Tokens, VisionOptions, complement


class CdprunerOptions(VisionOptions):
    """Options of CDPruner."""

    alpha: Annotated[float, Field(ge=0, le=3)] = 1.0
    """How much relevance to the question counts beside diversity; 0: not at all."""


def scaled(relevance: Tensor) -> Tensor:
    """(B, n): from 0 for an image's least relevant token to 1; all 1 where none is less so."""
    low, high = relevance.aminmax(dim=1, keepdim=True)
    return torch.where(high > low, (relevance - low) / (high - low), 1.0)


def filter(tokens: Tokens, evidence: Evidence, leave: int, options: CdprunerOptions) -> Tensor:
    quality = scaled(evidence.relevance(tokens.hidden)).clamp_min(1e-4) ** options.alpha
    chosen = log_det(Likeness(tokens.hidden), quality.square(), len(tokens) - leave)
    return complement(chosen, len(tokens))


CDPRUNER = Method(
    name="cdpruner",
    idea="keeps tokens that span most together, the more so the more they resemble the question",
    paper="Zhang et al., Beyond Attention or Similarity (CDPruner), arXiv 2506.10967",
    place="output",
    schedule=lambda _, budget, layers, __: schedule.at_output(budget, layers),
    filter=filter,
    options=CdprunerOptions,
    needs=frozenset(),
    asks_question=True,
)
