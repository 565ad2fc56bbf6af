# SPDX-License-Identifier: Apache-2.0
"""Qwen2-VL: every image on a grid of its own, its tower in full attention."""

from __future__ import annotations

from vllm.model_executor.models.qwen2_vl import (
    Qwen2VLDummyInputsBuilder,
    Qwen2VLForConditionalGeneration,
    Qwen2VLMultiModalProcessor,
    Qwen2VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_ficoco.models.native import NativeModel, NativeProcessor


class ReducingQwen2VLProcessor(NativeProcessor, Qwen2VLMultiModalProcessor):
    """Qwen2-VL's."""


@MULTIMODAL_REGISTRY.register_processor(
    ReducingQwen2VLProcessor,
    info=Qwen2VLProcessingInfo,
    dummy_inputs=Qwen2VLDummyInputsBuilder,
)
class ReducingQwen2VLForConditionalGeneration(NativeModel, Qwen2VLForConditionalGeneration):
    """vLLM's Qwen2-VL with a visual token budget per image."""
