# SPDX-License-Identifier: Apache-2.0
"""LLaVA-OneVision: as LLaVA-NeXT, with more tiles, which the model shrinks where they are many.

Its images; videos are as in vLLM.
"""

from __future__ import annotations

from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionDummyInputsBuilder,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageSize

from vllm_ficoco.models.llava_next import TiledModel, TiledProcessor


class ReducingLlavaOnevisionInfo(LlavaOnevisionProcessingInfo):
    """vLLM's, which takes the largest image for one that lies.

    One that stands has more rows, each with a newline: vLLM reserves too little for it and refuses
    it.
    """

    def get_image_size_with_most_features(self) -> ImageSize:
        lying = super().get_image_size_with_most_features()
        standing = ImageSize(width=lying.height, height=lying.width)
        return max(
            lying,
            standing,
            key=lambda size: self.get_num_image_tokens(
                image_width=size.width, image_height=size.height
            ),
        )


class ReducingLlavaOnevisionProcessor(TiledProcessor, LlavaOnevisionMultiModalProcessor):
    """LLaVA-OneVision's."""


@MULTIMODAL_REGISTRY.register_processor(
    ReducingLlavaOnevisionProcessor,
    info=ReducingLlavaOnevisionInfo,
    dummy_inputs=LlavaOnevisionDummyInputsBuilder,
)
class ReducingLlavaOnevisionForConditionalGeneration(
    TiledModel, LlavaOnevisionForConditionalGeneration
):
    """vLLM's LLaVA-OneVision with a visual token budget per image."""
