# SPDX-License-Identifier: Apache-2.0
"""FitPrune: fit once how many tokens each layer can spare; there, drop what nothing looks at.

Ye et al., "Fit and Prune: Fast and Training-free Visual Token Pruning for Multi-modal Large
Language Models", arXiv 2409.10197. A token's score is the product of the attention that it receives
from the image's tokens and of that from the text; those with the lowest leave. How many, stage by
stage, is a recipe that is fitted once for a model and a budget: ``python -m vllm_ficoco.fitprune``
(:mod:`vllm_ficoco.fitprune`) finds it, ``options.tokens`` takes it. A budget alone leaves an equal
share at each stage.

Deviations: attention is the mean over heads (the authors' code takes the largest head), is that of
the layer before which tokens leave, and is normalised over the image
(:mod:`vllm_ficoco.methods.decoding`); tokens leave at the stages that the server has, not at every
layer.
"""

from __future__ import annotations

from torch import Tensor

from vllm_ficoco.methods.decoding import DecoderEvidence, DecoderOptions, in_decoder
from vllm_ficoco.methods.paradigm import DecoderPart, Steps, Tokens, highest


def filter(_: Tokens, evidence: DecoderEvidence, leave: int, __: DecoderOptions) -> Tensor:
    from_image = evidence.attention_among().mean(1)
    from_text = evidence.attention_from_text().mean(1)
    return highest(-from_image * from_text, leave)


FITPRUNE = in_decoder(
    "fitprune",
    "keeps what image and text look at; counts by stage are fitted once, at decoder stages",
    "Ye et al., Fit and Prune, arXiv 2409.10197",
    DecoderPart(layers=(2,), steps=(Steps(filter),), every_stage=True),
)
