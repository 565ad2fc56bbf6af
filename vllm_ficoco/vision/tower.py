# SPDX-License-Identifier: Apache-2.0
"""Runs a vision tower layer by layer, so that a method can take tokens out on the way.

Works on vLLM's CLIP and SigLIP towers by the names of their parts, which Hugging Face's share; it
imports neither. Layers at which nothing is reduced run the tower's own code. A layer at which a
method looks or reduces is spelled out here: attention, reduction, MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vllm_ficoco.methods import Evidence, Tokens
from vllm_ficoco.methods.paradigm import on_device
from vllm_ficoco.methods.parts import Parts
from vllm_ficoco.preview import Follower
from vllm_ficoco.schedule import Stage
from vllm_ficoco.settings import Reduction
from vllm_ficoco.vision.geometry import Geometry, PartPlan
from vllm_ficoco.vision.layout import Layout, Window

Timer = Callable[[str], AbstractContextManager[None]]
"""Times the reduction part of a stage; given the method's name."""


def no_timer(_: str) -> AbstractContextManager[None]:
    """Times nothing."""
    return nullcontext()


class Input(NamedTuple):
    """What is to be done with one input of the tower: an image, a thumbnail or a tile."""

    reduction: Reduction
    """The settings of its image."""
    window: Window
    """What of the grid may stay."""
    stages: tuple[Stage, ...]
    """Where the others leave; none where all of the window stays."""
    follower: Follower | None = None
    """Of an image that somebody follows; places are those of the window."""


class ReducingTower:
    """A vision tower that returns as many tokens of each input as it is told to.

    Args:
        vision_model: the tower: ``embeddings``, ``encoder.layers``, and for CLIP
            ``pre_layrnorm`` (Hugging Face's spelling).
        geometry: of the checkpoint.
        sum_over_ranks: adds a tensor up over the ranks that share the heads of the tower.
        timer: measures what the reduction costs.
        project: what the model does with tokens of the tower before its decoder gets them.
    """

    def __init__(
        self,
        vision_model: nn.Module,
        geometry: Geometry,
        sum_over_ranks: Callable[[Tensor], Tensor],
        timer: Timer = no_timer,
        project: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        self.vision_model = vision_model
        self.geometry = geometry
        self.sum_over_ranks = sum_over_ranks
        self.timer = timer
        self.project = project

    def __call__(
        self, pixels: Tensor, inputs: Sequence[Input], questions: Tensor | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """What is left of every input, (kept, D), before the projector, and its places.

        Alike inputs run as one batch; all share the layers before the first one at which their
        settings tell them apart.

        Args:
            pixels: (B, 3, height, width).
            inputs: what is to be done with each.
            questions: (B, C) of each, where a method asks; see :attr:`Evidence.question`.

        Returns:
            Of every input (kept, D) and (kept,) places in its window, in raster order.
        """
        groups: dict[Input, list[int]] = {}
        for number, each in enumerate(inputs):
            groups.setdefault(each, []).append(number)
        outputs: list[tuple[Tensor, Tensor]] = [(pixels, pixels)] * len(inputs)
        hidden, waiting, at = self._embed(pixels), list(range(len(inputs))), 0
        for each in sorted(groups, key=self._first_layer):
            first = self._first_layer(each)
            hidden = self._run(hidden, range(at, first))
            at = first
            numbers = groups[each]
            index = [waiting.index(number) for number in numbers]
            asked = rows(questions, numbers) if questions is not None else None
            reduced = self._reduce(rows(hidden, index), rows(pixels, numbers), each, asked)
            for number, *tokens in zip(numbers, reduced.hidden, reduced.position, strict=True):
                outputs[number] = tuple(tokens)
            left = [i for i in range(len(waiting)) if i not in index]
            if not left:
                break
            hidden, waiting = rows(hidden, left), [waiting[i] for i in left]
        return outputs

    def _first_layer(self, each: Input) -> int:
        return each.stages[0].layer if each.stages else self.geometry.layers

    def across(
        self,
        pixels: Tensor,
        reduction: Reduction,
        layout: Layout,
        plans: Sequence[PartPlan],
        at_once: int,
        follower: Follower | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What is left of an image of which a method compares the parts with each other.

        Args:
            pixels: (P, 3, height, width), thumbnail and tiles.
            reduction: the image's settings.
            layout: the image's.
            plans: how many tokens its parts keep; of the tiles only the sum counts.
            at_once: how many of them the tower may run together.
            follower: of the image; places are counted part after part.

        Returns:
            (kept, D) before the projector, and (kept,) places, counted part after part.
        """
        method, options = reduction.spec, reduction.parsed_options()
        across, first = method.across, int(self.geometry.has_cls)
        assert across is not None
        looks = across.layers(self.geometry.layers, options)
        outputs: list[Tensor] = []
        seen: dict[int, list[tuple[Tensor, Tensor]]] = {i: [] for i in looks}
        for part in pixels.split(at_once):
            hidden = self._embed(part)
            for i in range(self.geometry.layers):
                layer = self.vision_model.encoder.layers[i]
                if i not in seen:
                    hidden = self._run(hidden, range(i, i + 1))
                    continue
                hidden, *heads = self._see(layer, hidden)
                seen[i].append((heads[0], heads[1]))
            outputs.append(hidden[:, first:])
        with self.timer(method.name):
            evidence = []
            for i in looks:
                query, key = (torch.cat(heads) for heads in zip(*seen[i], strict=True))
                layer = self.vision_model.encoder.layers[i]
                evidence.append(self._evidence(layer, query, key, pixels, layout.parts[0]))
            thumbnail = sum(plan.keep for plan in plans if plan.part == 0)
            tiles = sum(plan.keep for plan in plans) - thumbnail
            parts = Parts(layout=layout, evidence=tuple(evidence))
            (place,) = across.choose(parts, thumbnail, tiles, options)
            if follower is not None:
                every = torch.arange(parts.places * layout.inputs, device=place.device)
                follower.note("output", self.geometry.layers - 1, every, [], place)
            return torch.cat(outputs).flatten(0, 1)[place], place

    def frames(
        self,
        pixels: Tensor,
        pooled: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],
        at_once: int,
    ) -> tuple[Tensor, Evidence]:
        """The tokens of a video's frames, and what its methods may look at.

        Args:
            pixels: (F, 3, height, width).
            pooled: of frames' hidden states (f, patches, D), queries and keys (f, H, m, d), tokens
                (f, n, ...) and what they have of queries and keys, as :class:`Evidence` wants them.
            at_once: how many frames the tower may run together.

        Returns:
            (F, n, ...), and the evidence of F frames; of which ``grid`` and ``unit`` say nothing
            yet.
        """
        last, first = self.geometry.layers - 1, int(self.geometry.has_cls)
        layer, seen = self.vision_model.encoder.layers[last], []
        for some in pixels.split(at_once):
            hidden = self._run(self._embed(some), range(last))
            hidden, *heads = self._see(layer, hidden)
            seen.append(pooled(hidden[:, first:], *heads))
        tokens, query, key = (torch.cat(parts) for parts in zip(*seen, strict=True))
        return tokens, self._evidence(layer, query, key, pixels, Window(0, 0, *self.geometry.grid))

    def _embed(self, pixels: Tensor) -> Tensor:
        hidden = self.vision_model.embeddings(pixels)
        if hasattr(self.vision_model, "pre_layrnorm"):
            hidden = self.vision_model.pre_layrnorm(hidden)
        return hidden

    def _run(self, hidden: Tensor, layers: range) -> Tensor:
        """The tower's own layers; CLIP's return a tensor, SigLIP's a tuple."""
        for i in layers:
            output = self.vision_model.encoder.layers[i](hidden)
            hidden = output[0] if isinstance(output, tuple) else output
        return hidden

    def _reduce(
        self, hidden: Tensor, pixels: Tensor, each: Input, questions: Tensor | None
    ) -> Tokens:
        """One group, from the first layer of its stages to the end.

        Args:
            hidden: (B, m, D) input of that layer, [CLS] first if the tower has it.
            pixels: of the same inputs.
            each: what is to be done with them.
            questions: theirs.

        Returns:
            Those that stay.
        """
        method, options = each.reduction.spec, each.reduction.parsed_options()
        keep_after = dict(each.stages)
        first = int(self.geometry.has_cls)
        tokens = Tokens.of(hidden[:, first:])
        for i in range(self._first_layer(each), self.geometry.layers):
            proportional = method.proportional_attention and len(tokens) < self.geometry.tokens
            if i not in keep_after and not proportional:
                hidden = self._run(hidden, range(i, i + 1))
                tokens = tokens.with_hidden(hidden[:, first:])
                continue
            layer = self.vision_model.encoder.layers[i]
            size = tokens.size if proportional else None
            hidden, query, key = self._attend(layer, hidden, size)
            if i not in keep_after:
                hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
                tokens = tokens.with_hidden(hidden[:, first:])
                continue
            if method.place == "output":
                hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
                # It is the last layer: what is padding need not be there any more.
                hidden, query, key = (self._within(x, each.window) for x in (hidden, query, key))
                tokens = Tokens.of(hidden[:, first:])
            fates: list[Tensor] | None = None if each.follower is None else []
            with self.timer(method.name):
                evidence = self._evidence(layer, query, key, pixels, each.window, questions)
                tokens, before = tokens.with_hidden(hidden[:, first:]), tokens.position
                tokens = method.reduce(tokens, evidence, keep_after[i], options, fates)
                hidden = torch.cat([hidden[:, :first], tokens.hidden], 1)
            if each.follower is not None and fates is not None:
                where = "tower" if method.place == "tower" else "output"
                each.follower.note(where, i, before[0], fates, tokens.position[0])
            if method.place == "tower":
                hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
                tokens = tokens.with_hidden(hidden[:, first:])
        if not each.stages:
            tokens = Tokens.of(self._within(hidden, each.window)[:, first:])
        return tokens

    def _within(self, x: Tensor, window: Window) -> Tensor:
        """(..., m, D) cut to [CLS] and a window of the grid."""
        if window.tokens == self.geometry.tokens:
            return x
        first = int(self.geometry.has_cls)
        grid = x[..., first:, :].unflatten(-2, self.geometry.grid)
        grid = grid.narrow(-3, window.top, window.rows).narrow(-2, window.left, window.columns)
        return torch.cat([x[..., :first, :], grid.flatten(-3, -2)], -2)

    def _attend(
        self, layer: nn.Module, hidden: Tensor, size: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The attention half of a layer, residual included, and its queries and keys.

        Args:
            layer: of the tower.
            hidden: (B, m, D).
            size: (B, n) sizes for proportional attention (ToMe, eq. 1), [CLS] counting once.

        Returns:
            hidden (B, m, D), query and key (B, H, m, d) with this rank's heads.
        """
        attention = layer.self_attn
        qkv, _ = attention.qkv_proj(layer.layer_norm1(hidden))
        flat = qkv.chunk(3, dim=-1)
        query, key, value = (
            x.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for x in flat
        )
        if size is None:
            mixed = attention.attn(*flat)
        else:
            bias = torch.nn.functional.pad(size.log(), (int(self.geometry.has_cls), 0))
            mixed = nn.functional.scaled_dot_product_attention(
                query, key, value, bias[:, None, None].to(query.dtype), scale=attention.scale
            )
            mixed = mixed.transpose(1, 2).flatten(2)
        output, _ = attention.out_proj(mixed)
        return hidden + output, query, key

    def _see(self, layer: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A whole layer in which no token leaves, and its queries and keys, as :meth:`_attend`."""
        hidden, query, key = self._attend(layer, hidden, None)
        return hidden + layer.mlp(layer.layer_norm2(hidden)), query, key

    def _evidence(
        self,
        layer: nn.Module,
        query: Tensor,
        key: Tensor,
        pixels: Tensor,
        window: Window,
        questions: Tensor | None = None,
    ) -> Evidence:
        attention = layer.self_attn
        split: dict[str, Any] = {}
        if attention.tp_size > 1:  # else the tower is whole, or replicated, on every rank
            split["sum_over_ranks"] = self.sum_over_ranks
        return Evidence(
            query=query,
            key=key,
            scale=attention.scale,
            grid=(window.rows, window.columns),
            has_cls=self.geometry.has_cls,
            pixels=pixels,
            heads=attention.num_heads,
            question=questions,
            project=self.project,
            **split,
        )


def rows(x: Tensor, index: list[int]) -> Tensor:
    """Rows of x by a list on the host; no copy, and no transfer, where they are a run."""
    first = index[0] if index else 0
    if index == list(range(first, first + len(index))):
        return x[first : first + len(index)]
    return x[on_device(index, x.device)]
