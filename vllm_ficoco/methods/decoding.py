# SPDX-License-Identifier: Apache-2.0
"""What a method may look at inside the decoder, and what it says about itself there.

Queries, keys and values are those of the layer at which tokens leave, computed before they do, of
the image's tokens and of the text behind the image; rotary positions applied. Attention among
them is normalised over the image alone: how it divides among the image's tokens does not depend
on what stands before the image, which a cached prefix would not show again.

Shapes as in :mod:`vllm_ficoco.methods.paradigm`; M text tokens, G key-value heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from vllm_ficoco.methods.paradigm import (
    EVIDENCE_BYTES,
    AttentionKind,
    DecoderPart,
    Method,
    Options,
    Remembering,
    once,
    take,
)
from vllm_ficoco.vision.layout import Layout, Raster

Heads = Sequence[Tensor]
"""Query (B, H, n, d), key and value (B, G, n, d); an engine may compute each when it is asked for.
"""


def rows_of_heads(x: Tensor, index: Tensor) -> Tensor:
    """(B, heads, k, d): of (B, heads, n, d) the tokens by index (B, k)."""
    flat = take(x.transpose(1, 2).flatten(2), index)
    return flat.unflatten(2, (x.shape[1], -1)).transpose(1, 2)


@dataclass(frozen=True)
class DecoderEvidence(Remembering):
    """What a filter may look at in one layer of the decoder; computed when first asked for.

    With tensor parallelism these are this rank's heads, and averages run over those of all ranks.
    """

    look_at_image: Callable[[], Heads]
    look_at_text: Callable[[], Heads]
    """Of the text behind the image; of the image's last token where there is none."""
    read_text: Callable[[], Tensor]
    """Of that text, the hidden states, (B, M, D)."""
    final_norm: Tensor
    """(D,): weight of the norm behind the decoder's last layer."""
    lot: Tensor
    """(B, 1) int64: a number drawn by the image, for methods that choose by lot; 0 for others."""
    grid: tuple[int, int]
    """Rows and columns of the image's patches, which the tokens' positions refer to."""
    scale: float
    """Factor of the query-key products."""
    heads: int
    """H over all ranks."""
    sum_over_ranks: Callable[[Tensor], Tensor] = field(default=lambda x: x)
    rasters: tuple[Raster, ...] = ()
    """Of images in tiles, what the tokens' positions refer to instead of the grid."""
    noted: Tensor | None = None
    """(B, ...): what the method's ``note`` has made of the decoder's input; None without one."""
    before: tuple[Tensor, Tensor] | None = None
    """Of this rank's heads, :attr:`key_lengths_before`; None for methods that do not ask for it."""
    _known: dict[tuple[Any, ...], Any] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def _image(self) -> Heads:
        return self.look_at_image()

    @cached_property
    def _text(self) -> Heads:
        return self.look_at_text()

    @cached_property
    def text_hidden(self) -> Tensor:
        """(B, M, D): hidden states of the text behind the image."""
        return self.read_text()

    def _probabilities(self, query: Tensor, key: Tensor, hidden: Tensor | None = None) -> Tensor:
        """(B, rows, columns) float32: mean over heads of the softmax of scaled products.

        As many heads at once as memory allows.

        Args:
            query: (B, H, rows, d).
            key: (B, G, columns, d); every key head is shared by H / G query heads.
            hidden: (rows, columns) bool, which products to leave out.
        """
        rows, columns, shared = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
        # By the size of one image: the order of the sum must not depend on who shares the batch.
        at_once = max(1, EVIDENCE_BYTES // (4 * rows * columns * shared))
        total = torch.zeros((), device=query.device)
        for first in range(0, key.shape[1], at_once):
            keys = key[:, first : first + at_once].float()
            queries = query[:, first * shared : (first + at_once) * shared].float() * self.scale
            queries = queries.unflatten(1, (-1, shared)).flatten(2, 3)
            products = (queries @ keys.transpose(-1, -2)).unflatten(2, (shared, rows)).flatten(1, 2)
            if hidden is not None:
                products.masked_fill_(hidden, -torch.inf)
            total = total + products.softmax(-1).sum(1)
        return self.sum_over_ranks(total) / self.heads

    def _logits(self, query: Tensor, key: Tensor) -> Tensor:
        """(B, rows, columns) float32: mean over heads of scaled products.

        A sum over heads of products is one product of all heads side by side; those of the queries
        that share a key are added up before it.

        Args:
            query: (B, H, rows, d).
            key: (B, G, columns, d).
        """
        query = query.unflatten(1, (key.shape[1], -1)).sum(2, dtype=torch.float32)
        queries, keys = (x.transpose(1, 2).flatten(2) for x in (query, key.float()))
        products = queries @ keys.transpose(-1, -2)
        return self.sum_over_ranks(products) * (self.scale / self.heads)

    def _mean_over_heads(self, kind: AttentionKind, query: Tensor, key: Tensor) -> Tensor:
        return (self._logits if kind == "logits" else self._probabilities)(query, key)

    @once
    def attention_from_text(self, kind: AttentionKind = "probabilities") -> Tensor:
        """(B, M, n): A_kj, what text token k draws from the image's token j; mean over heads."""
        return self._mean_over_heads(kind, self._text[0], self._image[1])

    def attention_from_last(self) -> Tensor:
        """(B, n): what the last token draws from the image's; mean over heads."""
        last = self._text[0][:, :, -1:]
        return self._probabilities(last, self._image[1])[:, 0]

    def attention_to_text(self, kind: AttentionKind = "probabilities") -> Tensor:
        """(B, n, M): A_ik, what token i of the image would draw from text token k.

        No such attention takes place, as the text comes later; probabilities are normalised over
        the text.
        """
        return self._mean_over_heads(kind, self._image[0], self._text[1])

    @once
    def attention_among(self, kind: AttentionKind = "probabilities", causal: bool = True) -> Tensor:
        """(B, n, n): A_ij, what token i of the image draws from token j; mean over heads.

        Args:
            kind: probabilities are normalised over the image.
            causal: zero where j comes after i, as the decoder attends.
        """
        query, key = self._image[0], self._image[1]
        if not causal:
            return self._mean_over_heads(kind, query, key)
        n = query.shape[2]
        later = torch.ones(n, n, dtype=torch.bool, device=query.device).triu(1)
        if kind == "logits":
            return self._logits(query, key).masked_fill(later, 0.0)
        return self._probabilities(query, key, later)

    def attention_given(self, kind: AttentionKind = "probabilities", causal: bool = True) -> Tensor:
        """(B, n): mean over j of A_ij: what a token draws from the image's tokens."""
        if kind == "logits" and not causal:
            query, key = self._image[0], self._image[1]
            return self._logits(query, key.mean(2, keepdim=True, dtype=torch.float32))[..., 0]
        return self.attention_among(kind, causal).mean(-1)

    def attention_between(
        self,
        source: Tensor,
        target: Tensor,
        kind: AttentionKind = "probabilities",
        causal: bool = True,
    ) -> Tensor:
        """(B, S, T): A_ij, i in ``source`` (B, S) and j in ``target`` (B, T)."""
        if kind == "logits" and not causal:
            query, key = self._image[0], self._image[1]
            return self._logits(rows_of_heads(query, source), rows_of_heads(key, target))
        among = take(self.attention_among(kind, causal), source)
        return among.gather(2, target[:, None].expand(-1, source.shape[1], -1))

    def spots(self, position: Tensor) -> Tensor:
        """(B, n, 2): row and column of tokens at positions (B, n), in sides of the image."""
        rasters = self.rasters or (Layout(self.grid).raster(reduced=True),) * len(position)
        pairs = zip(rasters, position, strict=True)
        return torch.stack([raster.spots(number) for raster, number in pairs])

    def _norms(self, x: Tensor) -> Tensor:
        return self.sum_over_ranks(x.float().square().sum((1, 3))).sqrt()

    @property
    def key_norms(self) -> Tensor:
        """(B, n): length of a token's key, all heads together."""
        return self._norms(self._image[1])

    @property
    def key_lengths_before(self) -> tuple[Tensor, Tensor]:
        """(B, n) of the image, (B, M) of the text: sum of the absolute values of a token's key in
        the layer before the one at which tokens leave, all heads together."""
        assert self.before is not None
        image, text = self.before
        return self.sum_over_ranks(image), self.sum_over_ranks(text)

    @property
    def value_norms(self) -> Tensor:
        """(B, n): length of a token's value, all heads together."""
        return self._norms(self._image[2])


class DecoderOptions(Options):
    """Options of every method inside the decoder."""

    tokens: list[Annotated[int, Field(ge=0)]] | None = None
    """How many tokens to keep at each place of reduction, instead of a budget: (after the tower,
    where the method reduces there, and) at each stage."""


def in_decoder(
    name: str, idea: str, paper: str, part: DecoderPart, options: type[Options] = DecoderOptions
) -> Method:
    """A method that reduces in the decoder alone."""

    def nothing_leaves(*_: Any) -> Tensor:
        raise NotImplementedError(f"{name} does not reduce outside the decoder")

    return Method(
        name=name,
        idea=idea,
        paper=paper,
        place="nowhere",
        needs=frozenset(),
        schedule=lambda *_: [],
        filter=nothing_leaves,
        options=options,
        decoder=part,
    )
