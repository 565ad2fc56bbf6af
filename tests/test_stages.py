# SPDX-License-Identifier: Apache-2.0
"""How many tokens each stage of the decoder keeps, for a budget: the arithmetic and its limits."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

import pytest

from vllm_ficoco import schedule
from vllm_ficoco.methods import METHODS
from vllm_ficoco.settings import Reduction, SettingsError
from vllm_ficoco.vision.geometry import Geometry

DECODER = [name for name, method in METHODS.items() if method.decoder]


def llava(*starts: int) -> Geometry:
    """LLaVA-1.5-7B on a server with these stages."""
    return Geometry((24, 24), 23, True, 32, starts)


def held(
    geometry: Geometry, method: str, budget: int | None = None, **options: object
) -> list[int]:
    settings = Reduction.parse({"method": method, "budget": budget, "options": options})
    return geometry.held(settings, "reduction.budget")


def refusal(
    geometry: Geometry, method: str, budget: int | None = None, **options: object
) -> SettingsError:
    with pytest.raises(SettingsError) as refused:
        held(geometry, method, budget, **options)
    return refused.value


@pytest.mark.parametrize(("budget", "kept"), [(192, 166), (128, 98), (64, 29)])
def test_fastv_keeps_what_is_published(budget: int, kept: int) -> None:
    """The settings that the literature compares; with its 30 for 64, a layer has 64.1."""
    assert held(llava(2), "fastv", budget) == [576, kept]


@pytest.mark.parametrize("tokens", [32, 64, 128])
def test_tops_keeps_what_is_published(tokens: int) -> None:
    """Twice T, T and a quarter of T, which is 1.1875 T on average."""
    kept = [2 * tokens, tokens, tokens // 4]
    assert held(llava(12, 24), "tops", int(1.1875 * tokens)) == kept


def test_pyramiddrop_keeps_what_is_published() -> None:
    """A half at each of its three stages, which is 270 on average."""
    assert held(llava(8, 16, 24), "pyramiddrop", 270) == [576, 288, 144, 72]


@pytest.mark.parametrize("method", DECODER)
@pytest.mark.parametrize("starts", [(2,), (4,), (2, 22), (2, 6, 15), (8, 16, 24), (1, 2, 3, 31)])
def test_a_budget_is_the_average_over_layers(method: str, starts: tuple[int, ...]) -> None:
    """Never above it, and less than a token a layer below it where tokens are left to give."""
    geometry, part = llava(*starts), METHODS[method].decoder
    assert part is not None
    if len(starts) < part.least_stages:
        assert refusal(geometry, method, 64).field == "reduction.method"
        return
    spans = schedule.spans(starts, 32)
    for budget in range(1, 577, 3):
        try:
            kept = held(geometry, method, budget)
        except SettingsError as error:
            assert "at least" in error.allowed and METHODS[method].place == "nowhere"
            smallest = int(error.allowed.split()[2].rstrip(","))
            assert budget < smallest <= max(starts) * 576 / 32
            assert schedule.average_over_layers(held(geometry, method, smallest), spans) <= smallest
            continue
        average = schedule.average_over_layers(kept, spans)
        assert average <= budget
        assert budget - average < 2 * len(spans), (budget, kept)
        assert kept == sorted(kept, reverse=True) and kept[0] <= 576 and kept[-1] >= 0
        assert kept[0] == 576 or METHODS[method].place != "nowhere" or budget == 576


def test_the_smallest_budget_is_named_and_reached() -> None:
    error = refusal(llava(4), "ficoco-l", 71)
    assert error.field == "reduction.budget" and error.value == 71
    assert error.allowed.startswith("at least 72")
    assert held(llava(4), "ficoco-l", 72) == [576, 0]


@pytest.mark.parametrize(
    ("method", "starts", "named"),
    [("fastv", (), "2"), ("sparsevlm", (2, 22), "2,6,15"), ("ficoco-vl", (), "3")],
)
def test_a_method_that_lacks_stages_says_which(
    method: str, starts: tuple[int, ...], named: str
) -> None:
    error = refusal(llava(*starts), method, 400)
    assert error.value == method
    assert f"--reduction-stages {named}" in error.allowed


def test_tokens_by_stage_instead_of_a_budget() -> None:
    assert held(llava(2, 6, 15), "sparsevlm", tokens=[300, 200, 110]) == [576, 300, 200, 110]
    # Of stages to spare, it takes those next to where it is published.
    assert held(llava(2, 22), "fastv", tokens=[166]) == [576, 166, 166]
    assert held(llava(1, 8, 16, 24), "pyramiddrop", tokens=[9, 8, 7]) == [576, 576, 9, 8, 7]
    assert held(llava(4), "ficoco-vl", tokens=[100, 30]) == [100, 30]
    assert held(llava(4), "ficoco-vl", tokens=[100, 300]) == [100, 100]
    for tokens in ([300, 200], [300, 200, 110, 50]):
        error = refusal(llava(2, 6, 15), "sparsevlm", tokens=tokens)
        assert error.field == "reduction.options.tokens" and error.value == tokens
        assert error.allowed.startswith("3 numbers")
    assert "above 0" in refusal(llava(4), "ficoco-vl", tokens=[0, 0]).allowed


def test_methods_outside_the_decoder_hold_their_budget_in_every_stage() -> None:
    assert held(llava(2, 22), "ficoco-v", 64) == [64, 64, 64]
    assert llava(2, 22).held(None) == [576, 576, 576]
    assert held(llava(2, 22), "fastv", 576) == [576, 576, 576]


def test_the_nearest_stages() -> None:
    """By brute force over all layouts: no other choice lies closer to the published depths."""
    for starts in combinations(range(1, 8), 4):
        for wanted in ((2,), (8, 24), (2, 6, 15)):
            chosen = schedule.nearest_stages(starts, 8, wanted, 32)

            def off(stages: tuple[int, ...], starts=starts, wanted=wanted) -> float:
                pairs = zip(stages, wanted, strict=True)
                return sum(abs(starts[s - 1] / 8 - w / 32) for s, w in pairs)

            others = list(combinations(range(1, 5), len(wanted)))
            assert chosen in others
            assert off(chosen) == pytest.approx(min(map(off, others)))


def test_the_readmes_table_is_the_arithmetic() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)`, `([\d,]+)` \| (.*) \|$", readme, re.MULTILINE)
    assert len(rows) == 9
    for method, starts, cells in rows:
        model = llava(*map(int, starts.split(",")))
        *by_budget, smallest = cells.split(" | ")
        for budget, cell in zip((192, 128, 64), by_budget, strict=True):
            if cell == "refused":
                refusal(model, method, budget)
            else:
                assert " / ".join(map(str, held(model, method, budget))) == cell, (method, budget)
        held(model, method, int(smallest))
        if int(smallest) > 1:
            assert f"at least {smallest}," in refusal(model, method, int(smallest) - 1).allowed
