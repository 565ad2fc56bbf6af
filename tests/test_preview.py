# SPDX-License-Identifier: Apache-2.0
"""What becomes of an image's tokens: what is noted of it, and what a preview makes of that."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor
from vllm.exceptions import GracefulHTTPError

from ficoco_server import cli
from ficoco_server import preview as server_preview
from ficoco_server.picture import DIMMED, draw
from ficoco_server.places import Places, followed
from ficoco_server.policy import Policy
from ficoco_server.preview import WAITING, PreviewRequest, Previews, obstacle
from tests.reference import methods as reference
from tests.test_methods import VARIANTS, Row, evidence_at, images, relevance_of
from vllm_ficoco import preview
from vllm_ficoco.methods import METHODS, Tokens
from vllm_ficoco.models.llava import seen_by
from vllm_ficoco.packed import Packed, pack, unpack
from vllm_ficoco.preview import ENTERED, MOST, WORKER_EXTENSION, Follower, PreviewWorker, Step
from vllm_ficoco.settings import Reduction, SettingsError
from vllm_ficoco.vision.geometry import Geometry
from vllm_ficoco.vision.layout import Layout, Window

# --- Where tokens go ------------------------------------------------------------------------


@pytest.mark.parametrize("has_cls", [True, False])
@pytest.mark.parametrize(("row", "options"), VARIANTS)
def test_tokens_go_where_the_transcription_puts_most_of_them(
    row: Row, options: dict[str, Any], has_cls: bool
) -> None:
    """It is given tokens that carry a mark each, too small to matter, and mixes those as well."""
    grid, n, keep, small = (5, 7), 35, 18, 1e-6
    method = METHODS[row.method]
    tokens, evidence = Tokens.of(images(1, n, 7)), evidence_at(3, grid, n, 1, has_cls)
    fates: list[Tensor] = []
    parsed = method.options.model_validate(options)
    left = method.reduce(tokens, evidence, keep, parsed, fates)
    marked, merges = tokens.hidden[0].double(), method.correlate is not None
    if merges:  # others look at how many channels there are
        marked = torch.cat([marked, small * torch.eye(n).double()], 1)
    hidden, position, _ = reference.reduce_one(
        row.method,
        options,
        marked,
        evidence.query[0],
        evidence.key[0],
        evidence.scale,
        has_cls,
        grid,
        tokens.position[0].tolist(),
        [1.0] * n,
        keep,
        evidence.pixels[0],
        1,
        relevance_of(tokens.hidden[0], evidence, 0),
    )
    assert left.position[0].tolist() == position
    into = torch.cat(fates)[0].tolist()
    if not merges:
        at = {place: index for index, place in enumerate(position)}
        assert into == [at.get(token, -1) for token in range(n)]
        return
    share = hidden[:, -n:] / small
    for token, taker in enumerate(into):
        most = float(share[:, token].max())
        assert (taker >= 0) == (most > 1e-9)
        if taker >= 0:
            assert float(share[taker, token]) == pytest.approx(most, rel=1e-4)


def test_only_who_is_followed_is_asked_twice() -> None:
    """The tokens that stay are the same to the bit, followed or not."""
    method = METHODS["ficoco-v"]
    tokens, evidence = Tokens.of(images(1, 35, 7)), evidence_at(3, (5, 7), 35)
    plain = method.reduce(tokens, evidence, 18, method.options())
    fates: list[Tensor] = []
    seen = method.reduce(tokens, evidence, 18, method.options(), fates)
    for one, other in zip(plain.tensors, seen.tensors, strict=True):
        assert torch.equal(one, other)


# --- What is noted --------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def nothing_noted() -> Iterator[None]:
    preview._noted.clear()
    yield
    preview._noted.clear()


def note(mark: str, layer: int = 1) -> None:
    Follower(mark).note("tower", layer, torch.arange(4), [torch.tensor([[0, 0, 1, -1]])],
                        torch.tensor([0, 2]))  # fmt: skip


def test_what_is_noted_is_taken_once() -> None:
    note("a")
    assert PreviewWorker().take_reduction_preview("a") == [
        ["tower", 1, 0, [0, 1, 2, 3], [0, 0, 1, -1], [0, 2]]
    ]
    assert PreviewWorker().take_reduction_preview("a") == []


def test_what_nobody_asks_for_is_forgotten() -> None:
    for number in range(MOST + 3):
        note(f"{number}")
    assert preview.take("2") == [] and len(preview._noted) == MOST
    assert len(preview.take(f"{MOST + 2}")) == 1


def test_what_runs_again_is_noted_once() -> None:
    note("a"), note("a"), note("a", layer=2)
    assert [step.layer for step in preview.take("a")] == [1, 2]


def test_without_merging_the_others_are_gone() -> None:
    Follower("a").note("decoder", 2, torch.tensor([1, 5, 9]), [], torch.tensor([1, 9]))
    (step,) = preview.take("a")
    assert step == Step("decoder", 2, 0, [1, 5, 9], [0, -1, 1], [1, 9])


def test_a_mark_travels_with_an_image() -> None:
    for settings in (Reduction(budget=3), None):
        for layout in (Layout((4, 4)), None):
            assert unpack(pack(settings, layout, (1, 2), "m")) == Packed(
                settings, layout, (1, 2), "m"
            )


# --- Places ---------------------------------------------------------------------------------

TILED = Layout((4, 4), (2, 2), Window(2, 0, 4, 8))
"""An image twice as wide as high: two rows of padding above and below."""
WHOLE = (0.0, 0.0, 1.0, 1.0)


@pytest.mark.parametrize("reduced", [True, False])
@pytest.mark.parametrize(
    "layout",
    [
        Layout((3, 5)),
        TILED,
        Layout((4, 4), (1, 3), Window(1, 2, 3, 7)),
        Layout((4, 4), (3, 3), Window(0, 1, 12, 10), shrunk=(7, 6)),
    ],
)
def test_a_place_is_where_its_token_is(layout: Layout, reduced: bool) -> None:
    """By the numbers that methods in the decoder go by."""
    places, raster = Places(layout, reduced, WHOLE), layout.raster(reduced)
    count = places.total + (places.rows - places.newlines if layout.is_tiled else 0)
    seen = []
    for number, spot in enumerate(raster.spots(torch.arange(count)).tolist()):
        if spot[1] == 1.0 and not 0 <= spot[0] < 1:
            continue  # a newline of padding, which no image has
        place = places.place(number)
        seen.append(place)
        grid = [g for g in places.grids if g["first"] <= place][-1]
        index = place - grid["first"]
        if index >= grid["rows"] * grid["columns"]:
            assert spot[1] == 1.0, "a newline is at the right"
            continue
        row, column = divmod(index, grid["columns"])
        left, top, right, bottom = grid["area"]
        assert spot[0] == pytest.approx(top + (bottom - top) * row / grid["rows"])
        assert spot[1] == pytest.approx(left + (right - left) * column / grid["columns"])
    assert set(seen) >= places.present
    assert len(places.present) == (
        layout.tokens if not reduced or not layout.shrunk else layout._replace(shrunk=None).tokens
    )


def test_places_are_followed_from_stage_to_stage() -> None:
    places = Places(Layout((2, 4)), True, WHOLE)
    found = followed(
        places,
        [
            Step("decoder", 2, 0, [0, 3, 6], [0, 0, -1], [0]),
            Step("tower", 1, 0, [*range(8)], [0, 0, 1, 1, -1, 2, 2, 3], [0, 3, 6, 7]),
            Step("tower", 4, 0, [0, 3, 6, 7], [0, 1, 2, 2], [0, 3, 6]),
        ],
        5,
    )
    assert found["stages"] == [
        {
            "where": "tower",
            "layer": 1,
            "kept": [0, 3, 6, 7],
            "left": [1, 2, 4, 5],
            "into": [0, 3, None, 6],
        },
        {"where": "tower", "layer": 4, "kept": [0, 3, 6], "left": [7], "into": [6]},
        {"where": "decoder", "layer": 2, "kept": [0], "left": [3, 6], "into": [0, None]},
    ]
    assert found["kept"] == [0]
    assert found["receivers"] == [0, 0, 0, 0, None, None, None, None]


def test_a_new_token_stands_where_one_that_left_stood() -> None:
    """EViT's stands at the last place of those that it is made of."""
    places = Places(Layout((1, 5)), True, WHOLE)
    found = followed(places, [Step("tower", 2, 0, [*range(5)], [0, 2, 1, 2, 2], [0, 2, 4])], 5)
    (stage,) = found["stages"]
    assert (stage["left"], stage["into"]) == ([1, 3], [4, 4])
    assert found["receivers"] == [0, 4, 2, 4, 4]


def test_parts_newlines_and_what_is_left_of_them() -> None:
    """Of the thumbnail two stay, of the first two tiles one each, the others go with newlines."""
    places = Places(TILED, True, WHOLE)
    upper_left, upper_right = places.whole + 2 * 8, places.whole + 2 * 8 + 4
    number = {places.place(n): n for n in range(16 + 8 * 9)}
    kept = [3, 9, upper_left, upper_right + 3]
    tiles = [[upper_left + 8 * r + c for r in range(2) for c in range(4)],
             [upper_right + 8 * r + c for r in range(2) for c in range(4)]]  # fmt: skip
    steps = [
        Step("output", 3, 0, [*range(16)], [-1] * 3 + [0] + [-1] * 5 + [1] + [-1] * 6, [3, 9]),
        *(
            Step(
                "output",
                3,
                1 + part,
                [number[p] for p in places_of],
                [0 if p in kept else -1 for p in places_of],
                [number[p] for p in places_of if p in kept],
            )
            for part, places_of in enumerate(tiles)
        ),
        Step(ENTERED, 0, 0, [], [], [number[p] for p in kept]),
    ]
    found = followed(places, steps, 3)
    (stage,) = found["stages"]
    assert found["kept"] == stage["kept"] == kept and stage["into"] is None
    assert set(stage["left"]) == places.present - set(kept)
    assert len(stage["left"]) + len(kept) == TILED.tokens == 16 + 4 * 9
    assert found["receivers"] is None


def test_newlines_that_leave_alone() -> None:
    places = Places(TILED, True, WHOLE)
    number = {places.place(n): n for n in range(16 + 8 * 9)}
    newlines = sorted(places.present)[-4:]
    stay = sorted(places.present - {newlines[0]})
    found = followed(places, [Step(ENTERED, 0, 0, [], [], [number[p] for p in stay])], 3)
    (stage,) = found["stages"]
    assert (stage["where"], stage["layer"], stage["left"]) == ("output", 3, [newlines[0]])


def test_where_nothing_leaves_all_is_kept() -> None:
    found = followed(Places(Layout((2, 3)), False, WHOLE), [], 5)
    assert found == {"stages": [], "kept": [*range(6)], "receivers": None}


@pytest.mark.parametrize("size", [(50, 50), (90, 40), (33, 71), (20, 200)])
@pytest.mark.parametrize("how", [{"shortest_edge": 28}, {"height": 28, "width": 36}])
def test_what_a_processor_sees_of_an_image(size: tuple[int, int], how: dict[str, int]) -> None:
    """Of a picture whose red is its column and whose green is its row."""
    processor = CLIPImageProcessor(
        size=how, crop_size={"height": 28, "width": 28}, do_normalize=False, do_rescale=False
    )
    width, height = size
    ramps = np.zeros((height, width, 3), dtype=np.float32)
    ramps[..., 0] = (np.arange(width) + 0.5) / width
    ramps[..., 1] = ((np.arange(height) + 0.5) / height)[:, None]
    picture = Image.fromarray((ramps * 255).round().astype(np.uint8))
    seen = processor(picture, return_tensors="np")["pixel_values"][0] / 255
    left, top, right, bottom = seen_by(processor, width, height)
    at = (np.arange(28) + 0.5) / 28
    inner = slice(2, -2)  # at the edges, interpolation has one side only
    for values, low, high in ((seen[0].mean(0), left, right), (seen[1].mean(1), top, bottom)):
        assert np.abs(values - (low + (high - low) * at))[inner].max() < 0.02


def test_a_processor_that_cuts_nothing_off_sees_all() -> None:
    processor = SimpleNamespace(do_center_crop=False)
    assert seen_by(processor, 30, 20) == WHOLE


# --- The picture ----------------------------------------------------------------------------


def test_kept_patches_are_clear_and_others_dimmed() -> None:
    grid = {"first": 0, "rows": 2, "columns": 2, "area": [0.25, 0, 0.75, 1]}
    drawn = draw(Image.new("RGB", (80, 40), (200, 100, 50)), {"kept": [1], "grids": [grid]})
    dark = tuple(int(light * DIMMED) for light in (200, 100, 50))
    for x in range(80):
        for y in range(40):
            clear = 40 <= x < 60 and y < 20
            assert drawn.getpixel((x, y)) == ((200, 100, 50) if clear else dark), (x, y)


def test_stages_and_tiles_are_drawn() -> None:
    grids = [
        {"first": 0, "rows": 1, "columns": 1, "area": [0, 0, 1, 1]},
        {"first": 1, "rows": 3, "columns": 1, "area": [0, -0.5, 1, 1.5]},
    ]
    said = {"kept": [], "grids": grids, "stages": [{"kept": [0, 2]}, {"kept": []}]}
    image = Image.new("RGB", (30, 20), "white")
    first, last = draw(image, said, 0), draw(image, said)
    assert first.size == (30 + 8 + 30, 20)
    assert first.getpixel((5, 5)) == (255, 255, 255) != last.getpixel((5, 5))
    column = [first.getpixel((40, y))[0] == 255 for y in range(20)]
    # Rows of the second grid are at -10, 3.3 and 16.7 pixels.
    assert column == [10 / 3 <= y + 0.5 < 50 / 3 for y in range(20)]


# --- Who may look ---------------------------------------------------------------------------


def test_fields_of_a_request() -> None:
    chat = PreviewRequest(image="data:,", question="what ?", visual_token_budget=5).as_chat()
    assert chat.visual_token_budget == 5 and chat.max_completion_tokens == 1
    assert chat._mark and chat._mark != PreviewRequest(image="data:,").as_chat()._mark
    for body, field, words in (
        ({}, "image", "a string"),
        ({"image": {"url": "data:,"}}, "image", "a string"),
        ({"image": "data:,", "question": 3}, "question", "a string"),
        ({"image": "data:,", "model": 3}, "model", "a string"),
        ({"image": "data:,", "budget": 3}, "budget", "visual_token_budget"),
        ({"image": "data:,", "images": 3}, "images", "known: image, question, model"),
    ):
        with pytest.raises(SettingsError) as refused:
            PreviewRequest(**body).as_chat()
        assert refused.value.field == field and words in refused.value.allowed


class Handler:
    """Stands in for chat completions: answers when it is told to."""

    def __init__(self) -> None:
        self.go, self.running = asyncio.Event(), 0

    async def create_chat_completion(self, chat: Any) -> Any:
        self.running += 1
        await self.go.wait()
        self.running -= 1
        places = Places(Layout((2, 2)), False, WHOLE)
        chat._shown = server_preview.Shown(places, 8, 8, None, False)
        chat._report = {"images": [{"visual_tokens_kept": 4}]}
        return SimpleNamespace(model="m")


def previews(busy: bool = False, no_previews: str = "") -> Previews:
    reducer: Any = SimpleNamespace(no_previews=no_previews, geometry=Geometry((2, 2), 5, True))
    return Previews(reducer, None, lambda: busy)


async def test_one_runs_at_a_time_and_few_wait() -> None:
    guarded, handler, most = previews(), Handler(), 0

    async def one() -> Any:
        async with guarded.turn():
            return await guarded.look(PreviewRequest(image="data:,").as_chat(), handler)

    tasks = [asyncio.create_task(one()) for _ in range(1 + WAITING)]
    for _ in range(10):
        await asyncio.sleep(0)
        most = max(most, handler.running)
    with pytest.raises(GracefulHTTPError, match="too many") as refused:
        await one()
    assert refused.value.http_status == 429
    handler.go.set()
    found = await asyncio.gather(*tasks)
    assert most == 1 and [one["kept"] for one in found] == [[0, 1, 2, 3]] * (1 + WAITING)
    assert (await one())["object"] == "reduction.preview", "there is room again"


async def test_previews_stand_back_and_can_be_switched_off() -> None:
    for guarded, status, words in (
        (previews(busy=True), 503, "wait for the engine"),
        (previews(no_previews="switched off"), 403, "switched off"),
    ):
        with pytest.raises(GracefulHTTPError, match=words) as refused:
            async with guarded.turn():
                pass
        assert refused.value.http_status == status


def test_the_flag_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "prepare", lambda *_: None)
    monkeypatch.setattr(cli, "serve", lambda *_: None)
    monkeypatch.setenv("FICOCO_PREVIEW", "1")
    cli.main(["serve", "tiny-llava"])
    assert Policy.from_environment().preview
    cli.main(["serve", "tiny-llava", "--no-preview"])
    assert not Policy.from_environment().preview


def test_why_there_are_no_previews() -> None:
    def why(
        extension: str = WORKER_EXTENSION, on: bool = True, elsewhere: Any = None, **more: Any
    ) -> str:
        config: Any = SimpleNamespace(
            parallel_config=SimpleNamespace(worker_extension_cls=extension),
            ec_transfer_config=elsewhere,
        )
        reducer: Any = SimpleNamespace(
            policy=SimpleNamespace(preview=on),
            geometry=Geometry((2, 2), 5, True),
            modalities=["image"],
        )
        vars(reducer).update(more)
        return obstacle(config, reducer)

    assert why() == ""
    assert "--no-preview" in why(on=False)
    assert "--worker-extension-cls mine.Extension" in why("mine.Extension")
    assert "--ec-transfer-config" in why(elsewhere="another server")
    assert "no such model" in why(geometry=Geometry.none("no such model"))
    assert "no images" in why(modalities=["video"])
