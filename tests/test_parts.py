# SPDX-License-Identifier: Apache-2.0
"""Methods that compare the parts of an image: exact counts, and the places that the papers say."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration

from tests.reference import methods as reference
from tests.test_methods import SCALE, alike, evidence_at, pick
from tests.waiting import NoWaiting
from vllm_ficoco.methods import METHODS, Evidence
from vllm_ficoco.methods.parts import Parts, best_of_parts, largest_remainder
from vllm_ficoco.settings import Reduction
from vllm_ficoco.tiny_llava import CHECKPOINT
from vllm_ficoco.tiny_llava.scenes import COLOURS, SIZE, Scene, SceneMaker
from vllm_ficoco.vision.geometry import Geometry
from vllm_ficoco.vision.layout import Layout, Window

COMPARING = sorted(name for name, method in METHODS.items() if method.across)
VARIANTS = [
    ("globalcom2", {}),
    ("globalcom2", {"temperature": 0.4}),
    ("globalcom2", {"attention": "probabilities"}),
    ("hired", {}),
    ("hired", {"alpha": 0.0}),
    ("hired", {"alpha": 0.3}),
    ("hired", {"alpha": 1.0}),
]
LAYOUTS = {
    "square": Layout((4, 4), (2, 2), Window(0, 0, 8, 8)),
    "padded above": Layout((4, 4), (2, 2), Window(1, 0, 6, 8)),
    "padded aside": Layout((4, 4), (2, 2), Window(0, 3, 8, 2)),
    "wide": Layout((4, 4), (1, 3), Window(1, 0, 2, 12)),
    "tall": Layout((4, 4), (3, 1), Window(0, 1, 12, 3)),
    "not in the middle": Layout((4, 4), (2, 3), Window(1, 2, 5, 7)),
    "odd": Layout((5, 5), (2, 2), Window(0, 1, 10, 8)),
    "oblong grid": Layout((3, 5), (2, 2), Window(0, 0, 6, 10)),
    "many tiles": Layout((3, 3), (4, 4), Window(2, 0, 8, 12)),
    "tiles of padding": Layout((4, 4), (1, 3), Window(0, 4, 4, 4)),
    "corners of padding": Layout((4, 4), (3, 3), Window(5, 0, 2, 12)),
    "one row": Layout((4, 4), (2, 2), Window(3, 0, 1, 8)),
    "one place": Layout((4, 4), (2, 2), Window(4, 3, 1, 1)),
    "no rows": Layout((4, 4), (2, 2), Window(4, 0, 0, 8)),
    "no columns": Layout((4, 4), (2, 2), Window(0, 4, 8, 0)),
}
"""Tiles in every way in which images are wide, tall and padded."""


def test_every_method_that_compares_is_here() -> None:
    assert {name for name, _ in VARIANTS} == set(COMPARING) == reference.ACROSS


# --- Sharing out --------------------------------------------------------------------------------


def share_out(weights: list[list[float]], room: list[int], total: int) -> list[list[int]]:
    """Rows of shares by the package."""
    made = largest_remainder(torch.tensor(weights, dtype=torch.float64), torch.tensor(room), total)
    return made.tolist()


def test_sharing_out_exhaustively() -> None:
    """All whole weights and rooms of up to four tiles, small ones, and every total."""
    for tiles, heaviest, largest in ((1, 3, 4), (2, 4, 4), (3, 2, 3), (4, 1, 2)):
        weights = [list(map(float, w)) for w in product(range(heaviest + 1), repeat=tiles)]
        for room in map(list, product(range(largest + 1), repeat=tiles)):
            for total in range(sum(room) + 1):
                want = [reference.by_largest_remainder(w, room, total) for w in weights]
                assert share_out(weights, room, total) == want, (room, total)


def test_sharing_out_at_real_sizes() -> None:
    """Up to 36 tiles of up to 729 patches, all kinds of weights."""
    lot = random.Random(0)
    for case in range(400):
        tiles = lot.choice((2, 3, 4, 5, 9, 36))
        side = lot.choice((24, 27))
        room = [lot.choice((0, side, side * side, lot.randint(1, side**2))) for _ in range(tiles)]
        kind = case % 4
        weights = [
            (lot.random(), float(lot.randint(0, 300)), math.exp(lot.gauss(0, 20)), size * 1.0)[kind]
            for size in room
        ]
        total = lot.choice((0, 1, sum(room) // 10, lot.randint(0, sum(room)), sum(room)))
        want = reference.by_largest_remainder(weights, room, total)
        assert share_out([weights], room, total) == [want], (weights, room, total)


@pytest.mark.parametrize(
    "weights",
    [
        [0.0, 0.0, 0.0, 0.0],
        [1e-40, 0.0, 0.0, 0.0],
        [1e-310, 3e-310, 0.0, 1e-320],
        [1e308, 1e308, 1e308, 1e-300],
        [1e30, 1.0, 1e-30, 0.0],
        [math.inf, 1.0, 1.0, 0.0],
        [math.nan, 1.0, 2.0, math.nan],
        [math.nan] * 4,
        [-1.0, -2.0, 0.5, -0.0],
    ],
)
def test_whatever_the_weights_the_total_comes_out(weights: list[float]) -> None:
    room = [5, 0, 7, 3]
    for total in range(16):
        for dtype in (torch.float64, torch.float32):
            (shares,) = largest_remainder(
                torch.tensor([weights], dtype=dtype), torch.tensor(room), total
            ).tolist()
            assert sum(shares) == total
            assert all(0 <= share <= most for share, most in zip(shares, room, strict=True))


def test_what_a_full_tile_cannot_hold_is_handed_on_in_proportion() -> None:
    """The first would have 12 of 18 and holds 6; the 12 that are left are shared out 1 to 3."""
    assert share_out([[8.0, 1.0, 3.0]], [6, 20, 20], 18) == [[6, 3, 9]]
    # By room, where nobody has a weight: 4 to 12 of the 8 that are left.
    assert share_out([[1.0, 0.0, 0.0]], [6, 4, 12], 14) == [[6, 2, 6]]
    assert share_out([[1.0, 1.0, 1.0]], [9, 9, 9], 11) == [[4, 4, 3]]


def test_rounding_does_not_decide_a_tie() -> None:
    """100 1/3, 33 1/3 and 1 1/3: as floating-point numbers, the fraction of the second is larger.

    What is left over goes to the first all the same.
    """
    assert 100 / 3 % 1 > 301 / 3 % 1
    assert share_out([[301.0, 100.0, 4.0]], [500] * 3, 135) == [[101, 33, 1]]


def test_best_of_parts_by_hand() -> None:
    score = torch.tensor([[[5.0, 1.0, 9.0], [2.0, 2.0, 2.0]], [[0.0, 1.0, 2.0], [9.0, 1.0, 3.0]]])
    inside = torch.tensor([[True, True, False], [True, True, True]])
    share = torch.tensor([[1, 2], [2, 1]])
    assert best_of_parts(score, share, inside, 3).tolist() == [[0, 3, 4], [0, 1, 3]]


# --- Choosing -----------------------------------------------------------------------------------


def parts_of(layout: Layout, layers: int, batch: int, has_cls: bool, seed: int = 0) -> Parts:
    """Random evidence of images of a layout."""
    n = layout.grid[0] * layout.grid[1]
    inputs = batch * layout.inputs
    found = [evidence_at(10 * seed + i, layout.grid, n, inputs, has_cls) for i in range(layers)]
    return Parts(layout, tuple(found))


def chosen_by(method: str, options: dict, parts: Parts, patches: int) -> Tensor:
    """(B, patches): what the package chooses."""
    spec = METHODS[method]
    given = spec.options.model_validate(options)
    assert spec.across is not None
    sizes = [window.tokens for window in parts.layout.parts]
    whole = spec.across.thumbnail(patches, sizes[0], sum(sizes[1:]), given)
    return spec.across.choose(parts, whole, patches - whole, given)


def layers_of(method: str) -> int:
    """How many layers' evidence it asks for of a tower that has some."""
    across = METHODS[method].across
    assert across is not None
    return len(across.layers(9, METHODS[method].options()))


def some(layout: Layout) -> list[int]:
    """Patches that may stay: few, many, all."""
    everything = sum(window.tokens for window in layout.parts)
    wanted = {1, 5, everything // 9, everything // 3, everything // 2 + 1, everything - 1}
    return [*sorted(count for count in wanted if 0 < count < everything), everything]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(
    ("method", "options", "has_cls"),
    [*((*variant, True) for variant in VARIANTS), ("globalcom2", {}, False), ("hired", {}, False)],
)
def test_chooses_as_the_transcription(
    method: str, options: dict, layout: Layout, has_cls: bool
) -> None:
    """Every part keeps the places that the paper says, and all together as many as they may."""
    parts = parts_of(layout, layers_of(method), 2, has_cls)
    n = layout.grid[0] * layout.grid[1]
    for patches in some(layout):
        mine = chosen_by(method, options, parts, patches)
        assert mine.shape == (2, patches)
        assert (mine.diff(dim=1) > 0).all()
        for image in range(2):
            inputs = range(image * layout.inputs, (image + 1) * layout.inputs)
            first, last = (
                [(evidence.query[i], evidence.key[i]) for i in inputs]
                for evidence in (parts.evidence[0], parts.evidence[-1])
            )
            want = reference.choose_among_parts(
                method,
                options,
                first,
                last,
                SCALE,
                has_cls,
                layout.grid,
                layout.tiles,
                tuple(layout.window),
                patches,
            )
            flat = [part * n + place for part, places in enumerate(want) for place in places]
            assert mine[image].tolist() == flat, (patches, image)


@pytest.mark.parametrize("has_cls", [True, False], ids=["cls", "nocls"])
@pytest.mark.parametrize(("method", "options"), VARIANTS)
def test_an_image_does_not_depend_on_its_batch(method: str, options: dict, has_cls: bool) -> None:
    layout = LAYOUTS["not in the middle"]
    parts = parts_of(layout, layers_of(method), 5, has_cls)
    together = chosen_by(method, options, parts, 20)
    for order in [[i] for i in range(5)] + [[3, 0, 4, 2, 1]]:
        inputs = [image * layout.inputs + i for image in order for i in range(layout.inputs)]
        alone = Parts(layout, tuple(pick(evidence, inputs) for evidence in parts.evidence))
        assert torch.equal(chosen_by(method, options, alone, 20), together[order])


@pytest.mark.parametrize("has_cls", [True, False], ids=["cls", "nocls"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("make", ["alike", "huge", "nan"])
@pytest.mark.parametrize("method", COMPARING)
def test_the_count_is_right_whatever_the_evidence(
    method: str, make: str, layout: Layout, has_cls: bool
) -> None:
    """Where all patches are alike, and where scores are out of all proportion or no numbers."""
    if make == "alike":
        one = alike(layout.grid, has_cls)[1]
        evidence = replace(
            one,
            query=one.query.repeat(2 * layout.inputs, 1, 1, 1),
            key=one.key.repeat(2 * layout.inputs, 1, 1, 1),
            pixels=one.pixels.repeat(2 * layout.inputs, 1, 1, 1),
        )
    else:
        evidence = parts_of(layout, 1, 2, has_cls).evidence[0]
        evidence = replace(evidence, query=evidence.query * (1e15 if make == "huge" else math.nan))
    parts = Parts(layout, (evidence,) * layers_of(method))
    places = layout.grid[0] * layout.grid[1]
    inside = parts.inside.flatten()
    for patches in some(layout):
        got = chosen_by(method, {}, parts, patches)
        assert got.shape == (2, patches)
        assert (got.diff(dim=1) > 0).all()
        assert inside[got].all()
        if make == "alike":  # the lower index stays
            of_thumbnail = got[0][got[0] < places].tolist()
            assert of_thumbnail == list(range(len(of_thumbnail)))


@pytest.mark.parametrize("has_cls", [True, False], ids=["cls", "nocls"])
@pytest.mark.parametrize(("method", "options"), VARIANTS)
def test_the_host_does_not_wait(method: str, options: dict, has_cls: bool) -> None:
    for layout in LAYOUTS.values():
        parts = parts_of(layout, layers_of(method), 2, has_cls)
        patches = some(layout)[2]
        with NoWaiting():
            chosen_by(method, options, parts, patches)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(("method", "options"), VARIANTS)
def test_a_gpu_agrees_and_is_not_waited_for(method: str, options: dict, layout: Layout) -> None:
    parts = parts_of(layout, layers_of(method), 2, True)
    there = Parts(
        layout,
        tuple(
            replace(e, query=e.query.cuda(), key=e.key.cuda(), pixels=e.pixels.cuda())
            for e in parts.evidence
        ),
    )
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = chosen_by(method, options, there, some(layout)[3])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got.cpu(), chosen_by(method, options, parts, some(layout)[3]))


# --- Counts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout",
    [
        *LAYOUTS.values(),
        Layout((24, 24), (2, 2), Window(0, 0, 48, 48)),
        Layout((24, 24), (2, 2), Window(6, 0, 36, 48)),
        Layout((24, 24), (1, 3), Window(11, 0, 1, 72)),
        Layout((27, 27), (6, 6), Window(0, 20, 162, 121), (104, 78)),
    ],
)
@pytest.mark.parametrize("newlines", ["none", "all"])
@pytest.mark.parametrize(("method", "options"), VARIANTS)
def test_the_budget_is_kept(method: str, options: dict, newlines: str, layout: Layout) -> None:
    """Of every budget: patches of the thumbnail and of the tiles, and newlines, exactly."""
    geometry = Geometry(layout.grid, 23, True, by_image=True)
    least = 1 if newlines == "none" else layout.newlines + 1
    step = 1 if layout.tokens < 500 else 97
    budgets = {*range(least, layout.tokens, step), layout.tokens - 1} - {*range(least)}
    for budget in sorted(budgets):
        reduction = Reduction(
            method=method, budget=budget, options={**options, "newlines": newlines}
        )
        plans = geometry.parts(reduction, layout=layout)
        kept = {plan.part: plan.keep for plan in plans}
        patches = sum(kept.values())
        assert patches + geometry.newlines_kept(reduction, layout) == budget
        assert all(0 < kept[part] <= layout.parts[part].tokens for part in kept)
        whole = kept.get(0, 0)
        if method == "globalcom2":
            sizes = [layout.parts[0].tokens, sum(w.tokens for w in layout.parts[1:])]
            assert whole == reference.by_largest_remainder(sizes, sizes, patches)[0]
        elif patches - whole < sum(window.tokens for window in layout.parts[1:]):
            alpha = options.get("alpha", 0.5)
            assert whole == min(math.floor(patches * alpha), layout.parts[0].tokens)


def test_layers_are_of_the_tower() -> None:
    """The last that runs, and for HiRED the first, in towers of any depth."""
    for layers in range(1, 28):
        for method, wanted in (("globalcom2", {layers - 1}), ("hired", {0, layers - 1})):
            across = METHODS[method].across
            assert across is not None
            asked = across.layers(layers, METHODS[method].options())
            assert list(asked) == sorted(wanted)


def test_llava_next_at_its_published_budgets() -> None:
    """A square image of 672 x 672: 576 + 48 x 48 patches and 48 newlines."""
    geometry = Geometry((24, 24), 23, True, by_image=True)
    layout = Layout((24, 24), (2, 2), Window(0, 0, 48, 48))
    assert layout.tokens == 2928
    for budget, whole in ((640, 128), (320, 64), (160, 32)):
        plans = geometry.parts(Reduction(method="globalcom2", budget=budget), layout=layout)
        assert plans[0].keep == whole == budget // 5
        plans = geometry.parts(Reduction(method="hired", budget=budget), layout=layout)
        assert plans[0].keep == budget // 2


# --- What it is for -----------------------------------------------------------------------------

SEEDS = range(20)


def spread_out(scene: Scene, corner: int, seed: int) -> Image.Image:
    """A scene's things in one quarter of a picture that is empty elsewhere."""
    lot = np.random.default_rng(seed)
    canvas = lot.uniform(70, 180, 3) + lot.normal(0, 6, (2 * SIZE, 2 * SIZE, 1))
    down, across = divmod(corner, 2)
    for thing in scene.things:
        height, width = thing.mask.shape
        y = round(down * SIZE + thing.y - height / 2)
        x = round(across * SIZE + thing.x - width / 2)
        spot = canvas[y : y + height, x : x + width]
        spot += thing.mask[..., None] / 255 * (np.array(COLOURS[thing.colour]) - spot)
    return Image.fromarray(np.clip(np.rint(canvas), 0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def seen() -> Evidence:
    """Of the shipped tower's last layer: for each seed and corner, a thumbnail and 2 x 2 tiles."""
    model = LlavaForConditionalGeneration.from_pretrained(str(CHECKPOINT), dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(str(CHECKPOINT)).image_processor
    inputs: dict[bytes, Image.Image] = {}  # empty tiles come three times
    number, order = {}, []
    for seed in SEEDS:
        scene = SceneMaker(seed).scene()
        for corner in range(4):
            picture = spread_out(scene, corner, seed)
            tiles = product((0, SIZE), repeat=2)
            views = [picture.crop((x, y, x + SIZE, y + SIZE)) for y, x in tiles]
            for view in (picture.resize((SIZE, SIZE)), *views):
                inputs[view.tobytes()] = view
                order.append(number.setdefault(view.tobytes(), len(number)))
    assert len(inputs) == 12 * len(SEEDS)
    pixels = processor([*inputs.values()], return_tensors="pt")["pixel_values"]
    tower = model.model.vision_tower
    config = model.config.vision_config
    last = config.num_hidden_layers + model.config.vision_feature_layer
    attention = getattr(tower, "vision_model", tower).encoder.layers[last].self_attn
    found: dict[str, list[Tensor]] = {"q_proj": [], "k_proj": []}

    def look(name: str) -> Any:
        heads = config.num_attention_heads
        return lambda _, __, out: found[name].append(out.unflatten(-1, (heads, -1)).transpose(1, 2))

    for name in found:
        getattr(attention, name).register_forward_hook(look(name))
    with torch.no_grad():
        for few in pixels.split(50):
            tower(few)
    query, key = (torch.cat(found[name])[order] for name in ("q_proj", "k_proj"))
    return Evidence(query, key, query.shape[-1] ** -0.5, (12, 12), True, pixels[order])


def of_that_tile(evidence: Evidence) -> Tensor:
    """(20, 4): what the tile that has something to see keeps, in equal shares."""
    layout = Layout((12, 12), (2, 2), Window(0, 0, 24, 24))
    chosen = chosen_by("globalcom2", {}, Parts(layout, (evidence,)), 240)
    corner = torch.arange(4).repeat(len(SEEDS))
    there = (chosen // 144 == 1 + corner[:, None]).sum(1)
    return (there / ((240 - 48) / 4)).view(len(SEEDS), 4)


def test_the_tile_with_something_to_see_keeps_more(seen: Evidence) -> None:
    """On scenes in one corner of an empty picture; in which corner does not matter."""
    share = of_that_tile(seen)
    more = (share > 1).sum(0)
    assert (more >= 14).all(), (more, share.mean(0))
    assert (share.mean(0) > 1.2).all(), share.mean(0)
    assert (share.mean(1) > 1).all(), share.mean(1)


def test_it_is_what_the_thumbnail_sees(seen: Evidence) -> None:
    """Were the thumbnail's scores at other places, that tile would keep its equal share."""
    key = seen.key.clone()
    for thumbnail in range(0, len(key), 5):
        order = torch.randperm(144, generator=torch.Generator().manual_seed(thumbnail))
        key[thumbnail, :, 1:] = key[thumbnail, :, 1:][:, order]
    share = of_that_tile(replace(seen, key=key))
    assert ((share > 1).sum(0) <= 12).all()
    assert (share.mean(0) - 1).abs().max() < 0.1
