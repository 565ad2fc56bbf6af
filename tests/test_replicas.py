# SPDX-License-Identifier: Apache-2.0
"""``python -m loadtest plan``: how many replicas, with numbers that one can follow by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loadtest.__main__ import main
from loadtest.replicas import CannotPlan, as_measured, measured, need, without_budgets
from loadtest.traffic import Mix

MIX = Mix.parse("text=1,none=1,score@64=2")


def line(setting: str, speed: float, kv: float, more: Any = None, **its: Any) -> dict[str, Any]:
    """A run of 8 at once, all of them running whenever somebody looked and nobody else before."""
    return {
        "setting": setting,
        "concurrency": 8,
        "round": 0,
        "date": "2026-01-02T03:04:05+00:00",
        "conditions": {"rate": None, "model": "a-model", "output_tokens": 32, **(more or {})},
        "requests_per_s": speed,
        "p99_ttft_ms": 400.0,
        "watch": {
            "running": [0, 8, 8, 0],
            "kv_cache_usage": [0.0, kv, kv, 0.0],
            "most_kv_cache_usage": kv,
        },
        **its,
    }


LINES = [
    line("text", 20, 0.1),
    line("none", 4, 0.8),
    line("score@64", 10, 0.2),
    line("score@64", 30, 0.2, round=1),  # the median of the three is 12
    line("score@64", 12, 0.2, round=2),
    line("score@64", 16, 0.4, concurrency=32, p99_ttft_ms=900.0),
]


def test_replicas_are_what_the_arithmetic_says() -> None:
    figures = measured(LINES, {"ttft": 500})
    assert figures["score@64"] == (8, 12, pytest.approx(0.2 / 8), 0.2)
    # 4 / 20 + 4 / 4 + 8 / 12 of a replica's time; as much of its KV cache as each used.
    needed = need(MIX, 16, figures, use=0.8, kv_use=0.9)
    assert needed.by_rate == pytest.approx((0.2 + 1 + 2 / 3) / 0.8)
    assert needed.by_kv == pytest.approx((0.2 * 0.1 + 1 * 0.8 + 2 / 3 * 0.2) / 0.9)
    assert needed.replicas == 3
    # 4 / 20 + 12 / 4.
    full = need(without_budgets(MIX), 16, figures, use=0.8, kv_use=0.9)
    assert full.by_rate == pytest.approx(3.2 / 0.8) and full.replicas == 4
    assert need(without_budgets(MIX), 16.01, figures, use=0.8, kv_use=0.9).replicas == 5


def test_the_best_concurrency_counts_unless_it_misses_the_objective() -> None:
    assert measured(LINES, {})["score@64"].concurrency == 32
    assert measured(LINES, {"ttft": 900})["score@64"].requests_per_s == 16
    assert measured(LINES, {"ttft": 899})["score@64"].concurrency == 8
    with pytest.raises(CannotPlan, match="not within the objectives; there are: none"):
        need(MIX, 1, measured(LINES, {"ttft": 10}), 0.8, 0.9)


def test_a_full_kv_cache_needs_replicas_too() -> None:
    """Where less of it may be used than was."""
    figures = measured(LINES, {})
    tight = need(Mix.parse("none"), 8, figures, use=1.0, kv_use=0.4)
    assert (tight.by_rate, tight.by_kv) == (2, pytest.approx(2 * 0.8 / 0.4))
    assert tight.replicas == 4


def test_what_runs_that_say_nothing_of_a_replica_are_refused() -> None:
    with pytest.raises(CannotPlan, match="had a --rate"):
        measured([line("none", 4, 0.8, {"rate": 5.0})], {})
    with pytest.raises(CannotPlan, match="tome@64 was not measured"):
        need(Mix.parse("tome@64"), 1, measured(LINES, {}), 0.8, 0.9)


def test_a_mix_that_was_measured_is_found_in_any_order() -> None:
    figures = measured([*LINES, line("score@64=4,none=2,text=2", 9, 0.5)], {})
    its = as_measured(MIX, figures)
    assert its is not None and its.requests_per_s == 9
    assert as_measured(Mix.parse("text=1,none=1"), figures) is None


def test_the_command_shows_all_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs.jsonl"
    unseen = line("text", 20, 0.1)  # requests that were over before anybody looked
    unseen["watch"]["running"] = [0, 0, 0, 0]
    lines = [unseen, *LINES[1:], line(str(MIX), 9, 0.5)]
    runs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    main(["plan", str(runs), f"--mix={MIX}", "--rate=16", "--within", "ttft:500"])
    shown = capsys.readouterr().out
    for row in (
        "## Replicas: 3",
        "| score@64 | 8 | 12 | 2.5 | 20 |",
        "| text | 8 | 20 | not seen | 10 |",
        "| score@64 | 8 | 12 | 0.6667 | 20 | 0.1333 |",
        "time: 1.867 / 0.8 = 2.333, KV cache: 0.9533 / 0.9 = 1.059; the larger, rounded up: **3**",
        "## Without budgets: 4",
        "| none | 12 | 4 | 3 | 80 | 2.4 |",
        "Of this mix a replica did 9 requests/s when it was measured",
        "(at 8 at once); the sum says 8.571.",
        "model: a-model, output_tokens: 32; medians of 3 rounds",
    ):
        assert row in shown, row


@pytest.mark.parametrize("wrong", [["--rate=0"], ["--use=1.5"], ["--within", "speed:3"]])
def test_a_plan_for_nothing_is_refused(wrong: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", str(tmp_path), "--mix=none", "--rate=1", *wrong])
    assert stopped.value.code == 2
