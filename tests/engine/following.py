# SPDX-License-Identifier: Apache-2.0
"""Follows images through an engine, as a preview does, and says what was seen of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.engine.conftest import Ask, Engine
from vllm_ficoco.packed import Packed
from vllm_ficoco.preview import ENTERED, FETCH, PREVIEW_KEY, Mark, Step


@dataclass
class Followed:
    """What was seen of a request with one image."""

    output: Any
    packed: Packed
    """Of the image."""
    steps: list[Step]

    def at(self, where: str) -> dict[int, list[int]]:
        """By layer, the numbers of all that stays there, part after part."""
        found: dict[int, list[int]] = {}
        for step in self.steps:
            if step.where == where:
                found.setdefault(step.layer, []).extend(step.after)
        return found

    @property
    def entered(self) -> list[int]:
        """The numbers of what enters the decoder."""
        (numbers,) = self.at(ENTERED).values()
        return numbers


def follow(engine: Engine, asks: Sequence[Ask]) -> list[Followed]:
    """All in one batch, each followed."""
    rendered = []
    for number, ask in enumerate(asks):
        request = ask.for_vllm
        request["mm_processor_kwargs"] = {
            **request["mm_processor_kwargs"],
            PREVIEW_KEY: Mark(f"mark {number}"),
        }
        rendered.append(engine.llm._preprocess_cmpl_one(request))
        engine.add(ask, str(number), rendered[number])
    outputs, seen = engine.finished(), []
    for number in range(len(asks)):
        ranks = engine.llm.collective_rpc(FETCH, args=(f"mark {number}",))
        (packed,) = rendered[number]["visual_tokens"]
        steps = [Step(*step) for step in ranks[0]]
        seen.append(Followed(outputs[str(number)], packed, steps))
        assert engine.llm.collective_rpc(FETCH, args=(f"mark {number}",)) == [[]] * len(ranks)
    return seen
