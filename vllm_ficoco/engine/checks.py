# SPDX-License-Identifier: Apache-2.0
"""What a server with decoder stages needs, and what has not been shown to work with them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm.config import CompilationMode, CUDAGraphMode, VllmConfig
from vllm.sampling_params import SamplingParams

from vllm_ficoco import versions
from vllm_ficoco.vision.geometry import geometry_of

SCHEDULER = "vllm_ficoco.engine.scheduler.make_scheduler"
"""For ``--scheduler-cls``."""

DECODERS = ("llama", "mistral", "qwen2", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text")
"""``model_type`` of the text models whose layers :mod:`vllm_ficoco.engine.decoder` knows."""

BACKENDS = ("CPU_ATTN", "TRITON_ATTN", "FLASH_ATTN")
"""Attention backends that go by the block table and by the lengths on the device. On the host there
are only upper bounds, which FlashInfer takes as exact. The tests run the first two, the second one
through Triton's interpreter."""


class StagesError(ValueError):
    """A server with decoder stages cannot start like this."""


class PositionsError(ValueError):
    """A server whose positions have three rows (M-RoPE) cannot start like this."""


def check_positions(config: VllmConfig) -> None:
    """Refuses to start a Qwen-VL with what cannot work, or is not known to work.

    Places of reduced images' tokens are added to positions before the model runs: it must be given
    the tokens as the tower returned them, and all rows of a step at once.

    Raises:
        PositionsError: the first thing that is wrong.
    """
    compilation, parallel = config.compilation_config, config.parallel_config
    multimodal = config.model_config.get_multimodal_config()
    graphs = compilation.cudagraph_mode
    refused: dict[str, Any] = {
        "full CUDA graphs of steps with prefills (give cudagraph_mode FULL_AND_PIECEWISE)": (
            graphs is not None and graphs.mixed_mode() == CUDAGraphMode.FULL
        ),
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "context parallelism": parallel.decode_context_parallel_size > 1
        or parallel.prefill_context_parallel_size > 1,
        "micro-batches (DBO)": parallel.use_ubatching,
        "encoder connectors": config.ec_transfer_config,
        "speculative decoding": config.speculative_config,
        "CUDA graphs of the encoder (cudagraph_mm_encoder)": compilation.cudagraph_mm_encoder,
        "a compiled encoder (compile_mm_encoder)": compilation.compile_mm_encoder,
        "a data-parallel encoder (--mm-encoder-tp-mode data)": (
            multimodal.mm_encoder_tp_mode == "data"
        ),
    }
    for what, present in refused.items():
        if present:
            raise PositionsError(
                f"visual token budgets of Qwen-VL models are not known to work with {what}. To "
                "serve without budgets, name the plugins to load in VLLM_PLUGINS, vllm_ficoco not "
                "among them."
            )


def check(config: VllmConfig) -> None:
    """Refuses to start with what cannot work, or is not known to work.

    Raises:
        StagesError: the first thing that is wrong.
    """
    for wrong in _problems(config):
        raise StagesError(f"decoder stages (reduction_stages) {wrong}")


def needs_whole_prompt(params: SamplingParams) -> str | None:
    """The sampling parameter that asks for every row of a prompt; None where none does.

    Rows that leave inside the decoder have no logprobs, and the engine would end such a request.
    """
    names = ("prompt_logprobs", "prompt_logprob_token_ids")
    return next((name for name in names if getattr(params, name) is not None), None)


def version_problem() -> str | None:
    """What is wrong with this version of vLLM; None where nothing is.

    Stages override what its scheduler and its KV cache do, which no comparison of parameters tells.
    """
    minor = versions.check()
    if minor == versions.TESTED:
        return None
    return f"are tested with vLLM {versions.TESTED}, not with {minor}"


def _problems(config: VllmConfig) -> Iterator[str]:
    if problem := version_problem():
        yield problem
    scheduler, parallel, model = (
        config.scheduler_config,
        config.parallel_config,
        config.model_config,
    )
    text = model.hf_text_config.model_type
    if text not in DECODERS:
        yield f"work with {', '.join(DECODERS)} text models, not with {text}"
    name = scheduler.scheduler_cls
    name = (
        name if isinstance(name, str) else f"{name.__module__}.{name.__qualname__}" if name else ""
    )
    if name != SCHEDULER:
        yield f"need --scheduler-cls {SCHEDULER}, which plans what a stage does not hold"
    if scheduler.disable_hybrid_kv_cache_manager:
        yield "need the hybrid KV cache manager: stages are groups of layers with their own blocks"
    for flag, tokens in (
        ("--max-num-batched-tokens", scheduler.max_num_batched_tokens),
        ("--max-num-scheduled-tokens", scheduler.max_num_scheduled_tokens),
    ):
        if tokens is not None and tokens < model.max_model_len:
            yield (
                f"need {flag} {model.max_model_len} or more (max_model_len), not {tokens}: "
                "an image and the question behind it run as one"
            )
    geometry, block = geometry_of(model.hf_config), config.cache_config.block_size
    tokens = geometry.tokens
    # An image in tiles has several times as many; a small one may hold no whole block.
    if not geometry.by_image and tokens < 2 * block - 1:
        yield (
            f"need --block-size {(tokens + 1) // 2} or less, not {block}: they leave out whole KV "
            f"blocks, and the {tokens} tokens of an image need not hold one"
        )
    graphs = config.compilation_config.cudagraph_mode
    refused: dict[str, Any] = {
        "a threshold for long prefills": scheduler.long_prefill_token_threshold > 0,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "context parallelism": parallel.decode_context_parallel_size > 1
        or parallel.prefill_context_parallel_size > 1,
        "micro-batches (DBO)": parallel.use_ubatching,
        "LoRA": config.lora_config,
        "speculative decoding": config.speculative_config,
        "KV connectors": config.kv_transfer_config,
        "KV events": config.kv_events_config and config.kv_events_config.enable_kv_cache_events,
        "encoder connectors": config.ec_transfer_config,
        "full CUDA graphs of steps with prefills (give cudagraph_mode FULL_AND_PIECEWISE)": (
            graphs is not None and graphs.mixed_mode() == CUDAGraphMode.FULL
        ),
        "torch.compile of the whole model": (
            config.compilation_config.mode == CompilationMode.STOCK_TORCH_COMPILE
        ),
        "a sliding window": model.get_sliding_window(),
        "a quantised KV cache": config.cache_config.cache_dtype != "auto",
        "the shared-memory processor cache": (
            model.get_multimodal_config().mm_processor_cache_type == "shm"
        ),
        "pooling models": model.runner_type != "generate",
    }
    for what, present in refused.items():
        if present:
            yield f"are not known to work with {what}"


def check_backend(name: str) -> None:
    """Refuses an attention backend that is not known to work.

    Raises:
        StagesError: it is not one of :data:`BACKENDS`.
    """
    if name not in BACKENDS:
        raise StagesError(
            f"decoder stages (reduction_stages) are known to work with {', '.join(BACKENDS)}, not "
            f"with {name}"
        )
