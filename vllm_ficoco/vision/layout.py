# SPDX-License-Identifier: Apache-2.0
"""Where the visual tokens of one image or video stand: its parts, their grids, its newlines.

LLaVA-1.5 puts an image through the tower once: one part, one grid. So does Qwen-VL, with a grid of
the image's own, whose places are what its tower merges into one token. LLaVA-NeXT and
LLaVA-OneVision put it through as a whole (the thumbnail) and cut into tiles. The tiles are stitched
to one grid, which is cut to the image's shape, and a newline token follows every row of it:

    thumbnail, row 0 of the stitched grid, newline, row 1, newline, ...

The parts of a video are its frames, one after another, as many tokens of each as the model has left
of it by then (OneVision pools a frame's grid, Qwen-VL merges two frames into one). OneVision puts
one newline behind the last one.

Which sizes give which layout is vLLM's to say (:mod:`vllm_ficoco.models`); here it is only counted.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Window(NamedTuple):
    """A rectangle of a grid; it may be empty."""

    top: int
    left: int
    rows: int
    columns: int

    @property
    def tokens(self) -> int:
        """Places in it."""
        return self.rows * self.columns


class Raster(NamedTuple):
    """How a sequence of visual tokens is numbered, so that a number says where a token stands.

    First the thumbnail's grid, then a stitched grid with one newline behind every row. Or a video's
    frames, then one newline perhaps.
    """

    grid: tuple[int, int]
    columns: int
    """Of the stitched grid, newlines not counted."""
    window: Window
    """What of the stitched grid is the image; its numbers are relative to that."""
    frames: int = 0
    """Of a video; then there is no stitched grid."""

    def spots(self, number: Tensor) -> Tensor:
        """(n, 2): row and column of tokens (n,), in sides of the image; newlines at the right.

        Of a video, where in its frame a token stands; the newline at the end of the last one.
        """
        rows, columns = self.grid
        if self.frames:
            within = number % (rows * columns)
            at = torch.stack([(within // columns) / rows, (within % columns) / columns], -1)
            return torch.where((number >= self.frames * rows * columns)[..., None], 1.0, at)
        behind = number - rows * columns
        row, column = behind // (self.columns + 1), behind % (self.columns + 1)
        in_thumbnail = torch.stack([(number // columns) / rows, (number % columns) / columns], -1)
        right = (column - self.window.left) / max(self.window.columns, 1)
        right = torch.where(column == self.columns, 1.0, right)  # padding may be before it
        down = (row - self.window.top) / max(self.window.rows, 1)
        in_tiles = torch.stack([down, right], -1)
        return torch.where((behind < 0)[..., None], in_thumbnail, in_tiles)


class Layout(NamedTuple):
    """The visual tokens of one image, or of one video."""

    grid: tuple[int, int]
    """Rows and columns of patches that the tower makes of each of its inputs; of a video, of tokens
    of one frame."""
    tiles: tuple[int, int] = (0, 0)
    """Rows and columns of tiles; none for an image that goes through the tower as it is."""
    window: Window = Window(0, 0, 0, 0)
    """What of the stitched grid is the image; the rest is padding."""
    shrunk: tuple[int, int] | None = None
    """Rows and columns that the model shrinks the window to where it is too large (OneVision). A
    reduced image is not shrunk: its tokens are chosen among all that the tower has made."""
    original: int = 0
    """Visual tokens of the image as it was sent, where it is scaled down before the tower."""
    frames: int = 0
    """Of a video, how many; 0 for an image. In Qwen-VL one is what its tower makes of two."""
    closed: bool = False
    """Whether one newline stands behind a video's last frame (OneVision). It stays, and counts."""

    @property
    def is_video(self) -> bool:
        """Whether it is a video's."""
        return self.frames > 0

    @property
    def kind(self) -> str:
        """In words: of what it is the layout."""
        return "video" if self.is_video else "image"

    @property
    def is_tiled(self) -> bool:
        """Whether it has tiles, and so newlines."""
        return self.tiles != (0, 0)

    @property
    def inputs(self) -> int:
        """How many times the tower runs for it: the thumbnail and every tile, or every frame."""
        return self.frames or 1 + self.tiles[0] * self.tiles[1]

    @property
    def encoded(self) -> int:
        """Tokens that the tower makes of it, padding included."""
        return self.inputs * self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """Visual tokens of the unreduced image or video."""
        whole = self.grid[0] * self.grid[1]
        if self.is_video:
            return self.frames * whole + self.closed
        if not self.is_tiled:
            return whole
        rows, columns = self.shrunk or (self.window.rows, self.window.columns)
        return whole + rows * (columns + 1)

    @property
    def sent(self) -> int:
        """Visual tokens of the image as it was sent: what a budget is compared with."""
        return self.original or self.tokens

    @property
    def newlines(self) -> int:
        """Newlines that a reduced image can keep: one for every row. Of a video, the one it has."""
        return self.window.rows if self.is_tiled else int(self.closed)

    @property
    def parts(self) -> tuple[Window, ...]:
        """Of the thumbnail and of every tile, what of its grid is the image; of a video, frames."""
        return _parts(self)

    def numbers(self, part: int) -> tuple[int, int]:
        """The number of a part's first place in the sequence, and what a row of it adds.

        Numbers run over the thumbnail and then the stitched grid, padding and newlines included; or
        from frame to frame.
        """
        rows, columns = self.grid
        if part == 0 or self.is_video:
            return part * rows * columns, columns
        row, column = divmod(part - 1, self.tiles[1])
        width = self.tiles[1] * columns + 1
        return rows * columns + row * rows * width + column * columns, width

    def newline_numbers(self, count: int) -> list[int]:
        """The numbers of so many of its newlines, evenly over its rows."""
        rows, columns = self.grid
        if self.is_video:
            return [self.frames * rows * columns][:count]
        width = self.tiles[1] * columns + 1
        chosen = (self.window.top + i * self.newlines // count for i in range(count))
        return [rows * columns + (row + 1) * width - 1 for row in chosen]

    def raster(self, reduced: bool) -> Raster:
        """How the tokens that enter the decoder are numbered.

        Args:
            reduced: before the decoder; else they are numbered as they come, without gaps.
        """
        if self.is_video:
            return Raster(self.grid, 0, self.window, self.frames)
        if reduced:
            return Raster(self.grid, self.tiles[1] * self.grid[1], self.window)
        rows, columns = self.shrunk or (self.window.rows, self.window.columns)
        return Raster(self.grid, columns, Window(0, 0, rows, columns))

    def to_json(self) -> str:
        """For a packed field."""
        return json.dumps(self, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Layout:
        """What :meth:`to_json` wrote.

        Raises:
            ValueError: it is not a layout.
        """
        try:
            grid, tiles, window, shrunk, original, frames, closed = json.loads(text)
            made = cls(
                _pair(grid),
                _pair(tiles),
                Window(*window),
                shrunk and _pair(shrunk),
                original,
                frames,
                closed,
            )
        except TypeError as error:
            raise ValueError(f"not a layout: {text[:100]}") from error
        numbers = (*made.grid, *made.tiles, *made.window, *(made.shrunk or ()), original, frames)
        odd = type(closed) is not bool or (closed and not frames) or (frames and made.is_tiled)
        if odd or any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError(f"not a layout: {text[:100]}")
        return made


def _pair(value: list[int]) -> tuple[int, int]:
    first, second = value
    return first, second


@lru_cache(maxsize=4096)
def _parts(layout: Layout) -> tuple[Window, ...]:
    rows, columns = layout.grid
    parts = [Window(0, 0, rows, columns)]
    if layout.is_video:
        return tuple(parts * layout.frames)
    window = layout.window
    for row in range(layout.tiles[0]):
        for column in range(layout.tiles[1]):
            top = min(max(window.top - row * rows, 0), rows)
            end = min(max(window.top + window.rows - row * rows, top), rows)
            left = min(max(window.left - column * columns, 0), columns)
            right = min(max(window.left + window.columns - column * columns, left), columns)
            parts.append(Window(top, left, end - top, right - left))
    return tuple(parts)
