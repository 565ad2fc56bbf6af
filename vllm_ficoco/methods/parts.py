# SPDX-License-Identifier: Apache-2.0
"""The parts of images in tiles side by side, and tokens shared out among them on the device.

How many tokens an image keeps is known before it is seen; which of its tiles keeps how many is
not, and nobody waits to hear it: shares are numbers on the device, and what comes out has as many
rows as the image keeps.

Shapes: B images of one layout, P parts (the thumbnail, then T tiles in raster order), n places of
the tower's grid, padding included.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from vllm_ficoco.methods.paradigm import AttentionKind, Evidence
from vllm_ficoco.vision.layout import Layout


@dataclass(frozen=True)
class Parts:
    """What a method that compares parts may look at."""

    layout: Layout
    """That of all these images; it has tiles."""
    evidence: tuple[Evidence, ...]
    """Of every layer that the method asked for, over B * P inputs of the tower: an image's parts
    behind one another, the thumbnail first."""

    @property
    def places(self) -> int:
        """n, of each part."""
        return self.layout.grid[0] * self.layout.grid[1]

    @property
    def _device(self) -> torch.device:
        return self.evidence[0].query.device

    @cached_property
    def inside(self) -> Tensor:
        """(P, n): which places are the image; the others are padding."""
        (rows, columns), (down, across) = self.layout.grid, self.layout.tiles
        top, left, height, width = self.layout.window
        row = torch.arange(down * rows, device=self._device)[:, None]
        column = torch.arange(across * columns, device=self._device)
        stitched = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)
        tiles = self._cut(stitched)
        return torch.cat([torch.ones_like(tiles[:1]), tiles])

    @cached_property
    def sizes(self) -> Tensor:
        """(P,) int64: how many places of each part are the image."""
        return self.inside.sum(-1)

    def attention_of_cls(self, layer: int, kind: AttentionKind = "probabilities") -> Tensor:
        """(B, P, n): see :meth:`Evidence.attention_of_cls`, in one of the layers asked for."""
        attention = self.evidence[layer].attention_of_cls(kind)
        return attention.unflatten(0, (-1, self.layout.inputs))

    def attention_of_cls_in_thumbnail(
        self, layer: int, kind: AttentionKind = "probabilities"
    ) -> Tensor:
        """(B, n): the same of the thumbnail alone."""
        every, step = self.evidence[layer], self.layout.inputs
        return replace(
            every, query=every.query[::step], key=every.key[::step], pixels=every.pixels[::step]
        ).attention_of_cls(kind)

    def over_regions(self, values: Tensor) -> Tensor:
        """(B, T) float64: values (B, n) of the thumbnail, summed over what each tile shows.

        The thumbnail shows the image stretched to the grid, tiles show it within the window. A
        place of the thumbnail that several tiles show counts in each by the share of its area.
        """
        window = self.layout.window
        rows = self._overlap(0, window.top, window.rows)
        columns = self._overlap(1, window.left, window.columns)
        square = values.double().unflatten(-1, self.layout.grid)
        return (rows @ square @ columns.T).flatten(1)

    def _overlap(self, axis: int, start: int, length: int) -> Tensor:
        """(tiles, places) along an axis: what share of a place of the thumbnail a tile shows."""
        side, tiles = self.layout.grid[axis], self.layout.tiles[axis]
        edge = torch.arange(tiles + 1, device=self._device) * side - start
        edge = edge.double() * side / max(length, 1)  # in places of the thumbnail
        place = torch.arange(side, device=self._device)
        shown = torch.minimum(edge[1:, None], place + 1) - torch.maximum(edge[:-1, None], place)
        return shown.clamp(min=0)

    def over_tiles(self, values: Tensor) -> Tensor:
        """(B, T, n): values (B, n) of the thumbnail, interpolated to the window; 0 in padding.

        Bilinear, corners not aligned.
        """
        (rows, columns), (down, across) = self.layout.grid, self.layout.tiles
        top, left, height, width = self.layout.window
        if not height * width:
            return values.new_zeros(len(values), down * across, self.places)
        square = values.unflatten(-1, self.layout.grid)[:, None]
        finer = torch.nn.functional.interpolate(square, (height, width), mode="bilinear")[:, 0]
        right, bottom = across * columns - left - width, down * rows - top - height
        return self._cut(torch.nn.functional.pad(finer, (left, right, top, bottom)))

    def _cut(self, stitched: Tensor) -> Tensor:
        """(..., T, n): a stitched grid (..., rows, columns) cut into its tiles."""
        rows, columns = self.layout.grid
        tiles = stitched.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))
        return tiles.transpose(-3, -2).flatten(-2).flatten(-3, -2)

    def best(self, score: Tensor, weights: Tensor, whole: int, rest: int) -> Tensor:
        """(B, whole + rest): the places that stay, for :attr:`Across.choose`.

        Args:
            score: (B, P, n), the highest of each part stay.
            weights: (B, T) in proportion to which the tiles share what they keep together.
            whole: how many stay of the thumbnail.
            rest: how many stay of all tiles.
        """
        tiles = largest_remainder(weights, self.sizes[1:], rest)
        share = torch.cat([torch.full_like(tiles[:, :1], whole), tiles], 1)
        return best_of_parts(score, share, self.inside, whole + rest)


_FINEST = 2**24
"""Fractions are told apart to one of so many: the next rounding error must not decide a tie."""

_NEXT_TO_NOTHING = 2.0**-900
"""Of a place's weight: what shares out whatever no weight claims."""


def largest_remainder(weights: Tensor, room: Tensor, total: int) -> Tensor:
    """Share a number out in proportion to weights, in whole numbers that sum to it exactly.

    As :func:`vllm_ficoco.schedule.largest_remainder`, where nobody takes more than its room: what
    it cannot hold is handed on to the others in proportion to their weights. What these cannot
    hold, or what nobody has a weight for, goes by room. Ties go to the lower index.

    Args:
        weights: (B, T), not negative; NaN counts as 0.
        room: (T,) int64.
        total: at most the sum of the room.

    Returns:
        (B, T) int64
    """
    if not total:
        return torch.zeros_like(weights, dtype=torch.int64)
    weights = weights.double().nan_to_num(0.0).clamp(min=0.0)
    weights = weights / weights.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    weights = weights + room.double() * _NEXT_TO_NOTHING
    # Where all get the same level times their weight, the first to be full are those with least
    # room for their weight. So in that order: were those before me full, would I be?
    fills_at = torch.where(room > 0, room / weights, 0.0)
    fills_at, order = fills_at.sort(dim=-1, stable=True)
    held = room.expand_as(order).gather(-1, order)
    before = held.cumsum(-1) - held
    behind = weights.gather(-1, order).flip(-1).cumsum(-1).flip(-1)
    level = (total - before) / behind
    first = (level <= fills_at).byte().argmax(-1, keepdim=True)
    share = torch.minimum(level.gather(-1, first) * weights, room)
    exact = (share * _FINEST).round().long()
    whole, fraction = exact // _FINEST, exact % _FINEST
    return whole + (ranks(fraction) < total - whole.sum(-1, keepdim=True))


def best_of_parts(score: Tensor, share: Tensor, inside: Tensor, total: int) -> Tensor:
    """The places with the highest scores of every part, as many as its share.

    Args:
        score: (B, P, n), not negative infinity.
        share: (B, P), at most the places inside, summing to the total in every row.
        inside: (P, n) the places that can be chosen.
        total: how many come out.

    Returns:
        (B, total) indices in P * n, ascending
    """
    stays = ranks(score.masked_fill(~inside, float("-inf"))) < share[..., None]
    return stays.flatten(1).byte().sort(dim=-1, descending=True, stable=True).indices[:, :total]


def ranks(values: Tensor) -> Tensor:
    """How many entries of a row are before each, from the highest; of equals, the lower index."""
    order = values.sort(dim=-1, descending=True, stable=True).indices
    number = torch.arange(order.shape[-1], device=order.device)
    return torch.empty_like(order).scatter_(-1, order, number.expand_as(order))
