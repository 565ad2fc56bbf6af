# SPDX-License-Identifier: Apache-2.0
"""Quantised decoders with budgets, before the decoder and inside it: every layer does what an
independent one does with the numbers that the file says, every method keeps what it would keep.

Where activations are rounded, too (W8A8, FP8), a difference in the last bit of one can take it to
the next step, and after six layers two right results are as far apart as a quantised and an
unquantised model. So each layer of the reference goes on from what vLLM's layer before it said.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.checkpoints import SHIPPED
from tests.engine.conftest import Ask, Engine, make_engine
from tests.engine.test_decoder_stages import expected, wish
from tests.engine.wna16_on_cpu import stand_in
from tests.quantised import FORMATS, compute_as, quantise
from tests.reference.llava import ReferenceLlava
from vllm_ficoco.engine.checks import SCHEDULER
from vllm_ficoco.engine.decoder import StagedDecoder

pytestmark = pytest.mark.engine

VOCABULARY = 113
STAGES = [2]
HELD = 48
"""Visual tokens of 144 that stay: all but whole blocks."""
LAYERS = 6
EXAMPLES = SHIPPED / "examples"
QUESTIONS = json.loads((EXAMPLES / "questions.json").read_text())
PICTURES = [*QUESTIONS]


@dataclass(frozen=True)
class Shown(Ask):
    """A question to one of the shipped model's examples."""

    @property
    def pictures(self) -> list[Image.Image]:
        return [Image.open(EXAMPLES / PICTURES[number]) for number in self.images]


BEFORE = [{"method": m, "budget": b} for m, b in (("score", 48), ("ficoco-v", 16), ("tome", 48))]
INSIDE = [
    *(wish(method, HELD) for method in ("fastv", "a-score", "v-norm", "sieve", "ficoco-l")),
    wish("ficoco-vl", 80, HELD),
]


@pytest.fixture(scope="module", params=[name for name in FORMATS if name != "w8a8"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def quantised(name: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    stand_in()
    yield from make_engine(
        quantise(tmp_path_factory.mktemp(name), name),
        dtype=FORMATS[name].dtype,
        hf_overrides={"reduction_stages": STAGES},
        scheduler_cls=SCHEDULER,
        max_num_batched_tokens=2048,
        max_logprobs=VOCABULARY,
        logprobs_mode="raw_logits",
        enable_prefix_caching=False,  # a prompt is to run whole
    )


@pytest.fixture(scope="module")
def plain() -> ReferenceLlava:
    return ReferenceLlava(str(SHIPPED))


@pytest.fixture(scope="module")
def reference(name: str) -> ReferenceLlava:
    of_format = ReferenceLlava(str(SHIPPED))
    compute_as(of_format.model, name)
    return of_format


class Seen(NamedTuple):
    """What an engine's decoder does with a prompt."""

    streams: dict[int, Tensor]
    """(rows, D) that come to every layer, those that leave there included, and leave the last."""
    kept: list[list[int]]
    """By methods in the decoder: places of an image's tokens."""


@pytest.fixture
def seen(quantised: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    noted = Seen({}, [])

    def note(at: int, hidden: Tensor, residual: Tensor | None) -> None:
        stream = hidden if residual is None else hidden + residual
        noted.streams.setdefault(at, stream.float().clone())

    reduce: Callable[..., Any] = StagedDecoder._reduce

    def watched(self: StagedDecoder, number: int, batch: Any, *args: Any) -> Any:
        note(STAGES[number - 1], batch.hidden, batch.residual)
        result = reduce(self, number, batch, *args)
        noted.kept.extend(image.places.tolist() for image in args[-1])
        return result

    monkeypatch.setattr(StagedDecoder, "_reduce", watched)
    decoder = quantised.model.language_model.model
    hooks = [
        module.register_forward_pre_hook(lambda _, given, at=at: note(at, *given[-2:]))
        for at, module in enumerate((*decoder.layers, decoder.norm))
    ]
    yield noted
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("settings", [None, *BEFORE, *INSIDE], ids=json.dumps)
def test_every_layer_does_what_its_numbers_say(
    quantised: Engine,
    name: str,
    settings: dict[str, Any] | None,
    seen: Seen,
    plain: ReferenceLlava,
    reference: ReferenceLlava,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same loop with weights that are not quantised is ten times as far away."""
    exact = FORMATS[name].dtype == "float32"
    sampling = {"max_tokens": 1, "logprobs": VOCABULARY}
    ask = Shown([0], [settings], "what color is the cross ?", sampling)
    (output,) = quantised.generate([ask])
    for loop in (reference, plain):
        monkeypatch.setattr(loop, "beside", {"streams": [*seen.streams.values()]})
    truth = expected(reference, ask, quantised.block, STAGES)
    unquantised = expected(plain, ask, quantised.block, STAGES)

    assert [len(rows) for rows in seen.streams.values()][1:] == truth.held
    others = 0
    for places, due in zip(seen.kept, truth.kept.values(), strict=True):
        assert len(places) == HELD
        others += len({*places} - {*due})
    assert others <= (0 if exact else 1), "in 16 bits, tokens at the edge may change places"
    entered, *behind = truth.apart
    assert entered < 1e-5 or not exact
    for layer, (far, unlike) in enumerate(zip(behind, unquantised.apart[1:], strict=True)):
        assert far < unlike / 10 or (others and layer in STAGES), f"layer {layer}"
    given = output.outputs[0].logprobs[0]
    logits = torch.tensor([given[word].logprob for word in range(VOCABULARY)])
    near = 1e-4 if exact else 2e-2
    torch.testing.assert_close(logits, truth.first_logits, atol=near, rtol=near)


def test_questions_are_answered_rightly(quantised: Engine) -> None:
    """All settings in one batch; each enters the decoder with exactly what was asked for."""
    answers, image_token = QUESTIONS[PICTURES[0]], 4
    asked = [
        (Shown([0], [settings], question, {"ignore_eos": False}), answer)
        for settings in (None, *BEFORE, *INSIDE)
        for question, answer in answers.items()
    ]
    outputs = quantised.generate([ask for ask, _ in asked])
    wrong: dict[str, list[str]] = {}
    for (ask, answer), output in zip(asked, outputs, strict=True):
        (settings,) = ask.settings
        asked_for = (settings or {}).get("budget") or (80 if settings == INSIDE[-1] else 144)
        assert output.prompt_token_ids.count(image_token) == asked_for, settings
        if output.outputs[0].text.strip() != answer:
            wrong.setdefault(json.dumps(settings), []).append(ask.question)
    assert all(len(questions) < 2 for questions in wrong.values()), wrong
