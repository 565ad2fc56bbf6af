# SPDX-License-Identifier: Apache-2.0
"""SparseVLM: keep what the relevant words look at.

Zhang et al., "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model
Inference", arXiv 2410.04417. Text tokens that resemble the image more than the average one are
raters; at three decoder layers, the visual tokens with the least attention from them leave.

Deviations, as in the authors' version 2: nothing of what leaves is merged, and kept tokens keep
their positions. A budget leaves an equal share at each layer; ``options.tokens`` has what was
published, such as [300, 200, 110]. Attention as in :mod:`vllm_ficoco.methods.decoding`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_ficoco.methods.decoding import DecoderEvidence, DecoderOptions, in_decoder
from vllm_ficoco.methods.paradigm import DecoderPart, Steps, Tokens, highest


def filter(tokens: Tokens, evidence: DecoderEvidence, leave: int, _: DecoderOptions) -> Tensor:
    likeness = tokens.hidden.float() @ evidence.text_hidden.float().transpose(-1, -2)
    relevance = likeness.softmax(-1).mean(1)  # of every text token, (B, M)
    rates = relevance >= relevance.mean(-1, keepdim=True)
    attention = torch.where(rates[..., None], evidence.attention_from_text(), 0.0).sum(1)
    return highest(-attention, leave)


SPARSEVLM = in_decoder(
    "sparsevlm",
    "keeps what the words that resemble the image look at, at three decoder stages",
    "Zhang et al., SparseVLM, arXiv 2410.04417",
    DecoderPart(layers=(2, 6, 15), steps=(Steps(filter),)),
)
