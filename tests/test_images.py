# SPDX-License-Identifier: Apache-2.0
"""What becomes of an image's pixels before the tower: the same as in vLLM. No engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, LlavaProcessor, SiglipImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from vllm.config import ModelConfig
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal.processing import InputProcessingContext

from vllm_ficoco.models.llava import ReducingLlavaProcessor
from vllm_ficoco.models.pixels import PlainPixels
from vllm_ficoco.tiny_llava import CHECKPOINT

SIZES = ((168, 168), (336, 336), (1280, 960), (97, 333), (31, 8))


def processor(cls: Any, **options: Any) -> Any:
    """Of the shipped model, on vLLM's own context."""
    config = ModelConfig(model=str(CHECKPOINT), dtype="bfloat16", **options)
    info = LlavaProcessingInfo(InputProcessingContext(config, config_tokenizer(config)))
    return cls(info, LlavaDummyInputsBuilder(info))


def config_tokenizer(config: ModelConfig) -> Any:
    from vllm.tokenizers import cached_tokenizer_from_config

    return cached_tokenizer_from_config(config)


def image(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    generator = np.random.default_rng(sum(size))
    levels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(levels).convert(mode)


def pixels(of: Any, *images: Any, **kwargs: Any) -> list[torch.Tensor]:
    items = of.info.parse_mm_data({"image": [*images]})
    made = of("<image>" * len(images) + " what ?", items, None, kwargs, None)
    return [item["pixel_values"].data for item in made["mm_kwargs"]["image"]]


IMAGES = [
    *(image(size) for size in SIZES),
    image((50, 40), "L"),
    image((50, 40), "RGBA"),
    np.asarray(image((60, 70))),
]


@pytest.mark.parametrize("asked", [{}, {"do_center_crop": False}, {"size": {"shortest_edge": 200}}])
def test_pixels_are_those_of_vllm(asked: dict[str, Any]) -> None:
    """Bit by bit; also with options of the request."""
    if asked:
        images = [image((168, 168)), image((168, 168))]
    else:
        images = IMAGES
    stock, ours = processor(LlavaMultiModalProcessor), processor(ReducingLlavaProcessor)
    due, made = pixels(stock, *images, **asked), pixels(ours, *images, **asked)
    assert len(due) == len(images)
    for one, other in zip(due, made, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


CLIP = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
SIGLIP = {"size": {"height": 384, "width": 384}}


@pytest.mark.parametrize(
    "hugging_face",
    [
        CLIPImageProcessor(**CLIP),
        CLIPImageProcessor(**CLIP, do_normalize=False),
        CLIPImageProcessor(**CLIP, do_rescale=False),
        CLIPImageProcessor(size={"height": 90, "width": 70}, do_center_crop=False),
        SiglipImageProcessor(**SIGLIP),
        SiglipImageProcessor(**SIGLIP, resample=Image.Resampling.BILINEAR),
    ],
)
def test_pixels_are_those_of_the_image_processor(hugging_face: Any) -> None:
    """Bit by bit, alone and beside others, whatever it is set to; and it is not called for them."""
    images = [image(size) for size in SIZES]
    due = hugging_face(images=images, return_tensors="pt")["pixel_values"]
    plain = PlainPixels(hugging_face)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(hugging_face), "preprocess", None)
        made = plain(images)["pixel_values"]
        alone = torch.cat([plain([one])["pixel_values"] for one in images])
    assert made.dtype == due.dtype and torch.equal(made, due) and torch.equal(alone, due)


@pytest.mark.parametrize(
    "hugging_face",
    [
        CLIPImageProcessor(size={"shortest_edge": 40}, do_center_crop=False),
        CLIPImageProcessor(**CLIP, do_resize=False, do_center_crop=False),
        CLIPImageProcessorPil(**CLIP),
    ],
)
def test_an_image_processor_of_another_kind_is_called(hugging_face: Any) -> None:
    one = image((97, 333))
    due = hugging_face(images=[one], return_tensors="pt")["pixel_values"]
    assert torch.equal(PlainPixels(hugging_face)([one], return_tensors="pt")["pixel_values"], due)


def test_pixels_by_the_server_s_options_are_those_of_vllm() -> None:
    options = {"mm_processor_kwargs": {"do_normalize": False}}
    stock = processor(LlavaMultiModalProcessor, **options)
    ours = processor(ReducingLlavaProcessor, **options)
    (due,), (made,) = pixels(stock, IMAGES[1]), pixels(ours, IMAGES[1])
    assert torch.equal(due, made)
    assert not torch.equal(made, pixels(processor(ReducingLlavaProcessor), IMAGES[1])[0])


def test_no_text_is_made_for_the_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hugging Face processor writes and tokenizes one, which vLLM throws away."""
    ours = processor(ReducingLlavaProcessor)

    def called(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("more than the image processor is called")

    monkeypatch.setattr(LlavaProcessor, "__call__", called)
    assert pixels(ours, IMAGES[0], visual_token_budget=16)[0].shape == (3, 168, 168)
