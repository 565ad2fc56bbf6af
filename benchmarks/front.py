# SPDX-License-Identifier: Apache-2.0
"""CPU time of the API server's own process for a request, of vLLM's server and of ours, in turns.

The process that takes requests in is what is left to pay for when a budget has made the GPU's work
small. Its user and system time is read from the kernel before and after every round, so the engine,
which is another process, and the client are not in it, and neither is what else the machine does.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import numpy as np
from PIL import Image

from engines import SHIPPED, notched

REQUESTS, AT_ONCE = 32, 16  # short rounds: what else a machine does changes over seconds
BUDGET = 16
SIZES = ((336, 336), (1280, 960))
FORMATS = ("jpeg", "png")
STOCK = [
    "vllm.entrypoints.openai.api_server",
    f"--model={SHIPPED}",
    "--served-model-name=tiny-llava",
]
OURS = ["ficoco_server.cli", "serve", "tiny-llava"]


class Server:
    """A server on a free port, in a process of its own.

    Args:
        command: a module of Python and its arguments.
        environment: that differs from ours.
    """

    def __init__(self, *command: str, **environment: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        where = ["--host=127.0.0.1", f"--port={port}", "--enforce-eager", "--dtype=float32"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", *command, *where],
            env={**os.environ, **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def wait(self) -> None:
        """Until it answers."""
        for _ in range(600):
            if self.process.poll() is not None:
                raise SystemExit(f"it ended: {' '.join(map(str, self.process.args))}")
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health").is_success:
                    return
            time.sleep(1)
        raise SystemExit("a server did not start within ten minutes")

    def cpu_seconds(self) -> float:
        """User and system time of its process so far, without its children; of Linux alone."""
        return time.clock_gettime(~self.process.pid << 3 | 2)  # as clock_getcpuclockid(3) does

    def close(self) -> None:
        """The end of it, and of its engine."""
        self.process.terminate()
        try:
            self.process.wait(120)
        except subprocess.TimeoutExpired:
            self.process.kill()


def pictures(seed: int, size: tuple[int, int], form: str) -> list[str]:
    """Unseen images of soft shapes and some grain, coded about as large as photographs."""
    generator = np.random.default_rng(seed)
    urls = []
    for _ in range(REQUESTS):
        shapes = Image.fromarray(generator.integers(0, 255, (12, 16, 3), dtype=np.uint8))
        levels = np.asarray(shapes.resize(size, Image.Resampling.BICUBIC), np.int16)
        grain = generator.integers(-4, 5, levels.shape, dtype=np.int16)
        image = Image.fromarray(np.clip(levels + grain, 0, 255).astype(np.uint8))
        coded = io.BytesIO()
        image.save(coded, form, **({"quality": 90} if form == "jpeg" else {"compress_level": 1}))
        urls.append(f"data:image/{form};base64,{base64.b64encode(coded.getvalue()).decode()}")
    return urls


async def _ask(server: Server, urls: list[str], said: dict[str, Any]) -> None:
    places = asyncio.Semaphore(AT_ONCE)
    limits = httpx.Limits(max_connections=AT_ONCE, max_keepalive_connections=AT_ONCE)

    async def one(client: httpx.AsyncClient, url: str) -> None:
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": "what color is the circle ?"},
        ]
        body = {
            "model": "tiny-llava",
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 1,
            **said,
        }
        async with places:
            answer = await client.post("/v1/chat/completions", json=body)
        answer.raise_for_status()

    async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=300) as client:
        await asyncio.gather(*(one(client, url) for url in urls))


@contextlib.contextmanager
def _servers(options: Sequence[str]) -> Iterator[list[Server]]:
    """Stock vLLM, ours, and ours with each of the options of vLLM's."""
    servers = [Server(*STOCK, VLLM_PLUGINS=""), Server(*OURS)]
    servers += [Server(*OURS, *option.split()) for option in options]
    try:
        for server in servers:
            server.wait()
        yield servers
    finally:
        for server in servers:
            server.close()


def front(
    rounds: int,
    sizes: tuple[tuple[int, int], ...] = SIZES,
    options: Sequence[str] = (),
) -> None:
    """Stock vLLM, ours without a budget and ours with one, in turn, for every kind of image.

    Args:
        rounds: of :data:`REQUESTS` each, to every server.
        sizes: of images, in pixels.
        options: of vLLM's, each for another server of ours, asked with the budget.
    """
    with _servers(options) as (stock, ours, *others):
        budget: dict[str, Any] = {"visual_token_budget": BUDGET}
        kinds: dict[str, tuple[Server, dict[str, Any]]] = {
            "stock vLLM": (stock, {}),
            "vllm-ficoco, no budget": (ours, {}),
            f"vllm-ficoco, budget {BUDGET}": (ours, budget),
        }
        for option, other in zip(options, others, strict=True):
            kinds[f"the same, {option}"] = other, budget
        print("\n| image | | ms of CPU a request | ratio to stock |\n| --- | --- | --- | --- |")
        seed = 0
        for size in sizes:
            for form in FORMATS:
                times: dict[str, list[float]] = {name: [] for name in kinds}
                for i in range(rounds + 1):
                    seed += 1
                    urls = pictures(seed, size, form)
                    for j in range(len(kinds)):
                        name = list(kinds)[(i + j) % len(kinds)]
                        server, said = kinds[name]
                        before = server.cpu_seconds()
                        asyncio.run(_ask(server, urls, said))
                        if i:  # the first round warms up
                            spent = server.cpu_seconds() - before
                            times[name].append(1000 * spent / REQUESTS)
                for name, taken in times.items():
                    ratios = [t / s for t, s in zip(taken, times["stock vLLM"], strict=True)]
                    print(
                        f"| {size[0]} x {size[1]} {form.upper()} | {name} | "
                        f"{statistics.median(taken):.2f} | {notched(ratios)} |",
                        flush=True,
                    )
