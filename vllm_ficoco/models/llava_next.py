# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT: an image is its thumbnail and tiles, stitched, cut to shape, a newline behind rows.

What is common to it and LLaVA-OneVision is here, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from transformers import BatchFeature
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageSize

from vllm_ficoco.models.layered import FLAT_TOWER, LayeredModel
from vllm_ficoco.models.processing import ReducingProcessor
from vllm_ficoco.packed import Packed
from vllm_ficoco.vision.layout import Layout, Window


def tiled_layout(info: LlavaNextProcessingInfo, width: int, height: int) -> Layout:
    """The layout of an image of so many pixels, from vLLM's own arithmetic."""
    encoder = info.get_vision_encoder_info()
    side = encoder.get_patch_grid_length()
    tiles: tuple[int, int] = get_anyres_image_grid_shape(
        (height, width),
        grid_pinpoints=info.get_hf_config().image_grid_pinpoints,
        patch_size=encoder.get_image_size(),
    )

    def rows_and_columns(family: type[LlavaNextProcessingInfo]) -> tuple[int, int]:
        """Of the stitched grid, what is not padding, as a family's own method counts it."""
        patches, rows = family._get_num_unpadded_features(
            info,
            original_height=height,
            original_width=width,
            npatches=side,
            num_patch_height=tiles[0],
            num_patch_width=tiles[1],
        )
        return rows, patches // max(rows, 1)

    rows, columns = rows_and_columns(LlavaNextProcessingInfo)
    shrunk = rows_and_columns(type(info))  # OneVision's, where the image is large
    return Layout(
        (side, side),
        tiles,
        Window((tiles[0] * side - rows) // 2, (tiles[1] * side - columns) // 2, rows, columns),
        shrunk if shrunk != (rows, columns) else None,
    )


class TiledProcessor(ReducingProcessor):
    """Of families with tiles."""

    info: LlavaNextProcessingInfo

    def layout_of(
        self, width: int, height: int, kwargs: Mapping[str, object] | None = None
    ) -> Layout:
        return _layout_of(self.info, width, height)

    def smaller_sizes(
        self, width: int, height: int, kwargs: Mapping[str, object] | None
    ) -> list[ImageSize]:
        return _smaller_sizes(self.info, width, height)

    def strip_padding(self, processed: BatchFeature, settled: Sequence[Packed]) -> None:
        """Images of a prompt are padded with empty tiles to the largest of them."""
        if any(packed.reduction for packed in settled):
            processed["pixel_values"] = [
                _own_tiles(pixels, packed) if packed.reduction else pixels
                for pixels, packed in zip(processed["pixel_values"], settled, strict=True)
            ]


_layout_of = lru_cache(maxsize=4096)(tiled_layout)


@lru_cache(maxsize=4096)
def _smaller_sizes(info: LlavaNextProcessingInfo, width: int, height: int) -> list[ImageSize]:
    """An image scaled to fit every grid of tiles that is smaller."""
    sizes = set()
    for tall, wide in info.get_hf_config().image_grid_pinpoints:
        scale = min(wide / width, tall / height)
        if scale < 1:
            sizes.add(ImageSize(max(1, round(width * scale)), max(1, round(height * scale))))
    return sorted(sizes, key=lambda size: (-_layout_of(info, *size).tokens, size))


def _own_tiles(pixels: torch.Tensor, packed: Packed) -> torch.Tensor:
    """An image's thumbnail and tiles, (inputs, 3, height, width).

    Raises:
        VLLMValidationError: there are fewer, as processor options of the request can have it.
    """
    assert packed.layout is not None
    if len(pixels) < packed.layout.inputs:
        raise VLLMValidationError(
            f"An image to reduce was cut into {len(pixels)} tiles, where the model cuts it into "
            f"{packed.layout.inputs}: leave out what changes that.",
            parameter="mm_processor_kwargs",
        )
    return pixels[: packed.layout.inputs]


class TiledModel(LayeredModel):
    """Of families with tiles."""

    def _image_pixels_to_features(
        self, vision_tower: torch.nn.Module, pixel_values: torch.Tensor
    ) -> torch.Tensor:
        """As vLLM's, a bounded number of tiles at a time.

        vLLM bounds a batch of images by the tokens that come out of them. A thin image or one that
        is shrunk has many more tiles, with the padding that makes images of a batch alike.
        """
        features = super()._image_pixels_to_features  # type: ignore[misc]
        parts = pixel_values.split(self.images_at_once)
        if len(parts) == 1:
            return features(vision_tower, pixel_values)
        return torch.cat([features(vision_tower, part) for part in parts])


class ReducingLlavaNextProcessor(TiledProcessor, LlavaNextMultiModalProcessor):
    """LLaVA-NeXT's."""


@MULTIMODAL_REGISTRY.register_processor(
    ReducingLlavaNextProcessor,
    info=LlavaNextProcessingInfo,
    dummy_inputs=LlavaDummyInputsBuilder,
)
class ReducingLlavaNextForConditionalGeneration(TiledModel, LlavaNextForConditionalGeneration):
    """vLLM's LLaVA-NeXT with a visual token budget per image."""

    hf_to_vllm_mapper = FLAT_TOWER | LlavaNextForConditionalGeneration.hf_to_vllm_mapper
