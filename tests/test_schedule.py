# SPDX-License-Identifier: Apache-2.0
"""Every schedule ends at exactly the budget, for every count and depth."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from fractions import Fraction
from itertools import combinations, pairwise, product
from operator import floordiv, mod

import pytest
import torch

from tests.reference import methods as reference
from vllm_ficoco import schedule
from vllm_ficoco.methods import METHODS
from vllm_ficoco.methods.paradigm import grid_windows
from vllm_ficoco.methods.visionzip import VisionZipOptions

REDUCING = sorted(
    m.name
    for m in METHODS.values()
    if m.place != "input" and m.name != "none" and not m.decoder and not m.for_videos_alone
)
HALVING = {"ficoco-k", "tome"}
"""Methods that can let go of no more than half of the tokens at a layer."""


def stages(method: str, tokens: int, budget: int, layers: int) -> list[tuple[int, int]]:
    """``(layer, keep)`` by the package, default options."""
    spec = METHODS[method]
    return [tuple(s) for s in spec.schedule(tokens, budget, layers, spec.options())]


def counts(tokens: int) -> list[int]:
    """Every budget of a small grid; of a large one the ends and some between."""
    if tokens <= 40:
        return list(range(1, tokens))
    ends = [*range(1, 30), *range(tokens - 5, tokens)]
    return sorted({*ends, *range(30, tokens, 1 if tokens <= 144 else 7), 64, 128, tokens // 3})


def depths(tokens: int) -> range | tuple[int, ...]:
    """Every depth of a tower of up to 27 layers; for large grids some."""
    return range(1, 28) if tokens <= 40 else (1, 2, 3, 4, 11, 12, 23, 24, 26, 27)


@pytest.mark.parametrize("tokens", [*range(1, 41), 144, 256, 576])
@pytest.mark.parametrize("method", REDUCING)
def test_ends_at_the_budget(method: str, tokens: int) -> None:
    """Layers ascend and exist, every stage lets something go, the last one leaves the budget."""
    for layers in depths(tokens):
        smallest = math.ceil(tokens / 2**layers) if method in HALVING else 1
        for budget in counts(tokens):
            if budget < smallest:
                continue
            plan = stages(method, tokens, budget, layers)
            where = [layer for layer, _ in plan]
            left = [tokens, *(keep for _, keep in plan)]
            case = (layers, budget, plan)
            assert left[-1] == budget, case
            assert all(a > b for a, b in pairwise(left)), case
            assert where == sorted(set(where)), case
            assert where[0] >= 0, case
            assert where[-1] < layers, case
            if method in HALVING:
                assert all(a <= 2 * b for a, b in pairwise(left)), case
            elif METHODS[method].place == "output":
                assert plan == [(layers - 1, budget)], case


@pytest.mark.parametrize("tokens", [2, 3, 7, 16, 25, 36, 144, 576])
@pytest.mark.parametrize("method", sorted(set(REDUCING) - HALVING))
def test_matches_the_transcription(method: str, tokens: int) -> None:
    """The stages are those of the descriptions."""
    for layers in (1, 2, 3, 5, 12, 23, 24, 26, 27):
        for budget in counts(tokens):
            want = reference.stages(method, tokens, budget, layers)
            assert stages(method, tokens, budget, layers) == want, (layers, budget)


@pytest.mark.parametrize("method", ["none", "resize"])
def test_no_stages(method: str) -> None:
    """Nothing leaves anywhere: at all, or what is left of the image is scaled down before."""
    assert stages(method, 576, 64, 23) == []


# --- Spreading ----------------------------------------------------------------------------------


def test_even_is_even() -> None:
    """What leaves differs by at most one between layers, and the first layers take the more."""
    for tokens in (2, 5, 17, 100, 576):
        for budget in range(1, tokens):
            for length in (1, 2, 5, 12, 23):
                layers = range(3, 3 + length)
                left, leaving = tokens, dict.fromkeys(layers, 0)
                for layer, keep in schedule.even(tokens, budget, layers):
                    leaving[layer], left = left - keep, keep
                taken = list(leaving.values())
                assert sum(taken) == tokens - budget
                assert max(taken) - min(taken) <= 1
                assert taken == sorted(taken, reverse=True)


def test_nothing_to_spread() -> None:
    """A budget of all tokens has no stages."""
    assert schedule.even(7, 7, range(3)) == []
    assert schedule.halving(7, 7, range(3)) == []


def test_llava() -> None:
    """LLaVA-1.5: 576 tokens, of CLIP-L's 24 layers 23 run."""
    for budget in (192, 128, 64, 1, 564):
        plan = stages("ficoco-v", 576, budget, 23)
        assert [layer for layer, _ in plan] == list(range(11, 23))
        assert plan[-1] == (22, budget)
    # The authors let 42 go at each of 12 layers.
    assert stages("ficoco-v", 576, 72, 23) == [(11 + i, 576 - 42 * (i + 1)) for i in range(12)]
    # 448 = 12 * 37 + 4.
    left = [keep for _, keep in stages("ficoco-v", 576, 128, 23)]
    assert left[:6] == [538, 500, 462, 424, 387, 350]
    assert [layer for layer, _ in stages("tome", 576, 64, 23)] == list(range(23))
    assert stages("evit", 576, 72, 23) == [(5, 288), (11, 144), (17, 72)]
    assert stages("evit", 64, 1, 12) == [(3, 16), (6, 4), (9, 1)]


def test_same_depth() -> None:
    """As deep in a tower of another height; never past its last layer."""
    assert schedule.same_depth(11, 23, 23) == 11
    assert schedule.same_depth(11, 23, 26) == 12  # SigLIP-so400m without its last layer
    assert [schedule.same_depth(layer, 12, 24) for layer in (3, 6, 9)] == [6, 12, 18]
    for of in range(1, 28):
        for layers in range(1, 28):
            found = [schedule.same_depth(layer, of, layers) for layer in range(of)]
            assert found == sorted(found)
            assert found[0] == 0
            assert found[-1] < layers
            for layer, place in enumerate(found):
                assert place / layers <= layer / of < (place + 1) / layers


# --- Halving ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [*range(2, 41), 144, 256, 576])
def test_tome_refuses_what_halving_cannot_reach(tokens: int) -> None:
    """Exactly the budgets below ceil(n / 2^layers) are refused; the message names the smallest."""
    for layers in range(1, 12):
        smallest = tokens
        for _ in range(layers):
            smallest -= smallest // 2
        for budget in range(1, min(smallest, 25)):
            with pytest.raises(ValueError, match=rf"at least {smallest}\b"):
                stages("tome", tokens, budget, layers)
        if smallest > 1:
            with pytest.raises(ValueError, match=rf"at least {smallest}\b") as refused:
                stages("tome", tokens, smallest - 1, layers)
            named = int(re.findall(r"\d+", str(refused.value))[0])
            assert stages("tome", tokens, named, layers)[-1][1] == named
        if smallest < tokens:
            assert stages("tome", tokens, smallest, layers)[-1][1] == smallest


def even_enough(tokens: int, layers: int) -> list[int]:
    """The budgets at which every layer can take its even share."""
    return [b for b in counts(tokens) if math.ceil((tokens - b) / layers) <= b]


@pytest.mark.parametrize("tokens", [2, 3, 7, 16, 25, 36, 144, 576])
def test_tome_is_even_where_it_can_be(tokens: int) -> None:
    """Where no layer would lose more than half, ToMe spreads like any other schedule."""
    for layers in (1, 2, 3, 12, 23):
        for budget in even_enough(tokens, layers):
            plan = schedule.halving(tokens, budget, range(layers))
            assert plan == schedule.even(tokens, budget, range(layers)), (layers, budget)
            assert plan == reference.stages("tome", tokens, budget, layers), (layers, budget)


def test_tome_first_layers_take_what_the_last_cannot() -> None:
    """At small budgets no layer takes more than an earlier one."""
    for tokens, budget, layers in ((576, 5, 23), (576, 16, 23), (144, 1, 12), (36, 2, 6)):
        plan = stages("tome", tokens, budget, layers)
        left = [tokens, *(keep for _, keep in plan)]
        taken = [a - b for a, b in pairwise(left)]
        assert taken == sorted(taken, reverse=True), (tokens, budget, layers, taken)
        assert plan == reference.stages("tome", tokens, budget, layers)


# --- Counts of single methods -------------------------------------------------------------------


def test_visionzip_splits_as_published() -> None:
    """162 + 30, 108 + 20 and 54 + 10 for LLaVA-1.5."""
    share = VisionZipOptions().contextual
    assert [int(budget * share) for budget in (192, 128, 64)] == [30, 20, 10]


# --- Windows ------------------------------------------------------------------------------------


def windows(grid: tuple[int, int], count: int) -> list[list[int]]:
    """The places of every window."""
    owner, first, middle = grid_windows(grid, count, torch.device("cpu"))
    places: list[list[int]] = [[] for _ in range(count)]
    for place, window in enumerate(owner.tolist()):
        places[window].append(place)
    assert [window[0] for window in places] == first.tolist()
    for window, place in zip(places, middle.tolist(), strict=True):
        rows, columns = ({f(p, grid[1]) for p in window} for f in (floordiv, mod))
        assert place == sorted(rows)[len(rows) // 2] * grid[1] + sorted(columns)[len(columns) // 2]
    return places


@pytest.mark.parametrize(
    "grid", [(1, 1), (1, 9), (9, 1), (2, 13), (4, 4), (5, 7), (7, 5), (12, 12), (16, 16)]
)
def test_windows_are_those_of_the_transcription(grid: tuple[int, int]) -> None:
    """For every count: the same places in the same windows; rectangles in bands of equal height."""
    rows, columns = grid
    for count in range(1, rows * columns + 1):
        mine = windows(grid, count)
        assert mine == reference.cut(grid, count), count
        assert sorted(p for window in mine for p in window) == list(range(rows * columns))
        heights = {1 + (window[-1] - window[0]) // columns for window in mine}
        assert max(heights) - min(heights) <= 1


def test_windows_are_square_where_they_can_be() -> None:
    """A square count of a grid whose sides it divides gives squares."""
    for count, side in ((1, 24), (4, 12), (16, 6), (64, 3), (144, 2), (576, 1)):
        for window in windows((24, 24), count):
            assert len(window) == side**2
            assert window[-1] - window[0] == (side - 1) * 25


def test_groups_are_equally_large_and_as_vllm_makes_them() -> None:
    assert schedule.groups([32]) == [1]
    assert schedule.groups([2, 20, 10]) == [1, 10, 5]
    assert schedule.groups([8, 8, 8, 8]) == [1, 1, 1, 1]
    assert schedule.groups([3, 4, 4]) == [1, 1, 1], "one layer of padding"
    assert schedule.groups([2, 3, 3]) == [1, 2, 2], "too much padding"


def starts_of(layers: int) -> Iterator[tuple[int, ...]]:
    """All choices of up to three starts; of fewer in deep decoders."""
    for count in range(1 + (3 if layers <= 12 else 2 if layers <= 32 else 1)):
        yield from combinations(range(1, layers), count)


@pytest.mark.parametrize("layers", [*range(1, 17), 24, 28, 32, 40, 64, 80])
def test_every_layer_is_in_one_part_of_its_stage(layers: int) -> None:
    for starts, block in product(starts_of(layers), (16, 32, 128)):
        spans = schedule.spans(starts, layers)
        equal, parts = (schedule.parts(spans, block, packed) for packed in (False, True))
        assert [sum(p.stage == s for p in equal) for s in range(len(spans))] == (
            schedule.groups(spans)
        )
        for some in (equal, parts):
            assert [sum(p.layers for p in some if p.stage == s) for s in range(len(spans))] == spans
            assert [p.stage for p in some] == sorted(p.stage for p in some)
            assert all(p.layers for p in some)
        assert {p.block for p in equal} == {block}
        assert {p.block for p in parts if p.stage} <= {block}, "gaps are of the server's blocks"
        first = parts[0].block
        assert first % block == 0 and first <= max(block, schedule.FIRST_BLOCK)
        # A group less for half a percent of the KV cache, at most.
        fewer = len(equal) - len(parts)
        assert fewer >= 0
        assert schedule.waste(parts) - schedule.waste(equal) <= Fraction(fewer, 200)
        if schedule.blocks_differ(parts):
            assert sum(p.stage == 0 for p in parts) == 1
        else:
            assert parts == equal
        numbers = [schedule.part_of(parts, layer) for layer in range(layers)]
        assert [numbers.count(n) for n in range(len(parts))] == [p.layers for p in parts]
        assert numbers == sorted(numbers)


@pytest.mark.parametrize(
    ("layers", "starts", "groups", "first", "waste"),
    [
        (32, (2,), 4, 80, 0),
        (32, (2, 22), 4, 80, 0),
        (32, (2, 17), 3, 80, Fraction(1, 32)),
        (32, (4,), 3, 48, Fraction(1, 48)),
        (40, (2, 22), 5, 80, Fraction(1, 20)),
        # Two parts of 15, or none: what does not divide evenly stays as vLLM makes it.
        (32, (2, 6, 15), 17, 16, Fraction(1, 16)),
        (32, (8, 16, 24), 4, 16, 0),
        (32, (16,), 2, 16, 0),
        (32, (), 1, 16, 0),
    ],
)
def test_parts_are_few_and_waste_little(
    layers: int, starts: tuple[int, ...], groups: int, first: int, waste: Fraction
) -> None:
    parts = schedule.parts(schedule.spans(starts, layers), 16, packed=True)
    assert (len(parts), parts[0].block, schedule.waste(parts)) == (groups, first, waste)


# --- Ladders --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rung", "name"),
    [
        ("1", Fraction(1), "N"),
        ("1/1", Fraction(1), "N"),
        ("1/3", Fraction(1, 3), "N/3"),
        ("2/9", Fraction(2, 9), "2N/9"),
        ("4/18", Fraction(2, 9), "2N/9"),
        ("2", 2, "2"),
        ("64", 64, "64"),
    ],
)
def test_rungs(text: str, rung: Fraction | int, name: str) -> None:
    """A share is a fraction, and 1 the share of all; a number of tokens is an int."""
    parsed = schedule.rung(text)
    assert (parsed, type(parsed), schedule.rung_name(parsed)) == (rung, type(rung), name)
    assert schedule.rung(str(parsed)) == parsed


@pytest.mark.parametrize(
    "text", ["", "0", "-3", "0/3", "1/0", "4/3", "-1/3", "1/-3", "0.5", "N/3", "/", "1/3/2"]
)
def test_what_is_no_rung(text: str) -> None:
    with pytest.raises(ValueError, match="a share of the tokens such as 1/3, 1 for all of them"):
        schedule.rung(text)


LADDERS = [
    ("1", "1/3", "2/9", "1/9"),
    ("1", "1/2"),
    ("1/3",),
    ("576", "192", "64", "2"),
    ("1", "100", "1/9", "5"),
]


@pytest.mark.parametrize("texts", LADDERS)
@pytest.mark.parametrize(("least", "most"), [(1, None), (16, None), (1, 100), (10, 40), (7, 7)])
def test_every_ladder_of_every_image(texts: tuple[str, ...], least: int, most: int | None) -> None:
    """Within the limits and the image, exact shares rounded down, in the order of the rungs."""
    rungs = [schedule.rung(text) for text in texts]
    of_one_kind = len({type(rung) for rung in rungs}) == 1
    for tokens in range(1, 700):
        counts = schedule.ladder(tokens, rungs, least, most)
        assert len(counts) == len(rungs)
        assert all(1 <= count <= tokens for count in counts)
        assert all(min(least, tokens) <= count <= (most or tokens) for count in counts)
        if of_one_kind:
            assert counts == sorted(counts, reverse=True)
        for text, count in zip(texts, counts, strict=True):
            above, _, below = text.partition("/")
            plain = tokens * int(above) // int(below) if below else int(above)
            plain = tokens if text == "1" else plain
            if least <= plain <= min(most or tokens, tokens):
                assert count == plain
    assert schedule.ladder(144, [schedule.rung(t) for t in LADDERS[0]]) == [144, 48, 32, 16]
    assert schedule.ladder(576, [schedule.rung(t) for t in LADDERS[0]]) == [576, 192, 128, 64]
