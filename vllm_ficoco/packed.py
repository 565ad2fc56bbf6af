# SPDX-License-Identifier: Apache-2.0
"""The one field that travels with an image from the processor to scheduler and model.

It says how the image is reduced and where its visual tokens stand, and, where the method asks for
it, what the prompt's question is; nothing behind the processor asks for anything else, and nothing
else does arithmetic with sizes of images.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from vllm_ficoco.settings import Reduction
from vllm_ficoco.vision.layout import Layout

PACKED_FIELD = "packed_reduction"
"""Its name, beside ``pixel_values``."""
PACKED_FIELDS = {"image": PACKED_FIELD, "video": "packed_reduction_of_video"}
"""The same by modality: a field of vLLM's is of one."""


class Packed(NamedTuple):
    """What an image's field says."""

    reduction: Reduction | None = None
    """None: vLLM's own path."""
    layout: Layout | None = None
    """None: that of every image of the model."""
    question: tuple[int, ...] = ()
    """Token ids of the image's question (:mod:`vllm_ficoco.models.question`), where its method asks
    for it."""
    mark: str = ""
    """Of an image that somebody follows (:mod:`vllm_ficoco.preview`)."""


def pack(
    reduction: Reduction | None,
    layout: Layout | None = None,
    question: Sequence[int] = (),
    mark: str = "",
) -> torch.Tensor:
    """What is said of an image as a uint8 tensor; empty where there is nothing to say."""
    lines = (
        mark,
        json.dumps([*question]) if question else "",
        layout.to_json() if layout else "",
        reduction.key if reduction else "",
    )
    text = "\n".join(lines).lstrip("\n")
    if not text:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def unpack(packed: torch.Tensor) -> Packed:
    """What :func:`pack` wrote.

    Raises:
        ValueError: it did not write that.
    """
    return parse(bytes(packed.tolist()))


def packed_of(data: Mapping[str, Any] | None) -> Packed:
    """What the field of an item says, vLLM's with its fields; nothing where it has none."""
    data = data or {}
    field = next((data[name] for name in PACKED_FIELDS.values() if name in data), None)
    return Packed() if field is None or field.data is None else unpack(field.data)


@lru_cache(maxsize=4096)  # the images of a batch mostly have few different settings
def parse(raw: bytes) -> Packed:
    """The same of the tensor's bytes."""
    mark, asked, layout, reduction = ["", "", "", *raw.decode().split("\n")][-4:]
    question = json.loads(asked) if asked else []
    if not isinstance(question, list) or not all(type(word) is int for word in question):
        raise ValueError("a question is a list of token ids")
    return Packed(
        Reduction.model_validate_json(reduction) if reduction else None,
        Layout.from_json(layout) if layout else None,
        tuple(question),
        mark,
    )
