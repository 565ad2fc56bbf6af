# SPDX-License-Identifier: Apache-2.0
"""Measures the time of reductions without making the host wait for the device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from prometheus_client import Histogram

REDUCTION_SECONDS = Histogram(
    "vllm_ficoco_reduction_seconds",
    "Time of one reduction stage of a batch of images in the vision tower",
    ["method"],
    buckets=[1e-5 * 2**i for i in range(20)],
)
"""Observed in the process that runs the model, but for what runs in a CUDA graph
(:mod:`vllm_ficoco.models.encoder_graphs`). For the API server's /metrics to show it,
PROMETHEUS_MULTIPROC_DIR must be set before the server starts, which ``vllm-ficoco serve`` does."""


class StageTimer:
    """``with timer(method):`` around a stage observes how long it took.

    On a GPU two events mark the stage; they are read when they are long over, at a later stage.
    """

    def __init__(self) -> None:
        self._pending: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=1024)

    @contextmanager
    def __call__(self, method: str) -> Iterator[None]:
        if not torch.cuda.is_available():
            start = time.perf_counter()
            yield
            REDUCTION_SECONDS.labels(method).observe(time.perf_counter() - start)
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._pending.append((method, begin, end))
        while self._pending and self._pending[0][2].query():
            name, begin, end = self._pending.popleft()
            REDUCTION_SECONDS.labels(name).observe(begin.elapsed_time(end) / 1000)
