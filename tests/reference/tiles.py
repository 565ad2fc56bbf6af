# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT and LLaVA-OneVision with reduction on plain Hugging Face modules: one image at a time.

What is not reduced is what Hugging Face's own model makes of the image. What is reduced goes tile
by tile through :class:`tests.reference.llava.ReferenceTower`, which calls the literal transcription
of a method on the thumbnail and on what each tile has of the image. Tiles are cut by Hugging Face's
image processor, and what of them is the image is found by its ``unpad_image``, on numbers in place
of patches. No vLLM, nothing of the package.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    unpad_image,
)

from tests.reference.llava import ReferenceLlava
from tests.reference.methods import ACROSS, PLACE, choose_among_parts


class Window(NamedTuple):
    """What of the stitched grid is the image."""

    top: int
    left: int
    rows: int
    columns: int
    behind: int
    """The column behind the stitched grid: there newlines stand."""


class Part(NamedTuple):
    """The thumbnail, or what one tile has of the image."""

    among: list[int]
    """Its places on the tile's own grid, in raster order."""
    grid: tuple[int, int]
    """Its rows and columns."""
    row: int
    """Of the tile's first place on the stitched grid."""
    column: int


class Token(NamedTuple):
    """A visual token that stays, and where it stands."""

    of_tiles: bool
    row: int
    """On the thumbnail's or the stitched grid."""
    column: int
    hidden: Tensor


class ReferenceTiles(ReferenceLlava):
    """A checkpoint in float32 that answers with a reduction of each image."""

    @torch.no_grad()
    def visual_tokens(
        self, image: Image.Image, method: str = "none", budget: int = 0, options: dict | None = None
    ) -> Tensor:
        """(kept, hidden size of the decoder).

        Of these, ``self.spots`` then has rows and columns in sides of the image, and
        ``self.place`` their numbers; ``self.pixels`` is the thumbnail and its tiles.
        """
        processed = self.processor.image_processor([image], return_tensors="pt")
        self.pixels, size = processed["pixel_values"][0], processed["image_sizes"][0].tolist()
        window, parts = self.layout(size)
        whole = self.model.model.get_image_features(
            processed["pixel_values"], processed["image_sizes"]
        ).pooler_output[0]
        if method == "none" or budget >= len(whole):
            self.place, self.spots = list(range(len(whole))), self._all_spots(size, window)
            return whole
        tokens = self._reduced(window, parts, method, budget, dict(options or {}))
        self.place = [
            token.row * (window.behind + 1) + token.column + self.tower.side**2
            if token.of_tiles
            else token.row * self.tower.side + token.column
            for token in tokens
        ]
        self.spots = [self._spot(token, window) for token in tokens]
        return torch.stack([token.hidden for token in tokens])

    def layout(self, size: list[int]) -> tuple[Window, list[Part]]:
        """Of an image of this height and width."""
        side = self.tower.side
        rows, columns = self._tiles(size)
        behind = columns * side
        numbers = torch.arange(rows * side * behind).view(1, rows * side, behind)
        left = unpad_image(numbers, size)[0]
        top = divmod(int(left[0, 0]), behind) if left.numel() else (0, 0)
        parts = [Part(list(range(side**2)), (side, side), 0, 0)]
        stays = {*left.flatten().tolist()}
        for row in range(0, rows * side, side):
            for column in range(0, behind, side):
                among = [
                    place
                    for place in range(side**2)
                    if (row + place // side) * behind + column + place % side in stays
                ]
                grid = (len({p // side for p in among}), len({p % side for p in among}))
                parts.append(Part(among, grid, row, column))
        return Window(*top, *left.shape, behind), parts

    def _tiles(self, size: list[int]) -> tuple[int, int]:
        """Rows and columns of tiles."""
        config = self.model.config
        return get_anyres_image_grid_shape(
            size, config.image_grid_pinpoints, config.vision_config.image_size
        )

    def _reduced(
        self, window: Window, parts: list[Part], method: str, budget: int, options: dict
    ) -> list[Token]:
        """What stays, in the order of the prompt."""
        sizes = [len(part.among) for part in parts]
        newlines = max(0, budget - sum(sizes))
        if options.pop("newlines", "none") == "all":
            newlines = window.rows
        if method in ACROSS:
            kept = self._compared(window, parts, method, budget - newlines, options)
        else:
            shares = shared_out(budget - newlines, sizes)
            each = zip(self.pixels, parts, shares, strict=True)
            kept = [self._part(x, part, method, keep, options) for x, part, keep in each]
        tokens = []
        for number, (part, (hidden, places)) in enumerate(zip(parts, kept, strict=True)):
            projected = self.model.model.multi_modal_projector(hidden)
            for place, token in zip(places, projected, strict=True):
                row, column = divmod(place, self.tower.side)
                tokens.append(Token(number > 0, part.row + row, part.column + column, token))
        for i in range(newlines):
            row = window.top + i * window.rows // newlines
            tokens.append(Token(True, row, window.behind, self.model.model.image_newline))
        return sorted(tokens, key=lambda token: token[:3])

    def _part(
        self, pixels: Tensor, part: Part, method: str, keep: int, options: dict
    ) -> tuple[Tensor, list[int]]:
        """What stays of a part that is reduced by itself, (keep, D), and its places."""
        if not keep:
            return pixels.new_empty(0, self.model.config.vision_config.hidden_size), []
        if PLACE[method] == "tower":  # padding is redundant like anything
            return self.tower(pixels, method, keep, options)
        return self.tower(pixels, method, keep, options, part.grid, part.among)

    def _compared(
        self, window: Window, parts: list[Part], method: str, patches: int, options: dict
    ) -> list[tuple[Tensor, list[int]]]:
        """The same of all parts, by a method that compares them."""
        whole, first, last = [], [], []
        for pixels in self.pixels:
            whole.append(self.tower(pixels)[0])
            first.append(self.tower.looked[0])
            last.append(self.tower.looked[-1])
        side = self.tower.side
        chosen = choose_among_parts(
            method, options, first, last, last[0][0].shape[-1] ** -0.5, self.tower.has_cls,
            (side, side), (parts[-1].row // side + 1, parts[-1].column // side + 1),
            window[:4], patches,
        )  # fmt: skip
        return [(hidden[places], places) for hidden, places in zip(whole, chosen, strict=True)]

    def _spot(self, token: Token, window: Window) -> tuple[float, float]:
        if not token.of_tiles:
            return token.row / self.tower.side, token.column / self.tower.side
        row = (token.row - window.top) / window.rows if window.rows else 0.0
        if token.column == window.behind:
            return row, 1.0
        return row, (token.column - window.left) / max(window.columns, 1)

    def _all_spots(self, size: list[int], window: Window) -> list[tuple[float, float]]:
        """Of an unreduced image, whose window may have been shrunk."""
        side = self.tower.side
        patches, rows = self.processor._get_unpadded_features(*size, side, side, *self._tiles(size))
        columns = patches // max(rows, 1)
        spots = [(place // side / side, place % side / side) for place in range(side**2)]
        for row in range(rows):
            spots += [(row / rows, column / max(columns, 1)) for column in range(columns)]
            spots.append((row / rows, 1.0))
        return spots


def shared_out(total: int, sizes: list[int]) -> list[int]:
    """In proportion to sizes: whole parts first, then one each where the most was cut off."""
    exact = [Fraction(total * size, sum(sizes)) for size in sizes]
    shares = [math.floor(share) for share in exact]
    order = sorted(range(len(sizes)), key=lambda i: (shares[i] - exact[i], i))
    for i in order[: total - sum(shares)]:
        shares[i] += 1
    return shares
