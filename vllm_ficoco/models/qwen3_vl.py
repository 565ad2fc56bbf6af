# SPDX-License-Identifier: Apache-2.0
"""Qwen3-VL, with and without experts: visual tokens have levels for more layers (deepstack)."""

from __future__ import annotations

from itertools import groupby

from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl_moe import (
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLMoeProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing.processor import PromptUpdateDetails

from vllm_ficoco.models.native import NativeModel, NativeProcessor
from vllm_ficoco.models.processing import CountedDetails
from vllm_ficoco.packed import Packed


class ReducingQwen3VLProcessor(NativeProcessor, Qwen3VLMultiModalProcessor):
    """Qwen3-VL's.

    Before every frame of a video stands when it is, and marks stand around it. All of that stays,
    also of a frame of which nothing else does.
    """

    def _shortened(self, whole: PromptUpdateDetails, packed: Packed) -> CountedDetails:
        if packed.layout is None or not packed.layout.is_video:
            return super()._shortened(whole, packed)
        token = self.info.get_hf_config().video_token_id
        self.check_count(whole.full.count(token), packed.layout)
        if packed.reduction is None:
            return CountedDetails(whole.full, whole.is_embed)
        plans = self.geometry.parts(packed.reduction, layout=packed.layout)
        kept = {plan.part: plan.keep for plan in plans}
        full: list[int] = []
        frame = -1
        for is_visual, run in groupby(whole.full, key=token.__eq__):
            frame += is_visual
            full += [token] * kept.get(frame, 0) if is_visual else run
        return CountedDetails(full, whole.is_embed)


@MULTIMODAL_REGISTRY.register_processor(
    ReducingQwen3VLProcessor,
    info=Qwen3VLProcessingInfo,
    dummy_inputs=Qwen3VLDummyInputsBuilder,
)
class ReducingQwen3VLForConditionalGeneration(NativeModel, Qwen3VLForConditionalGeneration):
    """vLLM's Qwen3-VL with a visual token budget per image."""


@MULTIMODAL_REGISTRY.register_processor(
    ReducingQwen3VLProcessor,
    info=Qwen3VLMoeProcessingInfo,
    dummy_inputs=Qwen3VLDummyInputsBuilder,
)
class ReducingQwen3VLMoeForConditionalGeneration(NativeModel, Qwen3VLMoeForConditionalGeneration):
    """vLLM's Qwen3-VL-MoE with a visual token budget per image."""
