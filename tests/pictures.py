# SPDX-License-Identifier: Apache-2.0
"""Pictures of which tests know what they ask for."""

from __future__ import annotations

import numpy as np
from PIL import Image


def drawn(busy: int, seed: int = 0, size: tuple[int, int] = (168, 168)) -> Image.Image:
    """A picture that is grey but for so many of its 12 x 12 cells, which are coarse noise; of all
    of them it is black and white, as a page is."""
    lot = np.random.default_rng(seed)
    pixels = np.full((168, 168, 3), lot.integers(100, 140, 3), np.uint8)
    noise = lot.integers(0, 255, (84, 84, 3), dtype=np.uint8).repeat(2, 0).repeat(2, 1)
    if busy == 144:
        noise = noise[..., :1] // 128 * np.full(3, 255, np.uint8)
    mask = (np.arange(144) < busy).reshape(12, 12).repeat(14, 0).repeat(14, 1)
    pixels[mask] = noise[mask]
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)
