# SPDX-License-Identifier: Apache-2.0
"""Looks at a server's /metrics while it works, and says whether it kept what it was asked to."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Collection
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from loadtest.traffic import DEFAULT, TEXT, Mix

GAUGES = {
    "kv_cache_usage": "vllm:kv_cache_usage_perc",
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
}
COUNTERS = {
    "preemptions": "vllm:num_preemptions_total",
    "kv_blocks_saved": "vllm_ficoco_kv_blocks_saved_total",
    "lowered": "vllm_ficoco_lowered_total",
}
VISUAL_TOKENS = "vllm_ficoco_visual_tokens_total"
PATIENCE = 120.0
"""Seconds to wait for a server to become idle."""


class NotKept(RuntimeError):
    """A server kept another number of visual tokens than it was asked to."""


def client(url: str) -> httpx.AsyncClient:
    """For a server, with the key in ``OPENAI_API_KEY``, where vLLM's load generator looks, too."""
    key = os.environ.get("OPENAI_API_KEY")
    return httpx.AsyncClient(
        base_url=url, headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=60
    )


class Reading:
    """One look at /metrics."""

    def __init__(self, page: str) -> None:
        self.at = time.monotonic()
        self.sums: dict[str, float] = defaultdict(float)
        self.visual: dict[tuple[str, str], float] = defaultdict(float)
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                self.sums[sample.name] += sample.value
                if sample.name == VISUAL_TOKENS:
                    self.visual[sample.labels["method"], sample.labels["stage"]] += sample.value


class Watch:
    """What happened between two moments.

    Args:
        http: of :func:`client`.
        period: seconds between two looks.
    """

    def __init__(self, http: httpx.AsyncClient, period: float = 0.5) -> None:
        self.http, self.period = http, period
        self.readings: list[Reading] = []

    async def look(self) -> Reading:
        """Read /metrics once."""
        answer = await self.http.get("/metrics")
        answer.raise_for_status()
        return Reading(answer.text)

    async def idle(self) -> None:
        """Wait until the server has nothing to do, so that nothing of before is counted.

        Raises:
            RuntimeError: somebody else keeps it busy.
        """
        end = time.monotonic() + PATIENCE
        while True:
            sums = (await self.look()).sums
            busy = sums[GAUGES["running"]] + sums[GAUGES["waiting"]]
            if not busy:
                return
            if time.monotonic() > end:
                raise RuntimeError(f"the server has {busy:g} requests of somebody else")
            await asyncio.sleep(self.period)

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Look at the beginning, all the time, and at the end."""
        self.readings.append(await self.look())
        task = asyncio.create_task(self._go_on())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, httpx.HTTPError):
                await task
        self.readings.append(await self.look())

    async def _go_on(self) -> None:
        while True:
            await asyncio.sleep(self.period)
            with contextlib.suppress(httpx.TransportError):  # a busy server may be slow to answer
                self.readings.append(await self.look())

    def summary(self) -> dict[str, Any]:
        """Gauges over time, the most of each, and how far counters went."""
        first, last = self.readings[0], self.readings[-1]
        times = [round(reading.at - first.at, 2) for reading in self.readings]
        gauges = {
            name: [round(reading.sums[series], 4) for reading in self.readings]
            for name, series in GAUGES.items()
        }
        return {
            "seconds": times,
            **gauges,
            **{f"most_{name}": max(values) for name, values in gauges.items()},
            **{n: last.sums[series] - first.sums[series] for n, series in COUNTERS.items()},
            "visual_tokens_kept": self.kept(),
        }

    def kept(self) -> dict[str, float]:
        """Visual tokens kept of those that came, by method: a share."""
        first, last = self.readings[0].visual, self.readings[-1].visual
        came = {m: n - first[m, s] for (m, s), n in last.items() if s == "input"}
        return {m: (last[m, "kept"] - first[m, "kept"]) / n for m, n in came.items() if n}


def check(
    kept: dict[str, float],
    mix: Mix,
    visual_tokens: int,
    in_decoder: Collection[str] = (),
    block_size: int = 16,
    scaling: Collection[str] = (),
) -> None:
    """Compares what a server kept with what was asked for.

    Requests that ended early may not be counted, so it is the share of tokens that must be right;
    of a method with several budgets, it must lie between the smallest and the largest. What becomes
    of images of which nothing is said is the server's affair.

    Args:
        kept: of :meth:`Watch.kept`.
        mix: what was asked for.
        visual_tokens: of an unreduced image.
        in_decoder: methods that may keep up to two KV blocks more, as they keep whole ones.
        block_size: tokens of a KV block.
        scaling: methods that scale images down to a budget or less.

    Raises:
        NotKept: something else was kept.
    """
    if any(setting.method == DEFAULT for setting, _ in mix.parts):
        return
    budgets: dict[str, set[int]] = defaultdict(set)
    for setting, _ in mix.parts:
        if setting.method != TEXT:
            budgets[setting.method].add(setting.budget or visual_tokens)
    for method in kept.keys() - budgets.keys():
        raise NotKept(f"visual tokens of {method!r} were counted, which this run did not ask for")
    for method, asked in budgets.items():
        slack = 2 * block_size if method in in_decoder else 0
        low, high = min(asked), min(max(asked) + slack, visual_tokens)
        low = 1 if method in scaling else low
        if method not in kept:
            raise NotKept(f"no visual tokens of {method!r} were counted")
        tokens = kept[method] * visual_tokens
        if not low - 1e-6 <= tokens <= high + 1e-6:
            raise NotKept(
                f"{method!r} kept {tokens:g} visual tokens an image, but was asked for "
                f"{' or '.join(map(str, sorted(asked)))}"
            )
