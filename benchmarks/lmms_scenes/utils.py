# SPDX-License-Identifier: Apache-2.0
"""What scenes.yaml names: how lmms-eval reads a question of the task, and what counts as right."""

from typing import Any

from PIL import Image


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    """The image of a question."""
    return [Image.open(doc["image"]).convert("RGB")]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the answer is the right word, and nothing else."""
    return {"exact": float(results[0].strip() == doc["answer"])}
