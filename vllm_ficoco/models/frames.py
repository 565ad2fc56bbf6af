# SPDX-License-Identifier: Apache-2.0
"""Videos of models that put frames through an image's tower and pool what comes out: LLaVA's.

A frame is a grid of patches for the tower, and a smaller grid of tokens for the decoder. What a
method looks at is pooled likewise (:class:`Pooled`), so that every method that works on the
tower's output sees a frame as it sees an image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import BatchFeature
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models.interfaces import MultiModalEmbeddings

from vllm_ficoco.models.layered import LayeredModel, of_images
from vllm_ficoco.models.processing import ReducingProcessor
from vllm_ficoco.packed import PACKED_FIELDS, Packed, unpack
from vllm_ficoco.vision.frames import reduce_frames
from vllm_ficoco.vision.geometry import PartPlan
from vllm_ficoco.vision.layout import Layout

PIXELS = "pixel_values_videos"
"""vLLM's field: (B, F, 3, height, width), or of every video (F, 3, height, width)."""


class FramesProcessor(ReducingProcessor):
    """Of families whose videos have so many tokens a frame, whatever its size."""

    info: Any
    """vLLM's, which counts a video's tokens."""

    def video_layout(self, frames: int) -> Layout:
        """The layout of a video of so many frames, from vLLM's own arithmetic."""
        any_size = {"image_width": 1, "image_height": 1}
        each = self.info._get_num_frame_tokens(**any_size)
        tokens = self.info.get_num_video_tokens(**any_size, num_frames=frames)
        side = isqrt(each)
        return Layout((side, side), frames=frames, closed=tokens > frames * each)

    def video_layouts(self, processed: BatchFeature) -> Sequence[Layout]:
        """Of what has been processed.

        Raises:
            VLLMValidationError: frames are not what the tower takes, as processor options of the
                request can have it.
        """
        side = self.info.get_vision_encoder_info().get_image_size()
        for video in processed[PIXELS]:
            if tuple(video.shape[-2:]) != (side, side):
                height, width = video.shape[-2:]
                raise VLLMValidationError(
                    f"The frames of a video came to {width} x {height} pixels, where the model "
                    f"takes {side} x {side}: leave out what changes that.",
                    parameter="mm_processor_kwargs",
                )
        return [self.video_layout(len(video)) for video in processed[PIXELS]]

    def check_count(self, whole: int, layout: Layout) -> None:
        """As of images; of a video vLLM counts the frames that came, whatever has become of them.

        Raises:
            VLLMValidationError: options of the request have changed their number.
        """
        if not layout.is_video or whole == layout.tokens:
            return super().check_count(whole, layout)
        raise VLLMValidationError(
            f"A video has {whole} visual tokens, of which processor options have left "
            f"{layout.tokens}: leave out what changes its frames (media_io_kwargs may, which are "
            "followed when its file is read).",
            parameter="mm_processor_kwargs",
        )


class Pooled(NamedTuple):
    """How a model makes tokens of the patches of frames."""

    tokens: Callable[[Tensor], Tensor]
    """(f, patches, D) of the tower -> (f, n, ...)."""
    looks: Callable[[Tensor], Tensor]
    """(f, H, m, d), queries or keys of all patches, [CLS] first where the tower has one -> what
    ``Evidence`` wants of the tokens."""
    unit: int = 1
    """How many patches a token then has there."""
    projected: Callable[[Tensor], Tensor] = lambda tokens: tokens
    """What is still to be done with tokens before the decoder gets them."""


class FramesModel(LayeredModel):
    """The mixin for vLLM's models that show their decoder the frames of videos, pooled."""

    @property
    def pooled(self) -> Pooled:
        """Its own."""
        raise NotImplementedError

    def _video_pixels_to_features(self, vision_tower: torch.nn.Module, pixels: Tensor) -> Tensor:
        """As vLLM's, a bounded number of frames at a time.

        vLLM bounds a batch of videos by the tokens that come out of them, of which a frame has a
        quarter as many as the tower has patches; and a reduced one fewer.
        """
        features: Any = super()._video_pixels_to_features  # type: ignore[misc]
        parts = pixels.split(self.images_at_once)
        return torch.cat([features(vision_tower, part) for part in parts])

    def embed_multimodal(self, **kwargs: object) -> MultiModalEmbeddings:
        """Visual tokens of a batch of images or of videos, possibly of several requests.

        Args:
            **kwargs: the processor's fields of one modality, and its packed field.

        Returns:
            One tensor (kept, hidden size of the decoder) an item.
        """
        packed: Any = kwargs.pop(PACKED_FIELDS["video"], None)
        videos = [] if packed is None else [unpack(p) for p in packed]
        pixels: Any = kwargs.get(PIXELS)
        if not any(video.reduction for video in videos):
            return super().embed_multimodal(**kwargs)
        plans = [self._plans(video) for video in videos]
        whole = [i for i, frames in enumerate(plans) if not frames]
        outputs: dict[int, Tensor] = {}
        if whole:
            unreduced = super().embed_multimodal(**of_images(kwargs, whole))
            outputs.update(zip(whole, unreduced, strict=True))
        questions, numbers = self.embed_questions(videos), None
        for i, (video, frames) in enumerate(zip(videos, plans, strict=True)):
            if frames:
                asked = questions[i] if questions is not None else None
                outputs[i], numbers = self._reduced(video, frames, pixels[i], asked)
            if self.staged_decoder is not None:
                assert video.layout is not None
                outputs[i] = self.staged_decoder.mark(
                    outputs[i],
                    video.reduction,
                    numbers if frames else None,
                    pixels[i][None],
                    video.layout,
                )
        return [outputs[i] for i in range(len(videos))]

    def _plans(self, video: Packed) -> list[PartPlan]:
        if video.reduction is None:
            return []
        return self.geometry.parts(video.reduction, layout=video.layout)

    def _reduced(
        self, video: Packed, plans: list[PartPlan], pixels: Tensor, question: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The tokens that stay of a video, and their numbers.

        Args:
            video: its settings and layout.
            plans: how many tokens its frames keep.
            pixels: (F, 3, height, width).
            question: (C,), see :attr:`Evidence.question`.
        """
        reduction, layout, pooled = video.reduction, video.layout, self.pooled
        assert reduction is not None and layout is not None

        def pool(hidden: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return pooled.tokens(hidden), pooled.looks(query), pooled.looks(key)

        tokens, evidence = self.reducing_tower.frames(pixels, pool, self.images_at_once)
        evidence = replace(
            evidence,
            grid=layout.grid,
            unit=pooled.unit,
            project=pooled.projected,
            question=None if question is None else question.expand(len(pixels), -1),
        )
        with self.reducing_tower.timer(reduction.method):
            every = tokens.flatten(0, 1)[None]
            (kept,), (place,) = reduce_frames(every, evidence, reduction, layout, plans)
        embedded = pooled.projected(kept)
        if layout.closed:
            newline = self.image_newline.to(embedded.dtype)[None]  # type: ignore[attr-defined]
            embedded = torch.cat([embedded, newline])
            place = torch.cat([place, place.new_full((1,), layout.tokens - 1)])
        return embedded, place
