# SPDX-License-Identifier: Apache-2.0
"""PyramidDrop: at three stages, keep what the prompt's last token looks at.

Xing et al., "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual
Redundancy Reduction", arXiv 2410.17247: after layers 8, 16 and 24, the same share of the visual
tokens leaves; published with one half. A budget sets the share.

Deviations: kept tokens keep their positions (the authors' code counts them anew at each stage);
attention as in :mod:`vllm_ficoco.methods.fastv`.
"""

from __future__ import annotations

from vllm_ficoco.methods import fastv
from vllm_ficoco.methods.decoding import in_decoder
from vllm_ficoco.methods.paradigm import DecoderPart, Steps

PYRAMIDDROP = in_decoder(
    "pyramiddrop",
    "keeps what the prompt's last token looks at, an equal share at each of three decoder stages",
    "Xing et al., PyramidDrop, arXiv 2410.17247",
    DecoderPart(layers=(8, 16, 24), steps=(Steps(fastv.filter),)),
)
