# SPDX-License-Identifier: Apache-2.0
"""A server that cannot keep what it was told to does not start, and says why."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import random_qwen

pytestmark = pytest.mark.server


def test_stages_among_the_levels_of_the_tower(tmp_path: Path) -> None:
    model = random_qwen(tmp_path / "model", "qwen3-vl")
    command = ["ficoco_server.cli", "serve", str(model), "--reduction-stages=1", "--enforce-eager"]
    done = subprocess.run(
        [sys.executable, "-m", *command, "--host=127.0.0.1", "--port=0"],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode != 0
    assert "(deepstack), so a stage can start at 2 or later" in done.stderr.splitlines()[-1]
