# SPDX-License-Identifier: Apache-2.0
"""The model that ships with the package, and the generated scenes that it knows."""

from __future__ import annotations

from pathlib import Path

CHECKPOINT = Path(__file__).parent
"""The folder to give to vLLM or Hugging Face."""
