# SPDX-License-Identifier: Apache-2.0
"""Entry point of the ``vllm.general_plugins`` group: puts our models in vLLM's registries."""

from __future__ import annotations

MODELS = {
    "LlavaForConditionalGeneration": (
        "vllm_ficoco.models.llava:ReducingLlavaForConditionalGeneration"
    ),
}
"""Architecture and, as a lazy string, the class that takes its place."""


def register() -> None:
    """Register the models. vLLM calls this in every process, possibly more than once.

    The models are named, not imported: that must wait until vLLM needs one of them, because it
    initialises a GPU and costs start-up time.
    """
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from vllm_ficoco.models.config import ReducingLlavaConfig

    for architecture, model in MODELS.items():
        ModelRegistry.register_model(architecture, model)
        MODELS_CONFIG_MAP.setdefault(architecture, ReducingLlavaConfig)
