# SPDX-License-Identifier: Apache-2.0
"""Top-K: keep the patches with most [CLS] attention in the last layer that runs.

The baseline "TopK" of the FiCoCo paper's tables (arXiv 2411.17686). Nothing is merged. It is also
what FasterVLM does (Zhang et al., arXiv 2412.01818): its [CLS] attention is that of the layer whose
output is taken, after softmax, mean over heads. Of an image in tiles (LLaVA-NeXT), FasterVLM keeps
equally many patches of the thumbnail and of every tile, padding not left out; here each part's
share goes by its patches that are not padding.
Without [CLS], the attention that a patch receives on average takes its place.
"""

from __future__ import annotations

from torch import Tensor

from vllm_ficoco import schedule
from vllm_ficoco.methods.paradigm import Evidence, Method, Options, Tokens, highest


def filter(_: Tokens, evidence: Evidence, leave: int, __: Options) -> Tensor:
    return highest(-evidence.attention_of_cls(), leave)


TOPK = Method(
    name="topk",
    idea="keeps the patches with most [CLS] attention",
    paper="",
    place="output",
    schedule=lambda _, budget, layers, __: schedule.at_output(budget, layers),
    filter=filter,
)
