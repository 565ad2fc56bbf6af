# SPDX-License-Identifier: Apache-2.0
"""The load test against a real server: what it measures, what it does not believe."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from loadtest.__main__ import goodput, main, mixes, parse, timings
from loadtest.traffic import Mix, Setting, image
from loadtest.watch import NotKept, check
from tests.server.conftest import API_KEY, TOKENS, Server, eventually, value

MIX = "text=1,none=1,ficoco-v@48=2"
SMALL = ["--concurrency=4", "--requests=8", "--repeat=1", "--output-tokens=4", "--image-size=168"]


def load(server: Server, out: Path, *more: str) -> list[dict[str, Any]]:
    """Runs the command; its lines."""
    main([f"--base-url={server.url}/v1", f"--out={out}", *SMALL, *more])
    return [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", API_KEY)


@pytest.mark.server
def test_a_sweep_measures_every_setting_and_goes_on(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = "--concurrency=1,4 --methods=score,tome --budgets=144,48 --goodput ttft:60000"
    more = [f"--mix={MIX}", *sweep.split()]
    lines = load(server, tmp_path, *more)
    settings = ["none", "score@48", "tome@48", str(Mix.parse(MIX))]
    assert [(x["concurrency"], x["setting"]) for x in lines] == [
        (n, s) for n in (1, 4) for s in settings
    ]
    for line in lines:
        assert line["requests"] == 8 and line["requests_per_s"] > 0
        assert line["goodput_per_s"] == pytest.approx(line["requests_per_s"], rel=1e-3)
        assert 0 < line["p50_ttft_ms"] <= line["p99_ttft_ms"] <= line["p99_e2el_ms"]
        kept = line["watch"]["visual_tokens_kept"]
        for method, share in kept.items():
            assert share == pytest.approx(1 if method == "none" else 48 / TOKENS)
        assert line["conditions"]["visual_tokens"] == TOKENS
    assert lines[0]["watch"]["most_running"] <= 1
    report = (tmp_path / "report.md").read_text()
    assert all(f"| {setting} |" in report for setting in settings)
    for picture in ("throughput", "ttft", "tpot", "kv", "goodput"):
        assert (tmp_path / f"{picture}.png").stat().st_size > 1000
    capsys.readouterr()
    main(["plan", str(tmp_path / "runs.jsonl"), "--mix=score@48=3,none=1", "--rate=1000"])
    best = max(line["requests_per_s"] for line in lines if line["setting"] == "none")
    assert f"| none | 1000 | {best:.4g} | {1000 / best:.4g} |" in capsys.readouterr().out
    # One more setting: the rest is there already.
    assert load(server, tmp_path, *more, "--methods=score,tome,topk")[:-2] == lines
    with pytest.raises(SystemExit, match="other conditions"):
        load(server, tmp_path, "--budgets=48", "--note=another machine")


def test_latencies_at_a_rate_begin_when_a_request_arrives() -> None:
    """Not when one of the client's places is free: an overloaded server must look overloaded."""
    result = {
        "ttfts": [0.1, 0.1, 0.1],
        "latencies": [0.3, 0.3, 0.3],
        "queue_times": [0.0, 2.0, 0.0],
        "output_lens": [3, 3, 3],
        "errors": ["", "", "refused"],
    }
    rows = timings(result, 5.0)
    assert [row["ttft"] for row in rows] == pytest.approx([100, 2100])
    assert [row["e2el"] for row in rows] == pytest.approx([300, 2300])
    assert [row["tpot"] for row in rows] == pytest.approx([100, 100])
    assert goodput(rows, {"ttft": 500, "tpot": 150}, 2.0) == 0.5
    assert goodput(rows, {}, 2.0) is None
    at_once = timings(result, math.inf)
    assert [row["ttft"] for row in at_once] == pytest.approx([100, 100])


def test_more_at_once_than_there_are_requests_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        parse(["--base-url=http://localhost", "--concurrency=1,64", "--requests=48"])


def test_a_budget_above_an_images_tokens_is_no_reduction() -> None:
    args = parse(["--base-url=http://localhost", "--budgets=144,48", "--mix=tome@200=1,text=2"])
    assert list(map(str, mixes(args, 144))) == ["none", "score@48", "none=1,text=2"]


@pytest.mark.server
def test_clients_that_leave_take_nothing_with_them(server: Server, tmp_path: Path) -> None:
    def ended(outcome: str) -> float:
        return value(server.metrics(), "vllm_ficoco_requests_total", outcome=outcome)

    before = ended("cancelled")
    [line] = load(server, tmp_path, "--budgets=48", "--disconnects=3", "--requests=24")
    assert eventually(lambda: ended("cancelled") > before), "no client has left"
    assert line["watch"]["visual_tokens_kept"] == {"score": pytest.approx(48 / TOKENS)}
    assert eventually(lambda: value(server.metrics(), "vllm:num_requests_running") == 0)
    assert eventually(lambda: value(server.metrics(), "vllm:kv_cache_usage_perc") == 0)


@pytest.mark.server
def test_what_a_server_refuses_ends_the_test(server: Server, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="8 of 8 requests failed: Bad Request"):
        load(server, tmp_path, "--budgets=1")
    assert not (tmp_path / "runs.jsonl").read_text()


@pytest.mark.parametrize(
    ("kept", "wrong"),
    [
        ({"ficoco-v": 1.0}, "kept 144 visual tokens"),
        ({"ficoco-v": 47 / 144}, "kept 47 visual tokens"),
        ({}, "no visual tokens"),
        ({"ficoco-v": 48 / 144, "tome": 0.5}, "did not ask"),
    ],
)
def test_a_budget_that_was_not_kept_is_an_error(kept: dict[str, float], wrong: str) -> None:
    mix = Mix.parse("ficoco-v@48,text")
    check({"ficoco-v": 48 / 144}, mix, 144)
    with pytest.raises(NotKept, match=wrong):
        check(kept, mix, 144, ["fastv"])


def test_whole_blocks_are_allowed_for() -> None:
    mix = Mix.parse("fastv@48")
    check({"fastv": 60 / 144}, mix, 144, ["fastv"], 16)
    check({"fastv": 100 / 144}, mix, 144, ["fastv"], 32)
    for kept, inside, block in ((60, [], 16), (100, ["fastv"], 16)):
        with pytest.raises(NotKept):
            check({"fastv": kept / 144}, mix, 144, inside, block)


def test_what_is_scaled_down_may_keep_less() -> None:
    mix = Mix.parse("resize@48")
    check({"resize": 40 / 144}, mix, 144, scaling=["resize"])
    for kept, scaling in ((49, ["resize"]), (40, [])):
        with pytest.raises(NotKept):
            check({"resize": kept / 144}, mix, 144, scaling=scaling)


def test_traffic_is_as_asked_and_never_the_same_image() -> None:
    mix = Mix.parse("text=1,none=1,ficoco-v@48=2")
    for count in range(3, 50):
        drawn = mix.draw(count, count)
        assert len(drawn) == count
        assert abs(drawn.count(Setting("ficoco-v", 48)) - count / 2) <= 1.5
        assert {setting for setting, _ in mix.parts} == {*drawn}
    assert Setting("text").body == {} and Setting("none").body == {"reduction": {"method": "none"}}
    assert len({image(168, [1, n]) for n in range(20)}) == 20


@pytest.mark.parametrize("wrong", ["ficoco-v", "none@48", "@48", "ficoco-v@many", "none=0"])
def test_a_setting_that_is_none_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError):
        Mix.parse(wrong)
