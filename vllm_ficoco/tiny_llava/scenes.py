# SPDX-License-Identifier: Apache-2.0
"""Scenes of shapes, digits and words, and questions to them: the world of the shipped model.

Everything is drawn from a seed, nothing is downloaded. Shapes are 15 to 30 px on a 168 px image,
one to three patches wide, so an answer hangs on few visual tokens. Digits are scikit-learn's
handwritten ones, words are rendered in fonts that come with matplotlib; both are needed only here.

Tasks are named after what they stand for:

- ``existence-random``, ``-popular``, ``-adversarial``: POPE. What is absent is anything, or shares
  its colour or its shape with something present, or has both, but not bound together.
- ``reading``: TextVQA; the printed word.
- ``digit``: handwriting, of held-out samples in test scenes.
- ``colour``, ``shape``, ``count``, ``relation``, ``corner``: GQA and VQAv2.
- ``choice``: MMBench; four objects, one of which is there.
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
"""Side in pixels of the image that all sizes here are given for."""

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
LETTERS = "ABCD"
"""Of the answers that a multiple choice offers."""
CORNERS = ("top left", "top right", "bottom left", "bottom right")
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif-Bold", "DejaVuSansMono-Bold")
TEST_SHARE = 0.2
"""Share of the handwritten digits that only test scenes show."""


class Thing(NamedTuple):
    """A shape, a word or a digit on the image."""

    kind: str
    """``shape``, ``word`` or ``digit``."""
    colour: str
    name: str
    x: float
    """Centre, pixels from the left."""
    y: float
    """Centre, pixels from the top."""
    mask: NDArray[np.uint8] = np.zeros((0, 0), np.uint8)
    """Opacity around the centre, 0 to 255."""


class Mention(NamedTuple):
    """Where a question speaks of things."""

    word: int
    """The word of the question by which they are fully named."""
    things: tuple[int, ...]
    """Which of the scene's things those are; empty where there are none."""


class Question(NamedTuple):
    """A question to a scene. The mentions are for training and for showing what an answer needs."""

    task: str
    text: str
    answer: str
    mentions: tuple[Mention, ...] = ()


@dataclass(eq=False)  # a scene equals only itself
class Scene:
    """An image and what is on it."""

    image: Image.Image
    things: list[Thing] = field(default_factory=list)

    def where(self, kind: str = "shape", colour: str = "", name: str = "") -> tuple[int, ...]:
        """The things of a kind, and of a colour or name where one is given."""
        return tuple(
            index
            for index, thing in enumerate(self.things)
            if thing.kind == kind
            and (not colour or thing.colour == colour)
            and (not name or thing.name == name)
        )

    @property
    def shapes(self) -> list[Thing]:
        """The coloured shapes."""
        return [self.things[index] for index in self.where()]


class SceneMaker:
    """Draws scenes and questions from a seed.

    Args:
        seed: of everything.
        test: take digits that training scenes never show.
        side: of the images in pixels; everything on them grows with it.
    """

    fonts: tuple[str, ...] = FONTS
    word_sizes = (15, 19)
    """From and to so many pixels, on an image of the side that all sizes are given for."""
    clutter = (0, 4)
    """From and to so many pieces."""

    def __init__(self, seed: int, test: bool = True, side: int = SIZE) -> None:
        self.side, self.scale = side, side / SIZE
        self.random = random.Random(seed)
        self.numbers = np.random.default_rng(seed)
        digits, labels = _digits()
        order = np.random.default_rng(0).permutation(len(labels))
        held_out = int(len(labels) * TEST_SHARE)
        chosen = order[:held_out] if test else order[held_out:]
        self.digits, self.labels = digits[chosen], labels[chosen]

    def scene(self) -> Scene:
        """One scene: three to six shapes, often a word and a digit, and clutter."""
        lot = self.random
        canvas = self._background()
        boxes: list[tuple[int, int, int, int]] = []
        things: list[Thing] = []

        def put(kind: str, colour: str, name: str, mask: NDArray[np.uint8]) -> None:
            place = self._paste(canvas, mask, colour, boxes)
            if place is not None:
                height, width = mask.shape
                x, y = place[0] + width / 2, place[1] + height / 2
                things.append(Thing(kind, colour, name, x, y, mask))

        if lot.random() < 0.8:
            word = lot.choice(WORDS)
            mask = word_mask(
                word, lot.choice(self.fonts), round(lot.randint(*self.word_sizes) * self.scale)
            )
            put("word", lot.choice(list(COLOURS)), word, mask)
        if lot.random() < 0.8:
            index, side = lot.randrange(len(self.labels)), lot.choice((20, 22, 24, 26, 28))
            side = round(side * self.scale)
            mask = np.asarray(Image.fromarray(self.digits[index]).resize((side, side), 3))
            put("digit", lot.choice(list(COLOURS)), str(self.labels[index]), mask)
        for colour, name in self._kinds(lot.randint(3, 6)):
            size = round(math.exp(lot.uniform(math.log(15), math.log(30))) * self.scale)
            put("shape", colour, name, _shape_mask(name, size, lot.choice((-12, 0, 12))))
        for _ in range(lot.randint(*self.clutter)):
            self._paste(canvas, self._clutter(), lot.choice(list(COLOURS)), boxes)
        pixels = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
        return Scene(Image.fromarray(pixels), things)

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
        canvas = np.broadcast_to(base, (self.side, self.side, 3)).astype(np.float32)
        for cells, strength in ((4, 30.0), (14, 22.0)):
            spots = self.numbers.standard_normal((cells, cells, 3))
            spots = 0.35 * spots + spots.mean(-1, keepdims=True)
            for channel in range(3):
                plane = Image.fromarray(spots[..., channel].astype(np.float32))
                soft = np.asarray(plane.resize((self.side, self.side), Image.Resampling.BILINEAR))
                canvas[..., channel] += soft * self.numbers.uniform(0, strength)
        grain = self.numbers.standard_normal((self.side, self.side, 1)) * self.numbers.uniform(
            0, 14
        )
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
            x = self.random.randint(0, self.side - width)
            y = self.random.randint(0, self.side - height)
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
        side = round(side * self.scale)
        return np.asarray(image.resize((side, side), Image.Resampling.BOX))


# --- Questions ----------------------------------------------------------------------------------

Asked = tuple[str, str, tuple[Mention, ...]] | None
"""Question, answer and mentions; None where the scene has no such question."""


def _absent(scene: Scene, negatives: str) -> list[tuple[str, str]]:
    """Colours and shapes that are not there together, in POPE's three kinds."""
    there = {(shape.colour, shape.name) for shape in scene.shapes}
    colours, shapes = {c for c, _ in there}, {s for _, s in there}
    absent = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in there]
    if negatives == "popular":
        return [(c, s) for c, s in absent if (c in colours) != (s in shapes)]
    if negatives == "adversarial":
        return [(c, s) for c, s in absent if c in colours and s in shapes]
    return absent


def _existence(negatives: str) -> Callable[[Scene, random.Random], Asked]:
    def ask(scene: Scene, lot: random.Random) -> Asked:
        absent = _absent(scene, negatives)
        if not scene.shapes or not absent:
            return None
        present = lot.random() < 0.5
        some = lot.choice(scene.shapes)
        colour, shape = (some.colour, some.name) if present else lot.choice(absent)
        mention = Mention(4, scene.where(colour=colour, name=shape))
        return f"is there a {colour} {shape} ?", "yes" if present else "no", (mention,)

    return ask


def _colour(scene: Scene, lot: random.Random) -> Asked:
    single = [shape for shape in scene.shapes if len(scene.where(name=shape.name)) == 1]
    if not single:
        return None
    shape = lot.choice(single)
    mention = Mention(4, scene.where(name=shape.name))
    return f"what color is the {shape.name} ?", shape.colour, (mention,)


def _shape(scene: Scene, lot: random.Random) -> Asked:
    single = [shape for shape in scene.shapes if len(scene.where(colour=shape.colour)) == 1]
    if not single:
        return None
    shape = lot.choice(single)
    mention = Mention(5, scene.where(colour=shape.colour))
    return f"what shape is the {shape.colour} object ?", shape.name, (mention,)


def _count(scene: Scene, lot: random.Random) -> Asked:
    by_shape = lot.random() < 0.65
    there = [shape.name if by_shape else shape.colour for shape in scene.shapes]
    every = list(SHAPES if by_shape else COLOURS)
    thing = lot.choice(there if there and lot.random() < 0.85 else every)
    if by_shape:
        mention = Mention(2, scene.where(name=thing))
        return f"how many {PLURALS[thing]} are there ?", str(len(mention.things)), (mention,)
    mention = Mention(3, scene.where(colour=thing))
    return f"how many {thing} object are there ?", str(len(mention.things)), (mention,)


def _reading(scene: Scene, _: random.Random) -> Asked:
    found = scene.where("word")
    if not found:
        return None
    return "what word is printed ?", scene.things[found[0]].name, (Mention(3, found),)


def _digit(scene: Scene, _: random.Random) -> Asked:
    found = scene.where("digit")
    if not found:
        return None
    return "what digit is written ?", scene.things[found[0]].name, (Mention(3, found),)


def _relation(scene: Scene, lot: random.Random) -> Asked:
    single = [
        shape
        for shape in scene.shapes
        if len(scene.where(colour=shape.colour, name=shape.name)) == 1
    ]
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
    if abs(far) < 16 / SIZE * scene.image.width:  # too close to call
        return None
    question = f"is the {one.colour} {one.name} {word} the {other.colour} {other.name} ?"
    mentions = (
        Mention(3, scene.where(colour=one.colour, name=one.name)),
        Mention(len(question.split()) - 2, scene.where(colour=other.colour, name=other.name)),
    )
    return question, "yes" if far > 0 else "no", mentions


def _corner(scene: Scene, lot: random.Random) -> Asked:
    inside: list[list[int]] = [[], [], [], []]
    middle = scene.image.width / 2
    for index in scene.where():
        thing = scene.things[index]
        inside[2 * (thing.y > middle) + (thing.x > middle)].append(index)
    single = [corner for corner in range(4) if len(inside[corner]) == 1]
    if not single:
        return None
    corner = lot.choice(single)
    shape = scene.things[inside[corner][0]].name
    mention = Mention(6, tuple(inside[corner]))
    return f"what shape is in the {CORNERS[corner]} ?", shape, (mention,)


def _choice(scene: Scene, lot: random.Random) -> Asked:
    absent = _absent(scene, lot.choice(("popular", "adversarial")))
    if not scene.shapes or len(absent) < 3:
        return None
    right = lot.choice(scene.shapes)
    options = [(right.colour, right.name), *lot.sample(absent, 3)]
    lot.shuffle(options)
    listed = " ".join(f"{x} {c} {s}" for x, (c, s) in zip(LETTERS, options, strict=True))
    mentions = tuple(
        Mention(7 + 3 * index, scene.where(colour=colour, name=shape))
        for index, (colour, shape) in enumerate(options)
    )
    answer = LETTERS[options.index((right.colour, right.name))]
    return f"which object is there ? {listed}", answer, mentions


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
    "choice": _choice,
}


# --- Masks --------------------------------------------------------------------------------------


@cache
def _digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """scikit-learn's handwritten digits, 8 x 8, and what they are."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return np.clip(data.images * 16, 0, 255).astype(np.uint8), data.target


@cache
def word_mask(word: str, font: str, size: int) -> NDArray[np.uint8]:
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
