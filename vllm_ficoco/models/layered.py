# SPDX-License-Identifier: Apache-2.0
"""Models whose tower runs layer by layer, so that tokens can leave on the way: CLIP and SigLIP.

Images are one input of the tower, or a thumbnail and tiles.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.models.interfaces import MultiModalEmbeddings
from vllm.model_executor.models.utils import WeightsMapper

from vllm_ficoco.methods.paradigm import on_device
from vllm_ficoco.models.reducing import ReducingModel
from vllm_ficoco.packed import PACKED_FIELD, unpack
from vllm_ficoco.preview import ENTERED, Follower
from vllm_ficoco.settings import Reduction
from vllm_ficoco.vision.geometry import Geometry, PartPlan
from vllm_ficoco.vision.layout import Layout
from vllm_ficoco.vision.tower import Input, ReducingTower, Timer, rows

_PARTS = "embeddings|pre_layrnorm|encoder|post_layernorm|head"
FLAT_TOWER = WeightsMapper(
    orig_to_new_regex={
        re.compile(rf"^(model\.)?vision_tower\.(?=({_PARTS})\.)"): "vision_tower.vision_model."
    }
)
"""Names of a tower's weights as transformers 5 saves them, in terms of published checkpoints': vLLM
knows these alone, and refuses a model that was trained or made with a new transformers."""


class Reduced(NamedTuple):
    """What the tower has left of a part of an image, or of all its parts."""

    hidden: Tensor
    """(k, D) before the projector."""
    number: Tensor
    """(k,) in the sequence of the image, see :meth:`Layout.numbers`."""


class LayeredModel(ReducingModel):
    """The mixin for vLLM's LLaVAs: a tower, a projector, and perhaps newlines.

    A batch in which nothing is reduced takes vLLM's own path; so do, in a mixed batch, the images
    that are not reduced.
    """

    def make_tower(self, geometry: Geometry, timer: Timer) -> ReducingTower:
        return ReducingTower(
            self.vision_tower.vision_model,  # type: ignore[attr-defined]
            geometry,
            tensor_model_parallel_all_reduce,
            timer,
            lambda hidden: self.multi_modal_projector(hidden),  # type: ignore[attr-defined]
        )

    def embed_multimodal(self, **kwargs: object) -> MultiModalEmbeddings:
        """Visual tokens of a batch of images, possibly of several requests.

        Args:
            **kwargs: the processor's fields: ``pixel_values``, (B, 3, height, width), or for every
                image (tiles, 3, height, width), and the packed field of every image.

        Returns:
            One tensor (kept, hidden size of the decoder) an image.
        """
        packed: Any = kwargs.pop(PACKED_FIELD, None)
        images = [] if packed is None else [unpack(p) for p in packed]
        settings = [image.reduction for image in images]
        if not any(settings):
            return super().embed_multimodal(**kwargs)  # type: ignore[misc]
        layouts = [image.layout or self.geometry.layout for image in images]
        plans = [
            self.geometry.parts(reduction, layout=layout) if reduction else []
            for reduction, layout in zip(settings, layouts, strict=True)
        ]
        whole = [i for i, parts in enumerate(plans) if not parts]
        outputs: dict[int, Tensor] = {}
        numbers: dict[int, Tensor] = {}
        if whole:
            unreduced = super().embed_multimodal(**of_images(kwargs, whole))  # type: ignore[misc]
            outputs.update(zip(whole, unreduced, strict=True))
        inputs: Any = kwargs["pixel_values"]
        pixels = [x if x.dim() == 4 else x[None] for x in inputs]
        marks = [image.mark for image in images]
        questions = self.embed_questions(images)
        reduced = self._reduce(pixels, settings, layouts, plans, questions, marks)
        if reduced:
            # One projector call for all images: it works token by token.
            hidden = [part.hidden for parts in reduced.values() for part in parts]
            projected = self.multi_modal_projector(torch.cat(hidden)).split([*map(len, hidden)])  # type: ignore[attr-defined]
            pieces = iter(projected)
            for i, parts in reduced.items():
                embedded = [next(pieces) for _ in parts]
                reduction = settings[i]
                assert reduction is not None
                outputs[i], numbers[i] = self._sequence(embedded, parts, reduction, layouts[i])
                if marks[i]:
                    Follower(marks[i]).note(ENTERED, 0, numbers[i], [], numbers[i])
        if self.staged_decoder is not None:
            for i, (reduction, layout) in enumerate(zip(settings, layouts, strict=True)):
                # A batch may have padded an image with tiles that are not its own.
                own = pixels[i][: layout.inputs]
                outputs[i] = self.staged_decoder.mark(
                    outputs[i], reduction, numbers.get(i), own[None], layout, images[i].mark
                )
        return [outputs[i] for i in range(len(settings))]

    def _reduce(
        self,
        pixels: Sequence[Tensor],
        settings: Sequence[Reduction | None],
        layouts: Sequence[Layout],
        plans: Sequence[list[PartPlan]],
        questions: Tensor | None,
        marks: Sequence[str],
    ) -> dict[int, list[Reduced]]:
        """What the tower leaves of every image that it reduces, part by part."""
        reduced: dict[int, list[Reduced]] = {}
        work: list[tuple[int, PartPlan, Input]] = []
        for i, parts in enumerate(plans):
            reduction, layout = settings[i], layouts[i]
            if reduction is None or not parts:
                continue
            if layout.is_tiled and reduction.spec.across is not None:
                number = partial(_numbers_of, layout)
                chosen = self.reducing_tower.across(
                    pixels[i][: layout.inputs],
                    reduction,
                    layout,
                    parts,
                    self.images_at_once,
                    Follower(marks[i], number=number) if marks[i] else None,
                )
                reduced[i] = [Reduced(chosen[0], number(chosen[1]))]
                continue
            reduced[i] = []
            for plan in parts:
                number = partial(_numbers_in_part, layout, plan)
                follower = Follower(marks[i], plan.part, number) if marks[i] else None
                work.append((i, plan, Input(reduction, plan.window, plan.stages, follower)))
        # Equal settings side by side: they run as one batch.
        work.sort(key=lambda each: each[2].reduction.key)
        for start in range(0, len(work), self.images_at_once):
            now = work[start : start + self.images_at_once]
            batch = torch.stack([pixels[i][plan.part] for i, plan, _ in now])
            # All parts of an image are asked the same.
            asked = rows(questions, [i for i, _, _ in now]) if questions is not None else None
            kept = self.reducing_tower(batch, [each for _, _, each in now], asked)
            for (i, plan, _), (hidden, place) in zip(now, kept, strict=True):
                reduced[i].append(Reduced(hidden, _numbers_in_part(layouts[i], plan, place)))
        return reduced

    def _sequence(
        self,
        embedded: list[Tensor],
        parts: Sequence[Reduced],
        reduction: Reduction,
        layout: Layout,
    ) -> tuple[Tensor, Tensor]:
        """The visual tokens of a reduced image as they enter the decoder, and their numbers.

        Args:
            embedded: (k, D) of every part, behind the projector.
            parts: the same before it.
            reduction: the image's settings.
            layout: the image's.
        """
        if not layout.is_tiled:
            return embedded[0], parts[0].number
        numbers = [part.number for part in parts]
        newlines = self.geometry.newlines_kept(reduction, layout)
        if newlines:
            newline = self.image_newline.to(embedded[0].dtype)  # type: ignore[attr-defined]
            embedded = [*embedded, newline.expand(newlines, -1)]
            numbers.append(on_device(layout.newline_numbers(newlines), newline.device))
        number, order = torch.cat(numbers).sort(stable=True)
        return torch.cat(embedded)[order], number


def of_images(fields: Mapping[str, Any], images: list[int]) -> dict[str, Any]:
    """Some images' part of vLLM's fields: of a tensor, or of a list with one tensor an image."""
    return {
        name: rows(field, images) if isinstance(field, Tensor) else [field[i] for i in images]
        for name, field in fields.items()
    }


def _numbers_in_part(layout: Layout, plan: PartPlan, place: Tensor) -> Tensor:
    """(k,): the numbers of places (k,) in the window of a part."""
    if not layout.is_tiled:
        return place
    window, (first, row) = plan.window, layout.numbers(plan.part)
    down, right = place // window.columns, place % window.columns
    return first + (down + window.top) * row + right + window.left


def _numbers_of(layout: Layout, place: Tensor) -> Tensor:
    """(k,): the numbers of places (k,) that are counted part after part, padding included."""
    each, columns = layout.grid[0] * layout.grid[1], layout.grid[1]
    numbers = [layout.numbers(part) for part in range(layout.inputs)]
    first, row = (on_device([*column], place.device) for column in zip(*numbers, strict=True))
    part, within = place // each, place % each
    return first[part] + within // columns * row[part] + within % columns
