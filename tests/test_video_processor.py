# SPDX-License-Identifier: Apache-2.0
"""Videos in Qwen-VL's processors: counts, hashes, positions and what is refused. No engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from vllm.config import ModelConfig
from vllm.exceptions import VLLMValidationError
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.cache import MultiModalProcessorOnlyCache

from tests.checkpoints import random_qwen
from tests.pictures import drawn
from tests.videos import filmed
from vllm_ficoco import plugin
from vllm_ficoco.models.processing import COUNTS_KEYS, RefusedImage, RefusedPositions

FAMILIES = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl")


class Processor:
    """vLLM's with our mixin, and a cache."""

    def __init__(self, model: Any, **options: Any) -> None:
        plugin.register()
        config = ModelConfig(model=str(model), dtype="float32", **options)
        self.of: Any = MULTIMODAL_REGISTRY.create_processor(config)
        self.cache = MultiModalProcessorOnlyCache(config)

    def __call__(
        self,
        *videos: Any,
        images: Sequence[Any] = (),
        uuids: Sequence[str | None] | None = None,
        **kwargs: Any,
    ) -> Any:
        """What the engine would get."""
        shown = {"image": [*images], "video": [*videos]}
        items = self.of.info.parse_mm_data(
            {m: all for m, all in shown.items() if all}, validate=False
        )
        pads = [f"<|vision_start|> <|{m}_pad|> <|vision_end|>" for m in shown for _ in shown[m]]
        of_videos = {"video": uuids} if uuids else None
        return self.of(f"{' '.join(pads)} what ?", items, of_videos, kwargs, self.cache)

    @property
    def video_token(self) -> int:
        return int(self.of.info.get_hf_config().video_token_id)


@pytest.fixture(scope="module", params=FAMILIES)
def processor(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Processor:
    return Processor(random_qwen(tmp_path_factory.mktemp("qwen"), request.param))


def video(
    frames: int, size: tuple[int, int] = (112, 84), seed: int = 0, fps: float = 2.0
) -> tuple[np.ndarray, dict[str, Any]]:
    """As vLLM's loader gives it."""
    about = {
        "fps": fps,
        "duration": frames / fps,
        "total_num_frames": frames,
        "frames_indices": list(range(frames)),
        "video_backend": "opencv",
        "do_sample_frames": False,
    }
    return filmed(frames, size, seed), about


def kept(made: Any) -> list[int]:
    return [place.get_num_embeds() for place in made["mm_placeholders"]["video"]]


def hashes(made: Any) -> list[str]:
    return list(made["mm_hashes"]["video"])


def reduction(budget: int, method: str = "topk", **options: Any) -> dict[str, Any]:
    return {"method": method, "budget": budget, "options": options}


def test_every_budget_is_kept_exactly(processor: Processor) -> None:
    """And a frame of Qwen3-VL keeps what stands around it, whatever stays of it."""
    shown = video(7)
    whole = processor(shown)
    [tokens] = kept(whole)
    around = len(whole["prompt_token_ids"]) - tokens
    for budget in range(1, tokens + 3):
        made = processor(shown, visual_token_budget=budget)
        assert kept(made) == [min(budget, tokens)]
        assert made["prompt_token_ids"].count(processor.video_token) == min(budget, tokens)
        assert len(made["prompt_token_ids"]) == around + min(budget, tokens)
        [packed] = made[COUNTS_KEYS["video"]]
        assert packed.layout.tokens == tokens and packed.layout.frames == 4
        assert (packed.reduction is not None) == (budget < tokens)


def test_a_hash_is_a_video_s_own(processor: Processor) -> None:
    """Whatever stands beside it, and again from the cache; whole, it has vLLM's."""
    one, other, image = video(4), video(4, seed=1), drawn(100, size=(196, 140))
    alone = processor(one, reduction=reduction(9))
    for _ in range(2):
        both = processor(
            one,
            other,
            images=[image],
            reduction={"image": None, "video": [reduction(9), reduction(5)]},
        )
        assert hashes(both)[0] == hashes(alone)[0] and kept(both) == [9, 5]
        assert both["mm_hashes"]["image"] == processor(one, images=[image])["mm_hashes"]["image"]
        budgets = [packed.reduction.budget for packed in both[COUNTS_KEYS["video"]]]
        assert budgets == [9, 5]
    found = [
        hashes(processor(one, reduction=given)) for given in (None, reduction(8), reduction(9))
    ]
    found.append(hashes(processor(one, reduction=reduction(9, "uniform"))))
    assert len({tuple(each) for each in found}) == 4
    plain = type(processor.of).__mro__[2]
    assert hashes(processor(one)) == found[0] and plain.__module__.startswith("vllm_ficoco")


def test_a_question_is_read_behind_a_video(processor: Processor) -> None:
    asked = {"reduction": reduction(9, "cdpruner")}
    [packed] = processor(video(4), **asked)[COUNTS_KEYS["video"]]
    tokenizer = processor.of.info.get_tokenizer()
    assert tokenizer.decode(packed.question) == "what ?"


def test_by_its_uuid_alone(processor: Processor) -> None:
    """A video is found with the settings that it was seen with, and with no other."""
    sent = processor(video(4), uuids=["v"], reduction=reduction(9))
    found = processor(None, uuids=["v"], reduction=reduction(9))
    assert kept(found) == kept(sent) == [9]
    assert found[COUNTS_KEYS["video"]] == sent[COUNTS_KEYS["video"]]
    with pytest.raises(VLLMValidationError, match="Video 0 has a uuid and no data"):
        processor(None, uuids=["v"], reduction=reduction(8))


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"visual_token_budget": "auto"}, "a number for a video"),
        ({"reduction": reduction(9, "resize")}, r"reduction\.method = 'resize'.*one of "),
        ({"reduction": reduction(9, "tome")}, r"reduction\.method = 'tome'.*one of "),
        ({"reduction": reduction(9, "topk", newlines="all")}, "videos have no newline tokens"),
        ({"reduction": [reduction(9)] * 2}, r"one entry per video \(1\)"),
        ({"reduction": {"video": [reduction(9, "fastv")]}}, r"reduction\.video\[0\]\.method"),
        ({"reduction_where": {}}, "reduction_where is not for requests"),
    ],
)
def test_refused(processor: Processor, kwargs: dict[str, Any], says: str) -> None:
    with pytest.raises(VLLMValidationError, match=says):
        processor(video(4), **kwargs)


def test_patches_that_the_tower_cannot_take_in(processor: Processor) -> None:
    """Hugging Face's own Qwen3-VL makes none such."""
    if processor.of.geometry.videos != "by_frame":
        with pytest.raises(VLLMValidationError, match="Patches of the video have 588 values"):
            processor(video(4), visual_token_budget=5, temporal_patch_size=1)


def test_a_list_does_not_say_what_it_is_for(processor: Processor) -> None:
    with pytest.raises(VLLMValidationError, match=r'\{"image": \[\.\.\.\], "video": \[\.\.\.\]\}'):
        processor(video(4), images=[drawn(100, size=(196, 140))], visual_token_budget=[5])


def test_embeddings_are_not_reduced(processor: Processor) -> None:
    of = processor.of.info
    grid, width = torch.tensor([[2, 6, 8]]), of.get_hf_config().text_config.hidden_size
    ready = {
        "video_embeds": torch.zeros(24, width * (1 + processor.of.geometry.deepstack)),
        "video_grid_thw": grid,
        **({"timestamps": [[0.5, 1.5]]} if processor.of.geometry.videos == "by_frame" else {}),
    }
    items = of.parse_mm_data({"video": ready}, validate=False)
    with pytest.raises(VLLMValidationError, match="left out with video_embeds inputs"):
        processor.of("<|video_pad|>", items, None, {"visual_token_budget": 5}, processor.cache)


def test_what_is_between_frames_is_known_before_they_are_seen(processor: Processor) -> None:
    """In Qwen3-VL; elsewhere frames may share a budget by what is in them."""
    unique = {"reduction": reduction(9, frames="unique")}
    if processor.of.geometry.videos != "by_frame":
        assert kept(processor(video(4), **unique)) == [9]
        return
    with pytest.raises(RefusedImage, match=r"reduction\.options\.frames = 'unique'"):
        processor(video(4), **unique)
    with pytest.raises(RefusedImage, match="between the frames") as refused:
        processor(video(4), images=[drawn(100, size=(196, 140))], reduction=reduction(9, "fastv"))
    assert (refused.value.modality, refused.value.image) == ("video", 0)


def test_the_video_that_is_refused_is_named(processor: Processor) -> None:
    """Also where the one before it is in the cache."""
    if processor.of.geometry.videos == "by_frame":
        pytest.skip("its methods reach every budget")
    first, second = video(4), video(8)
    asked = [reduction(9, "vidcom2"), reduction(3, "vidcom2")]
    processor(first, reduction=asked[:1])
    with pytest.raises(RefusedImage, match=r"reduction\[1\]\.budget = 3 .*at least 4") as refused:
        processor(first, second, reduction=asked)
    assert (refused.value.modality, refused.value.image) == ("video", 1)


def test_a_long_time_is_no_way_out_of_the_rotary_table(tmp_path: Any) -> None:
    """In Qwen2.5-VL a video takes positions by its time, which clients say."""
    processor = Processor(random_qwen(tmp_path, "qwen2.5-vl"))
    assert kept(processor(video(8, fps=0.01), visual_token_budget=9)) == [9]
    for kwargs in {"visual_token_budget": 9}, {}:
        with pytest.raises(RefusedPositions, match="images and videos of this prompt take"):
            processor(video(8, fps=0.001), **kwargs)
