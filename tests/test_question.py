# SPDX-License-Identifier: Apache-2.0
"""What of a prompt is an image's question: words of the shipped model, images and ends of turns."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from vllm_ficoco.methods import METHODS
from vllm_ficoco.models.question import LONGEST, questions
from vllm_ficoco.packed import Packed, pack, unpack
from vllm_ficoco.settings import Reduction
from vllm_ficoco.tiny_llava import CHECKPOINT
from vllm_ficoco.vision.layout import Layout

TOKENIZER = AutoTokenizer.from_pretrained(CHECKPOINT)
IMAGE = 4
"""Its token."""


def asked(prompt: str, images: int | None = None) -> list[str]:
    """The question of every image of a prompt, in words."""
    tokens = TOKENIZER.encode(prompt, add_special_tokens=False)
    count = tokens.count(IMAGE) if images is None else images
    found = questions(tokens, {IMAGE: count}, {*TOKENIZER.all_special_ids}, TOKENIZER)
    return [TOKENIZER.decode(question) for question in found[IMAGE]]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("USER: <image> what color ? ASSISTANT:", ["what color ? ASSISTANT:"]),
        ("USER: how many ? <image>", ["USER: how many ?"]),
        ("USER: how many ? <image> </s> ASSISTANT:", ["USER: how many ? ASSISTANT:"]),
        ("<s> <image> what ? </s> </s> <pad>", ["what ?"]),
        ("<image> <image> what ?", ["what ?", "what ?"]),
        ("<image> <pad> <image> <image> what ?", ["what ?"] * 3),
        ("<image> what ? <image> how many ?", ["what ?", "how many ?"]),
        ("what <image> color <image> <image>", ["color", "color", "color"]),
        ("what ? </s> how many ? <image> </s> ASSISTANT:", ["how many ? ASSISTANT:"]),
        ("<image> what ? </s> red </s> how many ?", ["what ? red how many ?"]),
        ("<image>", [""]),
        ("<pad> <image> </s>", [""]),
        ("what ?", []),
    ],
)
def test_the_question_of_an_image(prompt: str, expected: list[str]) -> None:
    assert asked(prompt) == expected


def test_images_that_are_not_found_yet_are_asked_everything() -> None:
    assert asked("what color ? <image> how many ?", 3) == [
        "how many ?",
        "what color ? how many ?",
        "what color ? how many ?",
    ]


def test_of_a_long_text_the_end_counts() -> None:
    [question] = asked("<image> " + "what " * 300 + "color ?")
    assert question == " ".join(["what"] * (LONGEST - 2) + ["color", "?"])


@pytest.mark.parametrize("layout", [None, Layout((3, 5))])
def test_a_question_travels_with_its_image(layout: Layout | None) -> None:
    reduction = Reduction(method="cdpruner", budget=5)
    for question in ((), (7,), (3, 151_000, 0)):
        packed = pack(reduction, layout, question)
        assert unpack(packed) == Packed(reduction, layout, question)


@pytest.mark.parametrize("question", ['"a"', "[1.5]", "[true]", "[[1]]", "{}", "1", "["])
def test_what_is_no_question_is_refused(question: str) -> None:
    text = f"{question}\n\n{Reduction(method='cdpruner', budget=5).key}"
    with pytest.raises(ValueError):
        unpack(torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8))


def test_who_asks() -> None:
    """Nobody else: what they keep of an image is good for every question about it."""
    assert {name for name, m in METHODS.items() if m.asks_question} == {"cdpruner", "recoverable"}
