# SPDX-License-Identifier: Apache-2.0
"""What a method may look at inside the decoder, and what it says about itself there.

Queries, keys and values are those of the layer at which tokens leave, computed before they do, of
the image's tokens and of the text behind the image; rotary positions applied. Attention among
them is normalised over the image alone: how it divides among the image's tokens does not depend
on what stands before the image, which a cached prefix would not show again.

Shapes as in :mod:`vllm_ficoco.methods.paradigm`; M text tokens, G key-value heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, wraps
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from vllm_ficoco.methods.paradigm import AttentionKind, DecoderPart, Method, Options

Heads = tuple[Tensor, Tensor, Tensor]
"""Query (B, H, n, d), key and value (B, G, n, d)."""


def _once(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Remembers what a method of the evidence returned: to choose and to merge ask for the same."""

    @wraps(attention)
    def remembering(self: DecoderEvidence, *args: Any) -> Tensor:
        asked = (attention.__name__, *args)
        if asked not in self._known:
            self._known[asked] = attention(self, *args)
        return self._known[asked]

    return remembering


@dataclass(frozen=True)
class DecoderEvidence:
    """What a filter may look at in one layer of the decoder; computed when first asked for.

    With tensor parallelism these are this rank's heads, and averages run over those of all ranks.
    """

    look_at_image: Callable[[], Heads]
    look_at_text: Callable[[], Heads]
    """Of the text behind the image; of the image's last token where there is none."""
    text_hidden: Tensor
    """(B, M, D): that text's hidden states."""
    lot: Tensor
    """(B, 1) int64: a number drawn by the image, for methods that choose by lot."""
    grid: tuple[int, int]
    """Rows and columns of the image's patches, which the tokens' positions refer to."""
    scale: float
    """Factor of the query-key products."""
    heads: int
    """H over all ranks."""
    sum_over_ranks: Callable[[Tensor], Tensor] = field(default=lambda x: x)
    _known: dict[tuple[Any, ...], Tensor] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def _image(self) -> Heads:
        return self.look_at_image()

    @cached_property
    def _text(self) -> Heads:
        return self.look_at_text()

    def _logits(self, query: Tensor, key: Tensor) -> Tensor:
        """(B, H, rows, columns) float32: scaled products, key heads shared by query heads."""
        shared = query.shape[1] // key.shape[1]
        key = key.float().repeat_interleave(shared, 1)
        return query.float() * self.scale @ key.transpose(-1, -2)

    def _mean_over_heads(self, x: Tensor) -> Tensor:
        return self.sum_over_ranks(x.sum(1)) / self.heads

    @_once
    def attention_from_text(self, kind: AttentionKind = "probabilities") -> Tensor:
        """(B, M, n): A_kj, what text token k draws from the image's token j; mean over heads."""
        logits = self._logits(self._text[0], self._image[1])
        return self._mean_over_heads(logits.softmax(-1) if kind == "probabilities" else logits)

    def attention_from_last(self) -> Tensor:
        """(B, n): what the last token draws from the image's; mean over heads."""
        logits = self._logits(self._text[0][:, :, -1:], self._image[1])
        return self._mean_over_heads(logits.softmax(-1))[:, 0]

    def attention_to_text(self, kind: AttentionKind = "probabilities") -> Tensor:
        """(B, n, M): A_ik, what token i of the image would draw from text token k.

        No such attention takes place, as the text comes later; probabilities are normalised over
        the text.
        """
        logits = self._logits(self._image[0], self._text[1])
        return self._mean_over_heads(logits.softmax(-1) if kind == "probabilities" else logits)

    @_once
    def attention_among(self, kind: AttentionKind = "probabilities", causal: bool = True) -> Tensor:
        """(B, n, n): A_ij, what token i of the image draws from token j; mean over heads.

        Args:
            kind: probabilities are normalised over the image.
            causal: zero where j comes after i, as the decoder attends.
        """
        logits = self._logits(self._image[0], self._image[1])
        if not causal:
            return self._mean_over_heads(logits.softmax(-1) if kind == "probabilities" else logits)
        later = torch.ones_like(logits[0, 0], dtype=torch.bool).triu(1)
        if kind == "probabilities":
            return self._mean_over_heads(logits.masked_fill(later, -torch.inf).softmax(-1))
        return self._mean_over_heads(logits.masked_fill(later, 0.0))

    def _norms(self, x: Tensor) -> Tensor:
        return self.sum_over_ranks(x.float().square().sum((1, 3))).sqrt()

    @property
    def key_norms(self) -> Tensor:
        """(B, n): length of a token's key, all heads together."""
        return self._norms(self._image[1])

    @property
    def text_key_norms(self) -> Tensor:
        """(B, M): as :attr:`key_norms`, of the text."""
        return self._norms(self._text[1])

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
        schedule=lambda *_: [],
        filter=nothing_leaves,
        options=options,
        decoder=part,
    )
