# SPDX-License-Identifier: Apache-2.0
"""SparseVLM: keep what the relevant words look at.

Zhang et al., "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model
Inference", arXiv 2410.04417. Text tokens that resemble the image more than the average one are
raters. They are chosen once, from the embeddings that enter the decoder; at three of its layers,
the visual tokens with the least attention from them leave.

Deviations: nothing of what leaves is merged (the authors cluster a part of it, so the lists of
their first version, such as [300, 200, 110] for ``options.tokens``, count merged tokens beside
the kept ones); kept tokens keep their positions, as in the authors' second version, of which the
rest is not here: it weighs attention by distance and takes the heads that look at the image most.
Tokens leave before a layer, not behind it; a rater may be as relevant as the average. A budget
leaves an equal share at each layer. Attention as in :mod:`vllm_ficoco.methods.decoding`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_ficoco.methods.decoding import DecoderEvidence, DecoderOptions, in_decoder
from vllm_ficoco.methods.paradigm import DecoderPart, Steps, Tokens, highest


def raters(visual: Tensor, text: Tensor) -> Tensor:
    """(B, M) bool: which words rate, by what enters the decoder, (B, n, D) and (B, M, D)."""
    likeness = visual.float() @ text.float().transpose(-1, -2)
    relevance = likeness.softmax(-1).mean(1)
    return relevance >= relevance.mean(-1, keepdim=True)


def attention_of_raters(evidence: DecoderEvidence) -> Tensor:
    """(B, n): what the raters, which are noted, draw from each token together."""
    assert evidence.noted is not None
    return torch.where(evidence.noted[..., None], evidence.attention_from_text(), 0.0).sum(1)


def filter(_: Tokens, evidence: DecoderEvidence, leave: int, __: DecoderOptions) -> Tensor:
    return highest(-attention_of_raters(evidence), leave)


SPARSEVLM = in_decoder(
    "sparsevlm",
    "keeps what the words that resemble the image look at, at three decoder stages",
    "Zhang et al., SparseVLM, arXiv 2410.04417",
    DecoderPart(layers=(2, 6, 15), steps=(Steps(filter),), note=raters),
)
