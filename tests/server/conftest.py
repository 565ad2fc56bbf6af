# SPDX-License-Identifier: Apache-2.0
"""Real servers on the shipped model, and what the tests say to them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from loadtest.traffic import image as coloured_squares
from tests.checkpoints import random_llava_next, random_qwen

MODEL = "tiny-llava"
TOKENS = 144
"""Visual tokens of an image of the shipped model."""
API_KEY = "a-key-for-the-test"
POLICY = [
    "--reduction-min-budget=2",
    "--reduction-low-budget=16",
    "--reduction-methods=score,ficoco-v,tome,evit,topk,visionzip,prumerge,pooling,uniform",
    "--reduction-alias=fast=48",
    '--reduction-alias=merged={"method": "tome", "budget": 36}',
    "--reduction-alias=by-content=auto",
    "--reduction-alias=whole=none",
]

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Server(NamedTuple):
    """Where a server listens, and the client to talk to it."""

    url: str
    openai: openai.OpenAI
    http: httpx.Client
    process: subprocess.Popen[bytes]

    def metrics(self, prefix: str = "vllm") -> Series:
        """The samples of /metrics whose name begins so."""
        families = text_string_to_metric_families(self.http.get("/metrics").text)
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in families
            for sample in family.samples
            if sample.name.startswith(prefix)
        }


def value(series: Series, name: str, **labels: str) -> float:
    """The sum of the samples of this name that have these labels."""
    wanted = labels.items()
    return sum(v for (n, have), v in series.items() if n == name and wanted <= have)


def eventually(check: Callable[[], bool], seconds: float = 20) -> bool:
    """Whether a check comes true: what follows an answer may take a moment."""
    end = time.monotonic() + seconds
    while not check():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def picture(seed: int = 0, size: tuple[int, int] = (168, 168)) -> str:
    """A picture of coloured squares, so wide and high, as a data URL."""
    return coloured_squares(size, seed)


def image(seed: int = 0, size: tuple[int, int] = (168, 168), **said: Any) -> dict[str, Any]:
    """An image of a chat message."""
    return {"type": "image_url", "image_url": {"url": picture(seed, size), **said}}


def user(*parts: dict[str, Any]) -> list[Any]:
    """A conversation of one message with a question at the end."""
    question = {"type": "text", "text": "what color is the circle ?"}
    return [{"role": "user", "content": [*parts, question]}]


def input_image(seed: int = 0, size: tuple[int, int] = (168, 168), **said: Any) -> dict[str, Any]:
    """An image of a message to the responses API."""
    return {"type": "input_image", "image_url": picture(seed, size), **said}


def turn(*parts: dict[str, Any]) -> list[Any]:
    """Input of the responses API with a question at the end."""
    question = {"type": "input_text", "text": "what color is the circle ?"}
    return [{"role": "user", "content": [*parts, question]}]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextlib.contextmanager
def running(command: list[str], log: Path, **environment: str) -> Iterator[Server]:
    """A server process on a free port, stopped at the end."""
    port = free_port()
    ours = ("FICOCO_", "VLLM_PLUGINS", "PROMETHEUS_")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    flags = ["--host=127.0.0.1", f"--port={port}", f"--api-key={API_KEY}", "--enforce-eager"]
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *command, *flags],
            stdout=file,
            stderr=file,
            env=inherited | environment,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(process, url, log)
        headers = {"Authorization": f"Bearer {API_KEY}"}
        with httpx.Client(base_url=url, headers=headers, timeout=120) as http:
            client = openai.OpenAI(base_url=f"{url}/v1", api_key=API_KEY, max_retries=0)
            yield Server(url, client, http, process)
    finally:
        _stop(process)


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """``vllm-ficoco serve tiny-llava`` with a policy."""
    log = tmp_path_factory.mktemp("server") / "log"
    command = ["ficoco_server.cli", "serve", MODEL, "--enable-scale-out", *POLICY]
    with running(command, log, VLLM_ENABLE_RESPONSES_API_STORE="1") as started:
        yield started


@pytest.fixture(scope="package")
def tiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The same of a LLaVA-NeXT, whose images have as many tokens as their size says."""
    folder = tmp_path_factory.mktemp("tiled")
    model = random_llava_next(folder / "model")
    flags = [f"--served-model-name={MODEL}", "--enable-scale-out", "--reduction-min-budget=2"]
    command = ["ficoco_server.cli", "serve", str(model), *flags]
    with running(command, folder / "log", VLLM_ENABLE_RESPONSES_API_STORE="1") as started:
        yield started


@pytest.fixture(scope="package")
def native(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The same of a Qwen2.5-VL, whose clients may say how its processor scales their images."""
    folder = tmp_path_factory.mktemp("native")
    model = random_qwen(folder / "model", "qwen2.5-vl")
    flags = [f"--served-model-name={MODEL}", "--enable-scale-out", "--reduction-min-budget=2"]
    flags += ["--dtype=float32", "--trust-request-mm-kwargs", "--enable-mm-embeds"]
    command = ["ficoco_server.cli", "serve", str(model), *flags]
    with running(command, folder / "log", VLLM_ENABLE_RESPONSES_API_STORE="1") as started:
        yield started


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    def ready() -> bool:
        if process.poll() is not None:
            pytest.fail(f"the server has stopped:\n{log.read_text()[-5000:]}")
        try:
            return httpx.get(f"{url}/health").status_code == 200
        except httpx.TransportError:
            return False

    if not eventually(ready, 300):
        pytest.fail(f"the server did not start:\n{log.read_text()[-5000:]}")


def end(process: subprocess.Popen[bytes], how: signal.Signals, seconds: float) -> None:
    """Signal a command's process group, and kill it where that has not done in time."""
    os.killpg(process.pid, how)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server politely, then whatever is left of its process group."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(30)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
