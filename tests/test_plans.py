# SPDX-License-Identifier: Apache-2.0
"""Which rows of a batch lie in gaps: the plans say what the block table says, without a wait."""

from __future__ import annotations

import random
from itertools import accumulate
from typing import Any, NamedTuple, cast

import pytest
import torch
from vllm.multimodal.inputs import PlaceholderRange
from vllm.v1.attention.backend import CommonAttentionMetadata

from tests.waiting import NoWaiting
from vllm_ficoco.engine.attention import Pattern, pattern_of
from vllm_ficoco.engine.gaps import Plan, Run
from vllm_ficoco.engine.plans import plan_of
from vllm_ficoco.packed import PACKED_FIELDS, pack
from vllm_ficoco.settings import Reduction
from vllm_ficoco.vision.geometry import Geometry
from vllm_ficoco.vision.layout import Layout

BLOCK = 16


class Field(NamedTuple):
    """One of vLLM's, of an item."""

    data: torch.Tensor


class Feature(NamedTuple):
    """An image or a video, as vLLM's scheduler has it."""

    data: dict[str, Field]
    mm_position: PlaceholderRange


def batch(rng: random.Random) -> tuple[CommonAttentionMetadata, list[Plan | None]]:
    """Requests in the middle of their prefill or decoding, some of which reduce; the metadata of a
    stage."""
    plans: list[Plan | None] = []
    lengths, counts, tables = [], [], []
    for request in range(rng.randrange(1, 7)):
        runs, end = [], rng.randrange(20)
        for _ in range(rng.randrange(4)):
            runs.append(Run(end, end + rng.randrange(1, 150)))
            end = runs[-1].end + rng.randrange(40)
        prompt = end + rng.randrange(1, 40)
        plan = None
        if runs and rng.random() < 0.8:
            keep = [[rng.randrange(run.end - run.start + 1)] for run in runs]
            plan = Plan.of(runs, keep, BLOCK, prompt, False)
        plans.append(plan)
        decodes = rng.random() < 0.3
        length = prompt + rng.randrange(1, 50) if decodes else rng.randrange(1, prompt + 1)
        # A prefill begins at any place: what lies in a gap before it has left already.
        counts.append(1 if decodes else rng.randrange(1, length + 1))
        lengths.append(length)
        blocks = range(-(-length // BLOCK))
        left_out = [plan is not None and plan.left_out(1, b, b + 1) for b in blocks]
        tables.append([0 if out else 1 + 100 * request + b for b, out in enumerate(left_out)])
    width = max(map(len, tables)) + 2
    table = torch.tensor([row + [0] * (width - len(row)) for row in tables], dtype=torch.int32)
    starts = torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts.clone(),
        seq_lens=seq_lens,
        seq_lens_cpu_upper_bound=seq_lens.clone(),
        num_reqs=len(plans),
        num_actual_tokens=sum(counts),
        max_query_len=max(counts),
        max_seq_len=max(lengths),
        block_table_tensor=table,
        slot_mapping=torch.arange(sum(counts)),
    )
    return common, plans


def on_device(common: CommonAttentionMetadata) -> list[torch.Tensor]:
    return [common.query_start_loc, common.seq_lens, common.block_table_tensor]


def found(common: CommonAttentionMetadata, plans: list[Plan | None] | None) -> Pattern:
    lengths = torch.zeros(8, dtype=torch.int32)
    pattern = pattern_of(common, BLOCK, 1, lengths, plans, 1)
    assert pattern is not None
    return pattern


@pytest.mark.parametrize("seed", range(40))
def test_plans_say_what_the_block_table_says(seed: int) -> None:
    common, plans = batch(random.Random(seed))
    by_table = found(common, None)
    with NoWaiting(on_device(common)):
        by_plans = found(common, plans)
    assert torch.equal(by_plans.order, by_table.order)
    assert torch.equal(by_plans.lengths, by_table.lengths)
    assert (by_plans.left is None) == (by_table.left is None)
    if by_plans.left is not None and by_table.left is not None:
        for ours, read in zip(by_plans.left, by_table.left, strict=True):
            assert torch.equal(ours, read) if isinstance(ours, torch.Tensor) else ours == read


def test_the_batches_have_gaps_and_reading_the_table_waits() -> None:
    batches = [batch(random.Random(seed)) for seed in range(40)]
    assert sum(found(common, plans).left is not None for common, plans in batches) > 15
    prefills = [common for common, _ in batches if common.max_query_len > 1]
    for common in prefills:
        with pytest.raises(AssertionError, match="waits"), NoWaiting(on_device(common)):
            found(common, None)


def test_a_batch_without_gaps_has_no_pattern_where_nobody_waits() -> None:
    batches = [batch(random.Random(seed)) for seed in range(40)]
    nothing = 0
    for common, _ in batches:
        lengths = torch.zeros(8, dtype=torch.int32)
        pattern = pattern_of(common, BLOCK, 1, lengths, None, 1, on_host=True)
        gaps = bool((found(common, None).lengths != common.seq_lens).any())
        assert (pattern is not None) == gaps
        nothing += pattern is None
    assert 0 < nothing < 40


def test_text_between_the_frames_of_a_video_is_no_gap() -> None:
    """Of a video that was reduced before the decoder, all that is left stays in every stage."""
    geometry = Geometry((0, 0), 4, False, 6, (2, 4), True, frozenset({"attention"}), 0, "by_frame")
    layout = Layout((3, 4), frames=4)
    fields = {PACKED_FIELDS["video"]: Field(pack(Reduction(method="topk", budget=9), layout))}
    video = Feature(fields, PlaceholderRange(offset=5, length=9 + 4 * 6))
    shown = {
        PACKED_FIELDS["image"]: Field(pack(Reduction(method="k-norm", budget=40), Layout((8, 10))))
    }
    image = Feature(shown, PlaceholderRange(offset=50, length=80))
    plan = plan_of(cast("Any", [video, image]), 140, geometry, BLOCK)
    assert plan is not None and plan.runs == (Run(5, 38), Run(50, 130))
    for stage in (1, 2):
        assert not any(plan.left_out(stage, block, block + 1) for block in range(3))
        assert any(plan.left_out(stage, block, block + 1) for block in range(3, 9))
