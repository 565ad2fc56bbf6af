# SPDX-License-Identifier: Apache-2.0
"""Reduces on the output of a tower that takes images as they come: Qwen2-VL, 2.5-VL and 3-VL.

The tower is vLLM's and runs as it does there, images of all shapes in one sequence of patches; a
square of patches is merged into one visual token. What methods look at are the queries and keys of
its last layer in which all patches of an image see each other: a hook takes them before any
attention kernel is chosen. Works by the names of the tower's parts and imports nothing of vLLM.

A video is there as its frames, one behind another, of which the tower makes one of two. They see
nothing of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vllm_ficoco.methods import Evidence, Tokens
from vllm_ficoco.methods.paradigm import on_device
from vllm_ficoco.preview import Follower
from vllm_ficoco.settings import Reduction
from vllm_ficoco.vision.frames import reduce_frames
from vllm_ficoco.vision.geometry import PartPlan
from vllm_ficoco.vision.layout import Layout
from vllm_ficoco.vision.tower import Timer, no_timer, rows


class Kind(NamedTuple):
    """Images, or videos, that can be reduced together."""

    reduction: Reduction
    layout: Layout
    plans: tuple[PartPlan, ...]
    """Of the image, or of the video's frames."""
    follower: Follower | None = None
    """Of an image that somebody follows."""


class NativeTower:
    """A tower whose output is reduced.

    Args:
        visual: vLLM's tower: ``blocks``, and for Qwen2.5-VL ``fullatt_block_indexes`` and
            ``get_window_index_thw``.
        sum_over_ranks: adds a tensor up over the ranks that share the heads of the tower.
        timer: measures what the reduction costs.
    """

    def __init__(
        self, visual: nn.Module, sum_over_ranks: Callable[[Tensor], Tensor], timer: Timer = no_timer
    ) -> None:
        self.visual: Any = visual
        self.sum_over_ranks = sum_over_ranks
        self.timer = timer
        self.unit = self.visual.spatial_merge_size**2
        # In the other layers of Qwen2.5-VL patches see no more than their window.
        seeing_all = getattr(visual, "fullatt_block_indexes", (len(self.visual.blocks) - 1,))
        self.attention = self.visual.blocks[max(seeing_all)].attn
        self.attention.attn.register_forward_pre_hook(self._take, with_kwargs=True)
        self._watching = False
        self._taken: tuple[Tensor, Tensor] | None = None
        # Of an image's grid, where in the tower's order its tokens in raster order are.
        self._order = lru_cache(maxsize=256)(self._find_order)

    def _take(self, _: nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
        if self._watching:
            self._taken = kwargs["query"][0], kwargs["key"][0]

    @contextmanager
    def watching(self, watch: bool) -> Iterator[None]:
        """Inside of it, the tower's queries and keys are kept for :meth:`reduce`, if asked for."""
        self._watching = watch
        try:
            yield
        finally:
            self._watching, self._taken = False, None

    def reduce(
        self,
        embeddings: Sequence[Tensor],
        pixels: Sequence[Tensor],
        kinds: Sequence[Kind | None],
        questions: Tensor | None = None,
    ) -> list[tuple[Tensor, Tensor | None]]:
        """What is left of images, or videos, that the tower has just run on.

        Args:
            embeddings: of every one (n, D), frame after frame in raster order.
            pixels: of every one (patches, values).
            kinds: what is to be done with each; None for one that stays whole.
            questions: (items, C) of each, where a method asks; see :attr:`Evidence.question`.

        Returns:
            Of every one (kept, D) and (kept,) places in that order; None for a whole one.
        """
        outputs: list[tuple[Tensor, Tensor | None]] = [(e, None) for e in embeddings]
        alike: dict[Kind, list[int]] = {}
        for item, kind in enumerate(kinds):
            if kind is not None:
                alike.setdefault(kind, []).append(item)
        starts = [0]
        for embedded in embeddings:
            starts.append(starts[-1] + len(embedded) * self.unit)
        for (reduction, layout, plans, follower), items in alike.items():
            frames, each = layout.inputs, layout.grid[0] * layout.grid[1] * self.unit
            with self.timer(reduction.method):
                hidden = _together([embeddings[i] for i in items])
                evidence = self._evidence(
                    layout.grid,
                    [starts[i] + frame * each for i in items for frame in range(frames)],
                    _together([pixels[i] for i in items]).unflatten(1, (frames, -1)).flatten(0, 1),
                    rows(questions, [i for i in items for _ in range(frames)])
                    if questions is not None
                    else None,
                )
                if layout.is_video:
                    left = reduce_frames(hidden, evidence, reduction, layout, plans)
                else:
                    tokens, options = Tokens.of(hidden), reduction.parsed_options()
                    fates: list[Tensor] | None = None if follower is None else []
                    kept = reduction.spec.reduce(tokens, evidence, plans[0].keep, options, fates)
                    left = kept.hidden, kept.position
                    if follower is not None and fates is not None:
                        last = len(self.visual.blocks) - 1
                        seen = tokens.position[0], fates, kept.position[0]
                        follower.note("output", last, *seen)
            for item, hidden, place in zip(items, *left, strict=True):
                outputs[item] = (hidden, place)
        return outputs

    def _evidence(
        self,
        grid: tuple[int, int],
        starts: Sequence[int],
        pixels: Tensor,
        questions: Tensor | None,
    ) -> Evidence:
        """What is to be seen of B images, or frames, of one grid.

        Args:
            grid: rows and columns of tokens.
            starts: where in the sequence of patches the images begin.
            pixels: (B, patches, values).
            questions: (B, C), where a method asks.
        """
        if self._taken is None:  # no method among them asks for it
            nothing = pixels.new_empty(len(starts), 0, 0, 0)
            query = key = nothing
        else:
            query, key = (self._of_images(x, grid, starts) for x in self._taken)
        split: dict[str, Any] = {}
        if self.attention.tp_size > 1:
            split["sum_over_ranks"] = self.sum_over_ranks
        return Evidence(
            query=query,
            key=key,
            scale=query.shape[-1] ** -0.5 if query.numel() else 1.0,
            grid=grid,
            has_cls=False,
            pixels=pixels,
            heads=self.attention.num_attention_heads_per_partition * self.attention.tp_size,
            unit=self.unit,
            question=questions,
            # Behind a token for the decoder's input stand those of deepstack.
            project=lambda x: x if questions is None else x[..., : questions.shape[1]],
            **split,
        )

    def _of_images(self, x: Tensor, grid: tuple[int, int], starts: Sequence[int]) -> Tensor:
        """(B, heads, patches, d): of images, the patches of a token side by side, in raster order.

        Args:
            x: (patches, heads, d) of all images, in the tower's order.
            grid: rows and columns of tokens.
            starts: where the images begin, ascending.
        """
        order = self._order(grid, x.device)
        count = grid[0] * grid[1] * self.unit
        if starts[-1] - starts[0] == (len(starts) - 1) * count:  # frames of one video: no copy
            images = x[starts[0] : starts[-1] + count].unflatten(0, (-1, count))
        else:
            images = _together([x[start : start + count] for start in starts])
        if order is not None:
            images = images.unflatten(1, (-1, self.unit))[:, order].flatten(1, 2)
        return images.transpose(1, 2)

    def _find_order(self, grid: tuple[int, int], device: torch.device) -> Tensor | None:
        if not hasattr(self.visual, "get_window_index_thw"):
            return None
        side = self.visual.spatial_merge_size
        index, _ = self.visual.get_window_index_thw(1, grid[0] * side, grid[1] * side)
        return on_device(index.cpu().argsort().tolist(), device)


def _together(images: list[Tensor]) -> Tensor:
    """(B, ...): of one image, which can be large, no copy."""
    return images[0][None] if len(images) == 1 else torch.stack(images)
