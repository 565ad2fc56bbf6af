# SPDX-License-Identifier: Apache-2.0
"""Models that take images and videos at their own resolution: positions of three rows (Qwen-VL)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature
from vllm.config import VllmConfig
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models.interfaces import MultiModalEmbeddings
from vllm.model_executor.models.qwen2_vl import Qwen2VLProcessingInfo
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.multimodal.parse import ImageSize
from vllm.multimodal.processing.inputs import ProcessorInputs
from vllm.multimodal.processing.processor import PromptUpdateDetails
from vllm.sequence import IntermediateTensors

from vllm_ficoco.engine.checks import check_positions
from vllm_ficoco.engine.positions import (
    Offsets,
    PlacedState,
    enlarge_table,
    shortened,
    table_size,
    turns_of,
)
from vllm_ficoco.engine.visual import VisualTokens
from vllm_ficoco.methods.paradigm import on_device
from vllm_ficoco.models.config import ENCODER_TOKENS_KEY
from vllm_ficoco.models.processing import (
    COUNTS_KEY,
    COUNTS_KEYS,
    CountedDetails,
    ReducingProcessor,
    RefusedPositions,
)
from vllm_ficoco.models.reducing import ReducingModel
from vllm_ficoco.packed import PACKED_FIELDS, Packed, unpack
from vllm_ficoco.preview import Follower
from vllm_ficoco.vision.geometry import Geometry
from vllm_ficoco.vision.layout import Layout
from vllm_ficoco.vision.native import Kind, NativeTower
from vllm_ficoco.vision.tower import Timer


class NativeProcessor(ReducingProcessor):
    """The mixin for their processors."""

    info: Qwen2VLProcessingInfo

    @property
    def merge_size(self) -> int:
        """Patches of a side of what becomes one token."""
        return int(self.info.get_hf_config().vision_config.spatial_merge_size)

    @property
    def _unit(self) -> int:
        """Pixels of the same."""
        return self.merge_size * int(self.info.get_hf_config().vision_config.patch_size)

    @property
    def patch_values(self) -> int:
        """Numbers of a patch, as the tower takes it in."""
        vision = self.info.get_hf_config().vision_config
        return int(vision.in_channels * vision.temporal_patch_size * vision.patch_size**2)

    def layout_of(
        self, width: int, height: int, kwargs: Mapping[str, object] | None = None
    ) -> Layout:
        """As vLLM counts it.

        Raises:
            ValueError: an image of this shape, or with these options, cannot be scaled.
        """
        size = (
            _size_of(self.info, width, height, kwargs)
            if kwargs
            else _plain_size_of(self.info, width, height)
        )
        return Layout((size.height // self._unit, size.width // self._unit))

    def smaller_sizes(
        self, width: int, height: int, kwargs: Mapping[str, object] | None
    ) -> Iterator[ImageSize]:
        """Of whole tokens: one side any number of them, the other the next ones to its shape."""
        rows, columns = self.layout_of(width, height, kwargs).grid
        for row, column in _smaller_grids(rows, columns):
            yield ImageSize(width=column * self._unit, height=row * self._unit)

    def check_embeddings(self, images: Any) -> None:
        """Rows must be the places of the grid: vLLM counts by that alone; and as wide as tokens."""
        hidden = self.info.get_hf_config().text_config.hidden_size
        width = hidden * (1 + self.geometry.deepstack)
        for image in range(len(images)):
            given = images.get(image)
            if given.get("image_embeds") is None:
                continue  # they come another way
            grid, merge = given["image_grid_thw"].tolist(), self.merge_size
            shape = tuple(given["image_embeds"].shape)
            whole = len(grid) == 3 and all(type(n) is int and n > 0 for n in grid)
            fits = whole and grid[0] == 1 and not grid[1] % merge and not grid[2] % merge
            if not fits or shape != (math.prod(grid) // merge**2, width):
                raise VLLMValidationError(
                    f"Image {image} comes as embeddings of shape {shape} with image_grid_thw "
                    f"{grid}: that must be 1 and two sides, multiples of {merge}, rows a "
                    f"{merge**2}th of their product, and of {width} numbers",
                    parameter="image_embeds",
                )

    def strip_padding(self, processed: BatchFeature, settled: Sequence[Packed]) -> None:
        """Nothing is padded; but options of the request may have made other patches of images.

        Raises:
            VLLMValidationError: the tower cannot take them in.
        """
        self._check_patches("image", processed["pixel_values"])

    def _check_patches(self, kind: str, pixels: Any) -> None:
        values = self.patch_values
        if not isinstance(pixels, Tensor) or pixels.shape[-1] != values:
            had = getattr(pixels, "shape", (0,))[-1]
            raise VLLMValidationError(
                f"Patches of the {kind} have {had} values as {type(pixels).__name__}, and the "
                f"model takes in {values} as Tensor: leave out what changes that.",
                parameter="mm_processor_kwargs",
            )

    def video_layouts(self, processed: BatchFeature) -> list[Layout]:
        """Of their grids of patches: what the tower makes of two frames is one here."""
        self._check_patches("video", processed["pixel_values_videos"])
        side = self.merge_size
        return [
            Layout((rows // side, columns // side), frames=frames)
            for frames, rows, columns in torch.as_tensor(processed["video_grid_thw"]).tolist()
        ]

    def placeholders(
        self, whole: PromptUpdateDetails, packed: Packed, fields: Mapping[str, Any]
    ) -> CountedDetails:
        """As its base's; and how many positions the item takes."""
        details = super().placeholders(whole, packed, fields)
        assert packed.layout is not None
        details.span = self.span_of(packed.layout, fields)
        return details

    def span_of(self, layout: Layout, fields: Mapping[str, Any]) -> int:
        """Positions that an item takes: as many as the largest of its three sides."""
        if not layout.is_video:
            return max(layout.grid)
        if self.geometry.videos == "by_frame":
            return layout.frames * max(layout.grid)
        vision, seconds = self.info.get_hf_config().vision_config, fields.get("second_per_grid_ts")
        turns = turns_of(layout.frames, vision, None if seconds is None else float(seconds.data))
        return max(turns[-1] + 1, *layout.grid)

    def apply(self, inputs: ProcessorInputs, timing_ctx: Any) -> Any:
        """As its base's.

        Raises:
            VLLMValidationError: an image or a video is too large for the tower.
            RefusedPositions: the prompt's images would take positions that the model has not.
        """
        made = super().apply(inputs, timing_ctx)
        for modality, key in COUNTS_KEYS.items():
            self._refuse_large(modality, made[key])
        videos = [details for details in inputs.details["video"] if hasattr(details, "span")]
        self.refuse_far(made[COUNTS_KEY], videos)
        return made

    def _refuse_large(self, modality: str, items: Sequence[Packed]) -> None:
        """vLLM does so by what an item holds in the prompt: a budget would get it past that."""
        for item, packed in enumerate(items):
            if packed.reduction is None or packed.layout is None:
                continue
            # As vLLM reserves: for the largest image or video, or for a whole step where that is
            # more.
            step = getattr(self.info.get_hf_config(), ENCODER_TOKENS_KEY, 0)
            largest = self.largest_layout.tokens if modality == "image" else self._largest_item
            most = max(step, largest)
            if packed.layout.tokens > most:
                raise VLLMValidationError(
                    f"{modality.capitalize()} {item} has {packed.layout.tokens} visual tokens "
                    f"before it is reduced, and the tower takes in {most} at most, whatever its "
                    "budget: leave out what enlarges it.",
                    parameter="mm_processor_kwargs",
                )

    @cached_property
    def _largest_item(self) -> int:
        """Visual tokens of the largest image or video, as vLLM counts them."""
        allowed = [kind for kind, limit in self.info.allowed_mm_limits.items() if limit]
        length = self.info.ctx.model_config.max_model_len
        counts = self.info.get_mm_max_tokens_per_item(length, dict.fromkeys(allowed, 1))
        return max(counts[kind] for kind in allowed)

    def refuse_far(self, images: Sequence[Packed], videos: Sequence[CountedDetails] = ()) -> None:
        """An image takes as many positions as the larger side of its grid, however little stays,
        and a video as many as its time, also where all of it stays.

        A position behind the end of the rotary table ends the engine, so what may follow the prompt
        is counted with it.

        Raises:
            RefusedPositions: the prompt comes too near.
        """
        spans = [(packed, max(packed.layout.grid)) for packed in images if packed.layout]
        spans += [(details.packed, details.span) for details in videos]
        beyond = 0
        for packed, span in spans:
            beyond += max(0, span - self.geometry.kept(packed.reduction, layout=packed.layout))
        model = self.info.ctx.model_config
        table = table_size(model.hf_text_config)
        if beyond and model.max_model_len + beyond > table:
            what = "images and videos" if videos else "images"
            raise RefusedPositions(
                f"The {what} of this prompt take {beyond} positions more than they keep tokens, "
                f"and this model has {max(0, table - model.max_model_len)} to spare ({table}, less "
                f"{model.max_model_len} of the context): send fewer {what}, or give long ones a "
                f"larger budget{' and videos more frames a second' if videos else ''}.",
                parameter="visual_token_budget",
            )


@lru_cache(maxsize=1024)
def _smaller_grids(rows: int, columns: int) -> list[tuple[int, int]]:
    """Those with most places first, among equals those nearest to the shape of the grid."""
    grids = set()
    for row in range(1, rows + 1):
        down, up = columns * row // rows, -(-columns * row // rows)
        grids |= {(row, max(1, down)), (row, up)}
    for column in range(1, columns + 1):
        down, up = rows * column // columns, -(-rows * column // columns)
        grids |= {(max(1, down), column), (up, column)}

    def order(grid: tuple[int, int]) -> tuple[int, Fraction, tuple[int, int]]:
        shape = Fraction(grid[0] * columns, grid[1] * rows)
        return -grid[0] * grid[1], max(shape, 1 / shape), grid

    return sorted(grids, key=order)


def _size_of(
    info: Qwen2VLProcessingInfo, width: int, height: int, kwargs: Mapping[str, object]
) -> ImageSize:
    """To which size the processor scales an image, where it is not told to leave it as it is."""
    processor = info.get_image_processor()
    try:
        said = info._merge_and_resolve_mm_processor_kwargs(kwargs).get("images_kwargs") or {}
        size, _ = info._get_vision_info(
            image_width=width,
            image_height=height,
            num_frames=1,
            do_resize=said.get("do_resize", processor.do_resize),
            image_processor=processor,
            mm_kwargs=kwargs,
        )
    except (ArithmeticError, TypeError, ValueError) as error:  # limits of 0, or no numbers
        raise ValueError(
            f"an image of {width} x {height} pixels cannot be scaled: {error}"
        ) from None
    return size


@lru_cache(maxsize=65536)  # what `resize` counts is of whole tokens, so mostly the same sizes
def _plain_size_of(info: Qwen2VLProcessingInfo, width: int, height: int) -> ImageSize:
    return _size_of(info, width, height, {})


_FIELDS = (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw"))
"""Of images, and of videos: patches, and how many."""


class NativeModel(ReducingModel):
    """The mixin for vLLM's models.

    A batch in which nothing is reduced takes vLLM's own path. Else vLLM's tower runs on all of it
    and its output is reduced.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        check_positions(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.offsets = Offsets()
        text = vllm_config.model_config.hf_text_config
        enlarge_table(self.language_model.model.layers, text)  # type: ignore[attr-defined]

    def make_tower(self, geometry: Geometry, timer: Timer) -> NativeTower | None:
        if not hasattr(self.visual, "blocks"):  # type: ignore[attr-defined]
            return None  # the server takes no images
        return NativeTower(self.visual, tensor_model_parallel_all_reduce, timer)  # type: ignore[attr-defined]

    def embed_multimodal(self, **kwargs: object) -> MultiModalEmbeddings:
        """Visual tokens of a batch of images or of videos, possibly of several requests.

        Args:
            **kwargs: the processor's fields: ``pixel_values``, (patches of all images, values),
                ``image_grid_thw``, (B, 3), and the packed field of every image; or those of videos.

        Returns:
            One tensor (kept, D) an item; D is more than the decoder's hidden size with deepstack.
        """
        packed: Any = [kwargs.pop(name, None) for name in PACKED_FIELDS.values()]
        items = [
            unpack(p) for of_modality in packed if of_modality is not None for p in of_modality
        ]
        if not any(item.reduction for item in items):
            return super().embed_multimodal(**kwargs)  # type: ignore[misc]
        kinds = [self._kind(item) for item in items]
        questions = self.embed_questions(items)
        outputs: list[Tensor] = []
        pixels_of, grid_of = next(names for names in _FIELDS if names[0] in kwargs)  # one modality
        pixels, grids = kwargs[pixels_of], kwargs[grid_of]
        seconds: Any = kwargs.get("second_per_grid_ts")
        assert isinstance(pixels, Tensor) and isinstance(grids, Tensor)
        patches = grids.prod(-1).tolist()
        of_items = pixels.split(patches)
        for first, end in self._runs(items):
            now = slice(first, end)
            watch = any(kind and "attention" in kind.reduction.spec.needs for kind in kinds[now])
            with self.reducing_tower.watching(watch):
                # Slices of fields on the host and the device; a run of items is a run of patches.
                start = sum(patches[:first])
                embeddings = super().embed_multimodal(  # type: ignore[misc]
                    **{
                        pixels_of: pixels[start : start + sum(patches[now])],
                        grid_of: grids[now],
                    }
                )
                asked = questions[now] if questions is not None else None
                reduced = self.reducing_tower.reduce(embeddings, of_items[now], kinds[now], asked)
            for i, (tokens, place) in enumerate(reduced, first):
                second = None if seconds is None else float(seconds[i])
                outputs.append(self._marked(tokens, place, items[i], of_items[i], second))
        return outputs

    def _kind(self, item: Packed) -> Kind | None:
        if item.reduction is None or item.layout is None:
            return None
        plans = self.geometry.parts(item.reduction, layout=item.layout)
        follower = Follower(item.mark) if item.mark else None
        return Kind(item.reduction, item.layout, tuple(plans), follower) if plans else None

    def _runs(self, items: Sequence[Packed]) -> Iterator[tuple[int, int]]:
        """Items that follow one another, no more tokens at once than the tower may make."""
        first = tokens = 0
        for i, item in enumerate(items):
            more = item.layout.encoded if item.layout is not None else 0
            if i > first and tokens + more > self.images_at_once:
                yield first, i
                first = i
                tokens = 0
            tokens += more
        yield first, len(items)

    def _marked(
        self,
        tokens: Tensor,
        place: Tensor | None,
        item: Packed,
        pixels: Tensor,
        seconds: float | None,
    ) -> Tensor:
        """An item's tokens with what has to go with them into the decoder.

        Args:
            tokens: (kept, D).
            place: (kept,) their places, frame after frame; None for all.
            item: its settings and its layout.
            pixels: (patches, values) of it.
            seconds: of a frame of a video, in Qwen2.5-VL.
        """
        if item.layout is None:
            return tokens
        if place is not None:
            rows, columns = item.layout.grid
            frame, within = place // (rows * columns), place % (rows * columns)
            turn = torch.zeros_like(place)
            if item.layout.is_video and self.geometry.videos != "by_frame":
                vision = self.config.vision_config  # type: ignore[attr-defined]
                turns = turns_of(item.layout.frames, vision, seconds)
                turn = on_device(turns, place.device)[frame]
            offsets = torch.stack([turn, within // columns, within % columns], 1)
            tokens = VisualTokens.of(tokens, offsets=offsets)
        if self.staged_decoder is not None:
            tokens = self.staged_decoder.mark(
                tokens, item.reduction, place, pixels[None], item.layout, item.mark
            )
        return tokens

    state_cls = PlacedState

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[MultiModalFeatureSpec]
    ) -> tuple[Tensor, int]:
        """As vLLM's for the unreduced prompt, cut to what is left of it."""
        if self.geometry.unsupported:  # what is short, vLLM has pruned
            return super().get_mrope_input_positions(input_tokens, mm_features)  # type: ignore[misc]
        config: Any = self.config  # type: ignore[attr-defined]
        marks = config.vision_start_token_id, config.video_token_id, config.vision_end_token_id
        return shortened(
            super().get_mrope_input_positions,  # type: ignore[misc]
            input_tokens,
            mm_features,
            config.vision_config.spatial_merge_size,
            marks if self.geometry.videos == "by_frame" else None,
        )

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: MultiModalEmbeddings | None = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        """As its base's; the places of reduced images' tokens are noted for their positions."""
        embeddings: Any = multimodal_embeddings if multimodal_embeddings is not None else ()
        self.offsets.note(embeddings, is_multimodal)
        if self.staged_decoder is None and embeddings:
            multimodal_embeddings = [tokens.as_subclass(Tensor) for tokens in embeddings]
        return super().embed_input_ids(
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor | IntermediateTensors:
        self.offsets.before_run(positions)
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
