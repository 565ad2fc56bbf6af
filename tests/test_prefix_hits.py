# SPDX-License-Identifier: Apache-2.0
"""Reduced prefixes in KV cache groups whose blocks differ: found where all have them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash

from vllm_ficoco.engine.gaps import Plan, Run
from vllm_ficoco.engine.kv import GapManager, PlannedHashes, StageSpec

BLOCK, FIRST = 16, 80
SHAPE: Any = {"num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
SPECS = [StageSpec(block_size=FIRST, **SHAPE), StageSpec(block_size=BLOCK, stage=1, **SHAPE)]
PROMPT, RUN = 400, Run(20, 164)
PLAN = Plan.of([RUN], [[30]], BLOCK, PROMPT, looks_at_question=False)


def hashes(common: int = PROMPT, plan: Plan = PLAN) -> PlannedHashes:
    """Of a prompt whose first tokens are those of all others."""
    ends = range(BLOCK, PROMPT + 1, BLOCK)
    return PlannedHashes(
        [BlockHash(f"{end}{'' if end <= common else common}".encode()) for end in ends], plan
    )


@pytest.fixture
def pool() -> BlockPool:
    """Holds the blocks of one request in the groups of both stages."""
    pool = BlockPool(num_gpu_blocks=100, enable_caching=True, hash_block_size=BLOCK)
    request: Any = SimpleNamespace(block_hashes=hashes())
    for group, spec in enumerate(SPECS):
        count = PROMPT // spec.block_size
        blocks = [
            pool.null_block if PLAN.left_out(spec.stage, n, n + 1) else pool.get_new_blocks(1)[0]
            for n in range(count)
        ]
        pool.cache_full_blocks(request, blocks, 0, count, spec.block_size, group)
    return pool


def found(pool: BlockPool, of: PlannedHashes, length: int, group: int) -> list[int]:
    """Numbers of the blocks that a group finds."""
    (blocks,), hit = GapManager.find_longest_cache_hit(
        block_hashes=of,
        max_length=length,
        kv_cache_group_ids=[group],
        block_pool=pool,
        kv_cache_spec=SPECS[group],
        drop_eagle_block=False,
        alignment_tokens=FIRST,
        dcp_world_size=1,
        pcp_world_size=1,
    )
    assert hit == len(blocks) * SPECS[group].block_size
    return [block.block_id for block in blocks]


def test_hits_end_where_the_blocks_of_all_stages_end(pool: BlockPool) -> None:
    """At multiples of 80 tokens, none of which may lie inside the image."""
    for length in range(PROMPT + 1):
        whole = length // FIRST * FIRST
        due = whole if whole >= RUN.end else 0
        for group, spec in enumerate(SPECS):
            blocks = found(pool, hashes(), length, group)
            assert len(blocks) * spec.block_size == due, (length, group)
            gap = [n for n, number in enumerate(blocks) if number == 0]
            assert gap == [n for n in range(len(blocks)) if PLAN.left_out(spec.stage, n, n + 1)]


def test_no_more_is_found_than_prompts_have_in_common(pool: BlockPool) -> None:
    for common in range(0, PROMPT, BLOCK):
        whole = common // FIRST * FIRST
        due = whole if whole >= RUN.end else 0
        for group, spec in enumerate(SPECS):
            blocks = found(pool, hashes(common), PROMPT, group)
            assert len(blocks) * spec.block_size == due, (common, group)


def test_what_another_plan_needs_and_nobody_wrote_is_not_found(pool: BlockPool) -> None:
    """Equal hashes mean equal plans, as settings are in them; but evicted blocks are gone."""
    whole = Plan.of([RUN], [[RUN.end - RUN.start]], BLOCK, PROMPT, looks_at_question=False)
    assert not found(pool, hashes(plan=whole), PROMPT, 1)
    assert len(found(pool, hashes(plan=whole), PROMPT, 0)) == PROMPT // FIRST
