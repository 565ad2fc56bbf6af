# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of gaps, against brute force over all small prompts."""

from __future__ import annotations

from itertools import pairwise, product

import pytest

from vllm_ficoco.engine.gaps import Gap, Plan, Run, gap_of, held_of


def places(block_size: int, prompt: int) -> list[Run]:
    return [Run(a, b) for a in range(prompt) for b in range(a + 1, prompt + 1)]


@pytest.mark.parametrize("block_size", [1, 2, 3, 4])
@pytest.mark.parametrize("prompt", range(1, 14))
def test_a_gap_is_as_long_as_it_may_be(block_size: int, prompt: int) -> None:
    """Whole blocks of the image, not the first nor the last prompt token's, and enough is kept."""
    last = (prompt - 1) // block_size
    for run in places(block_size, prompt):
        inside = [
            block
            for block in range(1, last)
            if run.start <= block * block_size and (block + 1) * block_size <= run.end
        ]
        for keep in range(run.end - run.start + 1):
            gap = gap_of(run, keep, block_size, prompt)
            blocks = list(range(*gap)) if gap else []
            assert set(blocks) <= set(inside)
            held = held_of(run, keep, block_size, prompt)
            assert held == run.end - run.start - len(blocks) * block_size >= keep
            # One block more would be too many, or there is none.
            assert held - block_size < keep or len(blocks) == len(inside), (run, keep)
            assert gap is None or blocks


def test_gaps_of_later_stages_lie_around_those_of_earlier_ones() -> None:
    """Else a later stage would hold a row that an earlier one has dropped."""
    for block_size, prompt in product((1, 2, 3), range(2, 12)):
        for run in places(block_size, prompt):
            gaps = [gap_of(run, keep, block_size, prompt) for keep in range(run.end - run.start)]
            for fewer, more in pairwise(gaps):
                if more is not None:
                    assert fewer is not None
                    assert fewer.first <= more.first and fewer.end == more.end


def test_a_plan_counts_the_blocks_that_a_stage_leaves_out() -> None:
    runs = [Run(1, 11), Run(12, 30)]
    plan = Plan.of(runs, [[4, 2], [18, 0]], 2, 33, looks_at_question=False)
    assert plan.gaps == ((), (Gap(2, 5),), (Gap(1, 5), Gap(6, 15)))
    for stage, first, end in product(range(3), range(18), range(18)):
        blocks = {block for gap in plan.gaps[stage] for block in range(*gap)}
        assert plan.left_out(stage, first, end) == len(blocks & set(range(first, end)))


def test_a_prefill_never_stops_inside_an_image() -> None:
    runs = [Run(2, 5), Run(5, 9)]
    plan = Plan.of(runs, [[1], [1]], 2, 12, looks_at_question=False)
    inside = {3, 4, 6, 7, 8}
    assert {p for p in range(15) if not plan.may_resume_at(p)} == inside
    for start, end in product(set(range(13)) - inside, range(16)):
        if start < end:
            stop = plan.last_stop(start, end)
            possible = [p for p in range(start, end + 1) if p not in inside]
            assert stop == possible[-1]


def test_where_the_question_counts_a_prefill_holds_all_from_the_first_image_to_the_end() -> None:
    runs = [Run(2, 4), Run(5, 7)]
    plan = Plan.of(runs, [[1], [1]], 2, 10, looks_at_question=True)
    assert {p for p in range(14) if not plan.may_resume_at(p)} == {3, 4, 5, 6}
    for start in (0, 1, 2):
        for end in range(start + 1, 10):
            assert plan.last_stop(start, end) == max(start, min(end, 2))
        for end in (10, 11, 13):  # a request that starts anew has tokens behind its prompt
            assert plan.last_stop(start, end) == 10
    for start in range(7, 12):
        for end in range(start + 1, 14):
            assert plan.last_stop(start, end) == end
