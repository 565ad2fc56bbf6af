# SPDX-License-Identifier: Apache-2.0
"""Greedy choices: token after token, each the best beside those that are chosen already.

What a choice changes for the others is kept up, not worked out anew: a step is a handful of small
operations over all tokens of all images at once, and nothing waits for the host. Shapes as in
:mod:`vllm_ficoco.methods.paradigm`; k tokens are chosen, of which no two are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_ficoco.methods import paradigm

BASIS = 2
"""A round of :func:`log_det` takes at most a token's channels divided by this."""

COVERED = 1024
"""Of how many tokens at most :func:`coverage` counts who covers them."""

_SMALLEST = 1e-6
"""What is left of a unit vector's square when only rounding is left."""


class Likeness:
    """Cosines of an image's tokens, all at once where they can be held, else row by row.

    Args:
        vectors: (B, n, D).
    """

    def __init__(self, vectors: Tensor) -> None:
        self.unit = torch.nn.functional.normalize(vectors.float(), dim=-1)
        """(B, n, D) of length 1, or 0."""
        n = vectors.shape[1]
        # By the size of one image: a choice must not depend on who shares the batch.
        small = 4 * n * n <= paradigm.EVIDENCE_BYTES
        self._all = self.unit @ self.unit.transpose(1, 2) if small else None
        self._image = torch.arange(len(vectors), device=vectors.device)

    def row(self, index: Tensor) -> Tensor:
        """(B, n): cosines with one token (B,) of each image."""
        if self._all is not None:
            return self._all[self._image, index]
        return (self.unit @ self.unit[self._image, index][..., None])[..., 0]

    def columns(self, index: Tensor) -> Tensor:
        """(B, n, c): cosines with tokens (c,), the same of every image."""
        if self._all is not None and len(index) == self._all.shape[2]:
            return self._all
        return self.unit @ self.unit[:, index].transpose(1, 2)


def k_centres(likeness: Likeness, weight: Tensor, first: Tensor, count: int) -> Tensor:
    """The token that is least like its most alike chosen one, by weight: (1 - max cosine) * weight.

    Args:
        likeness: of the tokens.
        weight: (B, n), above 0.
        first: (B,) the token to begin with.
        count: k, at least 1.

    Returns:
        (B, k) indices in the order of choice.
    """
    chosen = [first]
    nearest = likeness.row(first).clamp_max(1)  # rounding must not make alike tokens negative
    score = torch.empty_like(nearest)
    for _ in range(count - 1):
        nearest.scatter_(1, chosen[-1][:, None], torch.inf)  # 1 - inf: not again
        torch.sub(1, nearest, out=score)
        chosen.append(score.mul_(weight).argmax(1))
        torch.maximum(nearest, likeness.row(chosen[-1]).clamp_max_(1), out=nearest)
    return torch.stack(chosen, 1)


def log_det(likeness: Likeness, quality: Tensor | None, count: int) -> Tensor:
    """The token that adds most to the volume that the chosen ones span (MAP of a DPP, greedily).

    Of the kernel quality_i * cosine_ij * quality_j, by an incremental Cholesky factor (Chen et al.,
    "Fast Greedy MAP Inference for Determinantal Point Process", arXiv 1709.05135, algorithm 1).
    Vectors of D channels span no more than D dimensions, after which rounding would choose. So of
    many tokens a round takes at most D / :data:`BASIS`, and the next one starts anew with those
    that are left.

    Args:
        likeness: of the tokens.
        quality: (B, n), from above 0 to 1; None: 1 for all.
        count: k, at least 1.

    Returns:
        (B, k) indices in the order of choice.
    """
    images, n, width = likeness.unit.shape
    most = min(count, max(1, width // BASIS))
    image = torch.arange(images, device=likeness.unit.device)
    whole = likeness.unit.any(-1).float()  # not the squares: among equals rounding would choose
    if quality is not None:
        whole = whole * quality.square()
    factor = likeness.unit.new_empty(images, most, n)
    chosen = torch.empty(images, count, dtype=torch.int64, device=image.device)
    left = whole.clone()
    for step in range(count):
        have = step % most  # chosen in this round
        if have == 0:
            left.copy_(whole)
        # What is smaller is a tie. Nobody is chosen twice.
        left.clamp_(min=_SMALLEST).scatter_(1, chosen[:, :step], -torch.inf)
        best = left.argmax(1)
        chosen[:, step] = best
        row = likeness.row(best)
        if quality is not None:
            row = row * quality * quality[image, best][:, None]
        before = factor[:, :have]
        of_best = before[image, :, best][:, None]
        row = torch.baddbmm(row[:, None], of_best, before, alpha=-1)[:, 0]
        row = row / left[image, best].sqrt()[:, None]
        factor[:, have] = row
        left = left - row.square()
    return chosen


def coverage(likeness: Likeness, weight: Tensor, seen: Tensor, count: int) -> Tensor:
    """The token that makes others most alike to a chosen one, by weight.

    Its gain is the sum over tokens j of what max cosine to a chosen token, at least 0, grows by.

    Args:
        likeness: of the tokens.
        weight: (B, n), above 0.
        seen: (c,) the tokens j that count.
        count: k, at least 1.

    Returns:
        (B, k) indices in the order of choice.
    """
    cosines = likeness.columns(seen)
    covered = cosines.new_zeros(len(cosines), 1, cosines.shape[2])
    image = torch.arange(len(cosines), device=cosines.device)
    raised, chosen = torch.empty_like(cosines), list[Tensor]()
    taken = torch.zeros_like(weight)
    for _ in range(count):
        torch.maximum(cosines, covered, out=raised)
        gain = raised.sum(2).sub_(covered.sum(2)).clamp_(min=0)
        best = gain.mul_(weight).add_(taken).argmax(1)
        chosen.append(best)
        taken.scatter_(1, best[:, None], -torch.inf)
        torch.maximum(covered, cosines[image, best][:, None], out=covered)
    return torch.stack(chosen, 1)
