# SPDX-License-Identifier: Apache-2.0
"""Counts the CUDA graphs that are replayed; a pytest plugin.

    pytest -p tests.engine.replays ...

A run that replays none fails: what it has shown of graphs is nothing.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

COUNT = [0]
"""So many, in this process."""


def count() -> None:
    """From now on."""
    replay = torch.cuda.CUDAGraph.replay

    def counted(self: Any) -> Any:
        COUNT[0] += 1
        return replay(self)

    torch.cuda.CUDAGraph.replay = counted  # type: ignore[method-assign]


def pytest_configure() -> None:
    count()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not COUNT[0]:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"{COUNT[0]} CUDA graphs were replayed")
