# SPDX-License-Identifier: Apache-2.0
"""Visual tokens on their way from the tower into the decoder, with what has to go with them.

vLLM keeps what the tower returned and hands slices of it back later, perhaps to another request
that shows the same image; what a slice belongs to it does not tell. So that travels with the
tensor. (vLLM marks these tensors in the same way, with their modality.)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_ficoco.settings import Reduction
from vllm_ficoco.vision.layout import Raster


class Leaving(NamedTuple):
    """How an image's or a video's tokens are to leave inside the decoder."""

    reduction: Reduction
    places: Tensor
    """(n,) ascending: their numbers in the image."""
    raster: Raster
    """Where on the image a number is."""
    lot: Tensor
    """(1, 1), see :func:`vllm_ficoco.methods.random.lot_of`; 0 where the method draws none."""
    mark: str = ""
    """Of an image that somebody follows (:mod:`vllm_ficoco.preview`)."""


class VisualTokens(torch.Tensor):
    """An image's visual tokens, (n, D), or some of them that follow one another."""

    leaving: Leaving | None
    """Of the whole image, whichever of its tokens these are; None where none leaves."""
    offsets: Tensor | None
    """(n, 3) int64 of these tokens: time, row and column from the first place on, for positions of
    three rows (:mod:`vllm_ficoco.engine.positions`); None where vLLM's positions are right."""

    @classmethod
    def of(
        cls, tokens: Tensor, leaving: Leaving | None = None, offsets: Tensor | None = None
    ) -> VisualTokens:
        """Marks tokens; what they were marked with before and is not given here stays."""
        marked = tokens.as_subclass(cls)
        before = tokens if isinstance(tokens, cls) else None
        marked.leaving = leaving if before is None else leaving or before.leaving
        marked.offsets = offsets if before is None or offsets is not None else before.offsets
        return marked

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(result, cls) and isinstance(args[0], cls):
            result.leaving, offsets = args[0].leaving, args[0].offsets
            if offsets is not None and func is torch.Tensor.__getitem__:
                offsets = offsets[args[1]]  # a step takes some of an image's rows
            result.offsets = offsets
        return result
