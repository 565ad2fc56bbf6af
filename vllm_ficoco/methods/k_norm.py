# SPDX-License-Identifier: Apache-2.0
"""K-norm: keep the visual tokens with the shortest keys.

A baseline of the token reduction literature ("ViTCoP: Accelerating Large Vision-Language Models via
Visual and Textual Semantic Collaborative Pruning", section 2.2: the longer a token's key, the less
attention it gets). It looks at no attention, and not at the question.
"""

from __future__ import annotations

from torch import Tensor

from vllm_ficoco.methods.decoding import DecoderEvidence, DecoderOptions, in_decoder
from vllm_ficoco.methods.paradigm import DecoderPart, Steps, Tokens, highest


def filter(_: Tokens, evidence: DecoderEvidence, leave: int, __: DecoderOptions) -> Tensor:
    return highest(evidence.key_norms, leave)


K_NORM = in_decoder(
    "k-norm",
    "keeps the tokens with the shortest keys, at decoder stages",
    "",
    DecoderPart(layers=(2,), steps=(Steps(filter),), every_stage=True, looks_at_question=False),
)
