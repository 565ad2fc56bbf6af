# SPDX-License-Identifier: Apache-2.0
"""A server with decoder stages refuses to start with what is not known to work, and says what."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from vllm.config import CompilationMode, CUDAGraphMode, KVEventsConfig

from vllm_ficoco import versions
from vllm_ficoco.engine.checks import SCHEDULER, StagesError, check, check_backend
from vllm_ficoco.tiny_llava import CHECKPOINT
from vllm_ficoco.vision.geometry import geometry_of


@pytest.fixture(scope="module")
def config() -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=str(CHECKPOINT),
        max_model_len=512,
        block_size=32,
        enforce_eager=True,
        scheduler_cls=SCHEDULER,
        hf_overrides={"reduction_stages": [2, 4]},
    ).create_engine_config()


@pytest.fixture(autouse=True)
def tested_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong with others is in test_next_vllm.py."""
    monkeypatch.setattr("vllm.version.__version__", versions.TESTED + ".0")


def put(path: str, value: object) -> Callable[[Any], None]:
    """Sets an attribute of a configuration, past vLLM's own checks of it."""

    def change(config: Any) -> None:
        *parts, last = path.split(".")
        for part in parts:
            config = getattr(config, part)
        object.__setattr__(config, last, value)

    return change


def test_vllm_as_the_command_starts_it_is_fine(config: Any) -> None:
    check(config)
    assert geometry_of(config.model_config.hf_config).starts == (2, 4)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (put("scheduler_config.scheduler_cls", None), "--scheduler-cls"),
        (put("scheduler_config.disable_hybrid_kv_cache_manager", True), "hybrid KV cache"),
        (put("scheduler_config.max_num_batched_tokens", 511), "--max-num-batched-tokens 512"),
        (put("cache_config.block_size", 128), "--block-size 72 or less"),
        (put("scheduler_config.max_num_scheduled_tokens", 511), "--max-num-scheduled-tokens 512"),
        (put("scheduler_config.long_prefill_token_threshold", 100), "threshold for long prefills"),
        (put("parallel_config.pipeline_parallel_size", 2), "pipeline parallelism"),
        (put("parallel_config.decode_context_parallel_size", 2), "context parallelism"),
        (put("parallel_config.prefill_context_parallel_size", 2), "context parallelism"),
        (put("parallel_config.enable_dbo", True), "DBO"),
        (put("lora_config", object()), "LoRA"),
        (put("speculative_config", object()), "speculative decoding"),
        (put("kv_transfer_config", object()), "KV connectors"),
        (put("kv_events_config", KVEventsConfig(enable_kv_cache_events=True)), "KV events"),
        (put("ec_transfer_config", object()), "encoder connectors"),
        (put("model_config.hf_text_config.sliding_window", 128), "sliding window"),
        (put("cache_config.cache_dtype", "fp8"), "quantised KV cache"),
        (put("model_config.runner_type", "pooling"), "pooling"),
        (put("model_config.hf_text_config.model_type", "gemma"), "llama, mistral, qwen2"),
        (
            put("model_config.multimodal_config.mm_processor_cache_type", "shm"),
            "shared-memory processor cache",
        ),
    ],
)
def test_refused(config: Any, change: Callable[[Any], None], says: str) -> None:
    changed = copy.deepcopy(config)
    change(changed)
    with pytest.raises(StagesError, match=says):
        check(changed)


@pytest.mark.parametrize("mode", CompilationMode)
@pytest.mark.parametrize("graphs", CUDAGraphMode)
def test_cuda_graphs_of_steps_with_prefills_are_piecewise(
    config: Any, mode: CompilationMode, graphs: CUDAGraphMode
) -> None:
    changed = copy.deepcopy(config)
    put("compilation_config.mode", mode)(changed)
    put("compilation_config.cudagraph_mode", graphs)(changed)
    if graphs != CUDAGraphMode.FULL and mode != CompilationMode.STOCK_TORCH_COMPILE:
        check(changed)
        return
    with pytest.raises(StagesError, match=r"FULL_AND_PIECEWISE|torch\.compile of the whole model"):
        check(changed)


def test_backends_are_on_the_list_or_refused() -> None:
    for name in ("CPU_ATTN", "TRITON_ATTN", "FLASH_ATTN"):
        check_backend(name)
    with pytest.raises(StagesError, match="FLASHINFER"):
        check_backend("FLASHINFER")


@pytest.mark.parametrize("stages", [[0], [6], [4, 2], [2, 2], ["2"], [2.0]])
def test_stages_that_the_decoder_does_not_have(config: Any, stages: list[Any]) -> None:
    hf = copy.deepcopy(config.model_config.hf_config)
    hf.reduction_stages = stages
    with pytest.raises(ValueError, match="from 1 to 5, in ascending order"):
        geometry_of(hf)
