# SPDX-License-Identifier: Apache-2.0
"""FiCoCo-K: merge what is alike, at every layer, but spare what [CLS] looks at.

A variant of ours. The paradigm and the two kinds of redundancy are FiCoCo-V's (arXiv 2411.17686),
the evidence of likeness and the pairwise merging are ToMe's (arXiv 2210.09461). The tokens are
dealt alternately into A and B; k is a token's key, a the logit of [CLS]'s attention to it, both
averaged over heads, and z(x) is x less its mean, divided by its deviation:

    l_i = max_{j in B} cos(k_i, k_j), i in A          local redundancy: another says the same
    s_i = z(l_i) - protect * z(a_i)                   less task redundancy, as in eq. 11

Those of A with the highest s merge into their most similar token of B, an average weighted by how
many patches a token stands for; later layers attend with log(size) added (ToMe, eq. 1).

Why: benchmarks/RESULTS.md measures that FiCoCo-V loses printed words where it merges by attention,
as a few much attended tokens then take in what is unlike them, and that ToMe, which merges what is
alike, starts to merge the things themselves once little is left. With ``protect`` 0 this is ToMe.
Without [CLS], a is the attention that a patch receives on average.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vllm_ficoco.methods import tome
from vllm_ficoco.methods.paradigm import Evidence, Method, Tokens, VisionOptions, highest


class FiCoCoKOptions(VisionOptions):
    """Options of FiCoCo-K."""

    protect: Annotated[float, Field(ge=0, le=16)] = 0.5
    """Weight of [CLS] attention against likeness."""


def standard(x: Tensor) -> Tensor:
    """(B, n) with mean 0 and deviation 1 over the tokens; nearly 0 where they are all the same."""
    return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-12)  # of noise, make no more


def filter(_: Tokens, evidence: Evidence, leave: int, options: FiCoCoKOptions) -> Tensor:
    """Of A, the tokens that are much like one of B and little looked at."""
    local = tome.links(evidence).amax(-1)
    task = standard(evidence.attention_of_cls("logits"))[:, ::2]
    return highest(standard(local) - options.protect * task, leave) * 2


FICOCO_K = Method(
    name="ficoco-k",
    idea="merges the most similar tokens at every tower layer, but spares what [CLS] looks at",
    paper="ours, after arXiv 2411.17686 and arXiv 2210.09461",
    place="tower",
    needs=frozenset({"layers", "attention"}),
    schedule=tome.stages,
    filter=filter,
    correlate=tome.correlate,
    compress=tome.compress,
    options=FiCoCoKOptions,
    proportional_attention=True,
)
