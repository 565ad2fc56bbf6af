# SPDX-License-Identifier: Apache-2.0
"""What the README says is what happens: its commands, its snippet, its output, its tables."""

from __future__ import annotations

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

from tests.server.conftest import API_KEY, MODEL, Server, end
from vllm_ficoco.engine.checks import DECODERS
from vllm_ficoco.methods import METHODS
from vllm_ficoco.vision.geometry import FAMILIES, Geometry

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


def test_the_table_says_where_a_method_acts() -> None:
    table = README.split("### Where a method acts")[1].split("## Inside the decoder")[0]
    rows = [
        [re.findall("`([^`]+)`", cell) for cell in line.split("|")[1:-1]]
        for line in table.splitlines()
        if line.startswith("| ") and "`" in line
    ]
    assert sorted(family for families, *_ in rows for family in families) == sorted(FAMILIES)
    for families, *cells in rows:
        for family in families:
            geometry = Geometry((0, 0), 1, False, offers=FAMILIES[family])
            # LLaVA's decoders have names of their own.
            has_stages = family.startswith("llava") or f"{family}_text" in DECODERS
            due: list[list[str]] = [[], [], [], [], []]
            for method in METHODS.values():
                if method.name == "none" or method.for_videos_alone:
                    continue
                if geometry.lacks(method) or (method.decoder and not has_stages):
                    due[-1].append(method.name)
                    continue
                place = geometry.place_of(method)
                if place != "nowhere":
                    due[("input", "tower", "output").index(place)].append(method.name)
                if method.decoder:
                    due[3].append(method.name)
            assert cells == due, family


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
        end(process, signal.SIGINT, 30)


@pytest.mark.server
def test_the_snippet_prints_what_the_readme_shows(served: None) -> None:
    snippet, shown = block("python", "127.0.0.1:8000/v1"), block("text", "144 144")
    run = subprocess.run(
        [sys.executable, "-c", snippet], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == shown


SNIPPETS = {
    "tiled": ("llava-next tiny-next", "globalcom2", "(100, 100)"),
    "native": ("qwen2.5-vl tiny-qwen", "(2240, 28)", "(2240, 28)"),
    "videos": ("qwen2.5-vl tiny-qwen", "ImageDraw", "vidcom2"),
}
"""What the command, the code and the output of each hold; the server of each is up already."""


@pytest.mark.server
@pytest.mark.parametrize("kind", SNIPPETS)
def test_a_snippet_without_weights_prints_what_the_readme_shows(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The model is made by the README's command; another one like it is up already."""
    server: Server = request.getfixturevalue("native" if kind == "videos" else kind)
    command_of, code_of, output_of = SNIPPETS[kind]
    first, second = block("bash", command_of).splitlines()
    *command, name = first.split("#")[0].removeprefix(".venv/bin/python ").split()
    port = second.split()[-1]
    subprocess.run([sys.executable, *command, tmp_path / name], cwd=ROOT, check=True)
    served = Path(server.process.args[4])  # type: ignore[call-overload, index]
    for file in ("config.json", "processor_config.json", "model.safetensors"):
        assert (tmp_path / name / file).read_bytes() == (served / file).read_bytes()
    snippet, shown = block("python", code_of), block("text", output_of)
    for said, here in (
        (f"http://127.0.0.1:{port}", server.url),
        ('api_key="none"', f'api_key="{API_KEY}"'),
        (f'"{name}"', f'"{MODEL}"'),
    ):
        assert said in snippet
        snippet = snippet.replace(said, here)
    run = subprocess.run(
        [sys.executable, "-c", snippet], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == shown
