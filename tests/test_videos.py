# SPDX-License-Identifier: Apache-2.0
"""Methods on videos keep what the transcriptions keep, to the token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.reference import videos as reference
from tests.waiting import NoWaiting
from vllm_ficoco.methods import METHODS, Evidence, Tokens
from vllm_ficoco.methods.paradigm import grid_windows
from vllm_ficoco.methods.vidcom2 import likeness
from vllm_ficoco.settings import Reduction, SettingsError
from vllm_ficoco.vision.frames import reduce_frames, uniqueness
from vllm_ficoco.vision.geometry import Geometry
from vllm_ficoco.vision.layout import Layout

GEOMETRY = Geometry(
    (0, 0),
    layers=3,
    has_cls=False,
    by_image=True,
    offers=frozenset({"attention"}),
    videos="reduced",
)
CHANNELS = 12
LAYOUTS = [
    Layout((2, 3), frames=1),
    Layout((2, 3), frames=5),
    Layout((3, 2), frames=8),
    Layout((4, 4), frames=6, closed=True),
    Layout((1, 1), frames=7),
]
BY_ITSELF = [
    name
    for name in GEOMETRY.methods(video=True)
    if name != "none" and METHODS[name].decoder is None and not METHODS[name].for_videos_alone
]


def videos(count: int, layout: Layout, seed: int = 0) -> Tensor:
    """(count, F * n, D): frames that resemble one another more or less."""
    lot = torch.Generator().manual_seed(seed)
    each = layout.grid[0] * layout.grid[1]
    scene = torch.randn(count, 1, each, CHANNELS, generator=lot)
    change = torch.randn(count, layout.frames, each, CHANNELS, generator=lot)
    much = torch.rand(count, layout.frames, 1, 1, generator=lot)
    return (scene + much * change).flatten(1, 2)


def evidence_of(count: int, layout: Layout, seed: int = 0) -> Evidence:
    lot = torch.Generator().manual_seed(100 + seed)
    frames, each = count * layout.frames, layout.grid[0] * layout.grid[1]
    query, key = (torch.randn(frames, 2, each, 4, generator=lot) for _ in range(2))
    return Evidence(
        query=query,
        key=key,
        scale=0.5,
        grid=layout.grid,
        has_cls=False,
        pixels=torch.randn(frames, 3, 4, 4, generator=lot),
        question=torch.randn(frames, CHANNELS, generator=lot),
    )


def reduce(
    layout: Layout,
    budget: int,
    method: str,
    hidden: Tensor,
    evidence: Evidence,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    reduction = Reduction(method=method, budget=budget, options=options)
    plans = GEOMETRY.parts(reduction, layout=layout)
    return reduce_frames(hidden, evidence, reduction, layout, plans)


def budgets(method: str, layout: Layout, **options: Any) -> Iterator[int]:
    """All that can be reached."""
    for budget in range(1, layout.tokens):
        try:
            GEOMETRY.parts(Reduction(method=method, budget=budget, options=options), "", layout)
        except SettingsError:
            continue
        yield budget


@pytest.mark.parametrize("frames", ["even", "unique"])
@pytest.mark.parametrize("method", BY_ITSELF)
def test_every_frame_is_an_image_of_its_own(method: str, frames: str) -> None:
    """By every method that knows images: the tokens that it makes of a frame alone."""
    spec, layout = METHODS[method], LAYOUTS[1]
    options = spec.options.model_validate({"frames": frames})
    hidden, evidence = videos(2, layout), evidence_of(2, layout)
    each = hidden.unflatten(1, (layout.frames, -1))
    for budget in (1, 4, 5, 13, 22, 29):
        kept, place = reduce(layout, budget, method, hidden, evidence, frames=frames)
        assert kept.shape == (2, budget, CHANNELS)
        for video in range(2):
            made = {number: token for number, token in enumerate(hidden[video])}

            def keep(frame: int, count: int, video: int = video, made: dict = made) -> list[int]:
                number = video * layout.frames + frame
                tokens = Tokens.of(each[video, frame][None])
                left = spec.reduce(
                    tokens, evidence.of_images(slice(number, number + 1)), count, options
                )
                places = left.position[0].tolist()
                made |= {frame * 6 + p: x for p, x in zip(places, left.hidden[0], strict=True)}
                return places

            tokens = each[video].double().numpy()
            due = reference.each_by_itself(tokens, budget, frames == "unique", keep)
            assert place[video].tolist() == due, budget
            torch.testing.assert_close(kept[video], torch.stack([made[n] for n in due]))


TRANSCRIBED = {
    "vidcom2": [{}, {"temperature": 0.3}],
    "dycoke": [{}, {"window": 2}, {"window": 3}, {"window": 8}],
}


@pytest.mark.parametrize(
    ("method", "options"),
    [(name, options) for name in TRANSCRIBED for options in TRANSCRIBED[name]],
)
def test_keeps_what_the_transcription_keeps(method: str, options: dict) -> None:
    seen = 0
    for seed, layout in enumerate(LAYOUTS):
        hidden, evidence = videos(3, layout, seed), evidence_of(3, layout)
        for budget in budgets(method, layout, **options):
            kept, place = reduce(layout, budget, method, hidden, evidence, **options)
            for video in range(3):
                tokens = hidden[video].double().numpy().reshape(layout.frames, -1, CHANNELS)
                due = getattr(reference, method)(tokens, budget - layout.closed, **options)
                assert place[video].tolist() == due, (layout, budget)
                assert torch.equal(kept[video], hidden[video][due])
                seen += 1
    assert seen > 50


def test_vidcom2_keeps_of_a_frame_what_vllms_own_keeps() -> None:
    """vLLM has it, per server. Its shares are rounded and put right by score, to the same total: so
    a frame may have a token more here or there, but the same come first."""
    from vllm.multimodal.video_prune.vidcom2 import compute_retention_mask

    layout, alike, frames = Layout((4, 4), frames=12), 0, 0
    for seed in range(5):
        hidden, evidence = videos(1, layout, seed), evidence_of(1, layout)
        for budget in (24, 48, 100, 144):
            rate = 1 - (budget + 0.5) / layout.tokens
            theirs = compute_retention_mask(hidden[0], (12, 8, 8), 2, rate).nonzero()[:, 0]
            _, ours = reduce(layout, budget, "vidcom2", hidden, evidence)
            assert len(theirs) == ours.shape[1] == budget
            for frame in range(12):
                one, other = (x[x // 16 == frame].tolist() for x in (ours[0], theirs))
                smaller, larger = sorted((one, other), key=len)
                assert {*smaller} <= {*larger}
                alike += len(one) == len(other)
                frames += 1
    assert alike > frames / 2, (alike, frames)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"segments": 3, "alike": 0.5, "every": 2, "merged": 0.7, "own": 0.1},
        {"segments": 1, "alike": -1.0, "merged": 1.0},
        {"segments": 100, "merged": 0.5},
    ],
    ids=str,
)
def test_merges_as_the_transcription(options: dict) -> None:
    """FastVID: whoever stays, and what anchors become."""
    for layout, step in ((LAYOUTS[0], 1), (LAYOUTS[1], 3), (LAYOUTS[3], 17)):
        hidden, evidence = videos(2, layout), evidence_of(2, layout)
        attention = evidence.attention_of_cls().unflatten(0, (2, -1)).double().numpy()
        for budget in [*budgets("fastvid", layout, **options)][::step]:
            kept, place = reduce(layout, budget, "fastvid", hidden, evidence, **options)
            for video in range(2):
                tokens = hidden[video].double().numpy().reshape(layout.frames, -1, CHANNELS)
                due = reference.fastvid(tokens, attention[video], budget - layout.closed, **options)
                assert place[video].tolist() == sorted(due), (layout, budget)
                values = torch.tensor(np.array([due[number] for number in sorted(due)]))
                torch.testing.assert_close(kept[video], values.float())


def test_tokens_that_are_alike_are_merged_once() -> None:
    """All tokens of a black video are one: no value is lost, and none is not a number."""
    layout = LAYOUTS[3]
    hidden = torch.ones(1, layout.frames * 16, CHANNELS)
    kept, _ = reduce(layout, 40, "fastvid", hidden, evidence_of(1, layout))
    torch.testing.assert_close(kept, torch.ones(1, 39, CHANNELS))


def test_whole_frames_at_equal_distances() -> None:
    for layout in LAYOUTS:
        each = layout.grid[0] * layout.grid[1]
        hidden, evidence = videos(2, layout), evidence_of(2, layout)

        def keep(count: int, layout: Layout = layout) -> list[int]:
            return grid_windows(layout.grid, count, torch.device("cpu"))[2].tolist()

        for budget in budgets("uniform-frames", layout):
            kept, place = reduce(layout, budget, "uniform-frames", hidden, evidence)
            due = reference.uniform_frames(layout.frames, each, budget - layout.closed, keep)
            assert place.tolist() == [due, due], (layout, budget)
            assert torch.equal(kept, hidden[:, due])


ALONE = [name for name, method in METHODS.items() if method.for_videos_alone]


def test_every_method_for_videos_is_transcribed() -> None:
    assert {*ALONE} == {*TRANSCRIBED, "fastvid", "uniform-frames"}
    for name in ALONE:
        method = METHODS[name]
        assert method.across_frames is not None and not method.fits_a_graph
        assert method.places == ["output"]


@pytest.mark.parametrize("frames", ["even", "unique"])
@pytest.mark.parametrize("method", [*ALONE, "topk", "pooling", "ficoco-v", "apet"])
def test_a_video_does_not_depend_on_who_shares_its_batch(method: str, frames: str) -> None:
    options = {"frames": frames} if method in BY_ITSELF else {}
    layout = LAYOUTS[3]
    hidden, evidence = videos(4, layout), evidence_of(4, layout)
    together = reduce(layout, 40, method, hidden, evidence, **options)
    for video in range(4):
        own = slice(video * layout.frames, (video + 1) * layout.frames)
        alone = reduce(
            layout, 40, method, hidden[video : video + 1], evidence.of_images(own), **options
        )
        for one, other in zip(together, alone, strict=True):
            assert torch.equal(one[video], other[0])


@pytest.mark.parametrize("method", [*ALONE, "topk", "pooling", "random"])
def test_long_videos_take_turns(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In copies of a frame or two, to the bit the same."""
    layout = LAYOUTS[3]
    hidden, evidence = videos(2, layout), evidence_of(2, layout)
    options = {"frames": "unique"} if method in BY_ITSELF else {}
    due = reduce(layout, 40, method, hidden, evidence, **options)
    for held in (1, 12 * 2 * 16 * CHANNELS * 2):
        for module in ("methods.paradigm", "methods.frames", "methods.fastvid", "vision.frames"):
            monkeypatch.setattr(f"vllm_ficoco.{module}.EVIDENCE_BYTES", held)
        found = reduce(layout, 40, method, hidden, evidence, **options)
        for one, other in zip(found, due, strict=True):
            torch.testing.assert_close(one, other)


def test_an_event_keeps_more_than_its_share() -> None:
    """A still video in which something appears in one frame: VidCom2 and `unique` keep more of that
    frame than of any other, and VidCom2 what has appeared."""
    layout = Layout((4, 4), frames=9)
    lot = torch.Generator().manual_seed(3)
    still = torch.ones(CHANNELS) + 0.3 * torch.randn(1, 16, CHANNELS, generator=lot)
    video = still.repeat(9, 1, 1) + 1e-3 * torch.randn(9, 16, CHANNELS, generator=lot)
    video[6, [2, 3, 7]] = torch.randn(3, CHANNELS, generator=lot)
    hidden, evidence = video.flatten(0, 1)[None], evidence_of(1, layout)
    assert uniqueness(video[None]).argmax() == 6
    for method, options in (("vidcom2", {}), ("topk", {"frames": "unique"})):
        for budget in (36, 18):
            _, place = reduce(layout, budget, method, hidden, evidence, **options)
            count = torch.bincount(place[0] // 16, minlength=9).tolist()
            assert count[6] == max(count) and count.count(count[6]) <= 3, (method, count)
            assert count[6] > budget / 9 and min(count) >= 1
            if method == "vidcom2":
                assert {6 * 16 + 2, 6 * 16 + 3, 6 * 16 + 7} <= {*place[0].tolist()}
    _, place = reduce(layout, 36, "topk", hidden, evidence)
    assert torch.bincount(place[0] // 16).tolist() == [4] * 9


def test_dycoke_keeps_what_has_changed() -> None:
    layout = Layout((4, 4), frames=8)
    video = torch.randn(1, 16, CHANNELS, generator=torch.Generator().manual_seed(4)).repeat(8, 1, 1)
    video[5, [3, 9]] *= -1  # what it is compared with is frame 4
    hidden = video.flatten(0, 1)[None]
    _, place = reduce(layout, 32 + 12, "dycoke", hidden, evidence_of(1, layout))
    at = {number for number in place[0].tolist() if number // 16 == 5}
    assert at == {5 * 16 + 3, 5 * 16 + 9}


def test_vidcom2_in_half_precision_scores_in_float32() -> None:
    """As its float32 copy does: nothing is rounded on the way, only what comes in."""
    layout = LAYOUTS[3]
    hidden, evidence = videos(2, layout).bfloat16(), evidence_of(2, layout)
    kept, place = reduce(layout, 40, "vidcom2", hidden, evidence)
    assert kept.dtype == torch.bfloat16
    _, due = reduce(layout, 40, "vidcom2", hidden.float(), evidence)
    assert torch.equal(place, due)
    for one in likeness(hidden.unflatten(1, (layout.frames, -1))):
        assert one.dtype == torch.float32


@pytest.mark.parametrize("method", [*ALONE, *BY_ITSELF])
def test_the_host_does_not_wait(method: str) -> None:
    """To hear which frame keeps how much, least of all."""
    layout = LAYOUTS[3]
    hidden, evidence = videos(2, layout), evidence_of(2, layout)
    assert evidence.question is not None
    there = (hidden, evidence.query, evidence.key, evidence.pixels, evidence.question)
    with NoWaiting(there):
        reduce(layout, 40, method, hidden, evidence)
        if method in BY_ITSELF:
            reduce(layout, 40, method, hidden, evidence, frames="unique")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", [*ALONE, *BY_ITSELF])
def test_a_gpu_agrees_and_is_not_waited_for(method: str) -> None:
    """On a GPU: no synchronisation, and the tokens that the CPU selects."""
    layout = LAYOUTS[3]
    hidden, evidence = videos(2, layout), evidence_of(2, layout)
    assert evidence.question is not None
    there = replace(
        evidence,
        query=evidence.query.cuda(),
        key=evidence.key.cuda(),
        pixels=evidence.pixels.cuda(),
        question=evidence.question.cuda(),
    )
    options = {"frames": "unique"} if method in BY_ITSELF else {}
    on_gpu = hidden.cuda()
    reduce(layout, 40, method, on_gpu, there, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = reduce(layout, 40, method, on_gpu, replace(there), **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want = reduce(layout, 40, method, hidden, evidence, **options)
    assert torch.equal(got[1].cpu(), want[1])
    torch.testing.assert_close(got[0].cpu(), want[0], rtol=1e-4, atol=1e-4)
