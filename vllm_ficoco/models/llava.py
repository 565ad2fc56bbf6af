# SPDX-License-Identifier: Apache-2.0
"""LLaVA-1.5: every image has the same number of visual tokens, on one grid."""

from __future__ import annotations

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
from vllm_ficoco.models.layered import LayeredModel
from vllm_ficoco.models.processing import ReducingProcessor


class ReducingLlavaProcessor(ReducingProcessor, LlavaMultiModalProcessor):
    """LLaVA with a CLIP or SigLIP tower."""


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
