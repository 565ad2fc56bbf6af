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


class ReducingLlavaProcessor(ReducingProcessor, LlavaMultiModalProcessor):
    """LLaVA with a CLIP or SigLIP tower."""

    @cached_property
    def _plain_images(self) -> Any:
        """The image processor, where nobody has set an option of it."""
        set_by_server = self.info.ctx.get_mm_config().mm_processor_kwargs
        if set_by_server:
            return None
        return PlainPixels(self.info.get_hf_processor().image_processor)

    def seen_of(self, width: int, height: int) -> tuple[float, float, float, float]:
        """CLIP's processors scale an image by its shorter side and cut the middle out."""
        processor = self.info.get_hf_processor().image_processor
        if not getattr(processor, "do_center_crop", False):
            return super().seen_of(width, height)
        shortest = (processor.size or {}).get("shortest_edge")
        scale = shortest / min(width, height) if processor.do_resize and shortest else 1.0
        seen = []
        for side, name in ((width, "width"), (height, "height")):
            share = processor.crop_size[name] / (side * scale)
            seen.append(((1 - share) / 2, (1 + share) / 2))
        (left, right), (top, bottom) = seen
        return left, top, right, bottom

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
