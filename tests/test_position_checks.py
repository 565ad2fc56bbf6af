# SPDX-License-Identifier: Apache-2.0
"""A Qwen-VL refuses to start with what its positions are not known to work with, and says what;
places are added to its positions once, however short the runs before were."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from vllm.config import CUDAGraphMode

from tests.checkpoints import random_qwen
from tests.test_stage_checks import put
from vllm_ficoco.engine.checks import PositionsError, check_positions
from vllm_ficoco.engine.positions import Offsets
from vllm_ficoco.engine.visual import VisualTokens
from vllm_ficoco.vision.geometry import UnsupportedModel, geometry_of


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


def test_nothing_is_reduced_where_vllm_prunes_videos_itself(config: Any) -> None:
    """The server starts; what a request asks for is refused with the reason."""
    from vllm.engine.arg_utils import EngineArgs

    model = config.model_config.model
    pruned = EngineArgs(model=model, enforce_eager=True, video_pruning_rate=0.5)
    with pytest.raises(UnsupportedModel, match="--video-pruning-rate"):
        geometry_of(pruned.create_engine_config().model_config.hf_config)
    assert geometry_of(config.model_config.hf_config).videos == "by_frame"


def test_stages_begin_behind_the_levels_of_the_tower(config: Any) -> None:
    hf = copy.deepcopy(config.model_config.hf_config)
    hf.reduction_stages = [2]
    assert geometry_of(hf).starts == (2,)
    hf.reduction_stages = [1, 2]
    with pytest.raises(ValueError, match=r"\(deepstack\), so a stage can start at 2 or later"):
        geometry_of(hf)


@pytest.mark.parametrize("first_run", [1, 4, 16])
def test_a_step_may_be_longer_than_the_first_run(first_run: int) -> None:
    """On CPUs the first run may be a request of a few words; the same step comes again."""
    buffer, places = torch.zeros(3, 16, dtype=torch.int64), torch.arange(1, 19).view(6, 3)
    is_visual = torch.arange(8) >= 2
    offsets = Offsets()
    offsets.before_run(buffer[:, :first_run])
    for _ in range(2):
        offsets.note([VisualTokens.of(torch.zeros(6, 5), offsets=places)], is_visual)
        offsets.before_run(buffer[:, :8])
        assert torch.equal(buffer[:, 2:8], places.T)
        assert buffer.sum() == places.sum()
        buffer.zero_()
