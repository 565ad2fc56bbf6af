# SPDX-License-Identifier: Apache-2.0
"""The model in the package answers the questions to its example images, at small budgets too.

And it is as good as it was: a fixed part of ``benchmarks/accuracy.py``. When the model or a method
is meant to change, record anew: ``python benchmarks/accuracy.py --in-process tiny-llava
--methods score,ficoco-v --budgets 48,16 --questions 660 --record benchmarks/recorded.json``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from tests.checkpoints import SHIPPED
from tests.engine.conftest import Engine, make_engine

pytestmark = pytest.mark.engine

EXAMPLES = SHIPPED / "examples"
RECORDED = json.loads((Path(__file__).parents[2] / "benchmarks/recorded.json").read_text())


@pytest.fixture(scope="module")
def shipped_engine() -> Iterator[Engine]:
    yield from make_engine(SHIPPED)


@pytest.mark.parametrize("budget", [144, 48, 16])
def test_examples_are_answered_rightly(shipped_engine: Engine, budget: int) -> None:
    questions = json.loads((EXAMPLES / "questions.json").read_text())
    asked = [(name, q, a) for name, answers in questions.items() for q, a in answers.items()]
    outputs = shipped_engine.llm.generate(
        [
            {
                "prompt": f"USER: <image> {question} ASSISTANT:",
                "multi_modal_data": {"image": Image.open(EXAMPLES / name)},
                "mm_processor_kwargs": {"visual_token_budget": budget},
            }
            for name, question, _ in asked
        ],
        shipped_engine.params(ignore_eos=False),
        use_tqdm=False,
    )
    assert [o.outputs[0].text.strip() for o in outputs] == [answer for *_, answer in asked]


@pytest.mark.parametrize("name", RECORDED["averages"])
def test_accuracy_is_what_it_was(shipped_engine: Engine, accuracy: ModuleType, name: str) -> None:
    """Not below the 95 % interval of the recorded value."""
    asked = accuracy.held_out(RECORDED["questions"])
    answers: dict[int, object] = {}
    accuracy.Engine(shipped_engine.llm).ask(
        [(index, *question) for index, question in enumerate(asked)],
        accuracy.Setting.of(name),
        answers.__setitem__,
    )
    (result,) = accuracy.summarise({name: answers}, asked).values()
    share = RECORDED["averages"][name]
    lowest, _ = accuracy.interval(round(share * len(asked)), len(asked))
    assert result["average"] >= lowest, result["tasks"]
    assert result["visual_tokens_kept"] == [accuracy.Setting.of(name).budget]
