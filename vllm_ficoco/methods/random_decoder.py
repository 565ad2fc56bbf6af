# SPDX-License-Identifier: Apache-2.0
"""Random in the decoder: at every stage, tokens drawn by lot leave.

The baseline for methods inside the decoder, with the lots of :mod:`vllm_ficoco.methods.random`.
"""

from __future__ import annotations

from torch import Tensor

from vllm_ficoco.methods.decoding import DecoderEvidence, DecoderOptions, in_decoder
from vllm_ficoco.methods.paradigm import DecoderPart, Steps, Tokens, highest
from vllm_ficoco.methods.random import Seeded, draw


class RandomDecoderOptions(Seeded, DecoderOptions):
    """Options of random-decoder."""


def filter(
    tokens: Tokens, evidence: DecoderEvidence, leave: int, options: RandomDecoderOptions
) -> Tensor:
    return highest(draw(evidence.lot, tokens.position, options.seed), leave)


RANDOM_DECODER = in_decoder(
    "random-decoder",
    "keeps tokens drawn by lot, seeded by the image, at decoder stages",
    "",
    DecoderPart(
        layers=(2,),
        steps=(Steps(filter),),
        every_stage=True,
        looks_at_question=False,
        by_lot=True,
    ),
    RandomDecoderOptions,
)
