# SPDX-License-Identifier: Apache-2.0
"""What the README says is what happens: its commands, its snippet, its output, its tables."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.conftest import API_KEY, MODEL, Server
from vllm_ficoco.methods import METHODS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def block(language: str, holding: str) -> str:
    """The fenced block of a language that holds a word."""
    blocks = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    (found,) = [b for b in blocks if holding in b]
    return found


def test_every_method_is_in_the_table() -> None:
    for method in METHODS.values():
        if method.name != "none":
            row = next(
                line for line in README.splitlines() if line.startswith(f"| `{method.name}`")
            )
            assert method.idea in row
            assert method.paper in row


def test_every_linked_file_is_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("https://"):
            assert (ROOT / target).exists(), target


def test_every_policy_flag_and_variable_is_in_the_table() -> None:
    from ficoco_server.cli import FLAGS

    for name, *_ in FLAGS:
        assert f"`--reduction-{name}`" in README
        assert f"`FICOCO_{name.replace('-', '_').upper()}`" in README


@pytest.fixture(scope="module")
def served() -> Iterator[None]:
    """``make serve``, as the README has it, on its port."""
    assert "make serve" in block("bash", "make test")
    if not (Path(sys.prefix) / ".installed").exists():
        pytest.skip("this environment was not made by make: it would make another")
    with socket.socket() as port:
        assert port.connect_ex(("127.0.0.1", 8000)) != 0, "port 8000 is taken"
    process = subprocess.Popen(
        ["make", "serve", f"VENV={sys.prefix}"], cwd=ROOT, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 240
        while True:
            try:
                urllib.request.urlopen("http://127.0.0.1:8000/health", timeout=5)
                break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None, "make serve ended"
                assert time.monotonic() < deadline, "make serve did not come up"
                time.sleep(1)
        yield
    finally:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.server
def test_the_snippet_prints_what_the_readme_shows(served: None) -> None:
    snippet, shown = block("python", "night.png"), block("text", "144 144")
    run = subprocess.run(
        [sys.executable, "-c", snippet], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == shown


@pytest.mark.server
def test_the_snippet_of_tiles_prints_what_the_readme_shows(tiled: Server, tmp_path: Path) -> None:
    """The model is made by the README's command; another one like it is up already."""
    made = block("bash", "tests.checkpoints").splitlines()[0].removeprefix(".venv/bin/python ")
    *command, name = made.split()
    subprocess.run([sys.executable, *command, tmp_path / name], cwd=ROOT, check=True)
    served = Path(tiled.process.args[4])  # type: ignore[call-overload, index]
    for file in ("config.json", "processor_config.json", "model.safetensors"):
        assert (tmp_path / name / file).read_bytes() == (served / file).read_bytes()
    snippet, shown = block("python", "globalcom2"), block("text", "(100, 100)")
    for said, here in (
        ("http://127.0.0.1:8001", tiled.url),
        ('api_key="none"', f'api_key="{API_KEY}"'),
        (name, MODEL),
    ):
        assert said in snippet
        snippet = snippet.replace(said, here)
    run = subprocess.run(
        [sys.executable, "-c", snippet], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == shown
