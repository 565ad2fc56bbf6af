# SPDX-License-Identifier: Apache-2.0
"""Our series in vLLM's own /metrics, and the observation of one request that feeds them.

They live in prometheus_client's default registry, as vLLM's do, so they are on the same page with
one process and with several. No label value comes from a client: methods are of the registry and
budgets fall into few buckets.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeVar

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.v1.metrics.buckets import histogram_buckets

from vllm_ficoco.settings import NO_REDUCTION, Reduction

Outcome = Literal["success", "error", "refused", "cancelled"]
T = TypeVar("T")

BUDGET_BUCKETS = (32, 64, 128, 192, 256, 576)
FULL, TEXT, MIXED, INVALID, BY_STAGE = "full", "text", "mixed", "invalid", "by stage"
"""Label values for unreduced images, no images, several different settings, refused settings, and
tokens by stage instead of a budget."""


def _once(kind: type[T], name: str, text: str, labels: Sequence[str], **how: Any) -> T:
    """A collector, or the one of this name that a first import of this module has made."""
    known: Any = getattr(REGISTRY, "_names_to_collectors", {}).get(name)
    return known or kind(name, text, labels, **how)  # type: ignore[call-arg]


VISUAL_TOKENS = _once(
    Counter,
    "vllm_ficoco_visual_tokens_total",
    "Visual tokens of images and videos that were prefilled: before the reduction (stage input), "
    "kept after it on average over decoder layers (kept), and, on a server with decoder stages, in "
    "the layers of each (layer_N, its first layer).",
    ["stage", "method", "modality"],
)
BYTES_SAVED = _once(
    Counter,
    "vllm_ficoco_kv_cache_bytes_saved_total",
    "Bytes of KV cache that dropped visual tokens would have held.",
    ["method", "modality"],
)
BLOCKS_SAVED = _once(
    Counter,
    "vllm_ficoco_kv_blocks_saved_total",
    "KV cache blocks, as vLLM counts them, that dropped visual tokens would have filled.",
    ["method", "modality"],
)
AUTO_BUDGETS = _once(
    Counter,
    "vllm_ficoco_auto_budgets_total",
    "Images with the budget auto that were prefilled, by the rung that they came to: a share of "
    "the N tokens of an image (N, N/3) or a number.",
    ["rung"],
)
REQUESTS = _once(
    Counter,
    "vllm_ficoco_requests_total",
    "Requests to chat completions and responses, and those with settings that another route has "
    "refused, by how they ended; method is invalid where the settings were.",
    ["method", "outcome"],
)
TIME_TO_FIRST_TOKEN = _once(
    Histogram,
    "vllm_ficoco_time_to_first_token_seconds",
    "Seconds from a request's arrival to its first token.",
    ["method", "budget"],
    buckets=histogram_buckets("time_to_first_token"),
)
INTER_TOKEN_LATENCY = _once(
    Histogram,
    "vllm_ficoco_inter_token_latency_seconds",
    "Seconds between tokens; of a request without streaming, their mean.",
    ["method", "budget"],
    buckets=histogram_buckets("inter_token_latency"),
)
E2E_LATENCY = _once(
    Histogram,
    "vllm_ficoco_e2e_request_latency_seconds",
    "Seconds from the arrival of a successful request to its end.",
    ["method", "budget"],
    buckets=histogram_buckets("request_latency"),
)
LOWERED = _once(
    Counter,
    "vllm_ficoco_lowered_total",
    "Requests that were prefilled with smaller images than they would have had without pressure.",
    ["method"],
)
PRESSURE = _once(
    Gauge,
    "vllm_ficoco_pressure",
    "Whether budgets that nobody has said yield: 1 while they do, 0 where they never do.",
    [],
    multiprocess_mode="mostrecent",
)
LOAD = _once(
    Gauge,
    "vllm_ficoco_pressure_load",
    "The share of the server that is asked for, which is compared with the marks of pressure: of "
    "its KV cache or of its places, whichever is larger.",
    [],
    multiprocess_mode="mostrecent",
)


@lru_cache(maxsize=4096)
def series(metric: Any, *labels: str) -> Any:
    """One series of a metric: to look it up takes the client as long as to count in it."""
    return metric.labels(*labels)


def budget_bucket(reduction: Reduction | None) -> str:
    """The label of an image's budget."""
    if reduction is None:
        return FULL
    if reduction.budget is None:
        return BY_STAGE
    for edge in BUDGET_BUCKETS:
        if reduction.budget <= edge:
            return f"<={edge}"
    return f">{BUDGET_BUCKETS[-1]}"


class Prefilled(NamedTuple):
    """What an image or a video leaves in the KV cache."""

    method: str
    tokens: dict[str, int]
    """Visual tokens by what the series calls the stage."""
    bytes_saved: int
    blocks_saved: float
    rung: str = ""
    """What the budget auto has come to; empty for another."""
    modality: str = "image"


class Observation:
    """One request from its arrival to its end, which is counted exactly once."""

    def __init__(self) -> None:
        self.arrival = time.perf_counter()
        self.method, self.budget = NO_REDUCTION, TEXT
        self.cancelled = self.failed = False
        self._images: Sequence[Prefilled] = ()
        self._lowered = False
        self._started = self._ended = False
        self._last: dict[int, float] = {}

    def expect(self, settings: Sequence[Reduction | None]) -> None:
        """Say how the images are to be reduced, as soon as that is settled."""
        methods = {s.method if s else NO_REDUCTION for s in settings}
        budgets = {budget_bucket(s) for s in settings}
        if methods:
            self.method = methods.pop() if len(methods) == 1 else MIXED
            self.budget = budgets.pop() if len(budgets) == 1 else MIXED

    def describe(self, images: Sequence[Prefilled], lowered: bool = False) -> None:
        """Say what the images will hold, once the prompt is rendered.

        Args:
            images: of the prompt.
            lowered: some of them hold less than they would without pressure.
        """
        self._images, self._lowered = images, lowered

    def finish(self, outcome: Outcome) -> None:
        """The end of the request; only the first one counts."""
        if self._ended:
            return
        self._ended = True
        series(REQUESTS, self.method, outcome).inc()
        if outcome == "success":
            taken = time.perf_counter() - self.arrival
            series(E2E_LATENCY, self.method, self.budget).observe(taken)

    async def watch(self, work: Awaitable[T]) -> T:
        """Await a step that may refuse the request or fail."""
        try:
            answer = await work
        except asyncio.CancelledError:
            self.finish("cancelled")
            raise
        except Exception as error:
            self.finish(_outcome(create_error_response(error)))
            raise
        if isinstance(answer, ErrorResponse):
            self.finish("cancelled" if self.cancelled else _outcome(answer))
        return answer

    async def results(
        self, generator: AsyncIterator[T], streaming: bool
    ) -> AsyncGenerator[T, None]:
        """The engine's results as they are, timed on their way."""
        stats = None
        try:
            async for result in generator:
                stats = getattr(result, "request_metrics", getattr(result, "metrics", None))
                if not self._started and _has_tokens(result):
                    self._start()
                if streaming:
                    self._tick(result)
                yield result
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled = True
            raise
        except Exception:
            self.failed = True
            raise
        finally:
            # The engine frees a request when its generator closes: now, not at some collection.
            close = getattr(generator, "aclose", None)
            if close is not None:
                await close()
        if not streaming and stats is not None:
            self._read(stats)

    def _start(self) -> None:
        """The prompt is in the KV cache: its tokens count."""
        self._started = True
        for method, tokens, bytes_saved, blocks_saved, rung, modality in self._images:
            for stage, count in tokens.items():
                series(VISUAL_TOKENS, stage, method, modality).inc(count)
            series(BYTES_SAVED, method, modality).inc(bytes_saved)
            series(BLOCKS_SAVED, method, modality).inc(blocks_saved)
            if rung:
                series(AUTO_BUDGETS, rung).inc()
        if self._lowered:
            series(LOWERED, self.method).inc()

    def _tick(self, result: Any) -> None:
        """A result with new tokens has come."""
        now = time.perf_counter()
        outputs = getattr(result, "outputs", None)
        # A context of the responses API has no outputs, and one sequence.
        news = [0] if outputs is None else [o.index for o in outputs if len(o.token_ids)]
        for index in news:
            if index in self._last:
                gap = now - self._last[index]
                series(INTER_TOKEN_LATENCY, self.method, self.budget).observe(gap)
            elif not self._last:
                series(TIME_TO_FIRST_TOKEN, self.method, self.budget).observe(now - self.arrival)
            self._last[index] = now

    def _read(self, stats: Any) -> None:
        """All tokens came at once; when they were made, the engine has noted."""
        if stats.first_token_latency > 0:
            series(TIME_TO_FIRST_TOKEN, self.method, self.budget).observe(stats.first_token_latency)
        gaps = stats.num_generation_tokens - 1
        if gaps > 0:
            mean = (stats.last_token_ts - stats.first_token_ts) / gaps
            series(INTER_TOKEN_LATENCY, self.method, self.budget).observe(mean)


def _has_tokens(result: Any) -> bool:
    """Whether the engine has made something; a request that fails at once ends without.

    Args:
        result: vLLM's, or a context of the responses API, which holds the last one.
    """
    outputs = getattr(getattr(result, "last_output", result), "outputs", None)
    return outputs is None or any(output.token_ids for output in outputs)


def _outcome(response: Any) -> Outcome:
    return "refused" if response.error.code < 500 else "error"
