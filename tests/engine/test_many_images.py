# SPDX-License-Identifier: Apache-2.0
"""Prompts of many reduced images: what a step encodes of them, and what they say.

And a model length below what one image has: reduced images fit it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from vllm.exceptions import VLLMValidationError

from tests.checkpoints import random_llava
from tests.engine.conftest import BLOCK, NEW_TOKENS, Ask, Engine, make_engine, picture
from tests.engine.test_decoder_stages import (
    FIRST_LOGITS,
    STAGED,
    VOCABULARY,
    run_to_the_end,
    wish,
)
from tests.engine.test_decoder_stages import check as check_staged
from tests.reference.decoder import answer
from tests.reference.llava import ReferenceLlava

pytestmark = pytest.mark.engine

AT_ONCE = 4
"""Images of 144 tokens that steps of 640 tokens encode."""
MANY = {
    "max_num_batched_tokens": 640,
    "limit_mm_per_prompt": {"image": 64},
    "max_logprobs": VOCABULARY,
    "logprobs_mode": "raw_logits",
    "enable_prefix_caching": False,
}


@pytest.fixture(scope="module")
def engine(clip_checkpoint: Path) -> Iterator[Engine]:
    yield from make_engine(clip_checkpoint, **MANY)


@pytest.fixture(scope="module")
def reference(clip_checkpoint: Path) -> ReferenceLlava:
    return ReferenceLlava(str(clip_checkpoint))


class Step(NamedTuple):
    """What a step was given to do, by request."""

    tokens: dict[str, int]
    images: dict[str, list[int]]


@contextmanager
def watched(engine: Engine) -> Iterator[list[Step]]:
    """The steps of an engine while it runs."""
    steps: list[Step] = []
    schedule = engine.scheduler.schedule

    def watch(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        parts = (output.num_scheduled_tokens, output.scheduled_encoder_inputs)
        steps.append(Step(*({k.split("-")[0]: v for k, v in p.items()} for p in parts)))
        return output

    engine.scheduler.schedule = watch
    try:
        yield steps
    finally:
        del engine.scheduler.schedule


def many(images: Sequence[int], **sampling: Any) -> Ask:
    """Budgets from 1 to 7 in turn, and methods of every place of the tower."""
    methods = ("ficoco-v", "topk", "visionzip", "uniform")
    settings = [{"method": methods[i % 4], "budget": 1 + i % 7} for i in images]
    return Ask(images, settings, sampling={**FIRST_LOGITS, **sampling})


def check(reference: ReferenceLlava, ask: Ask, output: Any) -> None:
    """Tokens and first logits are those of a loop that counts its own positions."""
    visual = [
        reference.visual_tokens(picture(seed), settings["method"], settings["budget"])
        for seed, settings in zip(ask.images, ask.settings, strict=True)
    ]
    embeds, places = reference.embed(ask.prompt, visual)
    assert len(output.prompt_token_ids) == len(embeds)
    truth = answer(reference.model, embeds, places, {}, [], [], NEW_TOKENS)
    assert list(output.outputs[0].token_ids) == truth.tokens
    given = output.outputs[0].logprobs[0]
    logits = torch.tensor([given[word].logprob for word in range(VOCABULARY)])
    torch.testing.assert_close(logits, truth.first_logits, atol=1e-3, rtol=1e-3)


def test_a_step_encodes_no_more_images_than_if_they_were_whole(
    engine: Engine, reference: ReferenceLlava
) -> None:
    """Forty images hold 160 tokens, which a step could prefill; another stream goes on meanwhile.

    Equal images are encoded once, and the positions of all are right.
    """
    ask = many([*range(28), *range(12)])
    free = engine.free_blocks
    engine.add(Ask(), "stream", max_tokens=60)
    engine.llm.llm_engine.step()
    with watched(engine) as steps:
        engine.add(ask, "many")
        outputs = engine.finished()
    encoding = [sum(map(len, step.images.values())) for step in steps]
    assert max(encoding) == AT_ONCE and sum(encoding) == 28
    while_many_ran = [step for step in steps if "many" in step.tokens]
    assert len(while_many_ran) >= 28 // AT_ONCE + NEW_TOKENS - 1
    assert all(step.tokens["stream"] == 1 for step in while_many_ran)
    check(reference, ask, outputs["many"])
    assert len(outputs["stream"].outputs[0].token_ids) == 60
    assert engine.free_blocks == free


def test_requests_share_what_a_step_encodes(engine: Engine, reference: ReferenceLlava) -> None:
    """Several prompts, unreduced images among them."""
    asks = [many([60 + i, 70 + i, 80 + i]) for i in range(6)]
    whole = Ask(
        [90, 91], [{"method": "none"}, {"budget": 9, "method": "tome"}], sampling=FIRST_LOGITS
    )
    with watched(engine) as steps:
        for i, ask in enumerate([whole, *asks]):
            engine.add(ask, f"share{i}")
        outputs = engine.finished()
    encoding = [sum(map(len, step.images.values())) for step in steps]
    assert max(encoding) == AT_ONCE and sum(encoding) == 20
    whole = Ask(
        whole.images, [{"method": "none", "budget": 0}, whole.settings[1]], sampling=FIRST_LOGITS
    )
    for i, ask in enumerate([whole, *asks]):
        check(reference, ask, outputs[f"share{i}"])


def test_without_reductions_the_schedule_is_vllms(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step for step, with the encoder cache manager that vLLM would have made."""
    from vllm.v1.core.encoder_cache_manager import EncoderCacheManager

    asks = [
        Ask([1, 2, 3]),
        Ask(question="how many are there ?"),
        *(Ask([10 + i, 11 + i]) for i in range(4)),
        Ask([1], [{"budget": 144}]),
        Ask([4], [{"budget": 1000}]),
    ]

    def run() -> list[Step]:
        with watched(engine) as steps:
            for i, ask in enumerate(asks):
                engine.add(ask, f"whole{i}")
                if i % 2:
                    engine.llm.llm_engine.step()
            run_to_the_end(engine)
        return steps

    ours = engine.scheduler.encoder_cache_manager
    ours_steps = run()
    stock = EncoderCacheManager(ours.cache_size)
    engine.llm.reset_mm_cache()
    engine.llm.llm_engine.reset_encoder_cache()
    monkeypatch.setattr(engine.scheduler, "encoder_cache_manager", stock)
    assert run() == ours_steps
    engine.llm.llm_engine.reset_encoder_cache()


# --- With decoder stages ------------------------------------------------------------------------


def test_with_decoder_stages(tmp_path: Path) -> None:
    """A method that reads the question must have all images in one step: more are an error."""
    checkpoint = random_llava(tmp_path / "model", decoder_layers=6)
    limits = {"max_num_batched_tokens": 512, "max_model_len": 512}  # three at once
    limits["limit_mm_per_prompt"] = {"image": 5}
    with contextmanager(make_engine)(checkpoint, **{**STAGED, **limits}) as engine:
        reference = ReferenceLlava(str(checkpoint))
        five = [wish("vitcop", 70, 40, 10), {"method": "topk", "budget": 3}]
        reads_question = wish("ficoco-vl", 70, 60, 50, 0)
        asks = [
            Ask(range(5), [*five, *five, None], sampling=FIRST_LOGITS),
            Ask(range(3), [reads_question] * 3, sampling=FIRST_LOGITS),
            Ask(sampling=FIRST_LOGITS),
        ]
        with watched(engine) as steps:
            check_staged(engine, reference, asks)
        assert max(sum(map(len, step.images.values())) for step in steps) == 3
        free = engine.free_blocks
        too_many = Ask(range(4), [reads_question] * 4)
        (output,) = engine.generate([too_many])
        assert output.outputs[0].finish_reason == "error"
        assert engine.free_blocks == free and not engine.scheduler.plans


# --- A short model ------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [False, True])
def test_reduced_images_fit_a_model_shorter_than_an_image(tmp_path: Path, stages: bool) -> None:
    checkpoint = random_llava(tmp_path / "model", decoder_layers=6)
    options = {**(STAGED if stages else MANY), "max_model_len": 4 * BLOCK}
    with contextmanager(make_engine)(checkpoint, **options) as engine:
        reference = ReferenceLlava(str(checkpoint))
        settings = [{"method": "ficoco-v", "budget": 60}, {"method": "tome", "budget": 20}]
        asks = [
            Ask([1, 2], settings, sampling=FIRST_LOGITS),
            Ask([2], settings[1:], sampling=FIRST_LOGITS),
        ]
        free = engine.free_blocks
        # Images of their own: vLLM takes those of a refused prompt for images that its engine has.
        for whole in (Ask([5]), Ask([6, 7], [settings[0], None]), Ask([8], [{"budget": 125}])):
            with pytest.raises(VLLMValidationError, match="maximum model length"):
                engine.generate([whole])
        if stages:  # whose images enter the decoder whole
            with pytest.raises(VLLMValidationError, match="maximum model length"):
                engine.generate([Ask([9], [wish("fastv", 48)])])
            asks.append(Ask([3], [wish("ficoco-vl", 90, 60, 30, 0)], sampling=FIRST_LOGITS))
            check_staged(engine, reference, asks)
        else:
            for ask, output in zip(asks, engine.generate(asks), strict=True):
                check(reference, ask, output)
        assert engine.free_blocks == free
