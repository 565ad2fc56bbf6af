# SPDX-License-Identifier: Apache-2.0
"""Writes the task of lmms-eval that scenes.yaml describes: held-out scenes of the shipped model.

    python benchmarks/lmms_scenes/make.py [QUESTIONS]    # 60 of them

The same questions as those of accuracy.py, so accuracies can be compared with RESULTS.md's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from accuracy import held_out

OUT = Path("reports/scenes")


def main(questions: int) -> None:
    """Write the images, and a line for each question."""
    (OUT / "images").mkdir(parents=True, exist_ok=True)
    with (OUT / "questions.jsonl").open("w") as lines:
        for number, (scene, question) in enumerate(held_out(questions)):
            image = OUT / f"images/{number}.png"
            scene.image.save(image)
            line = {"image": str(image), "question": question.text, "answer": question.answer}
            lines.write(json.dumps(line) + "\n")
    print(f"{questions} questions in {OUT}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 60)
