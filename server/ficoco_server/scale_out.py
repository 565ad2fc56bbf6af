# SPDX-License-Identifier: Apache-2.0
"""The adapter to vLLM's route for prompts that another server has rendered.

``/inference/v1/generate`` (of a server with ``--enable-scale-out``) takes images as the client says
that they were processed: a place in the prompt, a hash, and the processor's fields, or none of
them where the engine has them under the hash. A model that returns fewer rows than a place has
ends the engine, so the three must agree before a request gets there.

Where an image's tokens depend on its size, its hash says nothing of them. There its fields must
come along, and the engine gets it under another hash, which no other image can have. What its size
is, they say themselves: in pixels, or at native resolution (Qwen-VL) as a grid of patches.

A rendered video comes as in vLLM, whole. It too must come along under a hash of its own, so that
none finds what is left of a reduced one.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import Any, NamedTuple

import torch
from vllm.entrypoints.scale_out.token_in_token_out.mm_features import mm_kwargs_from_features
from vllm.entrypoints.scale_out.token_in_token_out.serving import ServingTokens
from vllm.exceptions import VLLMValidationError

from ficoco_server.metrics import INVALID, REQUESTS
from ficoco_server.reducer import Reducer
from ficoco_server.resolve import Level, fit, settled
from vllm_ficoco.engine.checks import needs_whole_prompt
from vllm_ficoco.models.processing import RefusedPositions, tokens_by_hash
from vllm_ficoco.models.question import LONGEST
from vllm_ficoco.packed import PACKED_FIELD, PACKED_FIELDS, Packed, unpack
from vllm_ficoco.settings import REDUCTION_KEY, Reduction, SettingsError
from vllm_ficoco.vision.layout import Layout

PIXELS, EMBEDS, HANDLE = "pixel_values", "image_embeds", "signature"
SIZE, GRID = "image_sizes", "image_grid_thw"
VIDEO_PIXELS, VIDEO_EMBEDS, VIDEO_GRID = "pixel_values_videos", "video_embeds", "video_grid_thw"

LARGEST_SIDE = 10**6
"""Pixels."""

_SALT = secrets.token_hex(16)


class ReductionTokens(ServingTokens):
    """vLLM's handler, which looks at images before the engine gets them."""

    reducer: Reducer

    async def serve_tokens(self, request: Any, raw_request: Any = None) -> Any:
        """As in vLLM."""
        if request.features is not None and not self.reducer.geometry.unsupported:
            try:
                check_features(request, self.reducer)
            except SettingsError as error:
                REQUESTS.labels(INVALID, "refused").inc()
                raise VLLMValidationError(str(error), parameter=error.field) from None
        return await super().serve_tokens(request, raw_request)


class Due(NamedTuple):
    """What the engine will make of an image."""

    tokens: int
    why: str
    packed: Packed = Packed()


def check_features(request: Any, reducer: Reducer) -> None:
    """Whether the parts of every rendered image agree, and with what this server can do.

    Raises:
        SettingsError: which do not.
    """
    features, params, geometry = request.features, request.sampling_params, reducer.geometry
    items = mm_kwargs_from_features(features).get("image", [])
    images = []
    for i, item in enumerate(items):
        hashes, place = features.mm_hashes["image"], features.mm_placeholders["image"][i]
        field = f"features.kwargs_data.image[{i}]"
        # Another instance has encoded it, or it is in memory, signed by vLLM.
        elsewhere = request.ec_transfer_params or (reducer.shared_memory and HANDLE in (item or ()))
        by_hash = None
        if not geometry.by_image:
            by_hash = Due(tokens_by_hash(hashes[i], geometry), "what its hash says")
        due = _due(item, field, reducer, by_hash, bool(elsewhere))
        whole = needs_whole_prompt(params)
        reduction = due.packed.reduction
        if whole and reduction is not None and reduction.spec.decoder:
            allowed = "left out where tokens leave inside the decoder"
            raise SettingsError(f"sampling_params.{whole}", getattr(params, whole), allowed)
        if place.length != due.tokens:
            field = f"features.mm_placeholders.image[{i}].length"
            raise SettingsError(field, place.length, f"{due.tokens}, {due.why}")
        if by_hash is None:
            if {PIXELS, EMBEDS} & {*item}:
                hashes[i] = _own_hash(hashes[i], item, due)
        elif by_hash.tokens != due.tokens:
            allowed = f"a render's, of an image with {due.tokens} visual tokens"
            raise SettingsError(f"features.mm_hashes.image[{i}]", hashes[i], allowed)
        images.append(due.packed)
    if geometry.videos != "whole":
        _check_videos(features, reducer)
    if geometry.is_native:
        try:
            reducer.processor.refuse_far(images)
        except RefusedPositions as refused:
            raise VLLMValidationError(str(refused.args[0]), parameter="features") from None


def _check_videos(features: Any, reducer: Reducer) -> None:
    """Whether every rendered video is there, whole, and has as many tokens as its place.

    Raises:
        SettingsError: one is not.
    """
    name = PACKED_FIELDS["video"]
    for i, item in enumerate(mm_kwargs_from_features(features).get("video", [])):
        hashes, field = features.mm_hashes["video"], f"features.kwargs_data.video[{i}]"
        if item is None:
            why = "given: a hash does not say how many visual tokens a video has"
            raise SettingsError(field, None, why)
        if _packed_in(item, field, name).reduction is not None:
            raise SettingsError(f"{field}.{name}", "settings", "left out: a video stays whole here")
        due = Due(_tokens_of_video(item, field, reducer), "what its frames have")
        place = features.mm_placeholders["video"][i]
        # Text between frames counts with a place, and says nothing of it in its length.
        if reducer.geometry.videos == "reduced" and place.length != due.tokens:
            field = f"features.mm_placeholders.video[{i}].length"
            raise SettingsError(field, place.length, f"{due.tokens}, {due.why}")
        hashes[i] = _own_hash(hashes[i], {}, due)


def _tokens_of_video(item: Any, field: str, reducer: Reducer) -> int:
    """Visual tokens that the engine makes of a video.

    Raises:
        SettingsError: its fields are not those of a video.
    """
    if VIDEO_EMBEDS in item and VIDEO_PIXELS not in item:
        return (*_shape(item, VIDEO_EMBEDS), 0)[0]
    native = reducer.geometry.is_native  # where patches do not say whose they are
    try:
        pixels = item[VIDEO_PIXELS].data
        fields = {VIDEO_PIXELS: pixels if native else [pixels]}
        if native:
            fields[VIDEO_GRID] = item[VIDEO_GRID].data[None]
        [layout] = reducer.processor.video_layouts(fields)
        if native and len(pixels) != layout.tokens * reducer.processor.merge_size**2:
            raise ValueError
    except (VLLMValidationError, ValueError, TypeError, KeyError, AttributeError, IndexError):
        allowed = f"{VIDEO_PIXELS}, and what goes with them, as a render has them"
        raise SettingsError(field, sorted(item), allowed) from None
    tokens: int = layout.tokens
    return tokens


def _due(item: Any, field: str, reducer: Reducer, by_hash: Due | None, elsewhere: bool) -> Due:
    """What the engine will make of an image.

    Args:
        item: its fields; None where there are none.
        field: where they stand.
        reducer: what this server can do.
        by_hash: what its hash says; None where that says nothing.
        elsewhere: its pixels need not be here.

    Raises:
        SettingsError: its fields are not those of an image.
    """
    if item is None:
        if by_hash is None:
            why = "given: a hash does not say how many visual tokens an image of this model has"
            raise SettingsError(field, None, why)
        return by_hash
    packed = _packed_in(item, field)
    _check_question(packed, field, reducer)
    if EMBEDS in item and PIXELS not in item and packed.reduction is None:
        rows = (*_shape(item, EMBEDS), 0)[0]
        width = reducer.decoder.hidden_size * (1 + reducer.geometry.deepstack)
        if _shape(item, EMBEDS) != (rows, width):
            allowed = f"of {width} numbers a token"
            raise SettingsError(f"{field}.{EMBEDS}", _shape(item, EMBEDS), allowed)
        if reducer.geometry.is_native and rows != _native_layout(item, field, reducer).tokens:
            allowed = f"as many as the places of {GRID}"
            raise SettingsError(f"{field}.{EMBEDS}", _shape(item, EMBEDS), allowed)
        return Due(rows, "what its embeddings have")
    pixels = PIXELS in item and EMBEDS not in item
    if not pixels and not elsewhere:
        raise SettingsError(field, sorted(item), f"{PIXELS}, or {EMBEDS} without settings")
    layout = _layout(item, packed.layout, field, reducer)
    reduction = packed.reduction and _admitted(packed.reduction, layout, field, reducer)
    _check_scaled(reduction, layout, field)
    if pixels:
        _check_pixels(item, layout, field, reducer)
    elif by_hash is not None:
        return by_hash._replace(packed=Packed(reduction))
    kept = reducer.geometry.kept(reduction, layout=layout)
    return Due(kept, "what its settings keep", Packed(reduction, layout))


def _shape(item: Any, name: str) -> tuple[int, ...]:
    return tuple(getattr(item[name].data, "shape", ()))


def _packed_in(item: Any, field: str, name: str = PACKED_FIELD) -> Packed:
    """The settings and the layout that travel with an image or a video."""
    packed = item.get(name)
    allowed = "an item with settings as a render writes them"
    try:
        found = unpack(packed.data) if packed is not None else Packed()
    except (ValueError, AttributeError, TypeError, RecursionError):
        raise SettingsError(field, name, allowed) from None
    if found.mark:  # of a preview, which is the server's own
        raise SettingsError(field, name, allowed)
    return found


def _check_question(packed: Packed, field: str, reducer: Reducer) -> None:
    """Whether a question is one, of a method that asks: the engine looks its tokens up unseen."""
    if not packed.question:
        return
    asked = packed.reduction is not None and packed.reduction.spec.asks_question
    fits = len(packed.question) <= LONGEST and all(w in reducer.vocabulary for w in packed.question)
    if not asked or not fits:
        allowed = "a render's: a question has a method that asks for it, and tokens of the model"
        raise SettingsError(f"{field}.{PACKED_FIELD}", packed.question, allowed)


def _admitted(
    reduction: Reduction, layout: Layout, field: str, reducer: Reducer
) -> Reduction | None:
    """The settings that travel with an image, where this server lets a request have them."""
    said = Level(field, {REDUCTION_KEY: reduction.model_dump()})
    [image] = settled(reducer.policy, Level(), [said], reducer.geometry)
    return fit(reducer.policy, image, reducer.geometry, layout)


def _layout(item: Any, packed: Layout | None, field: str, reducer: Reducer) -> Layout:
    """The layout of an image, where it is that of its size."""
    if not reducer.geometry.by_image:
        return reducer.geometry.layout
    if reducer.geometry.is_native:
        layout, image = _native_layout(item, field, reducer), f"an image with this {GRID}"
    else:
        layout, image = _tiled_layout(item, field, reducer)
    if packed is None or packed._replace(original=0) != layout:
        allowed = f"a render's: {image} has another layout"
        raise SettingsError(f"{field}.{PACKED_FIELD}", packed and packed.to_json(), allowed)
    return packed


def _tiled_layout(item: Any, field: str, reducer: Reducer) -> tuple[Layout, str]:
    """The layout of an image of this size, and the size in words."""
    size = getattr(item.get(SIZE), "data", None)
    numbers = size.tolist() if isinstance(size, torch.Tensor) and size.shape == (2,) else []
    if not numbers or not all(type(n) is int and 0 < n <= LARGEST_SIDE for n in numbers):
        allowed = f"height and width of the image, from 1 to {LARGEST_SIDE}"
        raise SettingsError(f"{field}.{SIZE}", numbers or None, allowed)
    height, width = numbers
    return reducer.processor.layout_of(width, height), f"an image of {width} x {height}"


def _native_layout(item: Any, field: str, reducer: Reducer) -> Layout:
    """The layout that an image's grid of patches says."""
    side = reducer.processor.merge_size
    grid = getattr(item.get(GRID), "data", None)
    numbers = grid.tolist() if isinstance(grid, torch.Tensor) and grid.shape == (3,) else []
    whole = bool(numbers) and all(type(n) is int and 0 < n <= LARGEST_SIDE for n in numbers)
    if not whole or numbers[0] != 1 or numbers[1] % side or numbers[2] % side:
        allowed = f"1, and rows and columns of patches, multiples of {side}"
        raise SettingsError(f"{field}.{GRID}", numbers or None, allowed)
    layout = Layout((numbers[1] // side, numbers[2] // side))
    if reducer.too_large(layout):
        allowed = f"of {reducer.encoder_tokens} visual tokens or fewer"
        raise SettingsError(f"{field}.{GRID}", numbers, allowed)
    return layout


def _check_scaled(reduction: Reduction | None, layout: Layout, field: str) -> None:
    """Whether an image that is said to have been scaled down is within its budget, and no other."""
    resized = reduction is not None and reduction.spec.place == "input"
    if resized != bool(layout.original) or (
        reduction is not None and resized and layout.tokens > (reduction.budget or 0)
    ):
        allowed = "a render's: of an image scaled down to its budget, or of one that was not"
        raise SettingsError(f"{field}.{PACKED_FIELD}", layout.to_json(), allowed)


def _check_pixels(item: Any, layout: Layout, field: str, reducer: Reducer) -> None:
    """Whether an image's pixels are what the tower takes in."""
    shape, side = _shape(item, PIXELS), reducer.image_size
    of_one = (3, side, side)
    if reducer.geometry.is_native:
        processor = reducer.processor
        due = (layout.tokens * processor.merge_size**2, processor.patch_values)
        if shape != due:
            raise SettingsError(f"{field}.{PIXELS}", shape, f"of shape {due}")
    elif not reducer.geometry.by_image:
        if shape != of_one:
            raise SettingsError(f"{field}.{PIXELS}", shape, f"of shape {of_one}")
    elif shape[1:] != of_one or not layout.inputs <= shape[0] <= reducer.most_inputs:
        # More than it has are padding of a batch.
        allowed = f"of shape {(layout.inputs, *of_one)}, thumbnail and tiles"
        raise SettingsError(f"{field}.{PIXELS}", shape, allowed)


def _own_hash(mm_hash: str, item: Any, due: Due) -> str:
    """A hash for the engine that no image of another size, or from another route, can have."""
    packed = bytes(item[PACKED_FIELD].data.tolist()) if PACKED_FIELD in item else b""
    if GRID in item:  # of embeddings: what is packed says it of pixels
        packed += repr(item[GRID].data.tolist()).encode()
    return hashlib.sha256(repr((_SALT, mm_hash, packed, due.tokens)).encode()).hexdigest()
