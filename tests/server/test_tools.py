# SPDX-License-Identifier: Apache-2.0
"""README's "Use it with": its commands, run as they stand there, and what arrives of them.

A command runs in a folder that looks like a checkout, with ``.tools/NAME/bin`` first on the PATH;
the address and the key of the server under test take the place of README's. Skipped where a tool is
not installed (``make tools``).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.server.conftest import (
    API_KEY,
    MODEL,
    TOKENS,
    Server,
    end,
    eventually,
    free_port,
    image,
    input_image,
    turn,
    user,
    value,
)
from tests.server.test_readme import ROOT, block

README_URL = "http://127.0.0.1:8000"
SECTION = "## Use it with"
PINNED = ("aiperf", "guidellm", "litellm", "lmms-eval")

pytestmark = pytest.mark.server


def tools() -> dict[str, str]:
    """What the table says of each tool, by name."""
    text = (ROOT / "README.md").read_text().split(SECTION)[1].split("\n## ")[0]
    rows = re.findall(r"^\| (?:\[`([^`]+)`\]\S*|`([^`]+)`)(.*)\|$", text, re.MULTILINE)
    return {linked or bare: rest for linked, bare, rest in rows}


def environment(tool: str, tmp_path: Path) -> dict[str, str]:
    """Where a tool of that name is found first, and what it must not inherit."""
    folder = ROOT / ".tools" / tool
    if not (folder / ".installed").exists():
        pytest.skip(f"needs {tool} (make tools)")
    ours = ("FICOCO_", "VLLM_", "PROMETHEUS_", "HF_")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    return inherited | {"PATH": path, "HF_HOME": str(tmp_path / "hub"), "OPENAI_API_KEY": API_KEY}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with what README's commands name."""
    for name in ("benchmarks", "vllm_ficoco"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    return tmp_path


def run(command: str, where: Path, env: dict[str, str]) -> str:
    """What a command of the shell prints."""
    done = subprocess.run(
        ["bash", "-euc", command], cwd=where, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def here(command: str, server: Server, *exchanged: tuple[str, str]) -> str:
    """A command of README for this server."""
    for said, instead in ((README_URL, server.url), *exchanged):
        assert said in command
        command = command.replace(said, instead)
    return command


def seen(server: Server) -> tuple[float, float]:
    """Visual tokens before and after that the server has counted with the default method."""
    series = server.metrics("vllm_ficoco_visual_tokens")
    name = "vllm_ficoco_visual_tokens_total"
    counts = [value(series, name, stage=stage, method="score") for stage in ("input", "kept")]
    return counts[0], counts[1]


@contextlib.contextmanager
def kept(server: Server, budget: int, at_least: int) -> Iterator[None]:
    """So many images come in meanwhile, every one of them with this budget."""
    before, held = seen(server)
    yield
    assert eventually(lambda: seen(server)[0] - before >= at_least * TOKENS)
    now, holds = seen(server)
    assert holds - held == (now - before) / TOKENS * budget


def test_the_table_names_the_versions_that_are_run() -> None:
    assert set(tools()) == {"openai", "vllm bench serve", *PINNED}
    for name in PINNED:
        pins = (ROOT / f"tests/tools/{name}.txt").read_text()
        [pinned] = re.findall(rf"^{name}(?:\[\w+\])?==(.+)$", pins, re.MULTILINE)
        assert pinned in tools()[name].split("|")[0], name


def test_openai(server: Server) -> None:
    """The argument that the table names, wherever the table says that it works."""
    said = tools()["openai"]
    [extra] = re.findall(r"`extra_body=(\{.*?\})`", said)
    body: dict[str, Any] = json.loads(extra)
    budget = body["visual_token_budget"]
    client = server.openai
    assert "chat.completions.create" in said and "responses.create" in said
    with kept(server, budget, 4):
        for stream in (False, True):
            usage = {"stream_options": {"include_usage": True}} if stream else {}
            answer: Any = client.chat.completions.create(
                model=MODEL, messages=user(image()), stream=stream, extra_body=body, **usage
            )
            last = list(answer)[-1] if stream else answer
            assert last.usage.prompt_tokens_details.image_tokens == budget
            answer = client.responses.create(
                model=MODEL, input=turn(input_image()), stream=stream, extra_body=body
            )
            last = list(answer)[-1].response if stream else answer
            assert last.usage.input_tokens_details.image_tokens == budget


BENCH = """
import asyncio
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
"""vLLM's own subcommand, where the command ``vllm`` does not start beside its wheel for CPUs."""


def test_vllm_bench_serve(server: Server, checkout: Path) -> None:
    command = here(block("bash", "vllm bench serve"), server)
    try:
        version("vllm")
    except PackageNotFoundError:
        command = command.replace("vllm bench serve", f"python -c {shlex.quote(BENCH)}")
    path = f"{sys.prefix}/bin:{os.environ['PATH']}"
    with kept(server, 48, 8):
        said = run(command, checkout, os.environ | {"PATH": path, "OPENAI_API_KEY": API_KEY})
    assert re.search(r"Successful requests: +8\b", said)


def test_guidellm(server: Server, checkout: Path) -> None:
    env = environment("guidellm", checkout)
    key = ('"model":"tiny-llava"', f'"model":"tiny-llava","api_key":"{API_KEY}"')
    with kept(server, 48, 8):
        run(here(block("bash", "guidellm run"), server, key), checkout, env)
    report = json.loads((checkout / "reports/guidellm.json").read_text())
    [load] = report["benchmarks"]
    assert load["metrics"]["request_totals"]["successful"] == 8


def test_aiperf(server: Server, checkout: Path) -> None:
    env = environment("aiperf", checkout)
    key = ("--streaming", f"--streaming --api-key {API_KEY}")
    with kept(server, 48, 8):
        run(here(block("bash", "aiperf profile"), server, key), checkout, env)
    [export] = (checkout / "reports/aiperf").rglob("server_metrics_export.json")
    assert "vllm_ficoco_visual_tokens" in export.read_text()


def test_lmms_eval(server: Server, checkout: Path) -> None:
    """A model's name is all that it can say; the name has a budget."""
    env = environment("lmms-eval", checkout)
    key = ("api_key=none", f"api_key={API_KEY}")
    command = here(block("bash", "lmms_eval --model openai"), server, key)
    with kept(server, 48, 60):
        run(command, checkout, env)
    [results] = (checkout / "reports/lmms-eval").rglob("*_results.json")
    accuracy = json.loads(results.read_text())["results"]["scenes"]["exact,none"]
    assert accuracy > 0.8  # failed requests count as wrong answers


@pytest.fixture
def proxy(server: Server, checkout: Path) -> Iterator[str]:
    """litellm's proxy as README starts it, before the server."""
    # Else it asks GitHub for a list of prices.
    env = environment("litellm", checkout) | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    keys = ((": none", f": {API_KEY}"), ("Bearer none", f"Bearer {API_KEY}"))
    config = here(block("yaml", "hosted_vllm"), server, *keys)
    (checkout / "litellm.yaml").write_text(config)
    port = free_port()
    command = block("bash", "litellm --config").replace("--port 4000", f"--port {port}")
    url = f"http://127.0.0.1:{port}"
    log = checkout / "litellm.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            ["bash", "-euc", command],
            cwd=checkout,
            env=env,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )

    def ready() -> bool:
        assert process.poll() is None, log.read_text()[-3000:]
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{url}/health/liveliness").status_code == 200
        return False

    try:
        assert eventually(ready, 120), log.read_text()[-3000:]
        yield url
    finally:
        end(process, signal.SIGTERM, 20)


def test_litellm(server: Server, checkout: Path, proxy: str) -> None:
    """README's snippet through the proxy; and what else README says of it."""
    snippet, shown = block("python", "proxy = "), block("text", "tiny-llava-48")
    assert "http://127.0.0.1:4000" in snippet
    code = shlex.quote(snippet.replace("http://127.0.0.1:4000", proxy))
    (key,) = re.findall(r"LITELLM_MASTER_KEY=(\S+)", block("bash", "litellm --config"))
    env = os.environ | {"LITELLM_MASTER_KEY": key}
    assert run(f"{sys.executable} -c {code}", checkout, env) == shown
    client = openai.OpenAI(base_url=proxy, api_key=key, max_retries=0)
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=user(image()),
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"visual_token_budget": 32},
        )
    )
    usages = [chunk.usage for chunk in chunks if chunk.usage]
    assert usages[-1].prompt_tokens_details.image_tokens == 32  # type: ignore[union-attr]
    with pytest.raises(openai.BadRequestError, match="visual_token_budget"):
        client.chat.completions.create(
            model=MODEL, messages=user(image()), extra_body={"visual_token_budget": 0}
        )
    listed = httpx.get(f"{proxy}/v1/reduction", headers={"Authorization": f"Bearer {key}"})
    assert listed.json() == server.http.get("/v1/reduction").json()
