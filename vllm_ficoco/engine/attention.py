# SPDX-License-Identifier: Apache-2.0
"""vLLM's attention area: metadata for a stage, in which the blocks of gaps do not occur.

A kernel of a later stage must see a request as if its gaps had never been. All there is to know
is in the block table: a null block behind the first one is a gap. Taken out of the table, with as
many tokens less in the request's length, what is left is an ordinary request, for any kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    CommonAttentionMetadata,
    subclass_attention_backend,
)
from vllm.v1.kv_cache_interface import KVCacheSpec, replace_as
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_ficoco import schedule
from vllm_ficoco.engine.checks import check_backend
from vllm_ficoco.engine.gaps import Plan
from vllm_ficoco.engine.kv import StageSpec, packed_layouts


class Rows(NamedTuple):
    """The rows of a batch that a stage runs on, where those are not all."""

    index: Tensor
    """(n,) ascending, on the host: which rows of the whole batch."""
    slots: Tensor
    """(n,) where their keys and values go."""
    requests: list[int]
    """Where every request begins among the rows of the whole batch, and where the last one ends."""


class Left(NamedTuple):
    """The rows of a batch that lie in no gap, where some do."""

    index: Tensor
    """(n,) ascending, on the host: which rows of the whole batch."""
    row: Tensor
    """(n,) the same on the device."""
    starts_on_host: Tensor
    """(requests + 1,) where requests begin among the rows that are left."""
    starts: Tensor
    """The same on the device."""
    longest: int
    """Rows of the request that has most of them."""
    requests: list[int]
    """Where requests begin among all rows."""


class Pattern(NamedTuple):
    """What a step leaves out in a stage: the same in every group of its layers."""

    order: Tensor
    """(requests, width) columns of the block table, those of gaps behind all others."""
    lengths: Tensor
    """(requests,) of the requests without their gaps."""
    left: Left | None
    """None where no row lies in a gap, as in every decode step."""


def left_by_plans(
    common: CommonAttentionMetadata, block_size: int, plans: Sequence[Plan | None], stage: int
) -> Tensor:
    """(rows,) on the host: which rows lie in no gap of their request, as its plan has it.

    Args:
        common: vLLM's. Its upper bounds of the lengths are exact where nothing is speculated.
        block_size: of the stage.
        plans: of the requests, in the order of the batch; None where nothing leaves.
        stage: which one.
    """
    begin = common.query_start_loc_cpu.tolist()
    ends = common.seq_lens_cpu_upper_bound.tolist()
    left = torch.ones(begin[-1], dtype=torch.bool)
    for plan, (first, end), length in zip(plans, pairwise(begin), ends, strict=True):
        zero = first - (length - (end - first))  # the row that position 0 would have
        for gap in plan.gaps[stage] if plan is not None else ():
            rows = slice(
                max(first, zero + gap.first * block_size),
                max(first, min(end, zero + gap.end * block_size)),
            )
            left[rows] = False
    return left


def left_by_table(common: CommonAttentionMetadata, block_size: int, gap: Tensor) -> Tensor:
    """The same, read on the device: the host waits for it.

    Args:
        common: vLLM's.
        block_size: of the ids in the block table.
        gap: (requests, width) bool, on the device.
    """
    start, length = common.query_start_loc.long(), common.seq_lens.long()
    count = start[1:] - start[:-1]
    rows = int(common.query_start_loc_cpu[-1])
    requests = torch.arange(len(gap), device=gap.device)
    request = requests.repeat_interleave(count, output_size=rows)
    position = torch.arange(rows, device=gap.device) + (length - count - start[:-1])[request]
    return ~gap[request, position // block_size].cpu()  # the host waits, here alone


def pattern_of(
    common: CommonAttentionMetadata,
    block_size: int,
    null_ids: int,
    lengths: Tensor,
    plans: Sequence[Plan | None] | None = None,
    stage: int = 0,
    on_host: bool = False,
) -> Pattern | None:
    """Finds the gaps in a batch's block table; None where it is known that there is none.

    Args:
        common: vLLM's.
        block_size: of the ids in the block table.
        null_ids: ids below belong to the null block; more than one where a kernel's blocks are
            smaller than the allocator's.
        lengths: (requests,) buffer, used again in every step.
        plans: of the requests, where the worker knows them (Model Runner V2). Without them the host
            waits for the device once in a step with a prefill.
        stage: of the layers, for the plans.
        on_host: whether all of it lies there, so that nobody waits when it is read, and whether no
            CUDA graph remembers ``lengths``.
    """
    ids = common.block_table_tensor
    requests, width = ids.shape
    block = torch.arange(width, device=ids.device)
    used = block < -(-common.seq_lens.long() // block_size)[:, None]
    # A row that starts with the null block is not a request: padding, or a dummy at start-up.
    gap = used & (ids < null_ids) & (ids[:, :1] >= null_ids)
    if on_host and not gap.any():
        return None
    lengths = lengths[:requests]
    lengths.copy_(common.seq_lens - gap.sum(1) * block_size)
    order = (gap | ~used).byte().argsort(dim=1, stable=True)
    if common.max_query_len <= 1:
        return Pattern(order, lengths, None)
    if plans is None:
        left = left_by_table(common, block_size, gap)
    else:
        left = left_by_plans(common, block_size * null_ids, plans, stage)
    index = left.nonzero()[:, 0]
    if len(index) == len(left):
        return Pattern(order, lengths, None)
    start = common.query_start_loc_cpu.long()
    left_before = torch.nn.functional.pad(left.cumsum(0), (1, 0))
    starts_on_host = left_before[start].to(common.query_start_loc_cpu.dtype)
    row, starts = (async_tensor_h2d(x, device=ids.device) for x in (index, starts_on_host))
    longest = int(starts_on_host.diff().max())
    return Pattern(
        order, lengths, Left(index, row, starts_on_host, starts, longest, start.tolist())
    )


def without_gaps(
    common: CommonAttentionMetadata, pattern: Pattern, table: Tensor
) -> tuple[CommonAttentionMetadata, Rows | None]:
    """Takes the blocks of gaps out of a group's block table, and their rows out of its queries.

    Args:
        common: vLLM's, not changed.
        pattern: what to take out.
        table: (requests, width) buffer for the new table, used again in every step.

    Returns:
        The metadata, and the rows that are left; None where all are.
    """
    ids = common.block_table_tensor
    requests, width = ids.shape
    new = copy(common)
    new._num_computed_tokens_cache = new._token_to_req_indices_cache = None
    new.seq_lens = pattern.lengths
    new.block_table_tensor = table[:requests, :width]
    torch.gather(ids, 1, pattern.order, out=new.block_table_tensor)
    if pattern.left is None:
        return new, None
    left = pattern.left
    new.query_start_loc_cpu, new.query_start_loc = left.starts_on_host, left.starts
    new.num_actual_tokens, new.max_query_len = len(left.index), left.longest
    new.slot_mapping = common.slot_mapping[left.row]
    new.positions = None if common.positions is None else common.positions[left.row]
    return new, Rows(left.index, new.slot_mapping, left.requests)


class Shared:
    """What the groups of one stage's layers share in a step.

    Finding a pattern takes some twenty small operations, building metadata up to three kernels, and
    a stage can have many groups, which differ in their block tables and slots alone. All groups of
    a stage have blocks of one size: the same rows run through all its layers.
    """

    def __init__(self) -> None:
        self.lengths: Tensor | None = None
        """(requests,) of the requests without their gaps. CUDA graphs remember where it lies."""
        self._seq_lens: Tensor | None = None
        self._asked: set[int] = set()
        self.pattern: Pattern | None = None
        """None where there is no gap."""
        self.metadata: Any = None
        """Of the group that came first in this step."""

    def begins(self, builder: object, seq_lens: Tensor) -> bool:
        """Whether a step begins with a group's builder; if so, what was of the last one is gone.

        Args:
            builder: one that asks again is in another step.
            seq_lens: vLLM makes this tensor once a step, for all groups.
        """
        new = self._seq_lens is not seq_lens or id(builder) in self._asked
        if new:
            self._seq_lens, self._asked = seq_lens, set()
            self.pattern = self.metadata = None
        self._asked.add(id(builder))
        return new


@functools.cache
def stage_backend(
    base: type[AttentionBackend], layouts: tuple[KVCacheLayout, ...] | None
) -> type[AttentionBackend]:
    """An attention backend whose metadata leave gaps out; the kernels are the base's.

    Args:
        base: vLLM's.
        layouts: of the KV cache, that groups need; None for those of the base.
    """
    builder: Any = base.get_builder_cls()

    class StageMetadataBuilder(builder):
        """Builds the base's metadata from a batch without gaps."""

        supports_update_block_table = False  # … past build(), which must see every table
        requires_block_table_width = True
        takes_plans = True

        def __init__(
            self,
            kv_cache_spec: Any,
            layer_names: list[str],
            vllm_config: VllmConfig,
            device: torch.device,
            *,
            block_table_width: int,
            **kwargs: Any,
        ) -> None:
            if builder.requires_block_table_width:
                kwargs["block_table_width"] = block_table_width
            super().__init__(kv_cache_spec, layer_names, vllm_config, device, **kwargs)
            layers = vllm_config.compilation_config.static_forward_context
            self.shared: Shared = layers[layer_names[0]].shared
            # CUDA graphs remember where these are, so they are made once.
            most = vllm_config.scheduler_config.max_num_seqs
            self.table = torch.zeros(most, block_table_width, dtype=torch.int32, device=device)
            if self.shared.lengths is None:
                self.shared.lengths = torch.zeros(most, dtype=torch.int32, device=device)
            graphs = vllm_config.compilation_config.cudagraph_mode
            whole = graphs is not None and graphs.has_full_cudagraphs()
            self.on_host = device.type == "cpu" and not whole

        @classmethod
        def get_cudagraph_support(cls, *args: Any) -> AttentionCGSupport:
            # A prefill has rows less in a stage, by its images: no graph of all rows is right.
            most = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
            return min(super().get_cudagraph_support(*args), most, key=lambda s: s.value)

        def build(
            self,
            common_prefix_len: int,
            common_attn_metadata: CommonAttentionMetadata,
            fast_build: bool = False,
            plans: Sequence[Plan | None] | None = None,
        ) -> Any:
            size = self.kv_cache_spec.block_size
            split = max(1, self.vllm_config.cache_config.block_size // size)
            shared = self.shared
            assert shared.lengths is not None
            stage = self.kv_cache_spec.stage
            common, rows = common_attn_metadata, None
            if shared.begins(self, common.seq_lens):
                shared.pattern = pattern_of(
                    common, size, split, shared.lengths, plans, stage, self.on_host
                )
            if shared.pattern is not None:
                common, rows = without_gaps(common, shared.pattern, self.table)
            if shared.metadata is None:
                # A shared prefix may lie over a gap; without that hint kernels are as right.
                shared.metadata = super().build(0, common, fast_build)
            metadata = copy(shared.metadata)
            metadata.block_table = common.block_table_tensor
            metadata.slot_mapping = common.slot_mapping
            metadata.ficoco_rows = rows
            return metadata

    backend: type[Any] = subclass_attention_backend("Stage", base, StageMetadataBuilder)
    if layouts is not None:
        backend.supported_kv_cache_layouts = classmethod(lambda _: layouts)
    return backend


@dataclass
class KeyWatch:
    """How long a layer's keys are, for whom that is not the layer at which tokens leave.

    Keys are seen on the way to the attention kernel, which runs outside of what is compiled.
    """

    on: bool = False
    """Whether the coming forward pass is to be watched."""
    lengths: Tensor | None = None
    """(rows,) float32: sum of a key's absolute values, this rank's heads; of the last watch."""


@functools.cache
def watched(base: Any) -> type[AttentionImpl]:
    """An attention implementation that measures its keys for its ``watch``."""

    class WatchedImpl(base):
        watch: KeyWatch

        def forward(self, layer: Any, query: Tensor, key: Tensor, *args: Any, **kw: Any) -> Tensor:
            if self.watch.on:
                self.watch.lengths = torch.linalg.vector_norm(
                    key.flatten(1), 1, 1, dtype=torch.float32
                )
            return super().forward(layer, query, key, *args, **kw)

    return WatchedImpl


def watch_keys(attention: Attention) -> KeyWatch:
    """Lets the keys of a layer be measured; changes a class as :func:`enter_stage` does."""
    impl: Any = attention.impl
    impl.__class__ = watched(impl.__class__)
    impl.watch = watch = KeyWatch()
    return watch


class StageAttention(Attention):
    """vLLM's attention layer, which knows its stage; made from one by :func:`enter_stage`."""

    layer: int
    """Its number in the decoder."""
    spans: Sequence[int]
    """Layers of every stage of the decoder."""
    packed: bool
    """Whether blocks of the KV cache may hold different numbers of layers."""
    shared: Shared

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        spec = super().get_kv_cache_spec(vllm_config)
        parts = schedule.parts(self.spans, spec.block_size, self.packed)
        number = schedule.part_of(parts, self.layer)
        stage, _, block = parts[number]
        part = number if schedule.blocks_differ(parts) else 0
        return replace_as(spec, StageSpec, stage=stage, part=part, block_size=block)


def enter_stage(
    attention: Attention, layer: int, spans: Sequence[int], block_size: int, shared: Shared
) -> None:
    """Puts an attention layer into its stage.

    vLLM's models build their layers themselves and take no class for the attention within them,
    so the class is changed on the finished layer; it adds no state but where the layer stands.

    Args:
        attention: of vLLM.
        layer: its number in the decoder.
        spans: layers of every stage.
        block_size: tokens of a KV block, as the server is configured.
        shared: one object for all layers of the stage.

    Raises:
        StagesError: with this attention backend, stages are not known to work.
    """
    base = attention.attn_backend
    check_backend(base.get_name())
    layouts = packed_layouts(base)
    attention.__class__ = StageAttention
    attention.layer, attention.spans, attention.shared = layer, spans, shared
    attention.packed = schedule.blocks_differ(schedule.parts(spans, block_size, bool(layouts)))
    if layer >= spans[0]:
        attention.attn_backend = stage_backend(base, layouts if attention.packed else None)
