# SPDX-License-Identifier: Apache-2.0
"""The manager of a stage's blocks answers as vLLM's own does, without the blocks of gaps."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

import torch
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_ficoco.engine.gaps import Plan, Run
from vllm_ficoco.engine.kv import GapManager, StageSpec

BLOCK, PROMPT = 16, 200
PLAN = Plan.of([Run(10, 150)], [[32]], BLOCK, PROMPT, False)


def manager_of(kind: type[FullAttentionManager]) -> FullAttentionManager:
    spec = StageSpec if kind is GapManager else FullAttentionSpec
    sizes = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
    return kind(
        spec(**sizes, **({"stage": 1} if spec is StageSpec else {})),
        block_pool=BlockPool(64, True, BLOCK),
        enable_caching=True,
        kv_cache_group_id=0,
        scheduler_block_size=BLOCK,
    )


@pytest.mark.parametrize("plan", [None, PLAN])
def test_a_request_grows_as_in_vllm(plan: Plan | None) -> None:
    """Token by token from its prompt on, over the edges of blocks."""
    ours, theirs = manager_of(GapManager), manager_of(FullAttentionManager)
    assert isinstance(ours, GapManager)
    if plan is not None:
        ours.plans["r"] = plan
    for tokens in (7, PROMPT, *range(PROMPT + 1, PROMPT + 3 * BLOCK)):
        asked, new = [], []
        for manager in (ours, theirs):
            due = manager.get_num_blocks_to_allocate("r", tokens, (), 0, 0, tokens)
            manager.remove_skipped_blocks("r", tokens - 1)
            got = manager.allocate_new_blocks("r", tokens, tokens)
            manager.num_cached_block["r"] = 0  # it runs
            assert due == sum(not block.is_null for block in got)
            asked.append(due)
            new.append(len(got))
        left_out = new[0] - asked[0]
        assert new[0] == new[1]
        assert asked[1] - asked[0] == left_out
        assert left_out == (plan.left_out(1, 1, 13) if plan and tokens == PROMPT else 0)
