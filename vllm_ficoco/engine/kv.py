# SPDX-License-Identifier: Apache-2.0
"""vLLM's KV cache area: layer groups that know their stage, and a manager that leaves gaps.

A request's block table covers the same positions in every stage, so slots, positions and prefix
hashes stay vLLM's own; the blocks of a gap (:mod:`vllm_ficoco.engine.gaps`) are the null block, and
nothing is ever allocated for them. Which layers share a table, and how many tokens its blocks have,
is :func:`vllm_ficoco.schedule.parts`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm import envs
from vllm.utils.math_utils import cdiv
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec

from vllm_ficoco.engine.gaps import Plan


class PlannedHashes(list[BlockHash]):
    """Prefix hashes of a request, with its plan.

    vLLM looks a prefix up by hashes alone. With the plan along, the lookup knows which of them are
    blocks that a stage does not hold and so need no finding. Nothing has to be remembered beside
    vLLM's own table: equal hashes mean equal settings, as these are in the hashes' salt.
    """

    def __init__(self, hashes: Iterable[BlockHash], plan: Plan) -> None:
        super().__init__(hashes)
        self.plan = plan


class GapManager(FullAttentionManager):
    """Full attention, less the blocks of gaps."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stage: int = self.kv_cache_spec.stage
        self.plans: dict[str, Plan] = {}
        """Of requests with gaps in this stage, by id; the scheduler writes and deletes them."""

    # The three below are asked for every request and group in every step. In most decode steps a
    # request's last block has room, and the answer of all of them is: nothing.

    def _has_room(self, request_id: str, num_tokens: int) -> bool:
        """Whether a request's blocks hold so many tokens, those of gaps counted."""
        return num_tokens <= len(self.req_to_blocks.get(request_id, ())) * self.block_size

    def remove_skipped_blocks(self, *_: Any, **__: Any) -> None:
        """Nothing: full attention skips no token."""

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        *args: Any,
        **kwargs: Any,
    ) -> int:
        if not new_computed_blocks and self._has_room(request_id, num_tokens):
            return 0
        blocks = super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, *args, **kwargs
        )
        plan = self.plans.get(request_id)
        if plan is None:
            return int(blocks)
        have = len(self.req_to_blocks.get(request_id, ())) + len(new_computed_blocks)
        return int(blocks) - plan.left_out(self.stage, have, cdiv(num_tokens, self.block_size))

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        if request_id not in self._partial_hit_reqs and self._has_room(request_id, num_tokens):
            return []
        plan = self.plans.get(request_id)
        if plan is None:
            return list(super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model))
        assert request_id not in self._partial_hit_reqs  # needs blocks of different sizes
        blocks = self.req_to_blocks[request_id]
        have, need = len(blocks), cdiv(num_tokens, self.block_size)
        left_out = plan.left_out(self.stage, have, need)
        held = iter(self.block_pool.get_new_blocks(max(need - have - left_out, 0)))
        new = [
            self._null_block if plan.left_out(self.stage, block, block + 1) else next(held)
            for block in range(have, need)
        ]
        blocks.extend(new)
        if self._record_new_block_ids:
            self.new_block_ids.extend(block.block_id for block in new if not block.is_null)
        return new

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Sequence[BlockHash],
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: KVCacheSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        **kwargs: Any,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """As vLLM's, but a block of a gap is found anywhere, and a hit ends where it may."""
        if not isinstance(block_hashes, PlannedHashes):
            hit: tuple[tuple[list[KVCacheBlock], ...], int] = super().find_longest_cache_hit(
                block_hashes,
                max_length,
                kv_cache_group_ids,
                block_pool,
                kv_cache_spec,
                drop_eagle_block,
                alignment_tokens,
                **kwargs,
            )
            return hit
        plan, size, stage = block_hashes.plan, kv_cache_spec.block_size, kv_cache_spec.stage
        # vLLM hashes prefixes at every multiple of the smallest block.
        by_block = resolve_block_hashes(block_hashes, block_pool.hash_block_size, size)
        nothing = [block_pool.null_block] * len(kv_cache_group_ids)
        found: list[list[KVCacheBlock]] = []
        for number, block_hash in enumerate(itertools.islice(by_block, max_length // size)):
            blocks = (
                nothing
                if plan.left_out(stage, number, number + 1)
                else block_pool.get_cached_block(block_hash, kv_cache_group_ids)
            )
            if not blocks:
                break
            found.append(blocks)
        # A hit ends where the blocks of all groups end.
        while found and (
            len(found) * size % alignment_tokens or not plan.may_resume_at(len(found) * size)
        ):
            found.pop()
        by_group = tuple([blocks[i] for blocks in found] for i in range(len(nothing)))
        return by_group, len(found) * size


PACKED = (KVCacheLayout.BLNHC, KVCacheLayout.BLHNC)
"""Layouts of a KV cache in which the layers of a group lie side by side in a block: then a block
may hold few layers of many tokens, or many layers of few tokens."""


def packed_layouts(backend: type[AttentionBackend]) -> tuple[KVCacheLayout, ...]:
    """Which of :data:`PACKED` an attention backend takes; none where the user asks for another."""
    taken, asked = backend.supported_kv_cache_layouts(), envs.VLLM_KV_CACHE_LAYOUT
    return tuple(
        layout
        for layout in PACKED
        if (taken is None or layout in taken) and asked in (None, layout.name)
    )


# vLLM registers its own kinds when the first one is looked up, unless the table has an entry: so
# they must be there before ours.
KVCacheSpecRegistry._ensure_registered()


@register_kv_cache_spec(manager_class=GapManager)
@dataclass(frozen=True, kw_only=True)
class StageSpec(FullAttentionSpec):
    """The KV cache of a decoder layer that knows its stage.

    Every layer has it, those before the first stage too: vLLM would let a plain
    ``FullAttentionSpec`` that comes first swallow all others into its group.
    """

    stage: int = 0
    part: int = 0
    """Of the stage's layers, where vLLM is not to cut them into groups itself."""

    @classmethod
    def merge(cls, specs: list[StageSpec]) -> StageSpec:
        if any(spec != specs[0] for spec in specs):
            raise AssertionError("layers of different stages in one KV cache group")
        return specs[0]

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Whether these layers may share one group; never over stages, nor over their parts."""
        return all(
            isinstance(spec, StageSpec) and (spec.stage, spec.part) == (self.stage, self.part)
            for spec in kv_cache_specs.values()
        )
