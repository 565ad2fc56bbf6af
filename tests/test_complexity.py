# SPDX-License-Identifier: Apache-2.0
"""What an image asks for: by its pixels alone, in whatever form they come."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from vllm_ficoco.vision.complexity import (
    CELLS,
    MOST,
    READABLE,
    SIDE,
    UnknownPixels,
    asks_for,
    busy_cells,
    sample,
    written_cells,
)

NOTHING, MUCH = (Fraction(0), Fraction(0)), (MOST, Fraction(0))
SIZES = [(168, 168), (336, 336), (1000, 700), (40, 900), (1, 1)]


def noise(size: tuple[int, int], seed: int = 0, most: int = 255) -> NDArray[np.uint8]:
    """Of single pixels, (height, width, 3)."""
    lot = np.random.default_rng(seed)
    return lot.integers(0, most, (size[1], size[0], 3), dtype=np.uint8)


def page(
    size: tuple[int, int], lines: int, ink: str = "black", paper: str = "white"
) -> Image.Image:
    """So many lines of text, from the top."""
    image = Image.new("RGB", size, paper)
    height = size[1] // 14
    for line in range(lines):
        text = "Hill, minimum of illumination" * 3
        ImageDraw.Draw(image).text((2, line * height), text, fill=ink, font_size=height * 0.8)
    return image


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("colour", ["black", "white", "teal"])
def test_a_plain_image_asks_for_nothing(size: tuple[int, int], colour: str) -> None:
    assert asks_for(Image.new("RGB", size, colour)) == NOTHING


@pytest.mark.parametrize("size", SIZES[:3])
def test_noise_asks_for_as_much_as_a_picture_can(size: tuple[int, int]) -> None:
    """It is no writing: it has every level."""
    assert asks_for(Image.fromarray(noise(size))) == MUCH


def test_a_gradient_asks_for_nothing() -> None:
    """Nothing happens in it; nor in one with grain, which is alike everywhere."""
    ramp = np.linspace(20, 220, 336)[None, :, None] * np.ones((336, 1, 3))
    assert asks_for(Image.fromarray(ramp.astype(np.uint8))) == NOTHING
    grain = np.random.default_rng(0).standard_normal((336, 336, 1)) * 12
    grainy = np.clip(ramp + grain, 0, 255).astype(np.uint8)
    assert asks_for(Image.fromarray(grainy)).share <= Fraction(1, 100)


def test_it_asks_for_a_token_for_two_busy_cells() -> None:
    """Wherever they are; and for no more than a third of its tokens."""
    lot = np.random.default_rng(1)
    for count in (1, 5, 16, 32, 60, 96, 97, 144):
        places = lot.permutation(CELLS**2)[:count]
        pixels = np.full((CELLS, 14, CELLS, 14, 3), 128, np.uint8)
        for y, x in zip(*np.divmod(places, CELLS), strict=True):
            pixels[y, 3:11, x, 3:11] = lot.choice((0, 255), 3)  # a square with room around it
        image = Image.fromarray(pixels.reshape(SIDE, SIDE, 3))
        found = busy_cells(sample(image))
        assert {*map(tuple, np.argwhere(found).tolist())} == {
            *map(tuple, np.stack(np.divmod(places, CELLS), 1).tolist())
        }
        assert asks_for(image) == (min(Fraction(count, 288), MOST), 0)


def test_colours_of_one_brightness_are_told_apart() -> None:
    image = Image.new("RGB", (168, 168), (120, 60, 60))
    grey = Image.new("RGB", (168, 168), (60, 91, 60)).convert("L").getpixel((0, 0))
    assert abs(grey - image.convert("L").getpixel((0, 0))) <= 2
    ImageDraw.Draw(image).ellipse((40, 40, 120, 120), fill=(60, 91, 60))
    assert busy_cells(sample(image)).sum() > 10


def test_faint_things_count_where_the_rest_is_even() -> None:
    """A step of 20 levels is none in grain, and one where there is none."""
    lot = np.random.default_rng(2)
    plane = np.full((168, 168, 3), 100.0)
    plane[40:120, 40:120] += 20
    assert busy_cells(sample(Image.fromarray(plane.astype(np.uint8)))).sum() > 10
    grainy = plane + lot.standard_normal((168, 168, 1)) * 14
    assert busy_cells(sample(Image.fromarray(grainy.astype(np.uint8)))).sum() < 10


@pytest.mark.parametrize("size", [(168, 168), (336, 336), (1240, 1754)])
@pytest.mark.parametrize("colours", [("black", "white"), ("yellow", "navy")])
def test_pages_of_text(size: tuple[int, int], colours: tuple[str, str]) -> None:
    """A full one asks for all; a few lines for no less than lets them be read."""
    assert asks_for(page(size, 14, *colours)) == (Fraction(1), READABLE)
    few = asks_for(page(size, 3, *colours))
    assert few == (READABLE, READABLE)
    assert written_cells(sample(page(size, 0, *colours))).sum() == 0


def test_photographs_are_no_writing() -> None:
    """Of scikit-learn's examples, by the measure alone."""
    datasets = pytest.importorskip("sklearn.datasets")
    for picture in datasets.load_sample_images().images:
        asked = asks_for(Image.fromarray(picture))
        assert Fraction(1, 9) < asked.share <= Fraction(1, 3) and asked.least == 0


@pytest.mark.parametrize("size", [(168, 168), (336, 200), (1000, 701), (41, 903)])
def test_every_form_of_an_image_asks_for_the_same(size: tuple[int, int]) -> None:
    """As vLLM takes them in: PIL, arrays and tensors, channels last or first, shares or levels."""
    pixels = noise(size, 3)
    pixels[: size[1] // 2] = 90
    image = Image.fromarray(pixels)
    expected, seen = asks_for(image), np.asarray(sample(image))
    assert 0 < expected.share < 1
    first = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    for form in (
        *(pixels, first, pixels.astype(np.float32), first / 255),
        *(torch.from_numpy(first), torch.from_numpy(pixels), torch.from_numpy(first).float() / 255),
        np.concatenate([pixels, np.full((*pixels.shape[:2], 1), 7, np.uint8)], -1),
    ):
        assert np.array_equal(np.asarray(sample(form)), seen)
        assert asks_for(form) == expected
    assert asks_for(torch.from_numpy(first).bfloat16()).share == expected.share
    grey = image.convert("L")
    of_grey = asks_for(grey)
    assert asks_for(np.asarray(grey)[..., None]) == of_grey
    assert asks_for(np.asarray(grey)[None]) == of_grey


def test_forms_that_are_not_known() -> None:
    for shape in ((5, 5), (5, 5, 5), (2, 9, 9), (1, 3, 9, 9), (0, 9, 3), (3, 0, 9)):
        with pytest.raises(UnknownPixels, match=str(shape[0])):
            asks_for(np.zeros(shape, np.uint8))
    with pytest.raises(UnknownPixels):
        asks_for("a picture")
    assert asks_for(np.full((9, 9, 3), np.nan)) == NOTHING, "no number is black"


def test_images_in_any_mode() -> None:
    for mode in ("1", "L", "P", "RGBA", "LA", "CMYK", "YCbCr", "I;16"):
        image = Image.fromarray(noise((168, 168), 5)).convert("L" if mode == "I;16" else "RGB")
        assert asks_for(image.convert(mode)).share >= MOST


def test_the_order_of_images_is_nothing_to_it() -> None:
    """Nothing is kept from one to the next, and the pixels stay as they are."""
    images = [Image.fromarray(noise((90, 90), seed, 40 * seed + 20)) for seed in range(6)]
    before = [image.tobytes() for image in images]
    forwards = [asks_for(image) for image in images]
    assert [asks_for(image) for image in images[::-1]] == forwards[::-1]
    assert [image.tobytes() for image in images] == before
