# SPDX-License-Identifier: Apache-2.0
"""LLaVA-OneVision: as LLaVA-NeXT, with more tiles, which the model shrinks where they are many.

Of the frames of its videos it makes tokens like any image's, and then fewer, by bilinear
interpolation: of 27 x 27 patches 14 x 14 tokens. One newline stands behind the last frame.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionDummyInputsBuilder,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageSize

from vllm_ficoco.models.frames import FramesModel, FramesProcessor, Pooled
from vllm_ficoco.models.layered import FLAT_TOWER
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


class ReducingLlavaOnevisionProcessor(
    TiledProcessor, FramesProcessor, LlavaOnevisionMultiModalProcessor
):
    """LLaVA-OneVision's."""


@MULTIMODAL_REGISTRY.register_processor(
    ReducingLlavaOnevisionProcessor,
    info=ReducingLlavaOnevisionInfo,
    dummy_inputs=LlavaOnevisionDummyInputsBuilder,
)
class ReducingLlavaOnevisionForConditionalGeneration(
    FramesModel, TiledModel, LlavaOnevisionForConditionalGeneration
):
    """vLLM's LLaVA-OneVision with a visual token budget per image and video."""

    hf_to_vllm_mapper = FLAT_TOWER | LlavaOnevisionForConditionalGeneration.hf_to_vllm_mapper

    @property
    def pooled(self) -> Pooled:
        """A token is a weighted mean of patches that were projected, and its query and key are such
        means of theirs: it has no patches of its own that attention could be summed over."""

        def looks(heads: Tensor) -> Tensor:
            fewer: Tensor = self.apply_pooling(heads.flatten(0, 1))
            return fewer.unflatten(0, heads.shape[:2])

        return Pooled(lambda hidden: self.apply_pooling(self.multi_modal_projector(hidden)), looks)

    def _process_video_pixels(self, inputs: Any) -> Any:
        """As vLLM's, which returns videos of different lengths with a dimension too many: its
        runner stops at that, and with it the engine."""
        embedded: Any = super()._process_video_pixels(inputs)
        if isinstance(embedded, torch.Tensor):
            return embedded
        return [video.flatten(0, -2) for video in embedded]
