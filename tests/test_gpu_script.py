# SPDX-License-Identifier: Apache-2.0
"""``benchmarks/gpu.sh`` with a stand-in for Python that notes what it is called with."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from importlib.metadata import distributions
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks/gpu.sh"
PLAN = ["device", "methods", "stages", "graphs", "agree", "load", "budgets", "tower", "native"]
STAND_IN = """#!/usr/bin/env bash
echo "${FICOCO_TEST_ENGINE:-{\\}} $*" >>"$CALLS"
[[ -n $FAILS && "$*" == *"$FAILS"* ]] && exit 1
echo figures
"""


class Run:
    """Of the script.

    Args:
        folder: for what it writes.
        arguments: its.
        fails: what is in the commands that fail.
        environment: more of it.
    """

    def __init__(self, folder: Path, *arguments: str, fails: str = "", **environment: str) -> None:
        python, calls, self.out = folder / "any name", folder / "calls", folder / "results"
        python.write_text(STAND_IN)
        python.chmod(0o755)
        given = {"PYTHON": str(python), "CALLS": str(calls), "FAILS": fails, **environment}
        self.result = subprocess.run(
            [str(SCRIPT), "--out", str(self.out), *arguments],
            env=os.environ | given,
            capture_output=True,
            text=True,
            check=False,
            cwd=folder,
        )
        self.calls = calls.read_text().splitlines()
        self.summary = dict(
            line.split(maxsplit=1)
            for line in (self.out / "summary.txt").read_text().splitlines()
            if line.split()[0] in PLAN
        )


def test_all_steps_run_in_order_and_leave_one_archive(tmp_path: Path) -> None:
    """Whatever the caller's variables mean to the caller."""
    theirs = dict.fromkeys(("OUT", "DECODER", "METHODS", "FICOCO_TEST_ENGINE", "PORT"), "/nonsense")
    run = Run(tmp_path, **theirs)
    assert run.result.returncode == 0, run.result.stdout + run.result.stderr
    assert [*run.summary] == PLAN
    assert all(outcome.startswith("ok") for outcome in run.summary.values())
    assert len(run.calls) == len(PLAN) and "nonsense" not in "".join(run.calls)
    with tarfile.open(f"{run.out}.tar.gz") as archive:
        names = {Path(name).name for name in archive.getnames()}
    assert {f"{step}.md" for step in PLAN} | {"summary.txt", "nvidia-smi.txt"} <= names


def test_engines_of_tests_get_their_options_as_json(tmp_path: Path) -> None:
    run = Run(tmp_path, "stages", "graphs", "native")
    options = [json.JSONDecoder().raw_decode(line)[0] for line in run.calls]
    graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    triton = {"attention_config": {"backend": "TRITON_ATTN"}}
    assert options == [
        {},
        {**triton, "enforce_eager": True},
        {**triton, "enforce_eager": False, "compilation_config": graphs},
        {"enforce_eager": False},
    ]


@pytest.mark.parametrize(
    ("fails", "left_out"),
    [
        ("gpu.py device", {*PLAN[1:]}),
        ("mixed_batch or alike", {"graphs", "agree"}),
        ("load", set()),
    ],
)
def test_what_is_worthless_after_a_failure_does_not_run(
    fails: str, left_out: set[str], tmp_path: Path
) -> None:
    run = Run(tmp_path, fails=fails)
    assert run.result.returncode == 1
    ran = {step for step, outcome in run.summary.items() if not outcome.startswith("skipped")}
    assert ran == {*PLAN} - left_out
    assert sum(outcome.startswith("FAILED") for outcome in run.summary.values()) == 1
    assert Path(f"{run.out}.tar.gz").exists()


def test_both_sides_of_a_ratio_have_equal_flags(tmp_path: Path) -> None:
    """Those that stages need, as stock vLLM runs beside them."""
    run = Run(tmp_path, "--backend", "TRITON_ATTN", "load", "budgets")
    assert all("--attention-backend TRITON_ATTN" in call for call in run.calls[1:])
    assert "--compilation-mode 0 --cudagraph-mode FULL_DECODE_ONLY" in run.calls[2]


def test_all_steps_together_take_less_than_ten_minutes() -> None:
    seconds = dict(re.findall(r"\[(\w+)\]=(\d+)", SCRIPT.read_text()))
    assert sum(int(seconds[step]) for step in PLAN) <= 560


def test_metadata_has_the_entry_points_of_an_installation(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT.with_suffix(".py")), "metadata", str(tmp_path)]
    subprocess.run(command, check=True)
    (made,) = distributions(path=[str(tmp_path)])
    installed = next(iter(distributions(name="vllm-ficoco")))
    assert made.name == "vllm-ficoco"
    points = {(e.group, e.name, e.value) for e in made.entry_points}
    assert points == {
        (e.group, e.name, e.value) for e in installed.entry_points if e.group.startswith("vllm.")
    }
