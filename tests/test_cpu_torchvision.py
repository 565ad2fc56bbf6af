# SPDX-License-Identifier: Apache-2.0
"""deploy/cpu_torchvision.py, run in throwaway environments with broken and sound packages.

Each environment takes torch and pip from the one that runs the tests, through a .pth file,
and has its own torchvision, torchaudio and torchcodec, which hide the real ones.
"""

import hashlib
import subprocess
import sys
import venv
from pathlib import Path

import pip
import pytest
import torch

TOOL = Path(__file__).parent.parent / "deploy" / "cpu_torchvision.py"

# torchvision asks torch for its operators like this, and fails where no one declared them.
NEEDS_SCHEMAS = """
import torch
for name in ("nms", "qnms"):
    torch.library.register_fake("torchvision::" + name)(lambda dets, scores, iou_threshold: dets)
"""
SOUND = "value = 1\n"
BROKEN = "raise OSError('Could not load this library')\n"

pytestmark = pytest.mark.skipif(
    torch.version.cuda is not None or torch.version.hip is not None,
    reason="the tool acts only beside a CPU-only torch",
)


class Environment:
    """A virtual environment without pip, torch or anything else of its own."""

    def __init__(self, path: Path) -> None:
        venv.create(path, symlinks=True)
        self.python = path / "bin" / "python"
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        self.site = path / "lib" / version / "site-packages"
        lent = {str(Path(module.__path__[0]).parent) for module in (torch, pip)}
        (self.site / "parent.pth").write_text("\n".join(sorted(lent)) + "\n")

    def add(self, name: str, source: str) -> None:
        """Install a package, with the metadata that pip needs to uninstall it."""
        package, info = self.site / name, self.site / f"{name}-1.0.dist-info"
        package.mkdir()
        info.mkdir()
        (package / "__init__.py").write_text(source)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "INSTALLER").write_text("pip\n")
        files = [f"{name}/__init__.py"]
        files += [f"{info.name}/{file}" for file in ("METADATA", "INSTALLER", "RECORD")]
        (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))

    def run(self, *args: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.python, *args], capture_output=True, text=True, cwd=self.site, check=False
        )

    def snapshot(self) -> dict[str, str]:
        return {
            str(path.relative_to(self.site)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(self.site.rglob("*"))
            if path.is_file() and path.suffix != ".pyc"
        }


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "env")


def test_broken_packages_are_repaired_once(environment: Environment) -> None:
    environment.add("torchvision", NEEDS_SCHEMAS)
    environment.add("torchaudio", BROKEN)
    environment.add("torchcodec", SOUND)

    check = environment.run(TOOL, "--check")
    assert check.returncode == 1
    assert "operator torchvision::nms does not exist" in check.stdout

    first = environment.run(TOOL)
    assert first.returncode == 0, first.stderr
    assert len(first.stdout.splitlines()) == 1
    assert "uninstalled torchaudio;" in first.stdout
    assert not (environment.site / "torchaudio").exists()
    assert (environment.site / "torchcodec").exists(), "a package that loads must stay"

    # A spawned child starts from the .pth file, as vLLM's workers do.
    script = environment.site.parent / "spawn.py"
    script.write_text(
        "import multiprocessing\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        pool.apply(exec, ('import torchvision',))\n"
    )
    child = environment.run(script)
    assert child.returncode == 0, child.stderr

    before = environment.snapshot()
    second = environment.run(TOOL)
    assert second.returncode == 0, second.stderr
    assert second.stdout == "cpu_torchvision: nothing to do\n"
    assert environment.snapshot() == before
    assert environment.run(TOOL, "--check").returncode == 0


def test_the_hook_does_not_import_torch_at_start(environment: Environment) -> None:
    environment.add("torchvision", NEEDS_SCHEMAS)
    assert environment.run(TOOL).returncode == 0
    code = (
        "import sys, importlib.util; importlib.util.find_spec('torchvision'); "
        "print('_cpu_torchvision_hook' in sys.modules, 'torch' in sys.modules)"
    )
    assert environment.run("-c", code).stdout.split() == ["True", "False"]


def test_packages_that_load_are_left_alone(environment: Environment) -> None:
    for name in ("torchvision", "torchaudio", "torchcodec"):
        environment.add(name, SOUND)
    before = environment.snapshot()

    done = environment.run(TOOL)

    assert done.returncode == 0, done.stderr
    assert done.stdout == "cpu_torchvision: nothing to do\n"
    assert environment.snapshot() == before


def test_another_fault_of_torchvision_is_reported_not_hidden(environment: Environment) -> None:
    environment.add("torchvision", "import no_such_module_at_all\n")
    before = environment.snapshot()

    done = environment.run(TOOL)

    assert done.returncode == 1
    assert "no_such_module_at_all" in done.stderr
    assert environment.snapshot() == before
