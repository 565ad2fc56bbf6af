# SPDX-License-Identifier: Apache-2.0
"""LLaVA-1.5: every image has the same number of visual tokens, on one grid."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from transformers import BatchFeature
from vllm.model_executor.models.llava import (
    BaseLlavaProcessingInfo,
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
    PixtralHFMultiModalProcessor,
    PixtralHFProcessingInfo,
    _build_llava_or_pixtral_hf_info,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import BaseDummyInputsBuilder, BaseMultiModalProcessor

from vllm_ficoco.models.encoder_graphs import EncoderGraphs
from vllm_ficoco.models.layered import FLAT_TOWER, LayeredModel
from vllm_ficoco.models.pixels import PlainPixels
from vllm_ficoco.models.processing import ReducingProcessor
from vllm_ficoco.preview import Area


def seen_by(processor: Any, width: int, height: int) -> Area:
    """Left, top, right and bottom of what an image processor leaves of an image, in its sides.

    CLIP's scale it by its shorter side and cut the middle out.
    """
    if not getattr(processor, "do_center_crop", False):
        return 0.0, 0.0, 1.0, 1.0
    size, crop = processor.size or {}, processor.crop_size
    if processor.do_resize and size.get("shortest_edge"):
        scale = size["shortest_edge"] / min(width, height)
        width, height = int(width * scale), int(height * scale)
    elif processor.do_resize:
        width, height = size["width"], size["height"]
    across, down = crop["width"] / width, crop["height"] / height
    return (1 - across) / 2, (1 - down) / 2, (1 + across) / 2, (1 + down) / 2


class ReducingLlavaProcessor(ReducingProcessor, LlavaMultiModalProcessor):
    """LLaVA with a CLIP or SigLIP tower."""

    @cached_property
    def _plain_images(self) -> Any:
        """The image processor, where nobody has set an option of it."""
        set_by_server = self.info.ctx.get_mm_config().mm_processor_kwargs
        if set_by_server:
            return None
        return PlainPixels(self.info.get_hf_processor().image_processor)

    def seen_of(self, width: int, height: int) -> Area:
        return seen_by(self.info.get_hf_processor().image_processor, width, height)

    def _call_hf_processor(
        self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]
    ) -> BatchFeature:
        """As vLLM's, whose Hugging Face processor merges options, writes a text with all
        placeholders and tokenizes it. vLLM needs the pixels alone: the same, from the same code."""
        if hf_kwargs or self._plain_images is None:
            return super()._call_hf_processor(hf_data, hf_kwargs)
        images = {"images": hf_data["images"]}
        return self.info.ctx.call_hf_processor(self._plain_images, images)


class ReducingPixtralProcessor(ReducingProcessor, PixtralHFMultiModalProcessor):
    """LLaVA with a Pixtral tower: as in vLLM, and a budget is refused."""


def _processor(
    info: BaseLlavaProcessingInfo, dummy_inputs: BaseDummyInputsBuilder
) -> BaseMultiModalProcessor:
    if isinstance(info, PixtralHFProcessingInfo):
        return ReducingPixtralProcessor(info, dummy_inputs)
    assert isinstance(info, LlavaProcessingInfo)
    return ReducingLlavaProcessor(info, dummy_inputs)


@MULTIMODAL_REGISTRY.register_processor(
    _processor,
    info=_build_llava_or_pixtral_hf_info,
    dummy_inputs=LlavaDummyInputsBuilder,
)
class ReducingLlavaForConditionalGeneration(
    LayeredModel, LlavaForConditionalGeneration, EncoderGraphs
):
    """vLLM's LLaVA with a visual token budget per image."""

    hf_to_vllm_mapper = FLAT_TOWER | LlavaForConditionalGeneration.hf_to_vllm_mapper
