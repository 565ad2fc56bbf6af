# SPDX-License-Identifier: Apache-2.0
"""Top-K: keep the patches with most [CLS] attention in the last layer that runs.

The baseline "TopK" of the FiCoCo paper's tables (arXiv 2411.17686). Nothing is merged.
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
