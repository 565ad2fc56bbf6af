# SPDX-License-Identifier: Apache-2.0
"""DPP: greedily the token that adds most to the volume that the kept ones span.

The most probable set of a determinantal point process, log det of the kept tokens' kernel, found
greedily: CDPruner's (Zhang et al., "Beyond Attention or Similarity", arXiv 2506.10967, section 3)
without its condition on the question, so that what is kept of an image can be used again for
another question. The kernel is the cosine of the tower's outputs; it needs neither attention nor
[CLS].

``alpha`` above 0 multiplies the kernel from both sides by saliency ** alpha, the saliency being the
[CLS] attention divided by its largest value (without [CLS], the attention received).

Deviations: from images of very many tokens it chooses in rounds, see
:func:`vllm_ficoco.methods.greedy.log_det`. Tokens stay in raster order.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from vllm_ficoco import schedule
from vllm_ficoco.methods.greedy import Likeness, log_det
from vllm_ficoco.methods.paradigm import Evidence, Method, Tokens, VisionOptions, complement
from vllm_ficoco.methods.score import weight


class DppOptions(VisionOptions):
    """Options of the DPP."""

    alpha: Annotated[float, Field(ge=0, le=8)] = 0.0
    """How much saliency counts beside diversity; 0: not at all."""


def filter(tokens: Tokens, evidence: Evidence, leave: int, options: DppOptions) -> Tensor:
    quality = None
    if options.alpha:
        quality = weight(evidence.attention_of_cls(), 2 * options.alpha)
    chosen = log_det(Likeness(tokens.hidden), quality, len(tokens) - leave)
    return complement(chosen, len(tokens))


DPP = Method(
    name="dpp",
    idea="keeps tokens that span most together (log-det diversity), whatever is looked at",
    paper="after Zhang et al., Beyond Attention or Similarity (CDPruner), arXiv 2506.10967",
    place="output",
    schedule=lambda _, budget, layers, __: schedule.at_output(budget, layers),
    filter=filter,
    options=DppOptions,
    needs=frozenset(),
)
