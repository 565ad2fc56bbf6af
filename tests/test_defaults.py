# SPDX-License-Identifier: Apache-2.0
"""Defaults of the environment where no front end of ours is: what the processor makes of them, and
who is told that the rest does nothing. No engine."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from vllm.config import ModelConfig
from vllm.exceptions import VLLMValidationError
from vllm.multimodal import MULTIMODAL_REGISTRY

from tests.checkpoints import random_qwen
from tests.pictures import drawn
from tests.videos import filmed
from vllm_ficoco import plugin
from vllm_ficoco.models import defaults
from vllm_ficoco.models.processing import COUNTS_KEYS, RefusedImage
from vllm_ficoco.tiny_llava import CHECKPOINT


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No front end, and nothing told."""
    monkeypatch.setattr(defaults, "_settled", False)
    for name in ("VLLM_PLUGINS", defaults.DIRECT, *defaults.useless()):
        monkeypatch.delenv(name, raising=False)
    defaults.tell_at_start.cache_clear()
    defaults.tell_of_no_front_end.cache_clear()
    yield
    defaults.tell_at_start.cache_clear()
    defaults.tell_of_no_front_end.cache_clear()


@pytest.fixture
def told(nothing_said: None) -> Iterator[list[str]]:
    """What is logged."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(defaults.logger.name)
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.WARNING)
    yield messages
    logger.setLevel(level)
    logger.removeHandler(handler)


def processor(model: Path = CHECKPOINT, **options: Any) -> Any:
    plugin.register()
    config = ModelConfig(model=str(model), dtype="float32", **options)
    return MULTIMODAL_REGISTRY.create_processor(config)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_qwen(tmp_path_factory.mktemp("qwen"), "qwen2.5-vl")


def made(of: Any, data: dict[str, Any], **kwargs: Any) -> Any:
    """What the engine would get of images and videos."""
    if hasattr(of.info.get_hf_config(), "image_token_index"):
        marks = {"image": "<image>"}
    else:
        marks = {m: f"<|vision_start|> <|{m}_pad|> <|vision_end|>" for m in ("image", "video")}
    prompt = " ".join(marks[kind] for kind, items in data.items() for _ in items)
    return of(f"{prompt} what ?", of.info.parse_mm_data(data), None, kwargs, None)


def held(engine_input: Any) -> list[tuple[Any, ...]]:
    """Of every image: its hash, the tokens that it takes, and its method and budget."""
    found = [packed.reduction for packed in engine_input[COUNTS_KEYS["image"]]]
    hashes, places = engine_input["mm_hashes"]["image"], engine_input["mm_placeholders"]["image"]
    return [
        (name, place.length, one and (one.method, one.budget))
        for name, place, one in zip(hashes, places, found, strict=True)
    ]


IMAGES = {"image": [drawn(30), drawn(60, 1)]}


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"BUDGET": "48"}, {"visual_token_budget": 48}),
        ({"BUDGET": "40", "METHOD": "tome"}, {"reduction": {"method": "tome", "budget": 40}}),
        ({"BUDGET": "auto"}, {"visual_token_budget": "auto"}),
        ({"BUDGET": "500"}, {}),
        ({"METHOD": "tome"}, {}),
    ],
)
def test_a_default_is_what_the_prompt_might_have_said(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], said: dict[str, Any]
) -> None:
    """The same hashes too: an image is found in the same caches."""
    due = made(processor(), IMAGES, **said)
    for name, text in environment.items():
        monkeypatch.setenv(f"FICOCO_DEFAULT_{name}", text)
    by_default = made(processor(), IMAGES)
    assert held(by_default) == held(due)
    assert by_default["prompt_token_ids"] == due["prompt_token_ids"]
    pairs = zip(by_default["mm_kwargs"]["image"], due["mm_kwargs"]["image"], strict=True)
    for one, other in pairs:
        for field in one:
            assert torch.equal(one[field].data, other[field].data)


def test_auto_is_among_the_budgets_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FICOCO_DEFAULT_BUDGET", "auto")
    monkeypatch.setenv("FICOCO_AUTO_BUDGETS", "1,77,5")
    assert [length for _, length, _ in held(made(processor(), IMAGES))] == [77, 77]


@pytest.mark.parametrize(
    ("said", "due"),
    [
        ({"visual_token_budget": 20}, [("score", 20)] * 2),
        ({"visual_token_budget": [20, None]}, [("score", 20), None]),
        ({"visual_token_budget": {"image": None}}, [None, None]),
        ({"reduction": {"method": "none"}}, [None, None]),
        ({"reduction": {"method": "topk", "budget": 9}}, [("topk", 9)] * 2),
        ({"visual_token_budget": None}, [("tome", 48)] * 2),
    ],
)
def test_what_a_prompt_says_wins(
    monkeypatch: pytest.MonkeyPatch, said: dict[str, Any], due: list[Any]
) -> None:
    monkeypatch.setenv("FICOCO_DEFAULT_BUDGET", "48")
    monkeypatch.setenv("FICOCO_DEFAULT_METHOD", "tome")
    assert [settings for *_, settings in held(made(processor(), IMAGES, **said))] == due


def test_where_a_front_end_settles_it_nothing_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says nothing of an image that is to stay whole."""
    whole = held(made(processor(), IMAGES))
    monkeypatch.setenv("FICOCO_DEFAULT_BUDGET", "48")
    of = processor()
    assert held(made(of, IMAGES)) != whole
    defaults.leave_to_front_end()
    assert held(made(of, IMAGES)) == whole


def test_room_is_made_for_whole_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what vLLM measures with when an engine starts: a prompt may say that its own stay so."""
    monkeypatch.setenv("FICOCO_DEFAULT_BUDGET", "48")
    [(_, length, settings)] = held(processor().get_dummy_mm_inputs({"image": 1}))
    assert (length, settings) == (144, None)


def test_videos_and_embeddings_stay_whole(monkeypatch: pytest.MonkeyPatch, qwen: Path) -> None:
    monkeypatch.setenv("FICOCO_DEFAULT_BUDGET", "9")
    frames = filmed(8)
    about = {
        "fps": 2.0,
        "duration": 4.0,
        "total_num_frames": 8,
        "frames_indices": [*range(8)],
        "video_backend": "opencv",
        "do_sample_frames": False,
    }
    engine_input = made(processor(qwen), {"image": [drawn(40)], "video": [(frames, about)]})
    assert [(n, s) for _, n, s in held(engine_input)] == [(9, ("score", 9))]
    assert [one.reduction for one in engine_input[COUNTS_KEYS["video"]]] == [None]
    embeds = {"image_embeds": torch.ones(16, 128), "image_grid_thw": torch.tensor([[1, 8, 8]])}
    of = processor(qwen, enable_mm_embeds=True)
    made_of_embeds = of(
        "<|vision_start|> <|image_pad|> <|vision_end|> what ?",
        of.info.parse_mm_data({"image": embeds}),
        None,
        {},
        None,
    )
    assert made_of_embeds["mm_placeholders"]["image"][0].length == 16


def test_an_image_that_cannot_have_the_default(monkeypatch: pytest.MonkeyPatch, qwen: Path) -> None:
    monkeypatch.setenv("FICOCO_DEFAULT_BUDGET", "3")
    monkeypatch.setenv("FICOCO_DEFAULT_METHOD", "resize")
    with pytest.raises(RefusedImage) as caught:
        made(processor(qwen), {"image": [drawn(40)]})
    assert caught.value.parameter == "visual_token_budget"
    for fragment in ("visual_token_budget = 3 ", "at least 4", "3 is FICOCO_DEFAULT_BUDGET"):
        assert fragment in str(caught.value)
    with pytest.raises(VLLMValidationError, match=r"visual_token_budget = 0 .*whole number"):
        made(processor(qwen), {"image": [drawn(40)]}, visual_token_budget=0)


@pytest.mark.parametrize(
    ("environment", "fragment"),
    [
        ({"BUDGET": "many"}, "'many' (FICOCO_DEFAULT_BUDGET"),
        ({"BUDGET": "9", "METHOD": "fastest"}, "unknown method fastest"),
        ({"BUDGET": "9", "METHOD": "fastv"}, "started with stages"),
        ({"BUDGET": "9", "METHOD": "resize"}, "by resize (FICOCO_DEFAULT_METHOD)"),
    ],
)
def test_a_wrong_default_stops_the_start(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], fragment: str
) -> None:
    for name, text in environment.items():
        monkeypatch.setenv(f"FICOCO_DEFAULT_{name}", text)
    with pytest.raises(ValueError) as caught:
        processor()
    assert fragment in str(caught.value)


def test_a_model_that_cannot_have_one_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FICOCO_DEFAULT_BUDGET", "9")
    with pytest.raises(ValueError, match=r"cannot be kept with this model: .*vision_feature"):
        processor(hf_overrides={"vision_feature_select_strategy": "full"})


def test_an_engines_processor_options_are_no_place_for_a_budget() -> None:
    with pytest.raises(ValueError, match="set FICOCO_DEFAULT_BUDGET, and FICOCO_DEFAULT_METHOD"):
        processor(mm_processor_kwargs={"visual_token_budget": 48})


# --- Who is told ----------------------------------------------------------------------------


def test_nobody_is_told_who_asks_for_no_front_end(
    monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    monkeypatch.setenv("FICOCO_DEFAULT_BUDGET", "48")
    made(processor(), IMAGES)
    assert told == []


def test_a_policy_without_a_front_end_is_told_at_the_start(
    monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    monkeypatch.setenv("FICOCO_MAX_BUDGET", "48")
    monkeypatch.setenv("FICOCO_STAGES", "2")
    of = processor()
    plugin.register()
    made(of, IMAGES)
    [message] = told
    for fragment in ("FICOCO_MAX_BUDGET, FICOCO_STAGES", "IGNORED", "VLLM_PLUGINS=vllm_ficoco,"):
        assert fragment in message


def test_a_front_end_that_nobody_attached_is_told_with_the_first_image(
    monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "vllm_ficoco,ficoco_server")
    of = processor()
    of.get_dummy_mm_inputs({"image": 1})
    assert told == [], "it may be attached yet"
    for _ in range(2):
        made(of, IMAGES)
    [message] = told
    assert "VLLM_PLUGINS=vllm_ficoco,ficoco_server" in message and defaults.DIRECT in message
    told.clear()
    defaults.tell_of_no_front_end.cache_clear()
    defaults.leave_to_front_end()
    made(of, IMAGES)
    assert told == []


def test_ray_serve_is_told_at_the_start(monkeypatch: pytest.MonkeyPatch, told: list[str]) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "vllm_ficoco,ficoco_server")
    plugin.register()
    assert told == []
    defaults.tell_at_start.cache_clear()
    monkeypatch.setitem(sys.modules, "ray.serve", ModuleType("ray.serve"))
    plugin.register()
    [message] = told
    assert "Ray Serve" in message and f"{defaults.DIRECT}=1" in message
    defaults.tell_at_start.cache_clear()
    monkeypatch.setenv(defaults.DIRECT, "1")
    plugin.register()
    assert len(told) == 1
