# SPDX-License-Identifier: Apache-2.0
"""SIEVE: keep what the text looks at and does not already say, and no two that say the same.

"SIEVE" (2026), in the decoder. With a_j the attention that the text pays to visual token j, and
r_j what is left of its hidden state x_j when its projection on the subspace that the hidden states
of the text span is taken away, a token is worth

    w_j = a_j^2 * |r_j|^2.

The best one is kept; the others are damped by how much their residuals are like its own,
w_j <- w_j * (1 - cos(r_j, r_kept)^2); and so on. With one kept, this is what Gram-Schmidt would
leave of the vectors a_j r_j.

The paper could not be read, only what others tell of it. Our readings: the square in the damping;
attention as the mean over all heads (the paper takes twelve) and all text behind the image;
hidden states as they come to the layer. A long text spans all the space, so the projection is that
of a ridge regression, by :data:`RIDGE` of a text token's squared length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_ficoco.methods.decoding import DecoderEvidence, DecoderOptions, in_decoder
from vllm_ficoco.methods.greedy import SMALLEST, Likeness
from vllm_ficoco.methods.paradigm import DecoderPart, Steps, Tokens, complement

RIDGE = 0.01
"""Directions in which the text hardly varies are not taken away: a prompt as long as a token is
wide would else leave nothing but noise of it."""


def residuals(visual: Tensor, text: Tensor) -> Tensor:
    """(B, n, D) float32: what a subspace does not explain.

    Args:
        visual: (B, n, D).
        text: (B, M, D) that spans it.
    """
    visual, text = visual.float(), torch.nn.functional.normalize(text.float(), dim=-1)
    alike = text @ text.transpose(-1, -2)
    ridge = torch.eye(len(alike[0]), device=alike.device) * RIDGE
    # Without its check, for which the host would wait: with the ridge it cannot fail.
    factor, _ = torch.linalg.cholesky_ex(alike + ridge)
    share = torch.cholesky_solve(text @ visual.transpose(-1, -2), factor)
    return visual - share.transpose(-1, -2) @ text


def filter(tokens: Tokens, evidence: DecoderEvidence, leave: int, _: DecoderOptions) -> Tensor:
    attention = evidence.attention_from_text().mean(1)
    left = residuals(tokens.hidden, evidence.text_hidden)
    least = torch.finfo(torch.float32).tiny
    # In logarithms: a product of hundreds of dampings would be 0.
    worth = 2 * (attention.clamp_min(least).log() + left.norm(dim=-1).clamp_min(least).log())
    likeness, kept = Likeness(left), list[Tensor]()
    for _step in range(len(tokens) - leave):
        best = worth.argmax(1, keepdim=True)
        kept.append(best)
        damping = (1 - likeness.row(best).square()).clamp_min(SMALLEST)
        worth = (worth + damping.log()).scatter(1, best, -torch.inf)
    return complement(torch.cat(kept, 1), len(tokens))


SIEVE = in_decoder(
    "sieve",
    "keeps what the text looks at and does not say itself, none like another, at decoder stages",
    "SIEVE, 2026",
    DecoderPart(layers=(2,), steps=(Steps(filter),), every_stage=True),
)
