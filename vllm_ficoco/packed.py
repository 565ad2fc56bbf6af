# SPDX-License-Identifier: Apache-2.0
"""The one field that travels with an image from the processor to scheduler and model.

It says how the image is reduced and where its visual tokens stand; nothing behind the processor
asks for anything else, and nothing else does arithmetic with sizes of images.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from vllm_ficoco.settings import Reduction
from vllm_ficoco.vision.layout import Layout

PACKED_FIELD = "packed_reduction"
"""Its name, beside ``pixel_values``."""


class Packed(NamedTuple):
    """What an image's field says."""

    reduction: Reduction | None = None
    """None: vLLM's own path."""
    layout: Layout | None = None
    """None: that of every image of the model."""


def pack(reduction: Reduction | None, layout: Layout | None = None) -> torch.Tensor:
    """An image's settings and layout as a uint8 tensor; empty where there is nothing to say."""
    text = (f"{layout.to_json()}\n" if layout else "") + (reduction.key if reduction else "")
    if not text:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def unpack(packed: torch.Tensor) -> Packed:
    """What :func:`pack` wrote.

    Raises:
        ValueError: it did not write that.
    """
    return _parse(bytes(packed.tolist()))


def packed_of(data: Mapping[str, Any] | None) -> Packed:
    """What the field of an item says, vLLM's with its fields; nothing where it has none."""
    field = data.get(PACKED_FIELD) if data is not None else None
    return Packed() if field is None or field.data is None else unpack(field.data)


@lru_cache(maxsize=4096)  # the images of a batch mostly have few different settings
def _parse(raw: bytes) -> Packed:
    layout, _, reduction = raw.decode().rpartition("\n")
    return Packed(
        Reduction.model_validate_json(reduction) if reduction else None,
        Layout.from_json(layout) if layout else None,
    )
