# SPDX-License-Identifier: Apache-2.0
"""The model in the package answers the questions to its example images, at small budgets too."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from PIL import Image

from tests.checkpoints import SHIPPED
from tests.engine.conftest import Engine, make_engine

pytestmark = pytest.mark.engine

EXAMPLES = SHIPPED / "examples"


@pytest.fixture(scope="module")
def shipped_engine() -> Iterator[Engine]:
    yield from make_engine(SHIPPED, dtype="bfloat16")


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
