# SPDX-License-Identifier: Apache-2.0
"""FastV: keep what the last token looks at.

Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", arXiv 2403.06764: after the decoder's
second layer, the visual tokens with the least attention from the prompt's last token leave.

Deviations: the attention is that of the layer at which tokens leave, not of the one before, and
normalised over the image (:mod:`vllm_ficoco.methods.decoding`).
"""

from __future__ import annotations

from torch import Tensor

from vllm_ficoco.methods.decoding import DecoderEvidence, DecoderOptions, in_decoder
from vllm_ficoco.methods.paradigm import DecoderPart, Steps, Tokens, highest


def filter(_: Tokens, evidence: DecoderEvidence, leave: int, __: DecoderOptions) -> Tensor:
    return highest(-evidence.attention_from_last(), leave)


FASTV = in_decoder(
    "fastv",
    "keeps what the prompt's last token looks at, at one decoder stage",
    "Chen et al., An Image is Worth 1/2 Tokens After Layer 2, arXiv 2403.06764",
    DecoderPart(layers=(2,), steps=(Steps(filter),)),
)
