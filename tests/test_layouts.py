# SPDX-License-Identifier: Apache-2.0
"""The layout of an image in tiles is what vLLM's and Hugging Face's models make of its size.

Arithmetic alone, with the published grids: sizes from 1 x 1 to 1400 x 1400, and next to each other
wherever the layout changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    PretrainedConfig,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from tests.checkpoints import (
    MANY_PINPOINTS,
    PINPOINTS,
    describe,
    next_processor,
    onevision_processor,
)
from vllm_ficoco import plugin
from vllm_ficoco.methods import METHODS
from vllm_ficoco.settings import Reduction, SettingsError
from vllm_ficoco.vision.geometry import Geometry, geometry_of
from vllm_ficoco.vision.layout import Layout

MOST = 1400
"""Pixels of a side."""
TEXT = dict(hidden_size=128, num_attention_heads=4, vocab_size=114, max_position_embeddings=32768)
TOWER = dict(hidden_size=64, num_attention_heads=4, num_hidden_layers=24, patch_size=14)


def llava_next(tower: str, side: int, pinpoints: list[list[int]]) -> LlavaNextConfig:
    return LlavaNextConfig(
        vision_config=(CLIPVisionConfig if tower == "clip" else SiglipVisionConfig)(
            image_size=side, **TOWER
        ),
        text_config=LlamaConfig(**TEXT),
        image_token_index=4,
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
    )


def onevision(side: int, pinpoints: list[list[int]]) -> LlavaOnevisionConfig:
    return LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(image_size=side, **TOWER),
        text_config=Qwen2Config(**TEXT),
        image_token_index=4,
        video_token_index=113,
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


def tiles_of(side: int, *counts: tuple[int, int]) -> list[list[int]]:
    return [[rows * side, columns * side] for rows, columns in counts]


NEXT = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
UP_TO_6 = [(rows, columns) for rows in range(1, 7) for columns in range(1, 7)]

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "LLaVA-NeXT": lambda: llava_next("clip", 336, tiles_of(336, *NEXT)),
    "LLaVA-NeXT with SigLIP": lambda: llava_next("siglip", 384, tiles_of(384, *NEXT)),
    "LLaVA-OneVision": lambda: onevision(384, tiles_of(384, *UP_TO_6)),
    "tiny LLaVA-NeXT": lambda: llava_next("clip", 56, PINPOINTS),
    "tiny LLaVA-OneVision": lambda: onevision(56, MANY_PINPOINTS),
}
"""Tiles of 24 x 24, 27 x 27 (of 27.4 patches) and 4 x 4."""


class Family(NamedTuple):
    """A model, as far as sizes go."""

    config: Any
    info: Any
    """vLLM's."""
    geometry: Geometry
    layout: Callable[[int, int], Layout]
    """Of a width and a height."""

    @property
    def side(self) -> int:
        return self.geometry.grid[0]


@pytest.fixture(scope="module", params=CONFIGS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    from vllm.config import ModelConfig
    from vllm.multimodal import MULTIMODAL_REGISTRY

    plugin.register()
    from vllm_ficoco.models.llava_next import tiled_layout

    config = CONFIGS[request.param]()
    kind = next_processor if config.model_type == "llava_next" else onevision_processor
    folder = describe(tmp_path_factory.mktemp("family"), config, kind(config))
    model = ModelConfig(model=str(folder), dtype="float32")
    info = MULTIMODAL_REGISTRY.create_processor(model).info
    config = info.get_hf_config()
    layout = lru_cache(maxsize=None)(lambda width, height: tiled_layout(info, width, height))
    return Family(config, info, geometry_of(config), layout)


def sizes(family: Family) -> list[tuple[int, int]]:
    """Widths and heights: a coarse grid, and along some lines both sides of every change."""
    coarse = [1, 2, 3, 5, 8, 13, *range(21, MOST, 90), MOST]
    found = {(width, height) for width in coarse for height in coarse}
    for fixed in (1, 40, family.config.vision_config.image_size, 700, 1153, MOST):
        for at in (lambda x, y=fixed: (x, y), lambda x, y=fixed: (y, x)):
            found |= {at(x) for x in changes(lambda x, at=at: family.layout(*at(x)), 1, MOST)}
    return sorted(found)


def changes(look: Callable[[int], Any], low: int, high: int) -> Iterator[int]:
    """Both sides of every change of what is seen that steps of 16 can find."""
    if high - low > 16 or look(low) != look(high):
        if high - low == 1:
            yield from (low, high)
        else:
            middle = (low + high) // 2
            yield from changes(look, low, middle)
            yield from changes(look, middle, high)


def different(family: Family) -> dict[Layout, tuple[int, int]]:
    """Every layout of those sizes, and a size that has it."""
    return {family.layout(*size): size for size in sizes(family)}


def test_as_many_tokens_as_vllm_and_transformers_count(family: Family) -> None:
    processor, pixels = family.info.get_hf_processor(), family.config.vision_config.image_size
    has_cls = family.geometry.has_cls
    for width, height in sizes(family):
        tokens = family.layout(width, height).tokens
        by_vllm = family.info.get_num_image_tokens(image_width=width, image_height=height)
        by_them = processor._get_number_of_features(height, width, pixels, pixels) - has_cls
        assert tokens == by_vllm == by_them, (width, height)


def test_tokens_stand_where_the_models_put_them(family: Family) -> None:
    """vLLM's and Hugging Face's code for tiles, on numbers in place of hidden states."""
    from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration
    from vllm.model_executor.models.llava_onevision import LlavaOnevisionForConditionalGeneration

    by_tile = family.config.model_type == "llava_next"
    newline = torch.tensor([-1.0])
    model = SimpleNamespace(config=family.config, image_newline=newline)
    each = family.side**2
    seen = set()
    for layout, (width, height) in different(family).items():
        parts = torch.arange(layout.inputs * each, dtype=torch.float).view(-1, each, 1)
        size = torch.tensor([height, width])
        if by_tile:
            by_vllm = LlavaNextForConditionalGeneration._merge_image_patch_embeddings(
                model, size, parts, strategy="spatial_unpad"
            )
            (by_them,), _ = LlavaNextModel.pack_image_features(
                model, [parts], [size], "default", newline
            )
        else:
            by_vllm = LlavaOnevisionForConditionalGeneration._merge_image_patch_embeddings(
                model, size, parts, image_newline=newline, strategy="spatial_unpad"
            )
            (by_them,), _ = LlavaOnevisionModel.pack_image_features(model, [parts], [size], newline)
        assert torch.equal(by_vllm, by_them) and len(by_vllm) == layout.tokens, (width, height)
        seen.add((layout.shrunk is not None, layout.window.rows > 0, layout.window.columns > 0))
        if layout.shrunk is None:
            assert by_vllm[:, 0].tolist() == numbered(layout), (width, height)
    assert (False, True, True) in seen and (by_tile or (True, True, True) in seen)
    if family.side % 2 == 0:  # of an odd number of rows one stays, however thin the image
        assert {(False, False, False), (False, True, False)} <= seen


def numbered(layout: Layout) -> list[int]:
    """The places of all parts' windows, counted part after part, and newlines as -1, in order."""
    rows, columns = layout.grid
    places = {}
    for part, window in enumerate(layout.parts):
        first, row = layout.numbers(part)
        for down in range(window.top, window.top + window.rows):
            for right in range(window.left, window.left + window.columns):
                place = part * rows * columns + down * columns + right
                places[first + down * row + right] = place
    places |= dict.fromkeys(layout.newline_numbers(layout.newlines), -1)
    return [places[number] for number in sorted(places)]


def test_spots(family: Family) -> None:
    """The first token of a row stands at 0, the next ones evenly, its newline at 1."""
    side = family.side
    whole = [(i // side / side, i % side / side) for i in range(side**2)]
    for layout in [*different(family)][::7]:
        for reduced in (True, False):
            rows, columns = layout.window.rows, layout.window.columns
            if layout.shrunk and not reduced:
                rows, columns = layout.shrunk
            due = whole + [
                (row / rows, column / columns if column < columns else 1.0)
                for row in range(rows)
                for column in range(columns + 1)
            ]
            numbers = torch.arange(len(due))
            if reduced:
                numbers = torch.tensor(sorted([n for n, _ in all_numbers(layout)]))
            spots = layout.raster(reduced).spots(numbers)
            torch.testing.assert_close(spots, torch.tensor(due, dtype=spots.dtype))


def all_numbers(layout: Layout) -> Iterator[tuple[int, int]]:
    """Of every patch and newline that a reduced image can keep, and its part; newlines: -1."""
    for part, window in enumerate(layout.parts):
        first, row = layout.numbers(part)
        for down in range(window.top, window.top + window.rows):
            for right in range(window.left, window.left + window.columns):
                yield first + down * row + right, part
    for number in layout.newline_numbers(layout.newlines):
        yield number, -1


def budgets(layout: Layout) -> list[int]:
    """All of a small image; of a large one the edges and some between."""
    if layout.tokens <= 100:
        return list(range(1, layout.tokens))
    patches = sum(window.tokens for window in layout.parts)
    edges = [1, layout.inputs, layout.newlines, patches, layout.tokens]
    near = {edge + step for edge in edges for step in (-1, 0, 1)}
    return sorted(
        budget for budget in {*near, 640, 320, 160, patches // 2} if 0 < budget < layout.tokens
    )


@pytest.mark.parametrize("newlines", ["none", "all"])
@pytest.mark.parametrize("method", ["topk", "ficoco-v"])
def test_every_budget_is_shared_out_exactly(family: Family, method: str, newlines: str) -> None:
    """No part gets more than it has of the image, and the thumbnail something."""
    options = {"newlines": newlines}
    layouts = [*different(family)]
    for layout in layouts[:: 1 + len(layouts) // 150]:
        sizes = [window.tokens for window in layout.parts]
        for budget in budgets(layout)[:: 1 if method == "topk" else 4]:
            reduction = Reduction(method=method, budget=budget, options=options)
            newline_tokens = max(0, budget - sum(sizes))
            if newlines == "all":
                newline_tokens = layout.newlines
                if budget <= newline_tokens:
                    with pytest.raises(SettingsError, match=f"at least {newline_tokens + 1} "):
                        family.geometry.kept(reduction, layout=layout)
                    continue
            case = (layout, budget)
            plans = family.geometry.parts(reduction, layout=layout)
            assert family.geometry.newlines_kept(reduction, layout) == newline_tokens, case
            assert sum(plan.keep for plan in plans) + newline_tokens == budget, case
            assert family.geometry.kept(reduction, layout=layout) == budget, case
            assert plans[0].part == 0, case
            for plan in plans:
                assert 0 < plan.keep <= sizes[plan.part], case
                left = plan.stages[-1].keep if plan.stages else plan.window.tokens
                assert left == plan.keep, case
                assert METHODS[method].place == "output" or plan.window.tokens == family.side**2


def test_no_image_has_more_tokens_than_vllm_reserves_for(family: Family) -> None:
    """Also those that stand, and whose tiles are just not shrunk."""
    size = family.info.get_image_size_with_most_features()
    most = family.layout(size.width, size.height).tokens
    pixels = family.config.vision_config.image_size
    for rows, columns in {tuple(point) for point in family.config.image_grid_pinpoints}:
        for step in range(family.side):
            less = step * pixels // family.side
            for width, height in ((columns - less, rows), (columns, rows - less)):
                assert family.layout(width, height).tokens <= most, (width, height)
