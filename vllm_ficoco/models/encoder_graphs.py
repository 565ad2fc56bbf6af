# SPDX-License-Identifier: Apache-2.0
"""vLLM's CUDA graphs of the encoder (``cudagraph_mm_encoder``), for a tower that reduces.

A reduction launches hundreds of small kernels; a graph launches them at once. vLLM keeps a set of
graphs for each *path* of an encoder, for 1, 2, 4 ... images. Ours are the whole tower, and every
setting that the server declares (:func:`vllm_ficoco.vision.geometry.graphed`). An image takes one
path, so images of a step may have different settings.

Images with other settings take no path. They run as without graphs, all of a step together, and so
do those of methods that no graph can hold (:attr:`Method.fits_a_graph`).

vLLM packs images into graphs by the tokens that come out of them, and captures every path up to
the same largest number. Here that would be graphs of hundreds of images, which no step fills: so
what is counted is what goes in, the same for every image.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from vllm.model_executor.models.interfaces import SupportsEncoderCudaGraph
from vllm.v1.worker.encoder_cudagraph_defs import (
    EncoderCudaGraphCaptureInputs,
    EncoderCudaGraphConfig,
    EncoderCudaGraphPathConfig,
    EncoderCudaGraphReplayBuffers,
    EncoderItemSpec,
)

from vllm_ficoco.models.layered import of_images
from vllm_ficoco.packed import PACKED_FIELD, parse
from vllm_ficoco.settings import Reduction
from vllm_ficoco.vision.geometry import Geometry, graphed
from vllm_ficoco.vision.tower import Input, ReducingTower, no_timer, rows

if TYPE_CHECKING:
    from vllm_ficoco.engine.decoder import StagedDecoder

WHOLE = "whole"
"""The path of images that are not reduced in the tower."""

IMAGES = 8
"""Images of the largest graph."""

PIXELS = "pixel_values"
KNOWN, REST = "known_images", "images_without_a_graph"
"""Beside vLLM's fields of a step's images: what is known of each, and what came of those without a
path, by number."""


class Known(NamedTuple):
    """Of an image."""

    reduction: Reduction | None
    path: str | None
    """None: it has none."""
    kept: int
    """Tokens that come out."""


class EncoderGraphs(SupportsEncoderCudaGraph):
    """The mixin for LLaVA-1.5. It comes last: a Protocol's ``__init__`` calls no other."""

    geometry: Geometry
    config: Any
    images_at_once: int
    staged_decoder: StagedDecoder | None

    @cached_property
    def _declared(self) -> dict[str, Reduction]:
        return graphed(self.config, self.geometry)

    @cached_property
    def _graphed_tower(self) -> ReducingTower:
        """The same without a timer: events in a graph would tell nobody when it ran."""
        tower: ReducingTower = self.make_tower(self.geometry, no_timer)
        return tower

    @property
    def _shape(self) -> tuple[int, int, int]:
        vision = self.config.vision_config
        return vision.num_channels, vision.image_size, vision.image_size

    def _images(self, mm_kwargs: dict[str, Any]) -> list[Known]:
        """What is known of every image; found once."""
        if KNOWN not in mm_kwargs:
            (count,) = {len(field) for field in mm_kwargs.values()}
            packed, pixels = mm_kwargs.get(PACKED_FIELD), mm_kwargs.get(PIXELS)
            said = [b""] * count if packed is None else [p.numpy().tobytes() for p in packed]
            images = [self._known(each) for each in said]
            if not isinstance(pixels, Tensor) or pixels.shape[1:] != self._shape:
                # vLLM's own code knows what to do with them.
                images = [image._replace(path=None) for image in images]
            mm_kwargs[KNOWN] = images
        known: list[Known] = mm_kwargs[KNOWN]
        return known

    @cached_property
    def _known(self) -> Callable[[bytes], Known]:
        """By what an image's field says: settings are read, counted and compared once."""
        paths = {reduction: name for name, reduction in self._declared.items()}

        @lru_cache(maxsize=4096)
        def known(said: bytes) -> Known:
            packed = parse(said)
            reduction = packed.reduction
            reduced = reduction is not None and self.geometry.parts(reduction)
            path = paths.get(reduction) if reduction and reduced else WHOLE
            path = None if packed.mark else path  # a graph notes nothing
            return Known(reduction, path, self.geometry.kept(reduction))

        return known

    def get_encoder_cudagraph_config(self) -> EncoderCudaGraphConfig:
        path = EncoderCudaGraphPathConfig(allow_zero_tokens=True)
        return EncoderCudaGraphConfig(
            modalities=["image"],
            buffer_keys=[PIXELS],
            out_hidden_size=self.config.text_config.hidden_size,
            paths=dict.fromkeys([WHOLE, *self._declared], path),
        )

    def get_encoder_cudagraph_budget_range(self, vllm_config: Any) -> tuple[int, int]:
        """Tokens that go in, of one image and of as many as a graph may have.

        Not more than a step may have: what memory was set aside for.
        """
        tokens = self.geometry.tokens
        return tokens, min(IMAGES, self.images_at_once) * tokens

    def get_encoder_cudagraph_item_specs(self, mm_kwargs: dict[str, Any]) -> list[EncoderItemSpec]:
        """vLLM packs them in the order of tokens that come out: 0 sets those without a path apart,
        so that they take no place in a graph."""
        tokens = self.geometry.tokens
        return [
            EncoderItemSpec(
                input_size=tokens,
                output_tokens=image.kept if image.path else 0,
                path_output_tokens={image.path: tokens} if image.path else {},
            )
            for image in self._images(mm_kwargs)
        ]

    def select_encoder_cudagraph_items(
        self, mm_kwargs: dict[str, Any], indices: list[int]
    ) -> dict[str, Any]:
        """Some images of a step, and what came of those without a path, the first time all run."""
        images = self._images(mm_kwargs)
        fields = {name: mm_kwargs[name] for name in mm_kwargs if name not in (KNOWN, REST)}
        if REST not in mm_kwargs:
            without = [i for i, image in enumerate(images) if image.path is None]
            made: Any = ()
            if without:
                made = self.embed_multimodal(**of_images(fields, without))
            mm_kwargs[REST] = dict(zip(without, made, strict=True))
        ours = {KNOWN: [images[i] for i in indices], REST: mm_kwargs[REST]}
        return of_images(fields, indices) | ours

    def prepare_encoder_cudagraph_capture_inputs(
        self,
        token_budget: int,
        max_batch_size: int,
        max_frames_per_batch: int,
        device: torch.device,
        dtype: torch.dtype,
        path: str = "default",
        axis_keys: tuple[Hashable, ...] | None = None,
    ) -> EncoderCudaGraphCaptureInputs:
        """Images of nothing.

        Raises:
            ValueError: there is no room for one.
        """
        images = token_budget // self.geometry.tokens
        if not images:
            raise ValueError(
                f"encoder_cudagraph_token_budgets has {token_budget}: they must be "
                f"{self.geometry.tokens} or more, the tokens of an image that is not reduced"
            )
        pixels = torch.zeros(images, *self._shape, device=device, dtype=dtype)
        return EncoderCudaGraphCaptureInputs({PIXELS: pixels})

    def prepare_encoder_cudagraph_replay_buffers(
        self,
        mm_kwargs: dict[str, Any],
        max_batch_size: int,
        max_frames_per_batch: int,
        path: str = "default",
    ) -> EncoderCudaGraphReplayBuffers:
        index = [i for i, image in enumerate(self._images(mm_kwargs)) if image.path == path]
        return EncoderCudaGraphReplayBuffers({PIXELS: rows(mm_kwargs[PIXELS], index)})

    def encoder_cudagraph_forward(self, inputs: dict[str, Tensor], path: str = "default") -> Tensor:
        """(images * kept, hidden size of the decoder), all on the same path.

        What is captured, so nothing in it may come from the host or go there.
        """
        pixels = inputs[PIXELS]
        if path == WHOLE:
            embedded: Tensor = self.embed_multimodal(pixel_values=pixels)
            return embedded.flatten(0, 1)
        reduction = self._declared[path]
        (plan,) = self.geometry.parts(reduction)
        each = Input(reduction, plan.window, plan.stages)
        kept = self._graphed_tower(pixels, [each] * len(pixels))
        projected: Tensor = self.multi_modal_projector(torch.cat([hidden for hidden, _ in kept]))
        return projected

    def encoder_eager_forward(self, mm_kwargs: dict[str, Any], path: str = "default") -> Tensor:
        """The same without a graph, of images on a path that are more than it holds."""
        buffers = self.prepare_encoder_cudagraph_replay_buffers(mm_kwargs, 0, 0, path)
        return self.encoder_cudagraph_forward({PIXELS: buffers.values[PIXELS]}, path)

    def postprocess_encoder_output(
        self,
        outputs: dict[str, Tensor],
        indices: list[int],
        per_item_out_tokens: list[int],
        dest: dict[int, Tensor] | list[Tensor | None],
        clone: bool = False,
        batch_mm_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Every image's own tokens, marked for the decoder where it reduces them."""
        assert batch_mm_kwargs is not None
        at = dict.fromkeys(outputs, 0)
        images = self._images(batch_mm_kwargs)
        for place, (index, image) in enumerate(zip(indices, images, strict=True)):
            if image.path is None:
                dest[index] = batch_mm_kwargs[REST][index]
                continue
            first = at[image.path]
            at[image.path] += image.kept
            own = outputs[image.path][first : first + image.kept]
            own = own.clone() if clone else own  # the next replay writes over it
            if self.staged_decoder is not None:
                pixels = batch_mm_kwargs[PIXELS][place][None, None]
                own = self.staged_decoder.mark(
                    own, image.reduction, None, pixels, self.geometry.layout
                )
            dest[index] = own
