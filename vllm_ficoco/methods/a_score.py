# SPDX-License-Identifier: Apache-2.0
"""A-score: keep the visual tokens that the text looks at most.

A baseline of the token reduction literature: attention from all text behind the image, on average.
"""

from __future__ import annotations

from torch import Tensor

from vllm_ficoco.methods.decoding import DecoderEvidence, DecoderOptions, in_decoder
from vllm_ficoco.methods.paradigm import DecoderPart, Steps, Tokens, highest


def filter(_: Tokens, evidence: DecoderEvidence, leave: int, __: DecoderOptions) -> Tensor:
    return highest(-evidence.attention_from_text().mean(1), leave)


A_SCORE = in_decoder(
    "a-score",
    "keeps what the text looks at, at decoder stages",
    "",
    DecoderPart(layers=(2,), steps=(Steps(filter),), every_stage=True),
)
