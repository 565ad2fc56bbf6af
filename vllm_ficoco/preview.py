# SPDX-License-Identifier: Apache-2.0
"""What becomes of an image's tokens, place by place, for who wants to see it.

An image whose packed field has a *mark* is followed: tower and decoder note here which of its
tokens leave where and what takes them in, and the front end asks for that when the request has been
answered. The mark is in the image's hash, so no cache answers for it, and it shares its reduction
with no other image. Nothing is noted of others, and for none the host waits: what is noted is on
its way to the host when the answer is.

Places are numbered as :meth:`vllm_ficoco.vision.layout.Layout.numbers` does.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

PREVIEW_KEY = "reduction_preview"
"""Among processor options, where the front end puts the mark."""

WORKER_EXTENSION = "vllm_ficoco.preview.PreviewWorker"
"""For ``--worker-extension-cls``."""

FETCH = "take_reduction_preview"
"""What the front end calls, through vLLM's ``collective_rpc``."""

MOST = 8
"""Images of which is kept what was noted. It is asked for at once; a request whose client has left
is not asked for, and is forgotten when others come."""


Area = tuple[float, float, float, float]
"""Left, top, right and bottom of a part of a picture, in widths and heights of it."""


class Mark(str):
    """Of an image that is followed. A client can send words, but none of this type."""


class Step(NamedTuple):
    """What happened at one place to the tokens of an image, or of a part of it."""

    where: str
    """``tower``, ``output`` or ``decoder``."""
    layer: int
    """Of the tower or the decoder."""
    part: int
    """Which one of the layout's, where each is reduced by itself."""
    before: list[int]
    """The places of the tokens that came."""
    into: list[int]
    """Of each of them, which of those that stay has taken most of it in; -1: none."""
    after: list[int]
    """The places of those that stay."""


ENTERED = "entered"
"""Where an image enters the decoder: the places that are left of all its parts."""

_noted: OrderedDict[str, dict[tuple[str, int, int], tuple[Tensor, Tensor, Tensor]]] = OrderedDict()
"""By mark. A request that is preempted runs again, and says the same again."""


def _to_host(x: Tensor) -> Tensor:
    if not x.is_cuda:
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


@dataclass(frozen=True, eq=False)
class Follower:
    """Notes what becomes of an image, or of a part of it. Equal to none but itself, so that what is
    grouped by it is alone."""

    mark: str
    part: int = 0
    number: Callable[[Tensor], Tensor] = lambda place: place
    """Of places in the part, their numbers in the image."""

    def note(
        self, where: str, layer: int, before: Tensor, fates: Sequence[Tensor], after: Tensor
    ) -> None:
        """Tokens leave, or are merged.

        Args:
            where: see :class:`Step`.
            layer: likewise.
            before: (n,) places of the tokens.
            fates: (1, n) as of :func:`destinations`; empty where nothing is merged.
            after: (k,) places of those that stay.
        """
        into = torch.cat([*fates])[0] if fates else before.new_empty(0)
        steps = _noted.setdefault(self.mark, {})
        steps[where, layer, self.part] = (
            _to_host(self.number(before)),
            _to_host(into),
            _to_host(self.number(after)),
        )
        while len(_noted) > MOST:
            _noted.popitem(last=False)


def take(mark: str) -> list[Step]:
    """What was noted of an image whose request has been answered, in the order of places; it is
    then forgotten."""
    steps = [
        Step(where, layer, part, *(x.tolist() for x in tensors))
        for (where, layer, part), tensors in _noted.pop(mark, {}).items()
    ]
    return [
        step if step.into else step._replace(into=_only_left(step.before, step.after))
        for step in steps
    ]


def _only_left(before: Sequence[int], after: Sequence[int]) -> list[int]:
    at = {place: index for index, place in enumerate(after)}
    return [at.get(place, -1) for place in before]


class PreviewWorker:
    """What vLLM's workers can do besides (``--worker-extension-cls``)."""

    def take_reduction_preview(self, mark: str) -> list[Any]:
        """As :func:`take`, of this worker."""
        return [list(step) for step in take(mark)]
