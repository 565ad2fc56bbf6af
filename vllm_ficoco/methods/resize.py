# SPDX-License-Identifier: Apache-2.0
"""Resize: scale the image down before the tower, so that it has at most the budget.

What users of models at native resolution do today (``max_pixels``), and what every method must
beat. It makes the tower cheaper, too, and needs no evidence. How many tokens an image has at a size
is the processor's to say: the size is chosen by counting (:mod:`vllm_ficoco.models.processing`),
the largest whose count is within the budget, and the image counts with what came out.
``max_pixels`` does not do that: a long image exceeds it.
"""

from __future__ import annotations

from torch import Tensor

from vllm_ficoco.methods.paradigm import Evidence, Method, Options, Tokens


def filter(tokens: Tokens, _: Evidence, __: int, ___: Options) -> Tensor:
    """Nothing leaves. Never called in serving: the smaller image takes vLLM's own path."""
    return tokens.position[:, :0]


RESIZE = Method(
    name="resize",
    idea="scales the image down before the tower, to at most the budget",
    paper="",
    place="input",
    needs=frozenset({"scaling"}),
    schedule=lambda _, __, ___, ____: [],
    filter=filter,
    options=Options,
)
