# SPDX-License-Identifier: Apache-2.0
"""How many of its visual tokens an image asks for, from its pixels alone.

An image is looked at as 12 x 12 cells. One in which nothing happens, sky or paper, is like its
neighbours, and one token can stand for many of them; one with edges in it is like no other. So an
image asks for a token for every two cells that are busy, a share that is its own whatever the size
of the grid that a model makes of it: of scenes as the shipped model was trained on, those with up
to 32 of 144 lose least at a ninth of their tokens. No more than a third for all that: beyond it,
next to nothing is gained there. But writing is fine: an image in which most cells look like it
(steps between two levels) asks for everything, and one with some for no less than a third. Writing
that is small against the image, a line or two on a whole page, is not seen as such.

All in whole numbers, on a sample of 168 x 168 pixels, so the same pixels give the same answer on
every machine, and in the same fraction of a millisecond whatever the size of the image. Nothing
else has a say: no other image, no question, no model.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 168
"""Pixels of a side of the sample."""

CELLS = 12
"""Of a side."""

BUSY_PIXELS = 6
"""So many pixels of a cell, of 7 x 7 after halving, are edges where it is busy."""

MOST = Fraction(1, 3)
"""Share that an image asks for at most, if it is no page of text."""

PAGE_CELLS = 72
"""So many cells that look like writing, half of all, make a page of text."""

WRITTEN_CELLS = 9
"""So many cells that look like writing make an image one with text: most of a line across it."""

READABLE = Fraction(1, 3)
"""Share of its tokens at which writing in an image is still read."""

_CHANNELS = (1, 3, 4)


class UnknownPixels(ValueError):
    """An image in a form that is not known; the message says which are."""


class Asked(NamedTuple):
    """What an image asks for."""

    share: Fraction
    """Of its tokens."""
    least: Fraction
    """Share below which the writing in it would be lost; 0 without any."""


def asks_for(image: Any) -> Asked:
    """What an image asks for.

    Args:
        image: of PIL, or an array or tensor with its channels (1, 3 or 4) last or first, as vLLM
            takes them in: of levels from 0 to 255, or of shares from 0 to 1 in floating point.

    Raises:
        UnknownPixels: it is none of these.
    """
    seen = sample(image)
    busy, written = int(busy_cells(seen).sum()), int(written_cells(seen).sum())
    least = READABLE if written >= WRITTEN_CELLS else Fraction(0)
    share = min(Fraction(busy, 2 * CELLS**2), MOST)
    return Asked(Fraction(1) if written >= PAGE_CELLS else max(share, least), least)


def busy_cells(seen: Image.Image) -> NDArray[np.bool_]:
    """Which cells of a sample have edges in them, (CELLS, CELLS).

    An edge is a step between neighbours, in any channel, that is well above those in most of the
    image: grain is none. One of more than 32 levels always is.
    """
    halved = seen.reduce(2)  # grain averages out
    levels = np.ascontiguousarray(np.asarray(halved).transpose(2, 0, 1), np.int16)
    steps = np.abs(levels[:, :, 1:] - levels[:, :, :-1])[:, :-1]
    np.maximum(steps, np.abs(levels[:, 1:] - levels[:, :-1])[:, :, :-1], out=steps)
    largest = np.zeros(levels.shape[1:], np.int16)  # nothing follows the last row and column
    np.maximum(np.maximum(steps[0], steps[1]), steps[2], out=largest[:-1, :-1])
    usual = int(np.partition(largest, largest.size // 2, axis=None)[largest.size // 2])
    edges = largest > min(3 * usual + 6, 32)
    return _over_cells(np.add, edges.astype(np.int16)) >= BUSY_PIXELS


def written_cells(seen: Image.Image) -> NDArray[np.bool_]:
    """Which cells of a sample look like writing, (CELLS, CELLS).

    Two levels far apart, little between them, and many steps from one to the other.
    """
    grey = np.asarray(seen.convert("L"))[::2].astype(np.int16)  # every second row will do
    low, high = _over_cells(np.minimum, grey), _over_cells(np.maximum, grey)
    margin = (high - low) // 4
    between = (grey > _spread(low + margin)) & (grey < _spread(high - margin))
    steps = np.zeros(grey.shape, np.int16)
    steps[:, 1:] = np.abs(grey[:, 1:] - grey[:, :-1]) > 64
    pixels = grey.size // CELLS**2
    many = _over_cells(np.add, steps) * 8 >= pixels
    written: NDArray[np.bool_] = many & (_over_cells(np.add, between.astype(np.int16)) * 3 < pixels)
    return written


def _over_cells(take: np.ufunc, plane: NDArray[np.int16]) -> NDArray[np.int16]:
    """What a ufunc makes of the pixels of every cell, (CELLS, CELLS)."""
    rows, columns = (side // CELLS for side in plane.shape)
    strips = take.reduce(plane.reshape(CELLS, rows, -1), 1)
    cells: NDArray[np.int16] = take.reduce(strips.reshape(CELLS, CELLS, columns), 2)
    return cells


def _spread(cells: NDArray[np.int16]) -> NDArray[np.int16]:
    """The number of its cell for every pixel of every second row."""
    return cells.repeat(SIDE // CELLS // 2, 0).repeat(SIDE // CELLS, 1)


def sample(image: Any) -> Image.Image:
    """Every so many-th pixel of an image, SIDE x SIDE.

    Raises:
        UnknownPixels: see :func:`asks_for`.
    """
    if isinstance(image, Image.Image):
        return image.resize((SIDE, SIDE), Image.Resampling.NEAREST).convert("RGB")
    shape = tuple(getattr(image, "shape", ()))
    if len(shape) != 3 or 0 in shape:
        raise UnknownPixels(f"its pixels must have three dimensions, and their shape is {shape}")
    last = shape[-1] in _CHANNELS  # the order in which vLLM looks
    if not last and shape[0] not in _CHANNELS:
        raise UnknownPixels(f"channels, 1, 3 or 4, must come last or first, and not in {shape}")
    height, width = shape[:2] if last else shape[1:]
    rows, columns = _every(height), _every(width)
    levels = image[rows][:, columns] if last else image[:, rows][:, :, columns]
    if not isinstance(levels, np.ndarray):
        levels = levels.detach().cpu().double().numpy()  # of torch, which is not needed here
    if not last:
        levels = levels.transpose(1, 2, 0)
    scale = 255 if levels.max() <= 1 else 1
    whole = np.rint(np.clip(np.nan_to_num(levels.astype(np.float64)) * scale, 0, 255))
    colours = np.broadcast_to(whole[..., : 3 if whole.shape[-1] > 1 else 1], (SIDE, SIDE, 3))
    return Image.fromarray(colours.astype(np.uint8))


def _every(pixels: int) -> list[int]:
    """The places of the sample's pixels along a side, as PIL takes them: it adds up steps."""
    step = pixels / SIDE
    places: list[int] = np.cumsum([step * 0.5, *[step] * (SIDE - 1)]).astype(int).tolist()
    return places
