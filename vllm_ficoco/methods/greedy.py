# SPDX-License-Identifier: Apache-2.0
"""Greedy choices: token after token, each the best beside those that are chosen already.

What a choice changes for the others is kept up, not worked out anew: a step is a handful of small
operations over all tokens of all images at once, and nothing waits for the host. Shapes as in
:mod:`vllm_ficoco.methods.paradigm`; k tokens are chosen, of which no two are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from vllm_ficoco.methods import paradigm

BASIS = 2
"""A round of :func:`log_det` takes at most a token's channels divided by this."""

COVERED = 1024
"""Of how many tokens at most :func:`coverage` counts who covers them."""

SMALLEST = 1e-6
"""What is less, of 1, is rounding: whatever adds no more than this is alike."""


def runs(*vectors: Tensor) -> Iterator[list[Tensor]]:
    """Several (B, ., D) in float32, some channels after others where copies would be too large."""
    # By the size of one image: the order of a sum must not depend on who shares the batch.
    rows = max(x.shape[1] for x in vectors)
    at_once = max(1, paradigm.EVIDENCE_BYTES // (12 * rows))
    if all(x.dtype == torch.float32 for x in vectors):  # no copies
        at_once = vectors[0].shape[2]
    for parts in zip(*(x.split(at_once, 2) for x in vectors), strict=True):
        yield [part.float() for part in parts]


def products(one: Tensor, other: Tensor) -> Tensor:
    """(B, s, t) float32: of vectors (B, s, D) and (B, t, D)."""
    total: Tensor | None = None
    for a, b in runs(one, other):
        if total is None:
            total = a @ b.transpose(1, 2)
        else:
            total.baddbmm_(a, b.transpose(1, 2))
    assert total is not None
    return total


def lengths(vectors: Tensor) -> Tensor:
    """(B, n) float32: of vectors (B, n, D)."""
    parts = [torch.linalg.vector_norm(run, dim=-1) for (run,) in runs(vectors)]
    return torch.linalg.vector_norm(torch.stack(parts), dim=0)


def inverse(length: Tensor) -> Tensor:
    """1 / length; where there is none, 0: so cosines with what has no direction are 0."""
    return torch.where(length > 0, 1 / length, 0.0)


def held(vectors: Tensor) -> Tensor:
    """The same in float32 where a copy of an image can be held."""
    if 4 * vectors.shape[1] * vectors.shape[2] <= paradigm.EVIDENCE_BYTES:
        return vectors.float()
    return vectors


class Likeness:
    """Cosines of an image's tokens, all at once where they can be held, else row by row.

    Args:
        vectors: (B, n, D) of any type.
    """

    def __init__(self, vectors: Tensor) -> None:
        self.shape = vectors.shape
        images, n, _ = vectors.shape
        self._first = torch.arange(0, images * n, n, device=vectors.device)
        self.scale = inverse(lengths(vectors))
        """(B, n): 1 / length, or 0."""
        self._vectors = held(vectors)

    @cached_property
    def _all(self) -> Tensor | None:
        """(B, n, n), where it can be held."""
        n = self.shape[1]
        # By the size of one image: a choice must not depend on who shares the batch.
        if 4 * n * n > paradigm.EVIDENCE_BYTES:
            return None
        cosines = products(self._vectors, self._vectors)
        return cosines.mul_(self.scale[:, None]).mul_(self.scale[..., None])

    def row(self, index: Tensor) -> Tensor:
        """(B, n): cosines with one token (B, 1) of each image."""
        if self._all is not None:
            return self._all.flatten(0, 1).index_select(0, index[:, 0] + self._first)
        row = products(self._vectors, paradigm.take(self._vectors, index))[..., 0]
        return row.mul_(self.scale).mul_(self.scale.gather(1, index))

    def least_like_the_mean(self) -> Tensor:
        """(B, 1): the token whose direction is farthest from the mean of all directions."""
        scale = self.scale[:, None] / self.shape[1]
        mean = torch.cat([scale @ run for (run,) in runs(self._vectors)], 2)
        alike = products(self._vectors, mean)[..., 0].mul_(self.scale)
        # What is more by rounding alone is equal, and the lower index is first.
        return (alike > alike.amin(1, keepdim=True) + SMALLEST).byte().argmin(1, keepdim=True)

    def columns(self, index: Tensor | None) -> Tensor:
        """(B, n, c): cosines with tokens (c,), the same of every image, or with all."""
        vectors, scale = self._vectors, self.scale
        if index is not None:
            vectors, scale = vectors.index_select(1, index), scale.index_select(1, index)
        columns = products(self._vectors, vectors)
        return columns.mul_(scale[:, None]).mul_(self.scale[..., None])


class Span:
    """What is left of vectors when those that are chosen have been projected out.

    An incremental Cholesky factor of their products (Chen et al., "Fast Greedy MAP Inference for
    Determinantal Point Process", arXiv 1709.05135, algorithm 1).

    Args:
        whole: (B, n) their squares.
        most: how many are chosen at most.
    """

    def __init__(self, whole: Tensor, most: int) -> None:
        self.left = whole.clone()
        """(B, n) squares of what is left, and rounding."""
        self._floor = (SMALLEST * whole).clamp_min_(torch.finfo(whole.dtype).tiny)
        self._factor = whole.new_empty(len(whole), most, whole.shape[1])
        self._chosen = 0

    def add(self, best: Tensor, row: Tensor) -> None:
        """Chooses one more: (B, 1) which, (B, n) its products with all."""
        before = self._factor[:, : self._chosen]
        of_best = before.gather(2, best[..., None].expand(-1, self._chosen, -1))
        row = torch.baddbmm(row[:, None], of_best.transpose(1, 2), before, alpha=-1)[:, 0]
        # Of one that is spanned already only rounding is left, which must not grow.
        row *= torch.maximum(self.left, self._floor).gather(1, best).rsqrt_()
        self._factor[:, self._chosen] = row
        self.left.addcmul_(row, row, value=-1)
        self._chosen += 1


class Cover:
    """Who is covered by those that are chosen: a token j by its max cosine to one, at least 0.

    Args:
        likeness: of the tokens.
        seen: (c,) the tokens j that count; None: all.
    """

    def __init__(self, likeness: Likeness, seen: Tensor | None) -> None:
        # What of j is covered if i is chosen as well: where it is less than what is now, that.
        self._raised = likeness.columns(seen).clamp_min_(0)
        images, n, self._seen = self._raised.shape
        self._first = torch.arange(0, images * n, n, device=self._raised.device)
        self._covered = self._raised.new_zeros(images, 1)

    def gain(self) -> Tensor:
        """(B, n): how much more is covered, over all j, if a token is chosen as well."""
        return self._raised.sum(2).sub_(self._covered).clamp_min_(SMALLEST * self._seen)

    def add(self, best: Tensor) -> None:
        """Chooses one more (B, 1)."""
        now = self._raised.flatten(0, 1).index_select(0, best[:, 0] + self._first)
        torch.maximum(self._raised, now[:, None], out=self._raised)
        self._covered = now.sum(1, keepdim=True)


def k_centres(likeness: Likeness, weight: Tensor, first: Tensor, count: int) -> Tensor:
    """The token that is least like its most alike chosen one, by weight: (1 - max cosine) * weight.

    Args:
        likeness: of the tokens.
        weight: (B, n), above 0.
        first: (B, 1) the token to begin with.
        count: k, at least 1.

    Returns:
        (B, k) indices in the order of choice.
    """
    chosen, weight = [first], weight.clone()
    nearest = likeness.row(first)
    for _ in range(count - 1):
        weight.scatter_(1, chosen[-1], -1.0)  # not again
        score = (1 - nearest).clamp_min_(SMALLEST).mul_(weight)
        chosen.append(score.argmax(1, keepdim=True))
        torch.maximum(nearest, likeness.row(chosen[-1]), out=nearest)
    return torch.cat(chosen, 1)


def log_det(likeness: Likeness, weight: Tensor | None, count: int) -> Tensor:
    """The token that adds most to the volume that the chosen ones span (MAP of a DPP, greedily).

    Of the kernel quality_i * cosine_ij * quality_j, whose determinant grows by quality_i squared
    times the square of what is left of the unit vector i beside the span of those that are chosen.
    Vectors of D channels span no more than D dimensions, after which rounding would choose. So a
    round takes at most D / :data:`BASIS`, and the next one starts anew with those that are left.

    Args:
        likeness: of the tokens.
        weight: (B, n), the square of the quality, above 0; None: 1 for all.
        count: k, at least 1.

    Returns:
        (B, k) indices in the order of choice.
    """
    most = min(count, max(1, likeness.shape[2] // BASIS))
    whole = (likeness.scale > 0).float()  # not the squares: among equals rounding would choose
    weight = torch.ones_like(whole) if weight is None else weight.clone()
    chosen = list[Tensor]()
    for step in range(count):
        if step % most == 0:
            span = Span(whole, most)
        best = span.left.clamp_min(SMALLEST).mul_(weight).argmax(1, keepdim=True)
        chosen.append(best)
        weight.scatter_(1, best, -1.0)  # not again
        span.add(best, likeness.row(best))
    return torch.cat(chosen, 1)


def coverage(likeness: Likeness, weight: Tensor, seen: Tensor | None, count: int) -> Tensor:
    """The token that makes others most alike to a chosen one, by weight.

    Args:
        likeness: of the tokens.
        weight: (B, n), above 0.
        seen: (c,) the tokens j that count; None: all.
        count: k, at least 1.

    Returns:
        (B, k) indices in the order of choice.
    """
    cover, chosen, weight = Cover(likeness, seen), list[Tensor](), weight.clone()
    for _ in range(count):
        best = cover.gain().mul_(weight).argmax(1, keepdim=True)
        chosen.append(best)
        weight.scatter_(1, best, -1.0)  # not again
        cover.add(best)
    return torch.cat(chosen, 1)
