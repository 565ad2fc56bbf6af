# SPDX-License-Identifier: Apache-2.0
"""Reduces the frames of a video, behind the tower: each by itself, or all of them compared.

A method that knows images alone takes a frame for one. How many tokens each frame keeps is settled
by counts (:meth:`vllm_ficoco.vision.geometry.Geometry.parts`), or there is a fixed list of shares
and the device finds out which frame has which: those that are least like the whole video come
first. Nobody waits to hear it.

Shapes: B videos of one layout, F frames, n places of a frame's grid, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from vllm_ficoco.methods.paradigm import EVIDENCE_BYTES, Evidence, Tokens, on_device, take
from vllm_ficoco.settings import Reduction
from vllm_ficoco.vision.geometry import PartPlan
from vllm_ficoco.vision.layout import Layout


def reduce_frames(
    hidden: Tensor,
    evidence: Evidence,
    reduction: Reduction,
    layout: Layout,
    plans: Sequence[PartPlan],
) -> tuple[Tensor, Tensor]:
    """What is left of B videos of one layout and the same settings; newlines apart.

    Args:
        hidden: (B, F * n, D) their tokens, as the model's tower and pooling leave them.
        evidence: over B * F images: the frames of a video behind one another, ``grid`` that of a
            frame. Query and key may be empty where the method does not need attention.
        reduction: their settings.
        layout: theirs.
        plans: what :meth:`Geometry.parts` says of them.

    Returns:
        (B, kept, D), and (B, kept) the places, ascending, in F * n.
    """
    method, options = reduction.spec, reduction.parsed_options()
    frames = hidden.unflatten(1, (layout.frames, -1))
    shares = [0] * layout.frames
    for plan in plans:
        shares[plan.part] = plan.keep
    if method.across_frames is not None:
        across = method.across_frames
        place = across.choose(frames, evidence, shares, options)
        if across.compress is not None:
            return across.compress(frames, evidence, place, options), place
        return take(hidden, place), place
    order = None
    if method.on_frames(options) == "seen":
        order = uniqueness(frames).sort(dim=-1, descending=True, stable=True).indices
    found = []
    ranks = sorted(range(layout.frames), key=shares.__getitem__)
    for keep, alike in groupby(ranks, key=shares.__getitem__):
        for some in _in_turns([*alike] if keep else [], frames, evidence):
            number, index = _numbers(some, order, len(hidden), layout.frames, hidden.device)
            tokens = Tokens.of(frames.flatten(0, 1)[index])
            if keep < len(tokens):
                tokens = method.reduce(tokens, evidence.of_images(index), keep, options)
            place = number[..., None] * frames.shape[2] + tokens.position.unflatten(
                0, (len(hidden), -1)
            )
            kept = tokens.hidden.unflatten(0, (len(hidden), -1))
            found.append((kept.flatten(1, 2), place.flatten(1, 2)))
    kept, place = (torch.cat(x, 1) for x in zip(*found, strict=True))
    if len(found) > 1 or order is not None:
        place, at = place.sort(dim=-1, stable=True)
        kept = take(kept, at)
    return kept, place


def uniqueness(frames: Tensor) -> Tensor:
    """(B, F): how little a frame (B, F, n, D) is like its video: 1 - the cosine of their means."""
    means = frames.mean(2, dtype=torch.float32)
    return 1 - torch.nn.functional.cosine_similarity(means, means.mean(1, keepdim=True), dim=-1)


def _in_turns(ranks: list[int], frames: Tensor, evidence: Evidence) -> list[list[int]]:
    """So many frames of every video at a time that copies of all that a method sees of them are
    held."""
    bytes_each = (
        sum(
            x[:1].numel() * x.element_size()
            for x in (evidence.query, evidence.key, evidence.pixels)
        )
        + frames[:1, :1].numel() * frames.element_size()
    )
    at_once = max(1, EVIDENCE_BYTES // (bytes_each * len(frames)))
    return [ranks[first : first + at_once] for first in range(0, len(ranks), at_once)]


def _numbers(
    ranks: list[int], order: Tensor | None, videos: int, frames: int, device: torch.device
) -> tuple[Tensor, Tensor | slice]:
    """(B, r) the frames at some ranks, and where in B * F they are.

    Args:
        ranks: ascending.
        order: (B, F) the frame of every rank; None: they are the frames' numbers.
        videos: B.
        frames: F.
        device: where to.
    """
    rank = on_device(ranks, device)
    if order is None and len(ranks) == frames:  # all of them: no copy
        return rank.expand(videos, -1), slice(None)
    number = rank.expand(videos, -1) if order is None else order[:, rank]
    first = torch.arange(0, videos * frames, frames, device=device)
    return number, (number + first[:, None]).flatten()
