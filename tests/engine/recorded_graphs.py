# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs without a GPU: what a capture runs is recorded, and a replay runs just that again.

As of a real graph, the host has no say in a replay: every operator gets the tensors and numbers
that it got at the capture, and leaves its results in the memory where they were then. So what a
capture has taken from the host is frozen, and so is what is read from a tensor that nobody fills
anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Graph:
    """In place of ``torch.cuda.CUDAGraph``."""

    def __init__(self) -> None:
        self.steps: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for function, args, kwargs, results in self.steps:
            for new, old in zip(
                tree_leaves(function(*args, **kwargs)), tree_leaves(results), strict=True
            ):
                if isinstance(new, Tensor) and _memory(new) != _memory(old):
                    old.copy_(new)


class Recorder(TorchDispatchMode):
    """In place of ``torch.cuda.graph``."""

    def __init__(self, graph: Graph, **_: Any) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        self.graph.steps.append((func, args, kwargs or {}, results))
        return results


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


@contextmanager
def recorded_graphs() -> Iterator[None]:
    """For the time of it, vLLM's graphs of the encoder are recordings."""
    from vllm.v1.worker import encoder_cudagraph

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "CUDAGraph", Graph)
        patch.setattr(torch.cuda, "graph", Recorder)
        patch.setattr(encoder_cudagraph, "current_stream", lambda: None)
        yield
