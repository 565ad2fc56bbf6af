# SPDX-License-Identifier: Apache-2.0
"""Entry point of the ``vllm.general_plugins`` group: puts our models in vLLM's registries."""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path

MODELS = {
    "LlavaForConditionalGeneration": (
        "vllm_ficoco.models.llava:ReducingLlavaForConditionalGeneration"
    ),
    "LlavaNextForConditionalGeneration": (
        "vllm_ficoco.models.llava_next:ReducingLlavaNextForConditionalGeneration"
    ),
    "LlavaNextVideoForConditionalGeneration": (
        "vllm_ficoco.models.llava_next_video:ReducingLlavaNextVideoForConditionalGeneration"
    ),
    "LlavaOnevisionForConditionalGeneration": (
        "vllm_ficoco.models.llava_onevision:ReducingLlavaOnevisionForConditionalGeneration"
    ),
    "Qwen2VLForConditionalGeneration": (
        "vllm_ficoco.models.qwen2_vl:ReducingQwen2VLForConditionalGeneration"
    ),
    "Qwen2_5_VLForConditionalGeneration": (
        "vllm_ficoco.models.qwen2_5_vl:ReducingQwen2_5_VLForConditionalGeneration"
    ),
    "Qwen3VLForConditionalGeneration": (
        "vllm_ficoco.models.qwen3_vl:ReducingQwen3VLForConditionalGeneration"
    ),
    "Qwen3VLMoeForConditionalGeneration": (
        "vllm_ficoco.models.qwen3_vl:ReducingQwen3VLMoeForConditionalGeneration"
    ),
}
"""Architecture and, as a lazy string, the class that takes its place."""


def register() -> None:
    """Register the models. vLLM calls this in every process, possibly more than once.

    The models are named, not imported: that must wait until vLLM needs one of them, because it
    initialises a GPU and costs start-up time.

    Raises:
        RuntimeError: this version of vLLM is not known; or vLLM runs a batch, where budgets and
            policy would be lost without a word.
    """
    from vllm_ficoco import versions

    versions.check()  # before anything is imported that another version may not have

    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from vllm_ficoco.models.config import ReducingConfig
    from vllm_ficoco.models.defaults import tell_at_start

    if "ficoco_server" in os.environ.get("VLLM_PLUGINS", "").split(",") and _runs_vllm_batch():
        raise RuntimeError(
            "`vllm run-batch` does not load endpoint plugins, so it would ignore ficoco_server, "
            "which VLLM_PLUGINS names: visual token budgets, reductions and the policy. "
            "Use `vllm-ficoco run-batch`, with the same arguments."
        )

    if multiprocessing.parent_process() is None:  # once, not by every process of an engine
        tell_at_start()

    for architecture, model in MODELS.items():
        ModelRegistry.register_model(architecture, model)
        MODELS_CONFIG_MAP.setdefault(architecture, ReducingConfig)


def _runs_vllm_batch() -> bool:
    """Whether this process is vLLM's own batch runner; that tells no plugin what it is."""
    program = Path(sys.argv[0]).stem
    return program == "run_batch" or (
        program in ("vllm", "main") and sys.argv[1:2] == ["run-batch"]
    )
