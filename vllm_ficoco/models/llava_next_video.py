# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT-Video: the frames of one video, of which squares of patches are pooled to one token.

vLLM shows it videos alone, and one of them in a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from vllm.model_executor.models.llava_next_video import (
    LlavaNextVideoDummyInputsBuilder,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoMultiModalProcessor,
    LlavaNextVideoProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_ficoco.models.frames import FramesModel, FramesProcessor, Pooled
from vllm_ficoco.models.layered import FLAT_TOWER
from vllm_ficoco.vision.layout import Layout


class ReducingLlavaNextVideoProcessor(FramesProcessor, LlavaNextVideoMultiModalProcessor):
    """LLaVA-NeXT-Video's."""

    def layout_of(
        self, width: int, height: int, kwargs: Mapping[str, object] | None = None
    ) -> Layout:
        """That of one frame: there are no images."""
        return self.video_layout(1)


@MULTIMODAL_REGISTRY.register_processor(
    ReducingLlavaNextVideoProcessor,
    info=LlavaNextVideoProcessingInfo,
    dummy_inputs=LlavaNextVideoDummyInputsBuilder,
)
class ReducingLlavaNextVideoForConditionalGeneration(
    FramesModel, LlavaNextVideoForConditionalGeneration
):
    """vLLM's LLaVA-NeXT-Video with a visual token budget per video."""

    hf_to_vllm_mapper = FLAT_TOWER | LlavaNextVideoForConditionalGeneration.hf_to_vllm_mapper

    @property
    def pooled(self) -> Pooled:
        """A token is the mean (or the largest) of a square of patches, and is projected then."""
        stride, side = self.config.spatial_pool_stride, self.geometry.grid[0]
        first = int(self.geometry.has_cls)

        def looks(heads: Tensor) -> Tensor:
            grid = heads[..., first:, :].unflatten(-2, (side // stride, stride, -1, stride))
            squares = grid.transpose(-4, -3).flatten(-5, -2)
            return torch.cat([heads[..., :first, :], squares], -2)

        return Pooled(self.vision_resampler, looks, stride**2, self.multi_modal_projector)
