# SPDX-License-Identifier: Apache-2.0
"""What another version of vLLM has no more, or has in another form, is found without importing it;
and versions that are not known are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from ficoco_server import cli
from tests.next_vllm import Use, compare
from vllm_ficoco import plugin, versions
from vllm_ficoco.engine import checks

OURS = """
import vllm.envs as envs
from vllm import Engine as Motor
from vllm.base import Base, Order, load

class Child(Base):
    def step(self, rows): return super().step(rows) + self.more(rows)

def run(): return Motor(1), load("a"), Order.FIRST, envs.PORT
"""
THEIRS = {
    "__init__.py": """
TABLE = {"Engine": ".base:Engine"}
def __getattr__(name): return TABLE[name]
""",
    "base.py": """
from .other import *
class Engine:
    def __init__(self, size, *, eager=False): ...
class Base(Root):
    def more(self, rows): ...
class Order:
    FIRST = 1
""",
    "other.py": """
if True:
    def load(name: str, retries: int = 3) -> None: ...
class Root:
    def step(self, rows): ...
""",
    "envs.py": "PORT = 1",
}


@pytest.fixture
def versions_of(tmp_path: Path) -> Callable[..., dict[Use, tuple[str, str]]]:
    """Compares what is above with the same after some words were exchanged."""
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours/__init__.py").write_text(OURS)

    def compared(file: str = "base.py", old: str = "", new: str = "") -> dict:
        for name in ("now", "then"):
            (tmp_path / name).mkdir(exist_ok=True)
            for theirs, text in THEIRS.items():
                assert theirs != file or old in text
                exchanged = text.replace(old, new) if (name, theirs) == ("then", file) else text
                (tmp_path / name / theirs).write_text(exchanged)
        return compare(tmp_path / "now", tmp_path / "then", {"ours": tmp_path / "ours"})

    return compared


BASE, OTHER = "vllm.base", "vllm.other"
CHANGES = {
    "a table's name": ("__init__.py", '"Engine"', '"Motor"', Use("vllm", "Engine")),
    "a constructor": ("base.py", "size, *", "size, rank, *", Use("vllm", "Engine")),
    "a default of what is overridden": (
        *("other.py", "(self, rows)", "(self, rows, step=1)"),
        Use(OTHER, "Root", "step"),
    ),
    "a name": ("other.py", "def load", "def read", Use(BASE, "load")),
    "a default": ("other.py", "retries: int = 3", "retries: int", Use(BASE, "load")),
    "a method that is overridden": ("other.py", "rows", "rows, step", Use(OTHER, "Root", "step")),
    "a method that is called": ("base.py", "(self, rows)", "(self)", Use(BASE, "Base", "more")),
    "a member": ("base.py", "FIRST", "LAST", Use(BASE, "Order", "FIRST")),
    "a module's": ("envs.py", "PORT", "PORTS", Use("vllm.envs", "PORT")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_the_same(change: str, versions_of: Callable[..., dict]) -> None:
    file, old, new, use = CHANGES[change]
    assert [*versions_of(file, old, new)] == [use]


def test_what_does_not_matter(versions_of: Callable[..., dict]) -> None:
    assert not versions_of()
    assert not versions_of("other.py", "name: str", "name: bytes")
    assert not versions_of("base.py", "class Order", "class Unused: ...\nclass Order")


# --- Versions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.32.0", "0.3", "0.320.0", "dev"])
def test_versions_that_are_not_known_are_refused(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm.version.__version__", version)
    with pytest.raises(RuntimeError) as refused:
        plugin.register()
    said = str(refused.value)
    assert version in said and "0.32" in said and "0.33" in said and "VLLM_PLUGINS" in said


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What vLLM's log is warned of."""
    said: list[str] = []
    logger = SimpleNamespace(warning_once=lambda text, *words: said.append(text % words))
    monkeypatch.setattr("vllm.logger.init_logger", lambda _: logger)
    return said


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1", "0.32.1.dev5+gabc123", "0.32.0+cpu"])
def test_the_version_that_is_tested_is_not_spoken_of(
    version: str, monkeypatch: pytest.MonkeyPatch, warned: list[str]
) -> None:
    monkeypatch.setattr("vllm.version.__version__", version)
    assert versions.check() == "0.32" and checks.version_problem() is None
    assert not warned


def test_the_version_that_was_only_compared_is_warned_of_and_has_no_stages(
    monkeypatch: pytest.MonkeyPatch, warned: list[str]
) -> None:
    monkeypatch.setattr("vllm.version.__version__", "0.33.0")
    assert versions.check() == "0.33"
    (warning,) = warned
    assert "0.33" in warning and "0.32" in warning
    assert "not with 0.33" in (checks.version_problem() or "")


@pytest.mark.parametrize(
    ("version", "command", "said"),
    [("0.34.0", "serve", "does not know vLLM 0.34.0"), ("0.33.0", "run-batch", "not with 0.33")],
)
def test_the_command_says_the_same(
    version: str,
    command: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("vllm.version.__version__", version)
    monkeypatch.setattr(cli, "prepare", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "tiny-llava"])
    assert ended.value.code == 2 and said in capsys.readouterr().err
