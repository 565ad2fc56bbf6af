# SPDX-License-Identifier: Apache-2.0
"""Scenes as batches of tensors to train on: pixels, what each patch shows, questions packed.

Shapes: B images, N patches, M things at most on an image, L words of packed questions.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vllm_ficoco.tiny_llava.scenes import (
    COLOURS,
    SHAPES,
    TASKS,
    WORDS,
    Question,
    Scene,
    SceneMaker,
    Thing,
)

PATCH = 14
"""Side of a patch in pixels."""
THINGS = 8
"""Most things on an image: a word, a digit and six shapes."""
PACKED = 112
"""Words of all questions to one image together."""
PHRASES: tuple[str, ...] = (
    *(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES),
    *map(str, range(10)),
    *WORDS,
)
"""What a thing can be: a colour and a shape, a digit, or a word."""
NOTHING = -100
"""Label that a loss leaves out."""
CELLS = 7
"""A patch's silhouette is this many cells high and wide."""

OFTEN = {
    **dict.fromkeys(("existence-random", "existence-popular", "existence-adversarial"), 0.4),
    **{"choice": 0.3, "colour": 0.6, "shape": 0.6},
    **{"relation": 4.0, "corner": 2.0, "count": 2.0, "reading": 1.5},
}
"""How often a task is asked about in training; once where it is not named. More where more is to
learn."""

_NUMBER = {phrase: number for number, phrase in enumerate(PHRASES)}


def phrase_of(thing: Thing) -> int:
    """Number of a thing's phrase."""
    return _NUMBER[f"{thing.colour} {thing.name}" if thing.kind == "shape" else thing.name]


@dataclass
class Lesson:
    """A batch."""

    pixels: Tensor
    """(B, 3, S, S), uint8."""
    present: Tensor
    """(B, phrases): how often each is there."""
    silhouette: Tensor
    """(B, N, CELLS²): share of each cell that things cover."""
    patch_phrase: Tensor
    """(B, N): number of the phrase shown, ``len(PHRASES)`` for background, or ``NOTHING``."""
    centre: Tensor
    """(B, N), bool: a thing's centre lies in the patch."""
    covers: Tensor
    """(B, M, N): share of the patch that each thing covers."""
    thing_phrase: Tensor
    """(B, M)."""
    thing_place: Tensor
    """(B, M, 2): centre, x and y as shares of the image."""
    words: Tensor
    """(B, L): all questions and answers, one after the other."""
    segment: Tensor
    """(B, L): number of the question, from 1; -1 for padding."""
    offset: Tensor
    """(B, L): number of the word within its question."""
    target: Tensor
    """(B, L): the word that follows, where it belongs to the answer; else ``NOTHING``."""
    task: Tensor
    """(B, L): number of the task where the answer starts; else -1."""
    mention: Tensor
    """(m, 2): image and word of every mention of things."""
    mentioned: Tensor
    """(m, M), bool: which things."""

    def to(self, device: torch.device) -> Lesson:
        """The same, on a device."""
        return Lesson(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))


class Lessons(Dataset[Lesson]):
    """Batches by number, each from its own seed: a run that goes on needs only its step.

    Args:
        vocabulary: number of every word.
        count: how many batches there are.
        batch: images in one.
        grid: patches along an image's side.
        seed: of all.
        test: draw from the held-out digits.
        every_task: one question of each task, as in the evaluation; else tasks at random.
    """

    def __init__(
        self,
        vocabulary: dict[str, int],
        count: int,
        batch: int,
        grid: int,
        seed: int,
        test: bool = False,
        every_task: bool = False,
    ) -> None:
        self.vocabulary, self.count, self.batch, self.grid = vocabulary, count, batch, grid
        self.seed, self.test, self.every_task = seed, test, every_task

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Lesson:
        if number >= self.count:
            raise IndexError(number)
        maker = SceneMaker(self.seed + number, self.test, self.grid * PATCH)
        scenes = [maker.scene() for _ in range(self.batch)]
        if self.every_task:
            asked = [list(maker.questions(scene)) for scene in scenes]
        else:
            asked = [_ask_at_random(scene, maker.random) for scene in scenes]
        return make_lesson(scenes, asked, self.vocabulary, self.grid)


def _ask_at_random(scene: Scene, lot: random.Random) -> list[Question]:
    """More than enough different questions; :func:`make_lesson` takes what fits."""
    asked: dict[str, Question] = {}
    for task in lot.choices(list(TASKS), [OFTEN.get(task, 1.0) for task in TASKS], k=40):
        found = TASKS[task](scene, lot)
        if found is not None:
            asked.setdefault(found[0], Question(task, *found))
    return list(asked.values())


def make_lesson(
    scenes: list[Scene], asked: list[list[Question]], vocabulary: dict[str, int], grid: int
) -> Lesson:
    """Scenes and questions to them as tensors."""
    batch, patches = len(scenes), grid * grid
    pixels = np.stack([np.asarray(scene.image) for scene in scenes]).transpose(0, 3, 1, 2)
    present = torch.zeros(batch, len(PHRASES))
    cells = np.zeros((batch, grid, grid, CELLS, CELLS), np.float32)
    covers = np.zeros((batch, THINGS, patches), np.float32)
    centre = torch.zeros(batch, patches, dtype=torch.bool)
    thing_phrase = torch.full((batch, THINGS), NOTHING)
    thing_place = torch.zeros(batch, THINGS, 2)
    side, step = grid * PATCH, PATCH // CELLS
    for row, scene in enumerate(scenes):
        total = np.zeros((side, side), np.float32)
        for number, thing in enumerate(scene.things):
            height, width = thing.mask.shape
            top, left = round(thing.y - height / 2), round(thing.x - width / 2)
            layer = np.zeros((side, side), np.float32)
            layer[top : top + height, left : left + width] = thing.mask / 255
            total += layer
            by_patch = layer.reshape(grid, PATCH, grid, PATCH).mean((1, 3))
            covers[row, number] = by_patch.reshape(patches)
            centre[row, int(thing.y // PATCH) * grid + int(thing.x // PATCH)] = True
            phrase = phrase_of(thing)
            present[row, phrase] += 1
            thing_phrase[row, number] = phrase
            thing_place[row, number] = torch.tensor((thing.x / side, thing.y / side))
        by_cell = total.reshape(grid, CELLS, step, grid, CELLS, step).mean((2, 5))
        cells[row] = by_cell.transpose(0, 2, 1, 3)
    by_thing = torch.from_numpy(covers)
    most, which = by_thing.max(1)
    patch_phrase = thing_phrase.gather(1, which)
    patch_phrase[most < 0.10] = NOTHING  # too little to tell by
    patch_phrase[most < 0.02] = len(PHRASES)
    packed = torch.full((5, batch, PACKED), -1)
    words, segment, offset, target, task_of = packed
    words.fill_(vocabulary["<pad>"])
    offset.fill_(0)
    target.fill_(NOTHING)
    tasks = list(TASKS)
    mention, mentioned = [], []
    for row, questions in enumerate(asked):
        start = 0
        for number, (task, text, answer, mentions) in enumerate(questions, 1):
            question = [vocabulary[word] for word in (*text.split(), "ASSISTANT:")]
            reply = [vocabulary[word] for word in (*answer.split(), "</s>")]
            end = start + len(question) + len(reply) - 1
            if end > PACKED:
                continue
            words[row, start:end] = torch.tensor(question + reply[:-1])
            segment[row, start:end] = number
            offset[row, start:end] = torch.arange(end - start)
            target[row, start + len(question) - 1 : end] = torch.tensor(reply)
            task_of[row, start + len(question) - 1] = tasks.index(task)
            for word, things in mentions:
                mention.append((row, start + word))
                mentioned.append([index in things for index in range(THINGS)])
            start = end
    return Lesson(
        pixels=torch.from_numpy(np.ascontiguousarray(pixels)),
        present=present,
        silhouette=torch.from_numpy(cells.reshape(batch, patches, CELLS**2)),
        patch_phrase=patch_phrase,
        centre=centre,
        covers=by_thing,
        thing_phrase=thing_phrase,
        thing_place=thing_place,
        words=words,
        segment=segment,
        offset=offset,
        target=target,
        task=task_of,
        mention=torch.tensor(mention),
        mentioned=torch.tensor(mentioned),
    )
