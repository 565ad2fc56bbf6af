# SPDX-License-Identifier: Apache-2.0
"""What is sent: images or videos that no cache has seen, and how each is to be reduced."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

QUESTION = "what color is the circle ?"
TEXT, FULL, DEFAULT = "text", "none", "default"


class Setting(NamedTuple):
    """How a request is to be served; ``text`` has no image, ``none`` an unreduced one, ``default``
    one of which nothing is said."""

    method: str
    budget: int | None = None

    @classmethod
    def parse(cls, text: str) -> Setting:
        """``score@192``, ``none``, ``default`` or ``text``.

        Raises:
            ValueError: it is none of these.
        """
        method, _, budget = text.partition("@")
        if bool(budget) == (method in (TEXT, FULL, DEFAULT)) or not method:
            raise ValueError(f"{text!r} should be METHOD@BUDGET, {FULL}, {DEFAULT} or {TEXT}")
        return cls(method, int(budget) if budget else None)

    def __str__(self) -> str:
        return self.method if self.budget is None else f"{self.method}@{self.budget}"

    @property
    def body(self) -> dict[str, Any]:
        """What it adds to a request."""
        if self.method in (TEXT, DEFAULT):
            return {}
        budget = {} if self.budget is None else {"budget": self.budget}
        return {"reduction": {"method": self.method, **budget}}


class Mix(NamedTuple):
    """Settings by weight; one alone, or mixed traffic."""

    parts: tuple[tuple[Setting, float], ...]

    @classmethod
    def parse(cls, text: str) -> Mix:
        """``score@192``, or ``text=1,none=2,score@192=4``.

        Raises:
            ValueError: a part is no setting, or a weight no positive number.
        """
        parts = []
        for part in text.split(","):
            name, _, weight = part.partition("=")
            if (share := float(weight or 1)) <= 0:
                raise ValueError(f"the weight of {part!r} should be above 0")
            parts.append((Setting.parse(name), share))
        return cls(tuple(parts))

    def __str__(self) -> str:
        if len(self.parts) == 1:
            return str(self.parts[0][0])
        return ",".join(f"{setting}={weight:g}" for setting, weight in self.parts)

    def draw(self, count: int, seed: int) -> list[Setting]:
        """So many settings in an order drawn by lot, of each as many as its weight says.

        Raises:
            ValueError: there are more settings than that.
        """
        if count < len(self.parts):
            raise ValueError(f"{count} requests are too few for {len(self.parts)} settings: {self}")
        total = sum(weight for _, weight in self.parts)
        rest = count - len(self.parts)  # one of each, and the rest by weight
        edges = [round(rest * share / total) for share in accumulate(w for _, w in self.parts)]
        drawn = [
            setting
            for (setting, _), (low, high) in zip(self.parts, pairwise([0, *edges]), strict=True)
            for _ in range(1 + high - low)
        ]
        random.Random(seed).shuffle(drawn)
        return drawn


def image(side: int | tuple[int, int], seed: int | Sequence[int]) -> str:
    """A picture of coloured squares, as a data URL; another one for every seed.

    Args:
        side: pixels; or width and height.
        seed: of the squares.
    """
    width, height = (side, side) if isinstance(side, int) else side
    shape = (max(height // 14, 1), max(width // 14, 1), 3)
    squares = np.random.default_rng(seed).integers(0, 255, shape, np.uint8)
    file = io.BytesIO()
    Image.fromarray(squares).resize((width, height), Image.Resampling.NEAREST).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def video(side: int, frames: int, seed: int | Sequence[int]) -> str:
    """Coloured squares of which two rows change with every frame, as a data URL of a GIF.

    Args:
        side: pixels of a frame.
        frames: how many, two a second.
        seed: of the squares.
    """
    lot, count = np.random.default_rng(seed), max(side // 14, 1)
    squares = lot.integers(0, 256, (count, count), np.uint8)
    colours, film = lot.integers(0, 256, 768).tolist(), []
    for _ in range(frames):
        squares[lot.integers(0, count, 2)] += 1  # equal frames would become one
        frame = Image.fromarray(squares).resize((side, side), Image.Resampling.NEAREST)
        frame.putpalette(colours)
        film.append(frame)
    file = io.BytesIO()
    film[0].save(file, "GIF", save_all=True, append_images=film[1:], duration=500, optimize=False)
    return "data:image/gif;base64," + base64.b64encode(file.getvalue()).decode()


def messages(
    setting: Setting, side: int, seed: Sequence[int], frames: int = 0
) -> list[dict[str, Any]]:
    """The conversation of a request: an image, or a video of so many frames, unless it has none,
    and a question."""
    content: list[dict[str, Any]] = [{"type": "text", "text": QUESTION}]
    if setting.method != TEXT and frames:
        content.insert(0, {"type": "video_url", "video_url": {"url": video(side, frames, seed)}})
    elif setting.method != TEXT:
        content.insert(0, {"type": "image_url", "image_url": {"url": image(side, seed)}})
    return [{"role": "user", "content": content}]
