# SPDX-License-Identifier: Apache-2.0
"""The end of a server: told to stop under load, out of time, and with a dead engine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.datastructures import State
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.v1.metrics.prometheus import setup_multiprocess_prometheus

from ficoco_server import cli, lifecycle
from tests.server.conftest import MODEL, TOKENS, Server, eventually, image, running, user, value

CLIENTS = 12
COMMAND = ["ficoco_server.cli", "serve", MODEL]


class Crowd:
    """Clients whose requests a server has in hand: every other one a stream, all with an image."""

    def __init__(self, server: Server, tokens: int) -> None:
        self.server = server
        pool = ThreadPoolExecutor(CLIENTS)
        self.answers = [pool.submit(self._ask, seed, tokens) for seed in range(CLIENTS)]
        assert eventually(lambda: self._inside() == CLIENTS), "not all requests came in"

    def _inside(self) -> float:
        series = self.server.metrics("vllm:num_requests")
        return sum(value(series, f"vllm:num_requests_{how}") for how in ("running", "waiting"))

    def _ask(self, seed: int, tokens: int) -> Any:
        """The tokens of an answer and why it ended; an error as the client sees it."""
        body = {
            "model": MODEL,
            "messages": user(image(1000 + seed)),
            "visual_token_budget": 48,
            "max_tokens": tokens,
            "ignore_eos": True,
            "stream": bool(seed % 2),
            "stream_options": {"include_usage": True} if seed % 2 else None,
        }
        try:
            answer = self.server.http.post("/v1/chat/completions", json=body)
        except httpx.TransportError as error:
            return repr(error)
        if not seed % 2:
            said = answer.json()
            if answer.status_code != 200:
                return said["error"]["message"]
            return said["usage"]["completion_tokens"], said["choices"][0]["finish_reason"]
        chunks = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
        parsed = [json.loads(chunk) for chunk in chunks if chunk != "[DONE]"]
        errors = [chunk["error"]["message"] for chunk in parsed if "error" in chunk]
        if errors:
            return errors[0]
        assert chunks[-1] == "[DONE]"
        ends = [c["finish_reason"] for chunk in parsed for c in chunk["choices"]]
        return parsed[-1]["usage"]["completion_tokens"], ends[-1]

    def heard(self) -> list[Any]:
        """What all clients got; none may wait for ever."""
        return [answer.result(60) for answer in self.answers]


def members(group: int) -> dict[int, str]:
    """The processes of a group that run, with their command lines."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, its_group, *_ = (process / "stat").read_text().rpartition(")")[2].split()
            if int(its_group) == group and state != "Z":
                found[int(process.name)] = (process / "cmdline").read_text()
    return found


def ends(server: Server, seconds: float = 20) -> int | None:
    """The exit code of a server, of which nothing is left behind."""
    pid = server.process.pid
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.process.wait(seconds)
    assert eventually(lambda: not members(pid), seconds), members(pid)
    return server.process.poll()


def refuses(server: Server) -> bool:
    """Whether there is nobody to connect to."""
    address = httpx.URL(server.url)
    with socket.socket() as client:
        return client.connect_ex((address.host, address.port)) != 0


@pytest.mark.server
def test_a_server_that_is_told_to_stop_answers_what_it_has_taken(tmp_path: Path) -> None:
    with running(COMMAND, tmp_path / "log") as server:
        crowd = Crowd(server, tokens=300)
        server.process.send_signal(signal.SIGTERM)
        assert eventually(lambda: refuses(server))
        assert crowd.heard() == [(300, "length")] * CLIENTS
        assert ends(server) == 0


@pytest.mark.server
def test_two_api_servers_count_as_one_and_stop_in_time(tmp_path: Path) -> None:
    """Who is not answered within the time is told so, or hears the connection close."""
    log = tmp_path / "log"
    with running([*COMMAND, "--api-server-count=2", "--shutdown-timeout=1"], log) as server:
        assert "PROMETHEUS_MULTIPROC_DIR" not in log.read_text()
        crowd = Crowd(server, tokens=1500)

        def counted() -> list[float]:
            series = server.metrics("vllm_ficoco_visual_tokens_total")
            return [
                value(series, "vllm_ficoco_visual_tokens_total", stage=stage)
                for stage in ("input", "kept")
            ]

        streams = CLIENTS // 2  # an answer in one piece counts at its end, which is not to come
        assert eventually(lambda: counted() == [streams * TOKENS, streams * 48])
        server.process.send_signal(signal.SIGTERM)
        assert (1500, "length") not in crowd.heard()
        ends(server)


@pytest.mark.server
def test_a_server_ends_with_its_engine_and_says_so(tmp_path: Path) -> None:
    with running(COMMAND, tmp_path / "log") as server:
        [engine] = [p for p, said in members(server.process.pid).items() if "EngineCore" in said]
        crowd = Crowd(server, tokens=1500)
        os.kill(engine, signal.SIGKILL)
        for said in crowd.heard():
            assert "EngineCore encountered an issue" in said
        assert ends(server) == 1
    assert "the engine has died" in (tmp_path / "log").read_text()


class Client:
    """What an engine client must have to be stopped."""

    def __init__(self, dead: bool = False, servers: int = 1) -> None:
        self.errored = dead
        parallel = SimpleNamespace(_api_process_count=servers)
        self.vllm_config = SimpleNamespace(parallel_config=parallel)
        self.did: list[Any] = []
        self.output_processor = SimpleNamespace(propagate_error=self.did.append)

    def shutdown(self, timeout: float) -> None:
        self.did.append(timeout)


def front(client: Client) -> lifecycle.Engine:
    """A server's view of it."""
    listener = SimpleNamespace(close=lambda: client.did.append("no more connections"))
    server = SimpleNamespace(servers=[listener], config=SimpleNamespace())
    return lifecycle.Engine(client, State({"server": server, "door": lifecycle.Door()}))


async def status(door: lifecycle.Door, app: Any, path: str = "/v1/chat/completions") -> int:
    """What a client gets through a door."""
    transport = httpx.ASGITransport(lifecycle.Doorkeeper(app, door))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
        return (await http.post(path)).status_code


async def test_the_engine_runs_until_the_requests_inside_are_answered() -> None:
    client, release = Client(), asyncio.Event()
    engine = front(client)
    door = engine._state.door

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await release.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    inside = asyncio.create_task(status(door, app))
    while not door._inside:
        await asyncio.sleep(0)
    stopped = asyncio.create_task(asyncio.to_thread(engine.shutdown, 60))
    while not door.closed:
        assert not stopped.done()
        await asyncio.sleep(0)
    assert client.did == ["no more connections"]
    assert await status(door, app) == 503
    release.set()
    assert await inside == 200
    await stopped
    _, left, error = client.did
    assert 0 < left <= 60 and error.http_status == 503
    assert await status(door, app, "/metrics") == 200


async def test_whoever_is_inside_when_the_time_is_out_gets_an_error() -> None:
    client = Client()
    engine = front(client)
    engine._state.door.enter()
    await asyncio.to_thread(engine.shutdown, 0)
    await asyncio.sleep(0)
    assert client.did[:2] == ["no more connections", 0.0]
    assert str(client.did[2]) == "The server is shutting down."
    assert engine._state.server.config.timeout_graceful_shutdown == lifecycle.LAST_WORDS


async def test_one_of_several_servers_speaks_before_its_parent_kills_it() -> None:
    engine = front(Client(servers=2))
    engine._state.door.enter()
    stopped = asyncio.to_thread(engine.shutdown, lifecycle.LAST_WORDS + 0.1)
    await asyncio.wait_for(stopped, lifecycle.LAST_WORDS)


async def test_a_server_that_has_not_started_can_be_told_to_stop() -> None:
    client = Client()
    engine = front(client)
    del engine._state.server.servers
    await asyncio.to_thread(engine.shutdown, 0)
    await asyncio.sleep(0)
    assert str(client.did[1]) == "The server is shutting down."


@pytest.mark.parametrize("dead", [False, True])
async def test_only_an_engine_that_lived_can_be_told_to_stop(
    dead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "_engine", None)
    assert not lifecycle.has_failed()  # no server in this process
    engine = front(Client(dead))
    monkeypatch.setattr(lifecycle, "_engine", engine)
    assert lifecycle.has_failed() and engine.errored == dead and isinstance(engine, Client)
    await asyncio.to_thread(engine.shutdown, 0)
    assert lifecycle.has_failed() == dead


def test_vllm_warns_of_a_metrics_folder_that_is_not_new(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With several API servers; a folder that the command has just made is."""
    logger = logging.getLogger("vllm.v1.metrics.prometheus")
    caplog.set_level(logging.WARNING, logger.name)  # a benchmark may have asked for errors alone
    monkeypatch.setattr(logger, "filters", [])
    warnings: list[str] = []
    monkeypatch.setattr(logger, "handle", lambda r: logger.filter(r) and warnings.append(r.msg))
    for name in ("VLLM_PLUGINS", "PROMETHEUS_MULTIPROC_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    for made_before, warned in ((True, 1), (False, 0)):
        warnings.clear()
        if not made_before:
            monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR")
        cli.prepare(os.environ, ["llava-hf/llava-1.5-7b-hf"])
        setup_multiprocess_prometheus()
        assert len(warnings) == warned


def test_the_command_drains_unless_it_is_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(ServeSubcommand, "cmd", started.append)
    for flags in ([], ["--shutdown-timeout=5"]):
        cli.serve(["tiny-llava", *flags])
    assert [args.shutdown_timeout for args in started] == [cli.SHUTDOWN_TIMEOUT, 5]
