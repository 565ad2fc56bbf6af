# SPDX-License-Identifier: Apache-2.0
"""The paged KV cache holds the text and the budgets, gives all back, and shares what is equal."""

from __future__ import annotations

import math

import pytest
from vllm.exceptions import VLLMValidationError

from tests.engine.conftest import BLOCK, Ask, Engine

pytestmark = pytest.mark.engine

TEXT = len(["USER:", "what", "color", "is", "the", "circle", "?", "ASSISTANT:"])


def test_kv_tokens_are_text_plus_budgets(engine: Engine) -> None:
    asks = {
        "full": (Ask([11], [None]), 144),
        "third": (Ask([11], [{"budget": 48}]), 48),
        "ninth": (Ask([11], [{"budget": 16}]), 16),
        "one": (Ask([11], [{"method": "topk", "budget": 1}]), 1),
        "two": (Ask([12, 13], [{"budget": 30}, {"method": "tome", "budget": 20}]), 50),
    }
    free = engine.free_blocks
    for name, (ask, _) in asks.items():
        engine.add(ask, name)
    engine.llm.llm_engine.step()  # all fit one step: every prompt is computed
    expected = 0
    for name, (_, visual) in asks.items():
        tokens = TEXT + visual
        assert engine.held(name) == (tokens, math.ceil(tokens / BLOCK)), name
        expected += math.ceil(tokens / BLOCK)
    assert free - engine.free_blocks == expected
    while engine.llm.llm_engine.has_unfinished_requests():
        engine.llm.llm_engine.step()
    assert engine.free_blocks == free


def test_blocks_come_back_after_an_abort(engine: Engine) -> None:
    free = engine.free_blocks
    for i in range(4):
        engine.add(Ask([20 + i], [{"budget": 40 + i}]), f"abort{i}", max_tokens=200)
    for _ in range(3):
        engine.llm.llm_engine.step()
    assert engine.free_blocks < free
    engine.llm.llm_engine.abort_request([f"abort{i}" for i in range(4)])
    while engine.llm.llm_engine.has_unfinished_requests():
        engine.llm.llm_engine.step()
    assert engine.free_blocks == free


def test_more_requests_fit_a_pool(tight_engine: Engine) -> None:
    """23 blocks: four requests of 152 tokens and what they generate, or eleven of 32."""

    def generating_at_once(budget: int) -> int:
        for i in range(16):
            tight_engine.add(Ask([i], [{"budget": budget}]), f"fit{budget}x{i}", max_tokens=24)
        most = 0
        while tight_engine.llm.llm_engine.has_unfinished_requests():
            tight_engine.llm.llm_engine.step()
            running = tight_engine.scheduler.running
            most = max(most, sum(r.num_output_tokens > 0 for r in running))
        return most

    assert generating_at_once(144) == 4
    assert generating_at_once(24) >= 10


def test_equal_settings_hit_the_prefix_cache_and_different_ones_do_not(engine: Engine) -> None:
    def cached(settings: dict | None) -> int:
        (output,) = engine.generate([Ask([30], [settings])])
        return output.num_cached_tokens

    first = {"budget": 100}
    assert cached(first) == 0
    hit = cached(first)
    assert hit == (TEXT + 100) // BLOCK * BLOCK
    # Another spelling of the same settings.
    assert cached({"method": "score", "budget": 100, "options": {"alpha": None}}) == hit
    assert cached({"budget": 99}) == 0
    assert cached({"method": "tome", "budget": 100}) == 0
    assert cached({"budget": 100, "options": {"alpha": 0.5}}) == 0
    assert cached(None) == 0
    assert cached({"budget": 144}) > 0, "a budget of N is no reduction, and shares with none"


def test_a_neighbour_does_not_change_an_images_cache_entry(engine: Engine) -> None:
    """The first image's blocks are shared although the second image has another budget."""
    first, second = (
        Ask([31, 32], [{"budget": 90}, {"budget": 8}]),
        Ask([31, 32], [{"budget": 90}, {"budget": 9}]),
    )
    engine.generate([first])
    (output,) = engine.generate([second])
    assert output.num_cached_tokens == 64


def test_processor_cache_gives_each_image_its_own_settings(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a prompt's images only those that are not cached are processed, each with its budget."""
    processor = engine.llm.llm_engine.renderer.get_mm_processor()
    processed: list[int] = []
    original = processor._call_hf_processor

    def count(data: dict, kwargs: dict) -> object:
        processed.append(len(data["images"]))
        return original(data, kwargs)

    monkeypatch.setattr(processor, "_call_hf_processor", count)
    engine.generate([Ask([40], [{"budget": 21}])])
    (output,) = engine.generate([Ask([41, 40], [{"budget": 5}, {"budget": 21}])])
    assert len(output.prompt_token_ids) == TEXT + 26
    (output,) = engine.generate([Ask([40, 42], [{"budget": 21}, None])])
    assert len(output.prompt_token_ids) == TEXT + 21 + 144
    engine.generate([Ask([42, 41], [None, {"budget": 5}])])
    assert processed == [1, 1, 1], "one image was new each time, and at the end none"


def test_the_tower_never_sees_more_images_than_were_profiled(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM fills a batch by kept tokens; small budgets must not make it larger than memory."""
    tower = engine.model.reducing_tower
    seen: list[int] = []
    embed = tower._embed
    monkeypatch.setattr(tower, "_embed", lambda pixels: seen.append(len(pixels)) or embed(pixels))
    limit = engine.llm.llm_engine.vllm_config.scheduler_config.max_num_encoder_input_tokens // 144
    engine.generate(
        [Ask([100 + 3 * i + k for k in range(3)], [{"budget": 1}] * 3) for i in range(30)]
    )
    assert sum(seen) == 90
    assert max(seen) <= limit < 90


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"visual_token_budget": 0}, "visual_token_budget = 0"),
        ({"visual_token_budget": 1.5}, "visual_token_budget = 1.5"),
        ({"visual_token_budget": [3, 4]}, "one entry per image"),
        ({"visual_token_budget": 5, "reduction": {"budget": 5}}, "left out"),
        ({"reduction": {"method": "magic", "budget": 5}}, "one of"),
        ({"reduction": {"method": "tome", "budget": 5, "options": {"x": 1}}}, "known here"),
    ],
)
def test_bad_settings_are_refused_by_name(engine: Engine, kwargs: dict, says: str) -> None:
    request = Ask([1], [None]).for_vllm | {"mm_processor_kwargs": kwargs}
    with pytest.raises(VLLMValidationError, match=says):
        engine.llm.generate(request, engine.params(), use_tqdm=False)
    assert not engine.llm.llm_engine.has_unfinished_requests()


def test_a_server_wide_budget_is_refused_at_start(engine: Engine) -> None:
    """vLLM would take it and nothing would come of it."""
    renderer = engine.llm.llm_engine.renderer
    processor = renderer.get_mm_processor()
    config = processor.info.ctx.get_mm_config()
    before = config.mm_processor_kwargs
    config.mm_processor_kwargs = {"visual_token_budget": 64}
    try:
        with pytest.raises(ValueError, match="has no effect"):
            type(processor)(processor.info, processor.dummy_inputs)
    finally:
        config.mm_processor_kwargs = before
