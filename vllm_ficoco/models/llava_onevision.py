# SPDX-License-Identifier: Apache-2.0
"""LLaVA-OneVision: as LLaVA-NeXT, with more tiles, which the model shrinks where they are many.

Its images; videos are as in vLLM.
"""

from __future__ import annotations

from functools import cached_property

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
    """vLLM's, which takes one size for that of the largest image, whatever the configuration.

    That one lies. One that stands has more rows, each with a newline: vLLM reserves too little for
    it and refuses it.
    """

    def get_image_size_with_most_features(self) -> ImageSize:
        return self._largest

    @cached_property
    def _largest(self) -> ImageSize:
        """Of all images that fill a grid of tiles, but for some rows or columns of patches."""
        encoder = self.get_vision_encoder_info()
        side, pixels = encoder.get_patch_grid_length(), encoder.get_image_size()
        cuts = [patches * pixels // side for patches in range(side)]
        sizes = [
            ImageSize(*size)
            for height, width in self.get_hf_config().image_grid_pinpoints
            for cut in cuts
            for size in ((width, height - cut), (width - cut, height))
        ]
        return max(
            (super().get_image_size_with_most_features(), *sizes),
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
