# SPDX-License-Identifier: Apache-2.0
"""Qwen3-VL, with and without experts: visual tokens have levels for more layers (deepstack)."""

from __future__ import annotations

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

from vllm_ficoco.models.native import NativeModel, NativeProcessor


class ReducingQwen3VLProcessor(NativeProcessor, Qwen3VLMultiModalProcessor):
    """Qwen3-VL's."""


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
