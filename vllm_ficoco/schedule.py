# SPDX-License-Identifier: Apache-2.0
"""All count arithmetic: how many visual tokens are left after which layer.

vLLM fixes an image's placeholders before the image is seen, so every schedule is a function of
counts alone and ends at exactly the budget. Nothing here looks at a tensor.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class Stage(NamedTuple):
    """One place where tokens leave."""

    layer: int
    """0-based layer of the vision tower, counted among the layers that run."""
    keep: int
    """Visual tokens that are left after it."""


def even(tokens: int, budget: int, layers: range) -> list[Stage]:
    """Spread the tokens that leave evenly over the layers, the remainder on the first ones.

    Layers at which nothing leaves are left out.
    """
    share, more = divmod(tokens - budget, len(layers))
    stages, left = [], tokens
    for i, layer in enumerate(layers):
        leave = share + (i < more)
        left -= leave
        if leave:
            stages.append(Stage(layer, left))
    return stages


def halving(tokens: int, budget: int, layers: range) -> list[Stage]:
    """As :func:`even`, where a layer can let go of no more than half of its tokens (ToMe).

    Where an even share is more than half of what is left at the end, the last layers halve and
    the layers before them share the rest evenly.

    Raises:
        ValueError: the budget cannot be reached; the message names the smallest that can.
    """
    smallest = math.ceil(tokens / 2 ** len(layers))
    if budget < smallest:
        raise ValueError(f"at least {smallest}, which is what {len(layers)} halvings can reach")
    last = 0  # how many of the last layers halve
    while math.ceil((tokens - budget * 2**last) / (len(layers) - last)) > budget * 2**last:
        last += 1
    stages = even(tokens, budget * 2**last, layers[: len(layers) - last])
    for i, layer in enumerate(layers[len(layers) - last :], start=1):
        stages.append(Stage(layer, budget * 2 ** (last - i)))
    return stages


def geometric(tokens: int, budget: int, layers: tuple[int, ...]) -> list[Stage]:
    """The same kept share at every layer: ``tokens * (budget / tokens) ** (i / n)`` after the i-th.

    Rounded to whole tokens; a layer at which nothing would leave is left out.
    """
    stages, left = [], tokens
    for i, layer in enumerate(layers, start=1):
        keep = round(tokens * (budget / tokens) ** (i / len(layers)))
        keep = budget if i == len(layers) else min(max(keep, budget), left)
        if keep < left:
            stages.append(Stage(layer, keep))
            left = keep
    return stages


def at_output(budget: int, layers: int) -> list[Stage]:
    """All at once, on the output of the last of so many layers."""
    return [Stage(layers - 1, budget)]


def same_depth(layer: int, of: int, layers: int) -> int:
    """The layer of a tower of ``layers`` layers that lies as deep as ``layer`` in one of ``of``."""
    return layer * layers // of


def windows(grid: tuple[int, int], count: int) -> list[tuple[int, int, int, int]]:
    """Cut a grid into exactly ``count`` rectangles of nearly equal size that cover it.

    The grid is cut into bands of rows, each band into windows; as square as the count allows.

    Args:
        grid: rows and columns.
        count: from 1 to rows * columns.

    Returns:
        (top, bottom, left, right) of every window, ends exclusive, in raster order.
    """
    rows, columns = grid
    bands = round(math.sqrt(count * rows / columns))
    bands = min(max(bands, math.ceil(count / columns), 1), rows, count)
    cuts = []
    for band in range(bands):
        top, bottom = band * rows // bands, (band + 1) * rows // bands
        here = (band + 1) * count // bands - band * count // bands
        for i in range(here):
            cuts.append((top, bottom, i * columns // here, (i + 1) * columns // here))
    return cuts
