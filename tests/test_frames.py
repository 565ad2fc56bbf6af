# SPDX-License-Identifier: Apache-2.0
"""Videos of LLaVA in the processor: as many placeholders as asked for, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from vllm.exceptions import VLLMValidationError

from tests.checkpoints import random_llava_next_video, random_llava_onevision
from tests.test_auto import Processor
from tests.videos import filmed
from vllm_ficoco.models.processing import COUNTS_KEYS
from vllm_ficoco.vision.geometry import UnsupportedModel, geometry_of
from vllm_ficoco.vision.layout import Layout

MODELS: dict[str, Callable[[Any], Any]] = {
    "onevision": lambda folder: random_llava_onevision(folder, side=7),
    "next-video": random_llava_next_video,
}


@pytest.fixture(scope="module", params=MODELS)
def processor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of frames of 4 x 4 tokens."""
    return Processor(MODELS[request.param](tmp_path_factory.mktemp("model") / "model"))


def shown(processor: Processor, *lengths: int, **kwargs: Any) -> tuple[list[int], list[Layout]]:
    """Videos of so many frames: how many tokens of each there are, and their layouts."""
    items = {"video": [filmed(frames, seed=frames) for frames in lengths]}
    prompt = "<video> " * len(lengths) + "what ?"
    parsed = processor.of.info.parse_mm_data(items, validate=False)
    made = processor.of(prompt, parsed, None, kwargs, processor.cache)
    counts = [place.length for place in made["mm_placeholders"]["video"]]
    return counts, [packed.layout for packed in made[COUNTS_KEYS["video"]]]


def test_a_video_has_as_many_tokens_as_it_is_to_have(processor: Processor) -> None:
    closed = processor.of.info.get_hf_config().model_type == "llava_onevision"
    for frames in (1, 2, 5):
        layout = Layout((4, 4), frames=frames, closed=closed)
        whole = 16 * frames + closed
        assert layout.tokens == whole
        assert shown(processor, frames) == ([whole], [layout])
        for budget in (1 + closed, frames + closed, 7, whole - 1, whole, whole + 9):
            counts = [min(budget, whole)]
            assert shown(processor, frames, visual_token_budget=budget) == (counts, [layout])


@pytest.mark.parametrize(
    ("kwargs", "because"),
    [
        ({"do_sample_frames": True, "num_frames": 2}, "leave out what changes its frames"),
        ({"size": {"height": 28, "width": 28}, "do_center_crop": False}, "28 x 28 pixels"),
        ({"reduction": {"method": "tome", "budget": 9}}, "tome (reduces in|needs layers of) the"),
        ({"reduction": {"method": "resize", "budget": 9}}, "resize"),
        ({"visual_token_budget": 0}, "a whole number from 1"),
    ],
    ids=str,
)
def test_what_is_refused(processor: Processor, kwargs: dict[str, Any], because: str) -> None:
    """Options that change frames stop vLLM's own engine, with a budget or without one."""
    asked = [kwargs]
    if "reduction" not in kwargs and "visual_token_budget" not in kwargs:
        asked.append({**kwargs, "visual_token_budget": 5})
    for said in asked:
        with pytest.raises(VLLMValidationError, match=because):
            shown(processor, 5, **said)


def test_a_closing_newline_stays(processor: Processor) -> None:
    if not shown(processor, 1)[1][0].closed:
        pytest.skip("there is none")
    with pytest.raises(VLLMValidationError, match="at least 2 for a video of 81 visual tokens"):
        shown(processor, 5, visual_token_budget=1)


def test_frames_that_vllm_miscounts_are_refused(processor: Processor) -> None:
    """Of squares that do not fit it counts ceil(7 / 2) tokens a row of patches and makes 3; and
    OneVision's it makes by a stride of 2, whatever stride it counts by."""
    config = AutoConfig.from_pretrained(processor.of.info.ctx.model_config.model)
    if config.model_type != "llava_next_video":
        assert geometry_of(config).grid == (7, 7), "interpolation makes as many as are counted"
        config.spatial_pool_stride = 3
        with pytest.raises(UnsupportedModel, match="spatial_pool_stride = 3"):
            geometry_of(config)
        return
    config.vision_config.image_size = 49
    with pytest.raises(UnsupportedModel, match="7 x 7 patches"):
        geometry_of(config)


def test_queries_and_keys_follow_their_tokens() -> None:
    """LLaVA-NeXT-Video's squares: of numbers in place of heads, the mean is what is pooled."""
    from vllm.model_executor.models.llava_next_video import LlavaNextVideoPooler

    from vllm_ficoco.models.llava_next_video import ReducingLlavaNextVideoForConditionalGeneration

    vision = SimpleNamespace(image_size=48, patch_size=6)
    config = SimpleNamespace(
        spatial_pool_mode="average", spatial_pool_stride=2, vision_config=vision
    )
    patches = torch.rand(3, 2, 1 + 64, 5)
    model = SimpleNamespace(
        config=config,
        geometry=SimpleNamespace(grid=(8, 8), has_cls=True),
        vision_resampler=LlavaNextVideoPooler(config),
        multi_modal_projector=None,
    )
    pooled = ReducingLlavaNextVideoForConditionalGeneration.pooled.fget(model)
    looks = pooled.looks(patches)
    assert torch.equal(looks[:, :, 0], patches[:, :, 0])
    due = pooled.tokens(patches[:, 0, 1:])
    torch.testing.assert_close(looks[:, 0, 1:].unflatten(1, (16, pooled.unit)).mean(2), due)
