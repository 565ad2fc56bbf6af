# SPDX-License-Identifier: Apache-2.0
"""V-norm: keep the visual tokens with the longest values.

A baseline of the token reduction literature. It looks at no attention, and not at the question.
"""

from __future__ import annotations

from torch import Tensor

from vllm_ficoco.methods.decoding import DecoderEvidence, DecoderOptions, in_decoder
from vllm_ficoco.methods.paradigm import DecoderPart, Steps, Tokens, highest


def filter(_: Tokens, evidence: DecoderEvidence, leave: int, __: DecoderOptions) -> Tensor:
    return highest(-evidence.value_norms, leave)


V_NORM = in_decoder(
    "v-norm",
    "keeps the tokens with the longest values, at decoder stages",
    "",
    DecoderPart(layers=(2,), steps=(Steps(filter),), every_stage=True, looks_at_question=False),
)
