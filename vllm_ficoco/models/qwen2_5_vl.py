# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5-VL: as Qwen2-VL, but most layers of the tower see a window of the image."""

from __future__ import annotations

from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_ficoco.models.native import NativeModel, NativeProcessor


class ReducingQwen2_5_VLProcessor(NativeProcessor, Qwen2_5_VLMultiModalProcessor):
    """Qwen2.5-VL's."""


@MULTIMODAL_REGISTRY.register_processor(
    ReducingQwen2_5_VLProcessor,
    info=Qwen2_5_VLProcessingInfo,
    dummy_inputs=Qwen2_5_VLDummyInputsBuilder,
)
class ReducingQwen2_5_VLForConditionalGeneration(NativeModel, Qwen2_5_VLForConditionalGeneration):
    """vLLM's Qwen2.5-VL with a visual token budget per image."""
