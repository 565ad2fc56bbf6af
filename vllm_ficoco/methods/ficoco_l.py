# SPDX-License-Identifier: Apache-2.0
"""FiCoCo-L: leave what draws on others and the text ignores, fold it into what goes with it.

Han et al., "Rethinking Token Reduction in MLLMs: Towards a Unified Paradigm for Training-Free
Acceleration", arXiv 2411.17686, section 3.2. N visual and M text tokens at a decoder layer:

    s_i = beta * mean_j A_ij - (1 - beta) * sum_k A_ik                       (14)
    C_ij = gamma * A_ij + (1 - gamma) * sum_k A_ik A_kj, i in S, j in T      (15)

with i, j visual and k text tokens; then as FiCoCo-V's equation 13.

The paper calls the second term of s "the attention weights visual tokens received from textual
tokens", and writes A_ik, which a causal decoder masks: the text comes later. ``text`` chooses:

- ``looks``: A_ki, what the text draws from token i, also in place of A_ik in eq. 15. The words.
- ``is looked at``: the products of i's query and the text's keys, without the mask. The letters.

``attention`` is as in FiCoCo-V: probabilities over the image make mean_j A_ij constant. ``causal``
sets A_ij to zero where j comes after i, as the decoder's mask does.

Deviations: the reduction takes place before a layer, not between its attention and its MLP, and
at the stages that the server has (published: from the 4th layer on). ``normalise`` is our own:
neither the paper nor the authors' code divides the terms of s by their lengths, and a sum over the
text and a mean over the image are on scales apart. Kept tokens keep their positions, where the
authors' code counts them anew. Their code also takes the mean over the text for the sum, takes
unmasked products, counts a part of the prompt as image, and does not divide by 1 + sum_i alpha_ij.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from vllm_ficoco.methods import ficoco_v
from vllm_ficoco.methods.decoding import DecoderEvidence, DecoderOptions, in_decoder
from vllm_ficoco.methods.paradigm import (
    AttentionKind,
    DecoderPart,
    Steps,
    Tokens,
    highest,
    merge,
    take,
)


class FiCoCoLOptions(DecoderOptions):
    """Options of FiCoCo-L; the numbers are the paper's."""

    attention: AttentionKind = "logits"
    text: Literal["looks", "is looked at"] = "looks"
    causal: bool = False
    normalise: bool = True
    """Divide both terms of s by their length over the tokens."""
    beta: Annotated[float, Field(ge=0, le=1)] = 0.6
    """Weight of the local term, eq. 14."""
    gamma: Annotated[float, Field(ge=0, le=1)] = 0.6
    """Weight of the direct correlation, eq. 15."""
    penalty: Annotated[float, Field(ge=1)] = 1.0
    """Coefficient of FiCoCo-V's local penalty, which does harm here (the paper's table 4): off."""
    window: Annotated[int, Field(ge=1, le=64)] = 2
    epsilon: Annotated[float, Field(ge=0, le=1)] = 0.998
    receivers: Annotated[int, Field(ge=0, le=4096)] | None = None
    weighted: bool = True


def _to_text(evidence: DecoderEvidence, options: FiCoCoLOptions) -> Tensor:
    """(B, n, M): A_ik."""
    if options.text == "looks":
        return evidence.attention_from_text(options.attention).transpose(-1, -2)
    return evidence.attention_to_text(options.attention)


def filter(
    tokens: Tokens, evidence: DecoderEvidence, leave: int, options: FiCoCoLOptions
) -> Tensor:
    local = evidence.attention_given(options.attention, options.causal)
    task = _to_text(evidence, options).sum(-1)
    if options.normalise:
        local, task = (torch.nn.functional.normalize(x, dim=-1) for x in (local, task))
    score = options.beta * local - (1 - options.beta) * task
    score = ficoco_v.local_penalty(
        score, tokens.position, evidence.grid, options.window, options.penalty
    )
    return highest(score, leave)


def correlate(
    _: Tokens, evidence: DecoderEvidence, source: Tensor, target: Tensor, options: FiCoCoLOptions
) -> Tensor:
    direct = evidence.attention_between(source, target, options.attention, options.causal)
    from_text = take(evidence.attention_from_text(options.attention).transpose(-1, -2), target)
    indirect = take(_to_text(evidence, options), source) @ from_text.transpose(-1, -2)
    if options.attention == "logits":  # products may be negative, weights may not
        direct, indirect = ((x - x.amax(-1, keepdim=True)).exp() for x in (direct, indirect))
    return options.gamma * direct + (1 - options.gamma) * indirect


def compress(
    tokens: Tokens,
    _: DecoderEvidence,
    source: Tensor,
    target: Tensor,
    correlation: Tensor,
    options: FiCoCoLOptions,
) -> Tokens:
    weight = ficoco_v.weigh_by_row(correlation, options)
    return merge(tokens, [source], target, lambda _: weight)


FICOCO_L = in_decoder(
    "ficoco-l",
    "redundant by patch attention, little attention from the text; merges, at decoder stages",
    "Han et al., Rethinking Token Reduction in MLLMs, arXiv 2411.17686",
    DecoderPart(
        layers=(3,),
        steps=(Steps(filter, correlate, compress),),
        every_stage=True,
        on_one_grid="penalty",
    ),
    FiCoCoLOptions,
)
