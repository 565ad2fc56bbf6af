# SPDX-License-Identifier: Apache-2.0
"""None: keep every token. The way to opt out where the server reduces by default."""

from __future__ import annotations

from torch import Tensor

from vllm_ficoco.methods.paradigm import Evidence, Method, Options, Tokens


def filter(tokens: Tokens, _: Evidence, __: int, ___: Options) -> Tensor:
    """Nothing leaves. Never called in serving: an unreduced image takes vLLM's own path."""
    return tokens.position[:, :0]


NONE = Method(
    name="none",
    idea="keeps every token",
    paper="",
    place="output",
    needs=frozenset(),
    schedule=lambda _, __, ___, ____: [],
    filter=filter,
    options=Options,
)
