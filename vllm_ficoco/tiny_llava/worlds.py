# SPDX-License-Identifier: Apache-2.0
"""Other worlds with the same questions: how far does a choice of methods and options carry?

Nothing was ever trained or tuned on these two. What a scene may contain and what may be asked of it
is as in :mod:`vllm_ficoco.tiny_llava.scenes`, or the model could not answer; the rest differs. How
hard a world is was set by the accuracy without any reduction, never by a method's.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from vllm_ficoco.tiny_llava.scenes import WORDS, SceneMaker, word_mask


class Cluttered(SceneMaker):
    """Stripes, checks, rings or a slope behind everything, and many things no question is about.

    Many tokens stand out here that do not matter, and few are like their neighbours.
    """

    clutter = (5, 7)
    contrast = (3.0, 12.0)
    """Between the two tones of a background, from and to so many of 255 levels."""

    def _background(self) -> NDArray[np.float32]:
        draw, side = self.numbers, self.side
        base = draw.uniform(80, 170) + draw.uniform(-20, 20, 3)
        tone = draw.uniform(*self.contrast) * (1 + draw.uniform(-0.4, 0.4, 3))
        y, x = np.mgrid[:side, :side] / self.scale
        angle, period = draw.uniform(0, math.pi), draw.uniform(10, 40)
        along = x * math.cos(angle) + y * math.sin(angle)
        across = y * math.cos(angle) - x * math.sin(angle)
        kind = draw.integers(4)
        if kind == 0:
            wave = np.sign(np.sin(2 * math.pi * along / period))
        elif kind == 1:
            wave = np.sign(np.sin(2 * math.pi * along / period))
            wave = wave * np.sign(np.sin(2 * math.pi * across / period))
        elif kind == 2:
            centre = draw.uniform(0, side / self.scale, 2)
            wave = np.sin(2 * math.pi * np.hypot(x - centre[0], y - centre[1]) / period)
        else:
            wave = 2 * (along - along.min()) / (along.max() - along.min()) - 1
        grain = draw.standard_normal((side, side, 1)) * draw.uniform(0, 8)
        return (base + wave[..., None] * tone + grain).astype(np.float32)

    def _clutter(self) -> NDArray[np.uint8]:
        """The strokes, dots and arcs of before, and as often a zigzag, a grid or a spiral."""
        lot, scale, side = self.random, 4, 28
        if lot.random() < 0.5:
            return super()._clutter()
        image = Image.new("L", (side * scale, side * scale))
        draw, most, width = ImageDraw.Draw(image), side * scale - 8, lot.randint(4, 9)
        points: list[tuple[float, float]] = []
        kind = lot.randrange(3)
        if kind == 0:
            teeth = lot.randint(4, 7)
            middle, reach = lot.randint(30, 80), lot.randint(10, 25)
            points = [
                (8 + (most - 8) * k / teeth, middle + (-1) ** k * reach) for k in range(teeth + 1)
            ]
            draw.line(points, fill=255, width=width)
        elif kind == 1:
            step = lot.randint(16, 30)
            for at in range(8, most, step):
                draw.line([(at, 8), (at, most)], fill=255, width=width // 2)
                draw.line([(8, at), (most, at)], fill=255, width=width // 2)
        else:
            turns, start = lot.uniform(1.5, 3), lot.uniform(0, 6)
            for k in range(60):
                angle, r = start + turns * 2 * math.pi * k / 60, 46 * k / 60
                points.append((56 + r * math.cos(angle), 56 + r * math.sin(angle)))
            draw.line(points, fill=255, width=width)
        side = round(side * self.scale)
        return np.asarray(image.resize((side, side), Image.Resampling.BOX))


class Printed(SceneMaker):
    """Paper with rows of faint small print, and words in other fonts and more sizes.

    The background is full of edges of one kind, everywhere alike.
    """

    fonts = (
        "STIXGeneral",
        "STIXGeneralBol",
        "STIXGeneralItalic",
        "cmr10",
        "cmb10",
        "cmss10",
        "cmtt10",
        "DejaVuSerif",
        "DejaVuSansMono",
        "DejaVuSans-BoldOblique",
    )
    word_sizes = (15, 24)
    ink = (8.0, 30.0)
    """The small print is so much darker than the paper, of 255 levels."""

    def _background(self) -> NDArray[np.float32]:
        draw, side = self.numbers, self.side
        paper = draw.uniform(110, 185) + draw.uniform(-12, 12, 3)
        page = Image.new("L", (side, side))
        font = self.fonts[draw.integers(len(self.fonts))]
        size = round(draw.integers(6, 9) * self.scale)
        y = int(draw.integers(0, 8))
        while y < side:
            x = int(draw.integers(-20, 4))
            while x < side:
                mask = Image.fromarray(word_mask(WORDS[draw.integers(len(WORDS))], font, size))
                page.paste(mask, (x, y + size - mask.height))
                x += mask.width + size // 2
            y += round(1.6 * size)
        page = page.filter(ImageFilter.GaussianBlur(0.5 * self.scale))
        marks = np.asarray(page, np.float32)[..., None] / 255
        shade = np.linspace(0, draw.uniform(-15, 15), side)[:, None, None]
        canvas = paper + shade - marks * draw.uniform(*self.ink)
        return (canvas + draw.standard_normal((side, side, 1)) * 3).astype(np.float32)


WORLDS: dict[str, type[SceneMaker]] = {
    "plain": SceneMaker,
    "cluttered": Cluttered,
    "printed": Printed,
}
"""By name; ``plain`` is the one that the model was trained on."""
