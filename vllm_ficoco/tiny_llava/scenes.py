# SPDX-License-Identifier: Apache-2.0
"""Scenes of shapes, digits and words, and questions to them: the world of the shipped model.

Everything is drawn from a seed, nothing is downloaded. Shapes are 13 to 28 px on a 168 px image,
one to three patches, so an answer hangs on few visual tokens. Digits are scikit-learn's
handwritten ones, words are rendered in fonts that come with matplotlib; both are needed only here.

Tasks are named after what they stand for:

- ``existence-random``, ``-popular``, ``-adversarial``: POPE. What is absent is anything, or shares
  its colour or its shape with something present, or has both, but not bound together.
- ``reading``: TextVQA; the printed word.
- ``digit``: handwriting, of held-out samples in test scenes.
- ``colour``, ``shape``, ``count``, ``relation``, ``corner``: GQA and VQAv2.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

SIZE = 168
"""Side of an image in pixels."""

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 165, 60),
    "blue": (50, 80, 225),
    "yellow": (235, 215, 50),
    "purple": (150, 60, 190),
    "cyan": (60, 205, 215),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
PLURALS = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "star": "stars",
    "cross": "crosses",
    "ring": "rings",
    "heart": "hearts",
    "diamond": "diamonds",
}
SHAPES = tuple(PLURALS)
WORDS = tuple(
    "cat dog sun map key bus cup hat pen box fox ice jam net oil pig rug van web zip "  # noqa: SIM905
    "arm bed cow egg fan gum hen ink jet kit leg mud nut owl pot rat sky toy urn yak".split()
)
CORNERS = ("top left", "top right", "bottom left", "bottom right")
FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "STIXGeneralBol",
    "DejaVuSans-Oblique",
)
TEST_SHARE = 0.2
"""Share of the handwritten digits that only test scenes show."""


class Shape(NamedTuple):
    """One coloured shape."""

    colour: str
    name: str
    x: float
    """Centre, pixels from the left."""
    y: float
    """Centre, pixels from the top."""
    size: int


class Question(NamedTuple):
    """A question to a scene."""

    task: str
    text: str
    answer: str


@dataclass
class Scene:
    """An image and what is on it."""

    image: Image.Image
    shapes: list[Shape] = field(default_factory=list)
    word: str | None = None
    digit: int | None = None


class SceneMaker:
    """Draws scenes and questions from a seed.

    Args:
        seed: of everything.
        test: take digits that training scenes never show.
    """

    def __init__(self, seed: int, test: bool = True) -> None:
        self.random = random.Random(seed)
        self.numbers = np.random.default_rng(seed)
        digits, labels = _digits()
        order = np.random.default_rng(0).permutation(len(labels))
        held_out = int(len(labels) * TEST_SHARE)
        chosen = order[:held_out] if test else order[held_out:]
        self.digits, self.labels = digits[chosen], labels[chosen]

    def scene(self) -> Scene:
        """One scene: three to seven shapes, often a word and a digit, and clutter."""
        lot = self.random
        canvas = self._background()
        boxes: list[tuple[int, int, int, int]] = []
        word = digit = None
        if lot.random() < 0.8:
            candidate = lot.choice(WORDS)
            mask = _word_mask(candidate, lot.choice(FONTS), lot.randint(13, 18))
            if self._paste(canvas, mask, lot.choice(list(COLOURS)), boxes) is not None:
                word = candidate
        if lot.random() < 0.8:
            index = lot.randrange(len(self.labels))
            side = lot.choice((18, 20, 22, 24, 26, 28))
            mask = np.asarray(Image.fromarray(self.digits[index]).resize((side, side), 3))
            if self._paste(canvas, mask, lot.choice(list(COLOURS)), boxes) is not None:
                digit = int(self.labels[index])
        shapes = []
        for colour, name in self._kinds(lot.randint(3, 7)):
            size = round(math.exp(lot.uniform(math.log(13), math.log(28))))
            mask = _shape_mask(name, size, lot.choice((-12, 0, 12)))
            place = self._paste(canvas, mask, colour, boxes)
            if place is not None:
                shapes.append(Shape(colour, name, place[0] + size / 2, place[1] + size / 2, size))
        for _ in range(lot.randint(0, 4)):
            self._paste(canvas, self._clutter(), lot.choice(list(COLOURS)), boxes)
        pixels = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
        return Scene(Image.fromarray(pixels), shapes, word, digit)

    def questions(self, scene: Scene) -> Iterator[Question]:
        """One question of every task that the scene has an answer for."""
        for task, ask in TASKS.items():
            asked = ask(scene, self.random)
            if asked is not None:
                yield Question(task, *asked)

    def _kinds(self, count: int) -> list[tuple[str, str]]:
        """Colours and shapes; often several share one, or there would be nothing to count."""
        lot = self.random
        kinds = [(lot.choice(list(COLOURS)), lot.choice(SHAPES)) for _ in range(count)]
        way, same = lot.random(), min(count, lot.choice((2, 3, 3, 4)))
        if way < 0.4:
            shape = lot.choice(SHAPES)
            kinds[:same] = [(colour, shape) for colour, _ in kinds[:same]]
        elif way < 0.55:
            colour = lot.choice(list(COLOURS))
            kinds[:same] = [(colour, shape) for _, shape in kinds[:same]]
        lot.shuffle(kinds)
        return kinds

    def _background(self) -> NDArray[np.float32]:
        """Grey, tinted, with soft spots of two sizes and grain."""
        base = self.numbers.uniform(70, 180) + self.numbers.uniform(-20, 20, 3)
        canvas = np.broadcast_to(base, (SIZE, SIZE, 3)).astype(np.float32)
        for cells, strength in ((4, 30.0), (14, 22.0)):
            spots = self.numbers.standard_normal((cells, cells, 3))
            spots = 0.35 * spots + spots.mean(-1, keepdims=True)
            for channel in range(3):
                plane = Image.fromarray(spots[..., channel].astype(np.float32))
                soft = np.asarray(plane.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
                canvas[..., channel] += soft * self.numbers.uniform(0, strength)
        grain = self.numbers.standard_normal((SIZE, SIZE, 1)) * self.numbers.uniform(0, 14)
        return (canvas + grain).astype(np.float32)

    def _paste(
        self,
        canvas: NDArray[np.float32],
        mask: NDArray[np.uint8],
        colour: str,
        boxes: list[tuple[int, int, int, int]],
    ) -> tuple[int, int] | None:
        """Put a mask somewhere free; where, or None if there is no room."""
        height, width = mask.shape
        for _ in range(25):
            x, y = self.random.randint(0, SIZE - width), self.random.randint(0, SIZE - height)
            if all(
                x + width + 2 <= a or a + c + 2 <= x or y + height + 2 <= b or b + d + 2 <= y
                for a, b, c, d in boxes
            ):
                break
        else:
            return None
        boxes.append((x, y, width, height))
        ink = np.clip(np.add(COLOURS[colour], self.numbers.uniform(-18, 18, 3)), 0, 255)
        part = canvas[y : y + height, x : x + width]
        part += mask[..., None] / 255.0 * (ink - part)
        return x, y

    def _clutter(self) -> NDArray[np.uint8]:
        """Strokes, dots or arcs that no question is about."""
        lot, scale, side = self.random, 4, 28
        image = Image.new("L", (side * scale, side * scale))
        draw = ImageDraw.Draw(image)

        def point() -> tuple[int, int]:
            return lot.randint(4, side * scale - 4), lot.randint(4, side * scale - 4)

        kind = lot.randrange(3)
        if kind == 0:
            points = [point() for _ in range(lot.randint(2, 4))]
            draw.line(points, fill=255, width=lot.randint(5, 13))
        elif kind == 1:
            for _ in range(lot.randint(3, 8)):
                (x, y), r = point(), lot.randint(4, 10)
                draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
        else:
            (x, y), r, start = point(), lot.randint(16, 50), lot.randint(0, 359)
            box = (x - r, y - r, x + r, y + r)
            draw.arc(box, start, start + lot.randint(60, 200), fill=255, width=lot.randint(5, 11))
        return np.asarray(image.resize((side, side), Image.Resampling.BOX))


# --- Questions ----------------------------------------------------------------------------------

Asked = tuple[str, str] | None
"""Question and answer, or None where the scene has none."""


def _kinds_of(scene: Scene) -> list[tuple[str, str]]:
    return [(shape.colour, shape.name) for shape in scene.shapes]


def _existence(negatives: str) -> Callable[[Scene, random.Random], Asked]:
    def ask(scene: Scene, lot: random.Random) -> Asked:
        there = _kinds_of(scene)
        if not there:
            return None
        absent = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in there]
        colours, shapes = {c for c, _ in there}, {s for _, s in there}
        if negatives == "popular":
            absent = [(c, s) for c, s in absent if (c in colours) != (s in shapes)]
        elif negatives == "adversarial":
            absent = [(c, s) for c, s in absent if c in colours and s in shapes]
        if not absent:
            return None
        present = lot.random() < 0.5
        colour, shape = lot.choice(there if present else absent)
        return f"is there a {colour} {shape} ?", "yes" if present else "no"

    return ask


def _colour(scene: Scene, lot: random.Random) -> Asked:
    names = [shape.name for shape in scene.shapes]
    single = [shape for shape in scene.shapes if names.count(shape.name) == 1]
    if not single:
        return None
    shape = lot.choice(single)
    return f"what color is the {shape.name} ?", shape.colour


def _shape(scene: Scene, lot: random.Random) -> Asked:
    colours = [shape.colour for shape in scene.shapes]
    single = [shape for shape in scene.shapes if colours.count(shape.colour) == 1]
    if not single:
        return None
    shape = lot.choice(single)
    return f"what shape is the {shape.colour} object ?", shape.name


def _count(scene: Scene, lot: random.Random) -> Asked:
    by_shape = lot.random() < 0.65
    there = [s.name if by_shape else s.colour for s in scene.shapes]
    every = list(SHAPES if by_shape else COLOURS)
    thing = lot.choice(there if there and lot.random() < 0.85 else every)
    what = PLURALS[thing] if by_shape else f"{thing} object"
    return f"how many {what} are there ?", str(there.count(thing))


def _reading(scene: Scene, _: random.Random) -> Asked:
    return None if scene.word is None else ("what word is printed ?", scene.word)


def _digit(scene: Scene, _: random.Random) -> Asked:
    return None if scene.digit is None else ("what digit is written ?", str(scene.digit))


def _relation(scene: Scene, lot: random.Random) -> Asked:
    kinds = _kinds_of(scene)
    single = [s for s in scene.shapes if kinds.count((s.colour, s.name)) == 1]
    if len(single) < 2:
        return None
    one, other = lot.sample(single, 2)
    word = lot.choice(("left of", "right of", "above", "below"))
    far = {
        "left of": other.x - one.x,
        "right of": one.x - other.x,
        "above": other.y - one.y,
        "below": one.y - other.y,
    }[word]
    if abs(far) < 16:  # too close to call
        return None
    question = f"is the {one.colour} {one.name} {word} the {other.colour} {other.name} ?"
    return question, "yes" if far > 0 else "no"


def _corner(scene: Scene, lot: random.Random) -> Asked:
    inside: list[list[str]] = [[], [], [], []]
    for shape in scene.shapes:
        inside[2 * (shape.y > SIZE / 2) + (shape.x > SIZE / 2)].append(shape.name)
    single = [corner for corner in range(4) if len(inside[corner]) == 1]
    if not single:
        return None
    corner = lot.choice(single)
    return f"what shape is in the {CORNERS[corner]} ?", inside[corner][0]


TASKS: dict[str, Callable[[Scene, random.Random], Asked]] = {
    "existence-random": _existence("random"),
    "existence-popular": _existence("popular"),
    "existence-adversarial": _existence("adversarial"),
    "reading": _reading,
    "digit": _digit,
    "colour": _colour,
    "shape": _shape,
    "count": _count,
    "relation": _relation,
    "corner": _corner,
}


# --- Masks --------------------------------------------------------------------------------------


@cache
def _digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """scikit-learn's handwritten digits, 8 x 8, and what they are."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return np.clip(data.images * 16, 0, 255).astype(np.uint8), data.target


@cache
def _word_mask(word: str, font: str, size: int) -> NDArray[np.uint8]:
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    face = ImageFont.truetype(str(folder / f"{font}.ttf"), size)
    left, top, right, bottom = face.getbbox(word)
    image = Image.new("L", (math.ceil(right - left), math.ceil(bottom - top)))
    ImageDraw.Draw(image).text((-left, -top), word, font=face, fill=255)
    return np.asarray(image)


@cache
def _shape_mask(name: str, size: int, turn: int) -> NDArray[np.uint8]:
    """A shape that fills a square of ``size`` pixels, drawn eight times larger and shrunk."""
    side = size * 8
    image = Image.new("L", (side, side))
    draw = ImageDraw.Draw(image)
    middle, radius = side / 2, side * 0.48

    def polygon(points: list[tuple[float, float]]) -> None:
        draw.polygon([(middle + x * radius, middle + y * radius) for x, y in points], fill=255)

    def disc(share: float, fill: int) -> None:
        r = radius * share
        draw.ellipse((middle - r, middle - r, middle + r, middle + r), fill=fill)

    if name in ("circle", "ring"):
        disc(1.0, 255)
        if name == "ring":
            disc(0.52, 0)
    elif name == "square":
        polygon([(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)])
    elif name == "diamond":
        polygon([(0, -1), (0.72, 0), (0, 1), (-0.72, 0)])
    elif name == "triangle":
        polygon([(0, -0.95), (0.95, 0.8), (-0.95, 0.8)])
    elif name == "star":
        spokes = [(1 if k % 2 == 0 else 0.42, math.pi * k / 5) for k in range(10)]
        polygon([(r * math.sin(a), -r * math.cos(a)) for r, a in spokes])
    elif name == "cross":
        a = 0.3
        upper = [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a)]
        polygon(upper + [(-x, -y) for x, y in upper])
    elif name == "heart":
        angles = [2 * math.pi * k / 60 for k in range(60)]
        wave = [
            13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
            for t in angles
        ]
        polygon([(16 * math.sin(t) ** 3 / 17, -w / 17) for t, w in zip(angles, wave, strict=True)])
    if turn:
        image = image.rotate(turn, Image.Resampling.BICUBIC)
    return np.asarray(image.resize((size, size), Image.Resampling.BOX))
