# SPDX-License-Identifier: Apache-2.0
"""What all tests need before vLLM is imported, and the evaluation as a module."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


@pytest.fixture(scope="session")
def accuracy() -> ModuleType:
    """``benchmarks/accuracy.py``, which is a command and not part of a package."""
    file = Path(__file__).parents[1] / "benchmarks/accuracy.py"
    spec = importlib.util.spec_from_file_location("accuracy", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["accuracy"] = module
    spec.loader.exec_module(module)
    return module
