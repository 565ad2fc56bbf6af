# SPDX-License-Identifier: Apache-2.0
"""Runs a vision tower layer by layer, so that a method can take tokens out on the way.

Works on vLLM's CLIP and SigLIP towers by the names of their parts, which Hugging Face's share; it
imports neither. Layers at which nothing is reduced run the tower's own code. A layer at which a
method looks or reduces is spelled out here: attention, reduction, MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from vllm_ficoco.methods import Evidence, Tokens
from vllm_ficoco.settings import Reduction
from vllm_ficoco.vision.geometry import Geometry

Timer = Callable[[str], AbstractContextManager[None]]
"""Times the reduction part of a stage; given the method's name."""


class ReducingTower:
    """A vision tower that returns as many tokens of each image as its settings say.

    Args:
        vision_model: the tower: ``embeddings``, ``encoder.layers``, and for CLIP
            ``pre_layrnorm`` (Hugging Face's spelling).
        geometry: of the checkpoint.
        sum_over_ranks: adds a tensor up over the ranks that share the heads of the tower.
        timer: measures what the reduction costs.
    """

    def __init__(
        self,
        vision_model: nn.Module,
        geometry: Geometry,
        sum_over_ranks: Callable[[Tensor], Tensor],
        timer: Timer = lambda _: nullcontext(),
    ) -> None:
        self.vision_model = vision_model
        self.geometry = geometry
        self.sum_over_ranks = sum_over_ranks
        self.timer = timer

    def __call__(
        self, pixels: Tensor, settings: Sequence[Reduction]
    ) -> list[tuple[Tensor, Tensor]]:
        """Visual tokens of every image, (kept, D), before the projector, and their grid places.

        Images of one setting run as one batch; all images share the layers before the first one
        at which their settings tell them apart.

        Args:
            pixels: (B, 3, height, width).
            settings: one an image, each of which really reduces.
        """
        groups: dict[Reduction, list[int]] = {}
        for image, reduction in enumerate(settings):
            groups.setdefault(reduction, []).append(image)
        outputs: list[tuple[Tensor, Tensor]] = [(pixels, pixels)] * len(settings)
        hidden, waiting, at = self._embed(pixels), list(range(len(settings))), 0
        for reduction in sorted(groups, key=lambda r: self.geometry.stages(r)[0].layer):
            first = self.geometry.stages(reduction)[0].layer
            hidden = self._run(hidden, range(at, first))
            at = first
            images = groups[reduction]
            index = [waiting.index(image) for image in images]
            reduced = self._reduce(rows(hidden, index), rows(pixels, images), reduction)
            for image, *tokens in zip(images, reduced.hidden, reduced.position, strict=True):
                outputs[image] = tuple(tokens)
            left = [i for i in range(len(waiting)) if i not in index]
            hidden, waiting = rows(hidden, left), [waiting[i] for i in left]
        return outputs

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

    def _reduce(self, hidden: Tensor, pixels: Tensor, reduction: Reduction) -> Tokens:
        """One group, from the first layer of its stages to the end.

        Args:
            hidden: (B, m, D) input of that layer, [CLS] first if the tower has it.
            pixels: of the same images.
            reduction: their settings.

        Returns:
            Those that stay.
        """
        method, options = reduction.spec, reduction.parsed_options()
        keep_after = dict(self.geometry.stages(reduction))
        first = int(self.geometry.has_cls)
        tokens = Tokens.of(hidden[:, first:])
        for i in range(min(keep_after), self.geometry.layers):
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
            with self.timer(method.name):
                evidence = self._evidence(layer, query, key, pixels)
                tokens = tokens.with_hidden(hidden[:, first:])
                tokens = method.reduce(tokens, evidence, keep_after[i], options)
                hidden = torch.cat([hidden[:, :first], tokens.hidden], 1)
            if method.place == "tower":
                hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
                tokens = tokens.with_hidden(hidden[:, first:])
        return tokens

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

    def _evidence(self, layer: nn.Module, query: Tensor, key: Tensor, pixels: Tensor) -> Evidence:
        attention = layer.self_attn
        split = attention.tp_size > 1  # else the tower is whole, or replicated, on every rank
        return Evidence(
            query=query,
            key=key,
            scale=attention.scale,
            grid=self.geometry.grid,
            has_cls=self.geometry.has_cls,
            pixels=pixels,
            heads=attention.num_heads,
            **({"sum_over_ranks": self.sum_over_ranks} if split else {}),
        )


def rows(x: Tensor, index: list[int]) -> Tensor:
    """Rows of x by a list on the host; no copy, and no transfer, where they are a run."""
    if index and index == list(range(index[0], index[0] + len(index))):
        return x[index[0] : index[0] + len(index)]
    return x[torch.tensor(index, dtype=torch.long, device="cpu").to(x.device, non_blocking=True)]
