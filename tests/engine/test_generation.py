# SPDX-License-Identifier: Apache-2.0
"""Answers under reduction are those of the reference; images without one are vLLM's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from vllm.exceptions import VLLMValidationError

from tests.engine.conftest import NEW_TOKENS, Ask, Engine, check_samples, picture
from tests.engine.following import follow
from tests.reference import llava
from tests.reference.llava import ReferenceLlava
from vllm_ficoco.methods import METHODS
from vllm_ficoco.settings import DEFAULT_METHOD

pytestmark = pytest.mark.engine

REDUCING = [
    name
    for name, method in METHODS.items()
    if name not in ("none", "resize") and not method.decoder and not method.for_videos_alone
]

OPTIONS = [
    ("score", {"alpha": 0.0}),
    ("score", {"alpha": 1.0}),
    ("ficoco-v", {"attention": "probabilities", "normalise": False}),
    ("ficoco-v", {"attention": "probabilities"}),
    ("ficoco-v", {"lambda": 0.0, "coefficient": 1.0, "epsilon": 0.9}),
    ("ficoco-v", {"window": 5, "coefficient": 3.0}),
    ("visionzip", {"contextual": 0.5}),
    ("prumerge", {"neighbours": 4}),
    ("random", {"seed": 7}),
    ("cdpruner", {"alpha": 2.0}),
    ("recoverable", {"recovered": 0.4, "merged": 0.3, "neighbours": 2}),
]


@pytest.fixture(scope="module")
def reference(clip_checkpoint: Path) -> ReferenceLlava:
    return ReferenceLlava(str(clip_checkpoint))


def asks_of_every_kind() -> list[Ask]:
    """Every method and option, several images and budgets, several images a prompt, text."""
    asks = [Ask(question="how many are there ?"), Ask([1], [None])]
    for i, name in enumerate(REDUCING):
        for budget in (16, 48, 143):
            asks.append(Ask([i % 3], [{"method": name, "budget": budget}]))
    asks += [
        Ask([3], [{"method": name, "budget": 40, "options": options}]) for name, options in OPTIONS
    ]
    return [
        *asks,
        Ask([1, 2], [{"budget": 30}, None]),
        Ask([2, 1], [{"method": "tome", "budget": 20}, {"method": "topk", "budget": 7}]),
        Ask([6, 7, 8], [{"budget": 30}] * 3),
        Ask([1, 2], [{"method": "recoverable", "budget": 30}, {"method": "cdpruner", "budget": 9}]),
        Ask([2], [{"method": "cdpruner", "budget": 9}], question="how many stars are there ?"),
        Ask([4, 4, 4], [{"budget": 64}, {"budget": 9}, {"method": "none"}]),
        Ask([5], [{"budget": 144}]),
        Ask([5], [{"budget": 100_000}]),
    ]


def check(reference: ReferenceLlava, ask: Ask, output: object) -> None:
    """One output is what the reference generates, over as many prompt tokens."""
    reference.ask(ask.behind)
    visual = [
        reference.visual_tokens(
            picture(seed),
            (settings or {}).get("method", DEFAULT_METHOD if settings else "none"),
            (settings or {}).get("budget", 0),
            (settings or {}).get("options"),
        )
        for seed, settings in zip(ask.images, ask.settings, strict=True)
    ]
    made, length = reference.generate(ask.prompt, visual, NEW_TOKENS)
    assert len(output.prompt_token_ids) == length, ask
    assert list(output.outputs[0].token_ids) == made, ask


def test_a_mixed_batch_generates_what_the_reference_does(
    engine: Engine, reference: ReferenceLlava
) -> None:
    asks = asks_of_every_kind()
    for ask, output in zip(asks, engine.generate(asks), strict=True):
        check(reference, ask, output)


def test_who_follows_an_image_sees_what_the_reference_keeps(
    engine: Engine, reference: ReferenceLlava, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every method in every layer, twice in one batch with the image as others ask for it, which
    every cache has by then; and the answer is the same."""
    methods = [name for name in REDUCING if name not in ("cdpruner", "recoverable")]
    asks = [Ask([i % 3], [{"method": name, "budget": 40}]) for i, name in enumerate(methods)]
    engine.generate(asks)
    stayed: list[list[int]] = []
    original = llava.reduce_one

    def watched(*args: object) -> object:
        result = original(*args)
        stayed.append(result[1])
        return result

    monkeypatch.setattr(llava, "reduce_one", watched)
    for ask in asks:  # no more at a time than a worker remembers
        first, again = follow(engine, [ask, ask])
        assert first.steps == again.steps
        check(reference, ask, first.output)
        method = METHODS[ask.settings[0]["method"]]
        where = "tower" if method.place == "tower" else "output"
        assert [*first.at(where).values()] == stayed[-len(first.at(where)) :], ask
        assert len(first.at(where)) > 1 or where == "output"
        assert first.entered == reference.place and len(first.entered) == 40


def test_chunks_and_preemption_change_nothing(
    tight_engine: Engine, reference: ReferenceLlava
) -> None:
    """Steps of 100 tokens cut through images, and the pool forces requests out and back in."""
    asks = asks_of_every_kind()[::2]
    preempted = tight_engine.watch_preemptions()
    free = tight_engine.free_blocks
    outputs = tight_engine.generate(asks)
    assert sum(preempted) > 0, "the pool was not small enough to test anything"
    assert tight_engine.free_blocks == free
    for ask, output in zip(asks, outputs, strict=True):
        check(reference, ask, output)


def test_without_stages_scheduler_attention_and_kv_cache_are_vllms_own(engine: Engine) -> None:
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    assert type(engine.scheduler).__module__.startswith("vllm.")
    (manager,) = engine.scheduler.kv_cache_manager.coordinator.single_type_managers
    assert type(manager).__module__.startswith("vllm.")
    assert type(manager.kv_cache_spec) is FullAttentionSpec
    assert engine.model.staged_decoder is None
    for layer in engine.model.language_model.model.layers:
        assert type(layer.self_attn.attn) is Attention
        assert layer.self_attn.attn.attn_backend.__module__.startswith("vllm.")


QUESTIONS = ("what color is the circle ?", "how many stars are there ?")


@pytest.mark.parametrize("method", ["cdpruner", "recoverable"])
def test_one_image_two_questions(engine: Engine, reference: ReferenceLlava, method: str) -> None:
    """In one batch and one after the other, with every cache on, each gets what it asks for."""
    settings = {"method": method, "budget": 40}  # a KV block and more
    asks = [Ask([40], [settings], question) for question in QUESTIONS]
    own = []
    for ask, other in zip(asks, reversed(asks), strict=True):
        reference.ask(other.behind)
        foreign = reference.visual_tokens(picture(40), method, 40)
        mistaken, length = reference.generate(ask.prompt, [foreign], NEW_TOKENS)
        reference.ask(ask.behind)
        tokens = reference.visual_tokens(picture(40), method, 40)
        own.append(reference.generate(ask.prompt, [tokens], NEW_TOKENS)[0])
        assert mistaken != own[-1], "the other question's tokens would not be noticed"
        assert length == len(tokens) + len(ask.prompt.split()) - 1
    for order in ([0, 1], [0], [1], [0], [1, 0]):
        outputs = engine.generate([asks[i] for i in order])
        assert [list(output.outputs[0].token_ids) for output in outputs] == [own[i] for i in order]
    assert outputs[0].num_cached_tokens > 0, "no cache was asked"


def hashes(engine: Engine, method: str, question: str) -> list[str]:
    """Of three images of a prompt, the first as it is and the others by a method."""
    settings = {"method": method, "budget": 11}
    ask = Ask([41, 42, 41], [None, settings, settings], question)
    made = engine.rendered(ask)
    engine.add(ask, "any", made)
    engine.finished()
    return made["mm_hashes"]["image"]


@pytest.mark.parametrize("method", [n for n in REDUCING if n in ("topk", "dpp", "cdpruner")])
def test_a_question_is_in_the_hash_of_images_whose_method_asks(engine: Engine, method: str) -> None:
    """And in no other's, so that they are reused for every question."""
    whole, *one = hashes(engine, method, QUESTIONS[0])
    other, *two = hashes(engine, method, QUESTIONS[1])
    assert whole == other
    assert (one == two) == (method != "cdpruner")
    assert not {*one} & {*two} or method != "cdpruner"


def test_a_prompt_of_token_ids_asks_the_same(engine: Engine) -> None:
    ask = Ask([43], [{"method": "cdpruner", "budget": 11}])
    ids = engine.llm.get_tokenizer().encode(ask.prompt)
    request = {name: value for name, value in ask.for_vllm.items() if name != "prompt"}
    outputs = engine.llm.generate(
        [ask.for_vllm, {**request, "prompt_token_ids": ids}], engine.params(), use_tqdm=False
    )
    assert outputs[0].prompt_token_ids == outputs[1].prompt_token_ids
    assert outputs[0].outputs[0].token_ids == outputs[1].outputs[0].token_ids


def test_a_request_cannot_set_a_question(engine: Engine) -> None:
    request = Ask([44], [{"method": "cdpruner", "budget": 11}]).for_vllm
    request["mm_processor_kwargs"]["reduction_questions"] = [[7]]
    with pytest.raises(VLLMValidationError, match="reduction_questions is not for requests"):
        engine.llm.generate([request], engine.params(), use_tqdm=False)


def test_samples_of_a_reduced_prompt_are_those_of_single_requests(engine: Engine) -> None:
    check_samples(engine, {"budget": 33})


def test_unreduced_images_are_bit_identical_to_vllm(engine: Engine) -> None:
    """Alone and in a mixed batch, they come out of vLLM's own class."""
    from vllm.model_executor.models.llava import LlavaForConditionalGeneration

    from vllm_ficoco.packed import PACKED_FIELD, pack
    from vllm_ficoco.settings import Reduction

    model = engine.model
    torch.manual_seed(0)
    pixels = torch.randn(4, 3, 168, 168)
    settings = [None, Reduction(budget=20), None, Reduction(method="tome", budget=5)]
    with torch.inference_mode():
        stock = LlavaForConditionalGeneration.embed_multimodal(model, pixel_values=pixels[::2])
        mixed = model.embed_multimodal(
            pixel_values=pixels, **{PACKED_FIELD: [pack(s) for s in settings]}
        )
        alone = model.embed_multimodal(
            pixel_values=pixels[::2], **{PACKED_FIELD: [pack(None), pack(None)]}
        )
    assert [len(tokens) for tokens in mixed] == [144, 20, 144, 5]
    for i in range(2):
        assert torch.equal(mixed[2 * i], stock[i])
        assert torch.equal(alone[i], stock[i])


@pytest.mark.parametrize("at_once", [1, 2, 6])
def test_an_image_does_not_depend_on_the_batch_it_is_in(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """The same settings and image give the same tokens alone and beside others, alike or not."""
    from vllm_ficoco.packed import PACKED_FIELD, pack
    from vllm_ficoco.settings import Reduction

    torch.manual_seed(1)
    pixels = torch.randn(6, 3, 168, 168)
    settings = [Reduction(method=REDUCING[i % 3], budget=30 + i // 5) for i in range(6)]
    monkeypatch.setattr(engine.model, "images_at_once", at_once)
    with torch.inference_mode():
        together = engine.model.embed_multimodal(
            pixel_values=pixels, **{PACKED_FIELD: [pack(s) for s in settings]}
        )
        for i, reduction in enumerate(settings):
            (alone,) = engine.model.embed_multimodal(
                pixel_values=pixels[i : i + 1], **{PACKED_FIELD: [pack(reduction)]}
            )
            torch.testing.assert_close(together[i], alone, rtol=1e-4, atol=1e-4)
