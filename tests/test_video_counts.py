# SPDX-License-Identifier: Apache-2.0
"""What is left of a video is settled by counts: its layout, its frames' shares, what is refused."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch

from vllm_ficoco import schedule
from vllm_ficoco.methods import METHODS
from vllm_ficoco.packed import Packed, pack, unpack
from vllm_ficoco.settings import Reduction, SettingsError
from vllm_ficoco.vision.geometry import Geometry
from vllm_ficoco.vision.layout import Layout, Window

LLAVA = Geometry(
    (3, 3),
    layers=4,
    has_cls=False,
    decoder_layers=8,
    starts=(2, 4, 6),
    by_image=True,
    offers=frozenset({"scaling", "layers", "attention"}),
    videos="reduced",
)
"""As LLaVA-OneVision: its tower lets tokens leave between layers, of images."""
QWEN = LLAVA._replace(grid=(0, 0), offers=frozenset({"scaling", "attention"}))
BY_FRAME = QWEN._replace(videos="by_frame")

LAYOUTS = [
    Layout(grid, frames=frames, closed=closed)
    for grid in ((1, 1), (2, 3), (3, 2))
    for frames in (1, 2, 5, 8)
    for closed in (False, True)
]
SMALL = Layout((2, 3), frames=5, closed=True)


def test_where_the_tokens_of_a_video_stand() -> None:
    layout = Layout((2, 3), frames=2, closed=True)
    assert (layout.tokens, layout.sent, layout.encoded) == (13, 13, 12)
    assert (layout.inputs, layout.newlines, layout.kind) == (2, 1, "video")
    assert layout.is_video and not layout.is_tiled
    assert layout.parts == (Window(0, 0, 2, 3),) * 2
    assert [layout.numbers(part) for part in range(2)] == [(0, 3), (6, 3)]
    assert layout.newline_numbers(1) == [12] and layout.newline_numbers(0) == []
    thirds = [0, 1 / 3, 2 / 3]
    frame = [[down, right] for down in (0, 0.5) for right in thirds]
    for reduced in (True, False):
        spots = layout.raster(reduced).spots(torch.arange(13))
        torch.testing.assert_close(spots, torch.tensor([*frame, *frame, [1, 1]]))
    opened = layout._replace(closed=False)
    assert (opened.tokens, opened.newlines) == (12, 0)


@pytest.mark.parametrize("layout", [SMALL, Layout((4, 4)), Layout((1, 1), frames=1)])
def test_a_layout_travels_with_its_item(layout: Layout) -> None:
    reduction = Reduction(budget=4)
    found = unpack(pack(reduction, layout))
    assert found == Packed(reduction, layout) and found.layout is not None
    assert type(found.layout.closed) is bool


@pytest.mark.parametrize(
    "wrong",
    [
        dict(frames=-1),
        dict(frames=1.0),
        dict(frames=True),
        dict(frames=0, closed=True),
        dict(closed=1),
        dict(tiles=(1, 1)),
    ],
    ids=repr,
)
def test_what_is_no_layout_of_a_video(wrong: dict) -> None:
    text = json.dumps(SMALL._replace(**wrong))
    with pytest.raises(ValueError, match="not a layout"):
        Layout.from_json(text)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16])
def test_even_shares(count: int) -> None:
    """They differ by one at most, and those that get one more do not stand together."""
    for total in range(4 * count + 1):
        shares = schedule.evenly(total, count)
        assert len(shares) == count and sum(shares) == total
        assert max(shares) - min(shares) <= 1
        more = [i for i, share in enumerate(shares) if share > total // count]
        apart = [b - a for a, b in pairwise(more)]
        assert not apart or max(apart) - min(apart) <= 1, "evenly over the video"
    assert schedule.evenly(1, 9) == [0, 0, 0, 0, 1, 0, 0, 0, 0], "one is taken from the middle"


@pytest.mark.parametrize("count", [1, 2, 3, 7, 12])
@pytest.mark.parametrize("size", [1, 2, 5, 30])
def test_shares_by_rank(count: int, size: int) -> None:
    for total in range(count * size + 1):
        shares = schedule.by_rank(total, count, size)
        assert len(shares) == count and sum(shares) == total
        assert shares == sorted(shares, reverse=True) and shares[0] <= size
        assert total < count or shares[-1] >= 1
        assert total >= count or shares[0] <= 1


def test_thrice_as_much_for_the_first_third() -> None:
    assert schedule.by_rank(3 + 12, 3, 100) == [1 + 6, 1 + 4, 1 + 2]
    assert schedule.by_rank(3 + 12, 3, 5) == [5, 5, 5]
    assert schedule.by_rank(3 + 12, 3, 6) == [6, 6, 3], "what is beyond the first's goes on"
    assert schedule.by_rank(2, 3, 6) == [1, 1, 0]


FOR_VIDEOS = [
    method
    for method in LLAVA.methods(video=True)
    if METHODS[method].decoder is None and method != "none"
]


@pytest.mark.parametrize("frames", ["even", "unique"])
@pytest.mark.parametrize("method", FOR_VIDEOS)
def test_every_budget_of_a_video_is_kept(method: str, frames: str) -> None:
    """Exactly, the newline counted; or it is refused, with the smallest one that can be."""
    options = {"frames": frames} if "frames" in METHODS[method].options.model_fields else {}
    if frames == "unique" and not options:
        return
    for layout in LAYOUTS:
        each, reachable = layout.grid[0] * layout.grid[1], []
        for budget in range(1, layout.tokens):
            reduction = Reduction(method=method, budget=budget, options=options)
            case = (layout, budget)
            try:
                plans = LLAVA.parts(reduction, layout=layout)
            except SettingsError as refused:
                assert not reachable, case
                words = refused.allowed
                smallest = int(words.removeprefix("at least ").split()[0])
                assert words == f"at least {smallest} for a video of {layout.tokens} visual tokens"
                assert smallest > budget, case
                if smallest < layout.tokens:
                    enough = reduction.model_copy(update={"budget": smallest})
                    assert LLAVA.kept(enough, layout=layout) == smallest, case
                    less = reduction.model_copy(update={"budget": smallest - 1})
                    with pytest.raises(SettingsError, match=f"at least {smallest} "):
                        LLAVA.kept(less, layout=layout)
                continue
            reachable.append(budget)
            assert LLAVA.newlines_kept(reduction, layout) == layout.closed, case
            assert sum(plan.keep for plan in plans) + layout.closed == budget, case
            assert LLAVA.kept(reduction, layout=layout) == budget, case
            assert LLAVA.held(reduction, layout=layout) == [budget] * 4
            assert [plan.part for plan in plans] == sorted({plan.part for plan in plans}), case
            for plan in plans:
                assert 0 < plan.keep <= each and plan.window == Window(0, 0, *layout.grid), case
                assert bool(plan.stages) == (plan.keep < each), case
                assert not plan.stages or plan.stages[-1] == (LLAVA.layers - 1, plan.keep), case
        whole = Reduction(method=method, budget=layout.tokens, options=options)
        assert LLAVA.parts(whole, layout=layout) == []
        assert LLAVA.kept(whole, layout=layout) == layout.tokens


def test_frames_that_keep_nothing_are_spread_over_the_video() -> None:
    layout = Layout((2, 3), frames=9)
    kept = {
        budget: [p.part for p in LLAVA.parts(Reduction(method="topk", budget=budget), "", layout)]
        for budget in (1, 3, 9)
    }
    assert kept == {1: [4], 3: [1, 4, 7], 9: [*range(9)]}


def test_a_newline_is_not_all_that_stays() -> None:
    with pytest.raises(SettingsError, match="at least 2 for a video of 31 visual tokens"):
        LLAVA.kept(Reduction(budget=1), layout=SMALL)
    assert LLAVA.kept(Reduction(budget=1), layout=SMALL._replace(closed=False)) == 1


@pytest.mark.parametrize("method", ["fastv", "k-norm", "dart", "vitcop", "ficoco-l"])
def test_stages_of_the_decoder_count_a_video_as_an_image(method: str) -> None:
    image = Layout((5, 6))
    video = Layout((2, 3), frames=5)
    for budget in range(1, 30):
        reduction, held = Reduction(method=method, budget=budget), []
        for layout in (image, video):
            try:
                held.append(LLAVA.held(reduction, layout=layout))
            except SettingsError as refused:
                held.append(refused.allowed)
        assert held[0] == held[1]


@pytest.mark.parametrize(
    ("geometry", "settings", "field", "says"),
    [
        (LLAVA, {"method": "tome"}, "method", "tome reduces in the tower or before it"),
        (LLAVA, {"method": "resize"}, "method", "resize reduces in the tower or before it"),
        (QWEN, {"method": "evit"}, "method", "evit needs layers of the vision tower"),
        (QWEN, {"method": "resize"}, "method", "resize reduces in the tower or before it"),
        (LLAVA, {"method": "ficoco-l", "options": {"penalty": 2.0}}, "options.penalty", "a video"),
        (
            BY_FRAME,
            {"method": "topk", "options": {"frames": "unique"}},
            "options.frames",
            "text stands between its frames",
        ),
        (QWEN, {"method": "topk", "options": {"newlines": "all"}}, "options.newlines", "videos"),
        (QWEN._replace(videos="whole"), {"method": "topk"}, "budget", "videos of this model stay"),
    ],
    ids=lambda value: "" if isinstance(value, Geometry) else repr(value),
)
def test_what_cannot_be_done_to_a_video(
    geometry: Geometry, settings: dict, field: str, says: str
) -> None:
    layout = SMALL._replace(closed=False)
    with pytest.raises(SettingsError) as refused:
        geometry.kept(Reduction.parse({**settings, "budget": 20}), "reduction.budget", layout)
    assert refused.value.field == f"reduction.{field}"
    assert says in refused.value.allowed
    if field == "method":
        assert "one of none, ficoco-v, score, " in refused.value.allowed


def test_an_image_has_no_frames() -> None:
    reduction = Reduction(method="topk", budget=3, options={"frames": "unique"})
    with pytest.raises(SettingsError, match=r"options.frames = 'unique' .* which has no frames"):
        LLAVA.kept(reduction, "reduction.budget", Layout((3, 3)))
    assert Reduction(method="topk", budget=3, options={"frames": "even"}) == Reduction(
        method="topk", budget=3
    ), "so images have the settings that they had"


def test_methods_between_layers_reduce_videos_on_the_output_where_they_can() -> None:
    assert LLAVA.place_of(METHODS["ficoco-v"]) == "tower"
    assert LLAVA.place_of(METHODS["ficoco-v"], video=True) == "output"
    (plan,) = LLAVA.parts(Reduction(method="ficoco-v", budget=1), layout=Layout((2, 2), frames=1))
    assert plan.stages == ((3, 1),)
