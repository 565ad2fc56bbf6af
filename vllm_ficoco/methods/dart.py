# SPDX-License-Identifier: Apache-2.0
"""DART: keep a few pivots and what is least like them.

Wen et al., "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters
More", arXiv 2502.11494: pivots are the visual and the text tokens with the longest keys; each
pivot in turn adds the visual tokens that are least similar to it.

As in the authors' code, a key's length is the sum of its absolute values over all heads, in the
layer before the one at which tokens leave, and tokens are compared (cosine) as the norm behind the
decoder's last layer would have them.

Deviations: every pivot adds as many tokens as make the budget, the first ones one more (the
authors: int(576 * kept / 8) each, which misses it); pivots take their turns by length, those of the
text first (the authors: in the order of a Python set of positions, which mixes both; the image's
first measures worse, benchmarks/RESULTS.md); ties go to the lower index.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vllm_ficoco.methods.decoding import DecoderEvidence, DecoderOptions, in_decoder
from vllm_ficoco.methods.paradigm import (
    DecoderPart,
    Steps,
    Tokens,
    complement,
    cosine,
    highest,
    take,
)


class DartOptions(DecoderOptions):
    """Options of DART; the numbers are the paper's."""

    visual_pivots: Annotated[int, Field(ge=1, le=64)] = 4
    text_pivots: Annotated[int, Field(ge=0, le=64)] = 4


def filter(tokens: Tokens, evidence: DecoderEvidence, leave: int, options: DartOptions) -> Tensor:
    keep = len(tokens) - leave
    of_visual, of_text = evidence.key_lengths_before
    visual = highest(of_visual, min(options.visual_pivots, keep))
    text = highest(of_text, options.text_pivots)
    # Behind the final norm; that it divides each token by its length is nothing to a cosine.
    hidden = tokens.hidden.float() * evidence.final_norm
    text_hidden = take(evidence.text_hidden, text).float() * evidence.final_norm
    pivots = torch.cat([text_hidden, take(hidden, visual)], 1)
    likeness = cosine(pivots, hidden)  # (B, pivots, n)
    kept = visual
    count = pivots.shape[1]
    for pivot in range(count):
        share = (keep - visual.shape[1]) // count + (pivot < (keep - visual.shape[1]) % count)
        if share:
            taken = likeness[:, pivot].scatter(1, kept, torch.inf)
            kept = torch.cat([kept, highest(-taken, share)], 1)
    return complement(kept, len(tokens))


DART = in_decoder(
    "dart",
    "keeps a few pivots and what is least like them, at one decoder stage",
    "Wen et al., Stop Looking for Important Tokens, arXiv 2502.11494",
    DecoderPart(layers=(2,), steps=(Steps(filter),), looks_before=True),
    DartOptions,
)
