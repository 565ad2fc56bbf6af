# SPDX-License-Identifier: Apache-2.0
"""vLLM makes the KV cache groups that the arithmetic says, of as much memory."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.backends.utils import (
    get_supported_kv_cache_layouts,
    resolve_kv_cache_layout,
)
from vllm.v1.core import kv_cache_utils as vllm_groups
from vllm.v1.engine import EngineCoreReadyResponse
from vllm.v1.engine.core_client import MPClient
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.version import __version__ as VLLM

from ficoco_server.policy import Policy
from ficoco_server.reducer import Reducer
from vllm_ficoco import schedule
from vllm_ficoco.engine import attention
from vllm_ficoco.engine.attention import Shared, enter_stage
from vllm_ficoco.engine.checks import SCHEDULER
from vllm_ficoco.tiny_llava import CHECKPOINT

pytestmark = pytest.mark.skipif(
    VLLM.startswith("0.33"), reason="stages are refused there, and groups are made elsewhere"
)


SPEC = FullAttentionSpec(block_size=16, num_kv_heads=8, head_size=128, dtype=torch.bfloat16)
GPU = [AttentionBackendEnum.TRITON_ATTN.get_class(), AttentionBackendEnum.FLASH_ATTN.get_class()]


def made(
    backend: Any, starts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[schedule.Part], Fraction, int]:
    """Groups of 32 layers with an attention backend, their waste, and where prefix hits may end."""
    monkeypatch.setattr(Attention, "get_kv_cache_spec", lambda *_: SPEC)
    monkeypatch.setattr(attention, "check_backend", lambda _: None)
    spans = schedule.spans(starts, 32)
    layers = []
    for number in range(32):
        layer = Attention.__new__(Attention)
        layer.attn_backend = backend
        enter_stage(layer, number, spans, SPEC.block_size, Shared())
        layers.append(layer)
    cache = SimpleNamespace(
        kv_cache_layout=None,
        block_size=SPEC.block_size,
        num_gpu_blocks_override=None,
        prefix_cache_retention_interval=None,
        enable_prefix_caching=True,
        prefix_match_unit=None,
    )
    parallel = SimpleNamespace(decode_context_parallel_size=1)
    config: Any = SimpleNamespace(
        cache_config=cache,
        parallel_config=parallel,
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        attention_config=SimpleNamespace(hisparse_config=None),
        speculative_config=None,
        kv_transfer_config=None,
    )
    specs = {f"layers.{n}": layer.get_kv_cache_spec(config) for n, layer in enumerate(layers)}
    layouts = get_supported_kv_cache_layouts({layer.attn_backend for layer in layers})
    layout = resolve_kv_cache_layout(config, [[layout.name for layout in layouts]], specs.values())
    cache.get_resolved_kv_cache_layout = lambda: layout
    groups = vllm_groups.get_kv_cache_groups(config, specs)
    a_block = vllm_groups._pool_bytes_per_block(config, groups)
    whole = vllm_groups.get_kv_cache_config_from_groups(config, groups, 100 * a_block)
    stages = [specs[group.layer_names[0]].stage for group in groups]
    parts = [
        schedule.Part(stage, len(group.layer_names), group.kv_cache_spec.block_size)
        for stage, group in zip(stages, groups, strict=True)
    ]
    of_a_token = SPEC.page_size_bytes // SPEC.block_size
    taken = sum(Fraction(a_block, part.block) for part in parts) / (32 * of_a_token)
    return parts, taken - 1, vllm_groups.resolve_kv_cache_block_sizes(whole, config)[0]


@pytest.mark.parametrize("backend", [*GPU, CPUAttentionBackend], ids=lambda b: b.get_name())
@pytest.mark.parametrize(
    "starts", [(2,), (2, 22), (2, 17), (2, 6, 15), (8, 16, 24), (12, 24), (1, 2, 3, 31)]
)
def test_groups_are_those_of_the_arithmetic(
    backend: Any, starts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    due = schedule.parts(schedule.spans(starts, 32), 16, packed=backend in GPU)
    parts, waste, hits_every = made(backend, starts, monkeypatch)
    assert parts == due
    assert waste == schedule.waste(due)
    assert hits_every == due[0].block


def test_four_groups_instead_of_sixteen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(made(CPUAttentionBackend, (2, 22), monkeypatch)[0]) == 16
    for backend in GPU:
        parts, waste, _ = made(backend, (2, 22), monkeypatch)
        assert parts == [(0, 2, 80), (1, 10, 16), (1, 10, 16), (2, 10, 16)] and waste == 0


def test_a_layout_that_the_user_asks_for_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", "HND")
    assert len(made(GPU[0], (2, 22), monkeypatch)[0]) == 16
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", "BLHNC")
    assert len(made(GPU[0], (2, 22), monkeypatch)[0]) == 4


@pytest.mark.parametrize(
    ("said", "sizes", "groups"), [(32, [32, 32], [1, 2]), (None, [64, 32], [1, 1])]
)
def test_the_front_end_reports_what_the_engine_has(
    said: int | None, sizes: list[int], groups: list[int]
) -> None:
    """Another process, which the engine tells whether its groups have one block size."""
    config = EngineArgs(
        model=str(CHECKPOINT),
        max_model_len=512,
        block_size=32,
        scheduler_cls=SCHEDULER,
        hf_overrides={"reduction_stages": [2]},
    ).create_engine_config()
    fields = dict.fromkeys(EngineCoreReadyResponse.__annotations__, 1) | {
        **dict.fromkeys(("dp_stats_address", "kv_events_config", "weight_transfer_backend")),
        **dict.fromkeys(("dtype", "vllm_version", "instance_id"), ""),
        **dict.fromkeys(
            ("supports_lora", "enable_sleep_mode", "supports_draft_weight_updates"), False
        ),
        "max_model_len": 512,
        "block_size": 32,
        "effective_attention_block_size": said,
    }
    client = MPClient.__new__(MPClient)
    client.vllm_config, client._effective_attention_block_sizes = config, set()
    client._apply_ready_response(msgspec.msgpack.encode(EngineCoreReadyResponse(**fields)))
    reducer = Reducer(config, Policy(), None, 0)
    about = reducer.describe()["model"]
    assert (about["kv_block_sizes"], about["kv_cache_groups"]) == (sizes, groups)
    # Of 144 tokens in the first two layers and 80 in the other four: two blocks of 32 in each.
    image = {"method": "fastv", "visual_tokens_before": 144, "visual_tokens_kept": 101}
    (left,) = reducer.prefilled({"images": [image | {"visual_tokens_by_stage": [144, 80]}]})
    assert left.blocks_saved == 2 * groups[1]
