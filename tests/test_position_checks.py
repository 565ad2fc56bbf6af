# SPDX-License-Identifier: Apache-2.0
"""A Qwen-VL refuses to start with what its positions are not known to work with, and says what."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from vllm.config import CUDAGraphMode

from tests.checkpoints import random_qwen
from tests.test_stage_checks import put
from vllm_ficoco.engine.checks import PositionsError, check_positions
from vllm_ficoco.vision.geometry import geometry_of


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    model = random_qwen(tmp_path_factory.mktemp("qwen") / "model", "qwen3-vl")
    return EngineArgs(model=str(model), enforce_eager=True).create_engine_config()


def test_vllm_as_it_starts_by_itself_is_fine(config: Any) -> None:
    check_positions(config)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (put("parallel_config.pipeline_parallel_size", 2), "pipeline parallelism"),
        (put("parallel_config.decode_context_parallel_size", 2), "context parallelism"),
        (put("parallel_config.prefill_context_parallel_size", 2), "context parallelism"),
        (put("parallel_config.enable_dbo", True), "DBO"),
        (put("ec_transfer_config", object()), "encoder connectors"),
        (put("speculative_config", object()), "speculative decoding"),
        (
            put("model_config.multimodal_config.video_pruning_rate", 0.5),
            "--video-pruning-rate",
        ),
        (put("compilation_config.cudagraph_mm_encoder", True), "cudagraph_mm_encoder"),
        (put("compilation_config.compile_mm_encoder", True), "compile_mm_encoder"),
        (
            put("model_config.multimodal_config.mm_encoder_tp_mode", "data"),
            "--mm-encoder-tp-mode data",
        ),
    ],
)
def test_refused(config: Any, change: Callable[[Any], None], says: str) -> None:
    """By the model as well, before it makes anything."""
    from vllm_ficoco.models.qwen3_vl import ReducingQwen3VLForConditionalGeneration

    changed = copy.deepcopy(config)
    change(changed)
    for refuse in check_positions, ReducingQwen3VLForConditionalGeneration:
        with pytest.raises(PositionsError, match=f"{says}.*VLLM_PLUGINS"):
            refuse(vllm_config=changed) if isinstance(refuse, type) else refuse(changed)


@pytest.mark.parametrize("graphs", CUDAGraphMode)
def test_a_step_with_images_is_in_no_full_cuda_graph(config: Any, graphs: CUDAGraphMode) -> None:
    changed = copy.deepcopy(config)
    put("compilation_config.cudagraph_mode", graphs)(changed)
    if graphs != CUDAGraphMode.FULL:
        return check_positions(changed)
    with pytest.raises(PositionsError, match="FULL_AND_PIECEWISE"):
        check_positions(changed)


def test_stages_begin_behind_the_levels_of_the_tower(config: Any) -> None:
    hf = copy.deepcopy(config.model_config.hf_config)
    hf.reduction_stages = [2]
    assert geometry_of(hf).starts == (2,)
    hf.reduction_stages = [1, 2]
    with pytest.raises(ValueError, match=r"\(deepstack\), so a stage can start at 2 or later"):
        geometry_of(hf)
