# SPDX-License-Identifier: Apache-2.0
"""What became of an image's tokens, as the answer to a preview says it.

Workers number places as :meth:`vllm_ficoco.vision.layout.Layout.numbers` does, newlines in between.
Here they are numbered so that a picture of them is easily made: grid after grid, each row by row,
and newlines at the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from vllm_ficoco.preview import ENTERED, Area, Step
from vllm_ficoco.vision.layout import Layout, Raster

_ORDER = ("tower", "output", ENTERED, "decoder")


class Places:
    """The places of an image.

    Args:
        layout: of the image.
        reduced: its tokens leave before the decoder, and are numbered as those of a reduced one.
        seen: what the tower sees of the image as a whole.
    """

    def __init__(self, layout: Layout, reduced: bool, seen: Area) -> None:
        self.raster: Raster = layout.raster(reduced)
        self.layout, self.reduced, self.seen = layout, reduced, seen
        rows, columns = layout.grid
        self.whole = rows * columns
        """Places of the image as a whole."""
        window = self.raster.window
        self.rows = layout.tiles[0] * rows if reduced else window.rows
        """Of the stitched grid; none without tiles."""
        self.stitched = self.rows * self.raster.columns if layout.is_tiled else 0
        self.newlines = window.rows if layout.is_tiled else 0

    @property
    def total(self) -> int:
        """How many there are, padding and newlines included."""
        return self.whole + self.stitched + self.newlines

    @property
    def grids(self) -> list[dict[str, Any]]:
        """What places are, in words of a picture."""
        rows, columns = self.layout.grid
        whole = {
            "name": "thumbnail" if self.layout.is_tiled else "image",
            "first": 0,
            "rows": rows,
            "columns": columns,
            "area": [*self.seen],
            "tile": None,
        }
        if not self.layout.is_tiled:
            return [whole]
        window, across = self.raster.window, self.raster.columns
        wide, high = max(window.columns, 1), max(window.rows, 1)
        area = (
            -window.left / wide,
            -window.top / high,
            (across - window.left) / wide,
            (self.rows - window.top) / high,
        )
        tiles = {
            "name": "tiles",
            "first": self.whole,
            "rows": self.rows,
            "columns": across,
            "area": [*area],
            # Without a reduction before the decoder they may have been shrunk.
            "tile": [rows, columns] if self.reduced else None,
        }
        return [whole, tiles]

    def place(self, number: int) -> int:
        """The place of a worker's number."""
        behind = number - self.whole
        if behind < 0:
            return number
        row, column = divmod(behind, self.raster.columns + 1)
        if column == self.raster.columns:
            return self.whole + self.stitched + row - self.raster.window.top
        return self.whole + row * self.raster.columns + column

    @property
    def present(self) -> set[int]:
        """Where the image has tokens: everywhere but in padding."""
        window, across = self.raster.window, self.raster.columns
        stitched = {
            self.whole + row * across + column
            for row in range(window.top, window.top + window.rows)
            for column in range(window.left, window.left + window.columns)
        }
        newlines = range(self.whole + self.stitched, self.total)
        return {*range(self.whole), *(stitched if self.layout.is_tiled else ()), *newlines}


def followed(places: Places, steps: Iterable[Step], last_layer: int) -> dict[str, Any]:
    """What leaves where, what is left, and where everything has ended.

    Args:
        places: of the image.
        steps: what its workers have noted.
        last_layer: of the tower, where what no method has chosen leaves.
    """
    ordered = sorted(steps, key=lambda step: (_ORDER.index(step.where), step.layer))
    current = places.present
    for step in ordered:
        if step.where == "tower":  # which knows no padding
            current |= set(map(places.place, step.before))
    ended: dict[int, int | None] = {place: place for place in current}
    stages: list[dict[str, Any]] = []
    for (where, layer), group in groupby(ordered, key=lambda step: (step.where, step.layer)):
        into: dict[int, int | None] = {}
        stay = set[int]()
        for step in group:
            after = [*map(places.place, step.after)]
            stay |= set(after)
            for number, index in zip(step.before, step.into, strict=True):
                into[places.place(number)] = after[index] if index >= 0 else None
        if where == ENTERED:  # newlines, and parts of which nothing stays
            into = dict.fromkeys(current - stay)
        left = sorted((current & into.keys()) - stay)
        if where == ENTERED and not left:
            continue
        current -= set(left)
        for place, at in ended.items():
            if at is not None:
                ended[place] = into.get(at, at)
        if where == ENTERED and stages:
            stages[-1] = _stage(
                stages[-1]["where"],
                stages[-1]["layer"],
                current,
                [*stages[-1]["left"], *left],
                [*(stages[-1]["into"] or [None] * len(stages[-1]["left"])), *[None] * len(left)],
            )
            continue
        where, layer = ("output", last_layer) if where == ENTERED else (where, layer)
        stages.append(_stage(where, layer, current, left, [into[place] for place in left]))
    receivers = [ended.get(place) for place in range(places.total)]
    merged = any(at is not None and at != place for place, at in enumerate(receivers))
    return {
        "stages": stages,
        "kept": sorted(current),
        "receivers": receivers if merged else None,
    }


def _stage(
    where: str, layer: int, kept: Iterable[int], left: Sequence[int], into: Sequence[int | None]
) -> dict[str, Any]:
    """What is left behind a place of reduction, and what became of the others."""
    order = sorted(zip(left, into, strict=True), key=lambda pair: pair[0])
    taken = [at for _, at in order]
    return {
        "where": where,
        "layer": layer,
        "kept": sorted(kept),
        "left": [place for place, _ in order],
        "into": taken if any(at is not None for at in taken) else None,
    }
