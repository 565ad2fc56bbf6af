# SPDX-License-Identifier: Apache-2.0
"""Filter, correlate, compress: the pieces that every method is put together from.

Han et al., "Rethinking Token Reduction in MLLMs" (arXiv 2411.17686), section 2.3:

1. *filter* scores how redundant every token is and picks the source set S that leaves;
2. *correlate* weighs every token of S against the target set T that stays: C, |S| x |T|;
3. *compress* folds S into T by C. Pruning is the case without 2 and 3.

Everything is batched over images and stays on the device: nothing makes the host wait, and there
is no loop over tokens but one, of methods whose every choice depends on the one before it
(:mod:`vllm_ficoco.methods.greedy`): as many steps as tokens are kept, each over all of them.
Shapes: B images, n tokens, D channels, H heads, S and T the sizes of the two sets. Ties are broken
in favour of the lower index, on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial, wraps
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from vllm_ficoco import schedule
from vllm_ficoco.schedule import Stage

AttentionKind = Literal["probabilities", "logits"]

Found = TypeVar("Found")

Need = Literal["scaling", "layers", "attention", "frames"]
"""What a method can ask of a model: ``scaling`` of an image to fewer tokens by its processor;
``layers`` of the vision tower between which tokens can leave; ``attention``: queries and keys of
the tower's last layer; ``frames``, which an image has in no model. The tokens themselves, their
grid and the pixels are always there."""

NEEDS: dict[Need, str] = {
    "scaling": "to scale an image down to fewer tokens before the tower",
    "layers": "layers of the vision tower between which tokens can leave",
    "attention": "queries and keys of the vision tower's last layer",
    "frames": "the frames of a video",
}
"""In the words of a refusal."""


class Options(BaseModel):
    """Base of the options of a method: unknown names and wrong types are refused."""

    # An alias is the only spelling of its option: clients write "lambda", Python cannot.
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, serialize_by_alias=True
    )


class VisionOptions(Options):
    """Options of every method that reduces before the decoder."""

    newlines: Annotated[Literal["none", "all"], Field(exclude_if=lambda value: value == "none")] = (
        "none"
    )
    """Of an image in tiles (LLaVA-NeXT, LLaVA-OneVision), whether the newline tokens behind its
    rows stay, within the budget; ``none``: they leave before any patch does."""
    frames: Annotated[
        Literal["even", "unique"], Field(exclude_if=lambda value: value == "even")
    ] = "even"
    """Of a video, how its frames share the budget: equally, or those that are least like the whole
    video get up to three times as much as those that are most like it
    (:func:`vllm_ficoco.schedule.by_rank`)."""


@dataclass(frozen=True)
class Tokens:
    """The visual tokens of B images at one place, [CLS] not among them."""

    hidden: Tensor
    """(B, n, D)"""
    position: Tensor
    """(B, n) int64: the grid place of every token, in raster order; ascending, but for a token
    that a method has added (EViT)."""
    size: Tensor
    """(B, n) float32: how many patches a token stands for; kept by methods with proportional
    attention, which alone look at it."""

    @classmethod
    def of(cls, hidden: Tensor) -> Tokens:
        """All tokens of the grid, none merged."""
        batch, n = hidden.shape[:2]
        position = torch.arange(n, device=hidden.device).expand(batch, n)
        return cls(hidden, position, hidden.new_ones(batch, n, dtype=torch.float32))

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states, positions and sizes."""
        return self.hidden, self.position, self.size

    def of_images(self, which: slice) -> Tokens:
        """Those of some of the images."""
        return Tokens(*(x[which] for x in self.tensors))

    def with_hidden(self, hidden: Tensor) -> Tokens:
        """The same tokens after a layer has changed their values."""
        return replace(self, hidden=hidden)

    def __len__(self) -> int:
        return self.hidden.shape[1]


EVIDENCE_BYTES = 256 * 2**20
"""What a method may hold at once of what grows with the square of an image, in float32: it comes on
top of what vLLM has reserved. What is larger takes turns: heads, images, blocks of tokens."""

SAMPLED = 256
"""Of how many tokens at most the patches are asked what they attend to, where a tower merges
patches: see :meth:`Evidence.attention_received`."""


def once(look: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Remembers what a method of evidence returned: to choose and to merge ask for the same."""

    @wraps(look)
    def remembering(self: Any, *args: Any) -> Tensor:
        found: Tensor = self.remember((look.__name__, *args), lambda: look(self, *args))
        return found

    return remembering


def in_turns(look: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Looks at as many images at a time as :data:`EVIDENCE_BYTES` allow, at least at one."""

    @wraps(look)
    def looking(self: Evidence, *args: Any) -> Tensor:
        # What one image takes, whoever else is there: three copies, see Evidence._attend.
        images, heads, patches, width = self.key.shape
        at_once = max(1, EVIDENCE_BYTES // (12 * patches * max(patches, heads * width)))
        if images <= at_once:
            return look(self, *args)
        found = []
        for first in range(0, images, at_once):
            some = slice(first, first + at_once)
            theirs = [x[some] if isinstance(x, Tensor) else x for x in args]
            found.append(look(self.of_images(some), *theirs))
        return torch.cat(found)

    return looking


class Remembering:
    """Evidence of either kind: what one step of a method has found is there for the next one."""

    _known: dict[tuple[Any, ...], Any]

    def remember(self, what: tuple[Any, ...], find: Callable[[], Found]) -> Found:
        """What was found from this evidence, once.

        Args:
            what: a name, and all that the finding depends on and that is not the evidence's own.
            find: the work.
        """
        if what not in self._known:
            self._known[what] = find()
        found: Found = self._known[what]
        return found


@dataclass(frozen=True)
class Evidence(Remembering):
    """What a filter may look at in one layer of the vision tower.

    ``query`` and ``key`` hold this rank's heads of all patches that the layer attends over, [CLS]
    first where the tower has one. Averages over heads run over the heads of all ranks:
    ``sum_over_ranks`` adds a tensor up over the ranks of a tensor parallel tower.

    All that it says is about tokens. Where the tower merges ``unit`` patches into one, a token
    gives what its patches give on average; of probabilities it receives what they receive
    together, of logits what they receive on average, which is the product of the mean query and
    the mean key; its key is the mean of theirs. What is quadratic in patches is worked out in
    blocks of queries.
    """

    query: Tensor
    """(B, H, m, d), m = unit * n patches, a token's side by side; one more with [CLS]"""
    key: Tensor
    """(B, H, m, d)"""
    scale: float
    """Factor of the query-key products, 1 / sqrt(d) in most towers."""
    grid: tuple[int, int]
    """Rows and columns of the grid of tokens that positions refer to."""
    has_cls: bool
    pixels: Tensor
    """(B, ...): for methods that only want to tell images apart."""
    heads: int = 0
    """Heads over all ranks; 0: the heads given are all there are."""
    unit: int = 1
    """How many patches the tower merges into one token."""
    sum_over_ranks: Callable[[Tensor], Tensor] = field(default=lambda x: x)
    question: Tensor | None = None
    """(B, C), for methods that ask: the mean of the question's words, each a unit vector of the
    language model's table; 0 where there are none."""
    project: Callable[[Tensor], Tensor] = field(default=lambda x: x)
    """Tokens (..., D) as the language model will get them, (..., C)."""
    _known: dict[tuple[Any, ...], Any] = field(default_factory=dict, init=False, repr=False)

    def of_images(self, which: slice | Tensor) -> Evidence:
        """That of some of the images, a run of them or by number."""
        return replace(
            self,
            query=self.query[which],
            key=self.key[which],
            pixels=self.pixels[which],
            question=None if self.question is None else self.question[which],
        )

    @property
    def _heads(self) -> int:
        return self.heads or self.query.shape[1]

    @property
    def _first(self) -> int:
        """Index of the first patch in ``query`` and ``key``."""
        return int(self.has_cls)

    @property
    def _tokens(self) -> int:
        return (self.key.shape[2] - self._first) // self.unit

    def _patches(self, index: Tensor) -> Tensor:
        """(B, k * unit): where in ``query`` and ``key`` the patches of tokens (B, k) are."""
        if self.unit > 1:
            within = torch.arange(self.unit, device=index.device)
            index = (index[..., None] * self.unit + within).flatten(-2)
        return index + self._first

    def _fold(self, x: Tensor, dim: int, mean: bool) -> Tensor:
        """Of patches along a dimension, tokens: their mean or their sum."""
        if self.unit == 1:
            return x
        x = x.unflatten(dim, (-1, self.unit))
        within = dim if dim < 0 else dim + 1
        return x.mean(within) if mean else x.sum(within)

    def _attend(
        self, rows: Tensor, look: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[float, Tensor]]:
        """Mean over heads of ``look(probabilities)``, of one block of queries after another.

        Args:
            rows: (B, r) or (1, r) whose queries: all patches of some tokens.
            look: of (B, rows of a block, m), what is wanted.

        Yields:
            The block's share of the rows, and the mean.
        """
        # Scores, probabilities and what is picked of them. By the size of one image, and one head
        # at a time: the order of a sum must not depend on who shares the batch.
        images, heads, patches, _ = self.key.shape
        at_once = max(1, EVIDENCE_BYTES // (12 * patches * self.unit)) * self.unit
        for block in rows.expand(images, -1).split(at_once, 1):
            total = torch.zeros((), device=rows.device)
            for head in range(heads):
                queries = take(self.query[:, head], block).float() * self.scale
                scores = queries @ self.key[:, head].float().transpose(-1, -2)
                total = total + look(scores.softmax(-1))
            share = block.shape[1] / rows.shape[1]
            yield share, self.sum_over_ranks(total) / self._heads

    def _mean_flat(self, x: Tensor, index: Tensor | slice) -> Tensor:
        """(B, k, H * d) float32: of query or key, tokens by index (B, k) or a run of them, heads
        side by side, mean over a token's patches."""
        flat = x.transpose(1, 2).flatten(2)
        if isinstance(index, Tensor) and self.unit == 1:
            patches = take(flat[:, self._first :], index)
        elif isinstance(index, Tensor):
            patches = take(flat, self._patches(index))
        else:
            first, last = (self._first + i * self.unit for i in (index.start, index.stop))
            patches = flat[:, first:last]
        return self._fold(patches.float(), 1, mean=True)

    def _runs(self, tokens: int) -> list[slice]:
        """So many tokens in runs whose queries and keys, heads side by side, can be held."""
        _, heads, __, width = self.key.shape
        at_once = max(1, EVIDENCE_BYTES // (12 * self.unit * heads * width))
        return [slice(i, min(i + at_once, tokens)) for i in range(0, tokens, at_once)]

    def _mean_of_all(self, x: Tensor) -> Tensor:
        """(B, 1, H * d): mean over all tokens of query or key, heads side by side."""
        total = torch.zeros((), device=x.device)
        for run in self._runs(self._tokens):
            share = (run.stop - run.start) / self._tokens
            total = total + share * self._mean_flat(x, run).mean(1, keepdim=True)
        return total

    def _logits(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Mean over heads of scaled products of flat queries and keys."""
        return self.sum_over_ranks(queries @ keys.transpose(-1, -2)) * (self.scale / self._heads)

    @once
    @in_turns
    def attention_of_cls(self, kind: AttentionKind = "probabilities") -> Tensor:
        """(B, n): attention of [CLS] to every token, mean over heads.

        Without [CLS] (SigLIP, Qwen-VL), what a token receives, :meth:`attention_received`.
        """
        if not self.has_cls:
            return self.attention_received(kind)
        if kind == "logits":
            query = self.query[:, :, :1].transpose(1, 2).flatten(2).float()
            runs = self._runs(self._tokens)
            return torch.cat(
                [self._logits(query, self._mean_flat(self.key, run))[:, 0] for run in runs], -1
            )
        rows = torch.zeros(1, 1, dtype=torch.int64, device=self.key.device)
        ((_, attention),) = self._attend(rows, lambda p: p[:, 0, 1:])
        return self._fold(attention, -1, mean=False)

    @in_turns
    def attention_received(self, kind: AttentionKind = "probabilities") -> Tensor:
        """(B, n): attention that a token receives, mean over the patches that give and heads.

        Probabilities are quadratic in patches: in float32 some 2 % of the time of a Qwen2.5-VL-7B
        tower at 1,296 tokens (5,184 patches), some 15 % at 4,096 tokens. So of a tower
        that merges patches those of at most :data:`SAMPLED` tokens are asked, the middles of as
        many windows of the grid: 0.4 to 1.1 % from 256 to 16,384 tokens, on one CPU thread. Of our
        own model, its [CLS] left out, Top-K answers 500 questions as well when a quarter or a ninth
        of the tokens are asked as when all are (54.6 and 53.6 % at a budget of 36, 54.2 % with
        all); by logits, which cost next to nothing, worse (43.0 %).
        """
        if kind == "logits":
            query = self._mean_of_all(self.query)
            runs = self._runs(self._tokens)
            return torch.cat(
                [self._logits(query, self._mean_flat(self.key, run))[:, 0] for run in runs], -1
            )
        first = self._first
        rows = torch.arange(first, self.key.shape[2], device=self.key.device)[None]
        if self.unit > 1 and self._tokens > SAMPLED:
            rows = self._patches(grid_windows(self.grid, SAMPLED, rows.device)[2][None])
        blocks = self._attend(rows, lambda p: p[..., first:].mean(-2))
        # Of a single block the share is 1, which changes no bit.
        received = torch.zeros((), device=self.key.device)
        for share, part in blocks:
            received = received + share * part
        return self._fold(received, -1, mean=False)

    @in_turns
    def attention_given(self, kind: AttentionKind = "probabilities") -> Tensor:
        """(B, n): mean over patches j of A_ij, i the query: what a token draws from the others."""
        if kind == "logits":
            key = self._mean_of_all(self.key)
            runs = self._runs(self._tokens)
            return torch.cat(
                [self._logits(self._mean_flat(self.query, run), key)[..., 0] for run in runs], -1
            )
        if self.unit > 1 and not self.has_cls:  # all of it goes to patches: no need to look
            share = 1 / self.key.shape[2]
            return torch.full((len(self.key), self._tokens), share, device=self.key.device)
        first = self._first
        rows = torch.arange(first, self.key.shape[2], device=self.key.device)[None]
        blocks = self._attend(rows, lambda p: p[..., first:].mean(-1))
        return self._fold(torch.cat([given for _, given in blocks], -1), -1, mean=True)

    @in_turns
    def attention_between(
        self, source: Tensor, target: Tensor, kind: AttentionKind = "probabilities"
    ) -> Tensor:
        """(B, S, T): A_ij, queries from ``source``, keys from ``target``, mean over heads."""
        if kind == "logits":
            queries = self._mean_flat(self.query, source)
            runs = self._runs(target.shape[1])
            parts = (target[:, run] for run in runs) if len(runs) > 1 else (target,)
            keys = (self._mean_flat(self.key, part) for part in parts)
            return torch.cat([self._logits(queries, key) for key in keys], -1)
        columns = self._patches(target)[:, None]

        def pick(p: Tensor) -> Tensor:
            picked = p.gather(2, columns.expand(-1, p.shape[1], -1))
            return self._fold(self._fold(picked, 2, mean=False), 1, mean=True)

        blocks = self._attend(self._patches(source), pick)
        return torch.cat([between for _, between in blocks], 1)

    @cached_property
    def mean_keys(self) -> Tensor:
        """(B, n, d): keys of the tokens, mean over heads."""
        return self._mean_keys()

    @in_turns
    def _mean_keys(self) -> Tensor:
        first, means = self._first, []
        for run in self._runs(self._tokens):
            keys = self.key[:, :, first + run.start * self.unit : first + run.stop * self.unit]
            means.append(self._fold(keys.float().sum(1), 1, mean=True))
        return self.sum_over_ranks(torch.cat(means, 1)) / self._heads

    @cached_property
    def unit_keys(self) -> Tensor:
        """(B, n, d): the same with length 1, so that products are cosines; or 0."""
        return torch.nn.functional.normalize(self.mean_keys, dim=-1)

    def cosine_of_keys(self, source: Tensor, target: Tensor) -> Tensor:
        """(B, S, T): how much the keys of ``source`` (B, S) and ``target`` (B, T) are alike."""
        return take(self.unit_keys, source) @ take(self.unit_keys, target).transpose(-1, -2)

    def relevance(self, hidden: Tensor) -> Tensor:
        """(B, n): cosine of a token with a word of its image's question, mean over the words.

        Of tokens (B, n, D) as the language model will get them, and words likewise; 0 without any.
        """
        assert self.question is not None, "the method does not say that it asks"
        images, width = self.question.shape
        at_once = max(1, EVIDENCE_BYTES // (12 * images * max(width, hidden.shape[2])))
        found = []
        for run in hidden.split(at_once, 1):
            tokens = self.project(run).float()
            along = (tokens @ self.question[..., None])[..., 0]
            found.append(along / tokens.norm(dim=-1).clamp_min(1e-12))
        return torch.cat(found, 1)


# --- The contract of a method -------------------------------------------------------------------

# The evidence is an Evidence, or inside the decoder a DecoderEvidence.
Filter = Callable[[Tokens, Any, int, Any], Tensor]
"""(tokens, evidence, how many leave, options) -> (B, S) indices of the leaving tokens."""

Correlate = Callable[[Tokens, Any, Tensor, Tensor, Any], Tensor]
"""(tokens, evidence, source, target, options) -> C, (B, S, T)."""

Compress = Callable[[Tokens, Any, Tensor, Tensor, Tensor, Any], Tokens]
"""(tokens, evidence, source, target, C, options) -> the tokens that stay."""


Weigh = Callable[[Tokens, Any, Tensor, Tensor, Tensor, Any], Tensor]
"""The same arguments -> (B, S, T) what of i goes to j, for :func:`merge`. A compress that is that
average and no more: it is asked for one block of C at a time, see :attr:`Method.by`."""


def reduce(steps: Method | Steps, tokens: Tokens, evidence: Any, keep: int, options: Any) -> Tokens:
    """Filter, correlate, compress: ``keep`` tokens of each image stay, in raster order.

    Args:
        steps: the three functions.
        tokens: what is there, more than ``keep`` of it.
        evidence: of the layer.
        keep: how many tokens are left, at least 1.
        options: an instance of the method's options.
    """
    leave = len(tokens) - keep + steps.added
    source, target = divide(steps.filter(tokens, evidence, leave, options), len(tokens))
    if isinstance(steps, Method) and steps.weigh is not None:
        return _reduce_in_turns(steps, tokens, evidence, source, target, options)
    if steps.correlate is None or steps.compress is None:
        return prune(tokens, target)
    weights = steps.correlate(tokens, evidence, source, target, options)
    return steps.compress(tokens, evidence, source, target, weights, options)


def blocks_of(one: Tensor, other: Tensor) -> tuple[Tensor, ...]:
    """One of source and target, (B, k), in blocks for which C can be worked on.

    To sort an entry takes six times its size, and no step takes more. By the size of one image: the
    order of a sum must not depend on who shares the batch.
    """
    return one.split(max(1, EVIDENCE_BYTES // (24 * max(other.shape[1], 1))), 1)


def _reduce_in_turns(
    method: Method, tokens: Tokens, evidence: Any, source: Tensor, target: Tensor, options: Any
) -> Tokens:
    """Correlate, weigh and merge, one block of C after another."""

    def weights(target: Tensor, source: Tensor) -> Tensor:
        assert method.correlate is not None and method.weigh is not None
        correlation = method.correlate(tokens, evidence, source, target, options)
        return method.weigh(tokens, evidence, source, target, correlation, options)

    if method.by == "source":
        return merge(tokens, blocks_of(source, target), target, partial(weights, target))
    kept, first = prune(tokens, target), 0
    for block in blocks_of(target, source):
        last = first + block.shape[1]
        kept.hidden[:, first:last] = merge(tokens, [source], block, partial(weights, block)).hidden
        first = last
    return kept


@dataclass(frozen=True)
class Steps:
    """The three steps at a stage of the decoder; their evidence is a ``DecoderEvidence``."""

    filter: Filter
    correlate: Correlate | None = None
    compress: Compress | None = None
    added: int = 0


@dataclass(frozen=True)
class DecoderPart:
    """What a method does inside the decoder, before the layers that start its stages."""

    layers: tuple[int, ...]
    """The layers, 0-based, of the published decoder: 32 of them."""
    steps: tuple[Steps, ...]
    """For every one of them; the last for all further ones."""
    every_stage: bool = False
    """It reduces at every stage that the server has; else at as many as are published."""
    looks_at_question: bool = True
    """What it keeps depends on the text behind the image."""
    by_lot: bool = False
    """It chooses by :attr:`DecoderEvidence.lot`, which is not drawn for others."""
    note: Callable[[Tensor, Tensor], Tensor] | None = None
    """What it notes of the decoder's input, for :attr:`DecoderEvidence.noted` at all its stages:
    (the image's tokens (B, n, D), the text behind it (B, M, D)) -> (B, ...)."""
    looks_before: bool = False
    """It asks for :attr:`DecoderEvidence.key_lengths_before`, which are not measured for others."""
    on_one_grid: str = ""
    """An option that asks for windows of the image's grid where it is not left at its default:
    tokens of thumbnail and tiles lie on no common one, so it is refused for them."""
    shares: Callable[[int, int, int], list[int]] = schedule.equal_shares
    """(tokens, tokens kept by the first of them, how many) -> tokens kept by each place."""

    @property
    def least_stages(self) -> int:
        """How many stages a server must have for it."""
        return 1 if self.every_stage else len(self.layers)


@dataclass(frozen=True)
class Across:
    """How a method chooses among all parts of an image in tiles, on the tower's output."""

    layers: Callable[[int, Any], tuple[int, ...]]
    """(tower layers that run, options) -> the layers whose evidence it asks for, ascending."""
    thumbnail: Callable[[int, int, int, Any], int]
    """(patches that stay, places of the thumbnail, of all tiles together, options) -> patches of
    the thumbnail that stay: not more than it has, and not fewer than the tiles leave over."""
    choose: Callable[[Any, int, int, Any], Tensor]
    """(a :class:`vllm_ficoco.methods.parts.Parts`, patches of the thumbnail that stay, of all tiles
    together, options) -> (B, both) places that stay, ascending, in ``parts * places`` of a part."""


@dataclass(frozen=True)
class AcrossFrames:
    """How a method chooses among all frames of a video, on the tower's output."""

    shares: Callable[[int, int, int, Any], list[int]]
    """(patches that stay, frames, patches of one, options) -> how many stay of every frame. Raises
    ValueError with what would be allowed, for a number that cannot be reached."""
    choose: Callable[[Any, Any, Sequence[int], Any], Tensor]
    """(tokens (B, F, n, D), evidence over B * F frames, those shares, options) -> (B, patches that
    stay) places, ascending, in ``F * n``."""
    compress: Callable[[Any, Any, Tensor, Any], Tensor] | None = None
    """(the same tokens and evidence, those places, options) -> (B, patches that stay, D) what they
    become; None: they stay as they are."""
    by_content: bool = False
    """Which frame keeps how much is seen on the device, and of the shares only the sum holds."""


@dataclass(frozen=True)
class Method:
    """One way to reduce: a place, a schedule, the three steps; and what it does in the decoder."""

    name: str
    idea: str
    """One line for people who choose."""
    paper: str
    """Authors, title, arXiv number; empty for baselines that have no paper."""
    place: Literal["input", "tower", "output", "nowhere"]
    """``tower``: between attention and MLP of a layer. ``output``: on the last layer's output,
    with the evidence of that layer. ``nowhere``: in the decoder alone. ``input``: the image is
    scaled down before the tower."""
    schedule: Callable[[int, int, int, Any], list[Stage]]
    """(tokens, budget, tower layers that run, options) -> stages that end at the budget.
    Raises ValueError with what would be allowed, for a budget that cannot be reached."""
    filter: Filter
    correlate: Correlate | None = None
    compress: Compress | None = None
    weigh: Weigh | None = None
    """Instead of compress, where that is an average (:func:`merge`) by weights of its own."""
    by: Literal["source", "target"] = "source"
    """What a weight of ``weigh`` depends on besides its own entry of C: its row, those of the same
    source, or its column, those of the same target."""
    options: type[Options] = VisionOptions
    needs: frozenset[Need] = frozenset({"attention"})
    """What a tower must offer for it; see :data:`Need`."""
    asks_question: bool = False
    """It asks for :attr:`Evidence.question` before the decoder. What is kept of an image is then
    good for one question only: no cache gives it to another."""
    at_output: bool = False
    """Where a tower lets nothing leave between its layers, it reduces all at once on the output."""
    proportional_attention: bool = False
    """Layers attend with log(size) added to the scores, so that a merged token counts fully."""
    added: int = 0
    """New tokens that compress puts behind the targets at every stage (EViT: one)."""
    decoder: DecoderPart | None = None
    across: Across | None = None
    """How it compares the parts of an image in tiles; None: each part is reduced by itself."""
    across_frames: AcrossFrames | None = None
    """How it compares the frames of a video; such a method is for videos alone. None: each frame is
    reduced by itself."""

    @property
    def for_videos_alone(self) -> bool:
        """Whether it has nothing to say of an image."""
        return "frames" in self.needs

    def on_frames(self, options: Any) -> str:
        """How much every frame of a video keeps: ``fixed`` by counts, or by what is ``seen`` on the
        device."""
        if self.across_frames is not None:
            return "seen" if self.across_frames.by_content else "fixed"
        return "seen" if getattr(options, "frames", "even") == "unique" else "fixed"

    @property
    def places(self) -> list[str]:
        """Where it reduces: ``tower``, ``output``, ``decoder``."""
        return [
            p for p in (self.place, "decoder" if self.decoder else "") if p not in ("", "nowhere")
        ]

    @property
    def fits_a_graph(self) -> bool:
        """Whether a CUDA graph of the tower can hold what it does: nothing but work on the device,
        the same for every image, that ends in tokens. A question comes from the host, and a part in
        the decoder wants to know which tokens they are."""
        on_device = self.places in (["tower"], ["output"]) and not self.asks_question
        return on_device and not self.for_videos_alone

    def reduce(self, tokens: Tokens, evidence: Evidence, keep: int, options: Any) -> Tokens:
        """One stage of the vision part, see :func:`reduce`.

        Beside what it is given and what it returns it never holds more than three times
        :data:`EVIDENCE_BYTES`, however large an image is and however many there are.
        """
        images, n, width = tokens.hidden.shape
        at_once = max(1, EVIDENCE_BYTES // (12 * n * max(n, width)))
        if images <= at_once:
            return reduce(self, tokens, evidence, keep, options)
        left = Tokens(*(x.new_empty(images, keep, *x.shape[2:]) for x in tokens.tensors))
        for first in range(0, images, at_once):
            some = slice(first, first + at_once)
            theirs = tokens.of_images(some), evidence.of_images(some)
            parts = reduce(self, *theirs, keep, options).tensors
            for whole, part in zip(left.tensors, parts, strict=True):
                whole[some] = part
        return left


# --- Pieces to compose --------------------------------------------------------------------------


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of (B, n, D) or entries of (B, n) by index (B, k)."""
    if x.dim() == 2:
        return x.gather(1, index)
    # Whole rows at once; a gather would look up every element, several times as slow.
    if len(x) == 1:
        return x[0].index_select(0, index[0])[None]
    batch, n, width = x.shape
    step, odd = divmod(x.stride(0), max(x.stride(1), 1))
    if odd or step < n or x.stride(1) < 1 or x.stride(2) != 1:  # not rows at equal distances
        x, step = x.contiguous(), n
    # The rows of all images as one, no copy, though [CLS] be cut off of every image.
    rows = x.as_strided(((batch - 1) * step + n, width), (x.stride(1), 1))
    return rows.index_select(0, _numbers(index, step)).unflatten(0, index.shape)


def _numbers(index: Tensor, step: int) -> Tensor:
    """(B * k,): of index (B, k), in rows of which every image has so many.

    Kept with the index: hidden states, queries and keys are asked for the same.
    """
    known: dict[int, Tensor] = vars(index).setdefault("numbers", {})
    if step not in known:
        first = torch.arange(0, len(index) * step, step, device=index.device)
        known[step] = (index + first[:, None]).flatten()
    return known[step]


def highest(score: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` highest entries of every row; among equals the lower index."""
    return score.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def places(order: Tensor) -> Tensor:
    """(..., n) int64: at which place of an order of all tokens each of them stands."""
    number = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.zeros_like(order).scatter(-1, order, number)


def divide(index: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """``index`` (B, k) ascending, and the indices below ``n`` that are not in it, (B, n - k)."""
    present = torch.zeros(index.shape[0], n, dtype=torch.uint8, device=index.device)
    present.scatter_(1, index, 1)
    others, own = present.sort(dim=-1, stable=True).indices.tensor_split([n - index.shape[1]], -1)
    return own, others


def complement(index: Tensor, n: int) -> Tensor:
    """(B, n - k): the indices below ``n`` that are not in ``index`` (B, k), ascending."""
    return divide(index, n)[1]


def prune(tokens: Tokens, target: Tensor) -> Tokens:
    """Compress of a pruning method: the targets as they are."""
    return Tokens(
        take(tokens.hidden, target), take(tokens.position, target), take(tokens.size, target)
    )


def merge(
    tokens: Tokens,
    sources: Sequence[Tensor],
    target: Tensor,
    weigh: Callable[[Tensor], Tensor],
    own: Tensor | float = 1.0,
) -> Tokens:
    """Compress by weighted average: X_j <- (own_j X_j + sum_i w_ij X_i) / (own_j + sum_i w_ij).

    Computed in float32. A target that receives nothing keeps its value bit for bit.

    Args:
        tokens: before.
        sources: who leaves, in blocks (B, s).
        target: (B, T) who stays.
        weigh: of a block (B, s, T) what of i goes to j, not negative.
        own: (B, T) or a number: weight of the target's own value.
    """
    kept = prune(tokens, target)
    share = own[..., None] if isinstance(own, Tensor) else own
    if len(sources) == 1:
        whole = weigh(sources[0])
        weigh = lambda _: whole  # noqa: E731
    # Channels take turns, too, so that no copy in float32 is larger than it may be.
    rows = max(target.shape[1], sources[0].shape[1], 1)
    at_once = max(1, EVIDENCE_BYTES // (12 * rows))
    for first in range(0, tokens.hidden.shape[2], at_once):
        channels = slice(first, first + at_once)
        before = kept.hidden[..., channels]
        mixed, total = share * before.float(), torch.zeros((), device=before.device)
        for source in sources:
            weight = weigh(source)
            total = total + weight.sum(1)
            leaving = take(tokens.hidden[..., channels], source).float()
            mixed = mixed + weight.transpose(1, 2) @ leaving
        mixed = (mixed / (own + total)[..., None]).to(before.dtype)
        before.copy_(torch.where((total > 0)[..., None], mixed, before))
    return kept


def one_hot_of_highest(correlation: Tensor) -> Tensor:
    """(B, S, T): 1 where a source's correlation is highest, else 0 (K = 1)."""
    best = correlation.argmax(-1, keepdim=True)
    return torch.zeros_like(correlation).scatter_(2, best, 1.0)


def one_hot_among(correlation: Tensor, target: Tensor, barred: Tensor, n: int) -> Tensor:
    """The same among the targets (B, T) of n tokens that are not in ``barred`` (B, k); 0 if none is
    left."""
    receives = torch.ones(len(target), n, dtype=torch.bool, device=target.device)
    receives = take(receives.scatter(1, barred, False), target)
    correlation = correlation.masked_fill(~receives[:, None], -torch.inf)
    return one_hot_of_highest(correlation).masked_fill(correlation.isinf(), 0.0)


def quantile_per_row(x: Tensor, q: float) -> Tensor:
    """The q-quantile of every row, linearly interpolated, kept as a last dimension of 1.

    What ``torch.quantile`` gives, from the few highest entries instead of a full sort.
    """
    n = x.shape[-1]
    rank = q * (n - 1)
    low = min(int(rank), n - 1)
    top = x.topk(n - low, dim=-1).values
    lower, upper = top[..., -1:], top[..., -2:-1] if low + 1 < n else top[..., -1:]
    return torch.lerp(lower, upper, rank - low)


def quantile_of_blocks(blocks: Callable[[], Iterable[Tensor]], count: int, q: float) -> Tensor:
    """(B,): the q-quantile of so many numbers of every image, linearly interpolated.

    To the bit what :func:`quantile_per_row` gives, for numbers that need not be there at once: they
    are counted by the upper half of their bits, then by the lower one where the upper is that of
    the number looked for.

    Args:
        blocks: (B, ...) float32 of them after another, not negative, each time it is called.
        count: how many of an image they are together.
        q: from 0 to 1.
    """
    rank = q * (count - 1)
    low = min(int(rank), count - 1)

    def histogram(shift: int, above: Tensor | None = None) -> Tensor:
        """(B, 2 ** 16): how often 16 of the bits are what; of numbers with these bits above."""
        total: Tensor | None = None
        for block in blocks():
            bits = block.flatten(1).view(torch.int32)
            digit = (bits >> shift & 0xFFFF).long()
            counts = torch.ones_like(digit) if above is None else (bits >> 16 == above).long()
            if total is None:
                total = digit.new_zeros(len(digit), 1 << 16)
            total.scatter_add_(1, digit, counts)
        assert total is not None
        return total

    def find(often: Tensor, wanted: Tensor | int) -> tuple[Tensor, Tensor]:
        """(B, 1) the digit at a rank, from the lowest, and how many of its own are before it."""
        up_to = often.cumsum(1)
        found = (up_to <= wanted).sum(1, keepdim=True)
        return found, wanted - (up_to - often).gather(1, found)

    uppers, values = histogram(16), []
    for wanted in (low, min(low + 1, count - 1)):
        upper, behind = find(uppers, wanted)
        lower, _ = find(histogram(0, upper), behind)
        values.append((upper << 16 | lower).int().view(torch.float32)[:, 0])
    return torch.lerp(values[0], values[1], rank - low)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """(B, S, T): cosine similarity of the rows of (B, S, d) and (B, T, d)."""
    a, b = (torch.nn.functional.normalize(x.float(), dim=-1) for x in (a, b))
    return a @ b.transpose(-1, -2)


def distances(x: Tensor) -> Tensor:
    """(B, n, n) float32: Euclidean distances of tokens (B, n, D), as exact as float32 inputs are.

    By products, which take a sixth of the time of differences; in double precision, as in single
    their rounding would decide where tokens are long and alike. What is nearer than that is 0, so
    that equal tokens stay equal.
    """
    wide = x.double()
    squares = wide.square().sum(-1)
    both = squares[..., None] + squares[:, None]
    apart = torch.baddbmm(both, wide, wide.mT, alpha=-2)
    return apart.masked_fill_(apart < 1e-13 * both, 0.0).sqrt().float()


def on_device(values: list[int], device: torch.device) -> Tensor:
    """Numbers of the host on a device as int64, without waiting for it."""
    on_host = torch.tensor(values, dtype=torch.int64)
    if device.type == "cpu":
        return on_host
    return on_host.pin_memory().to(device, non_blocking=True)


def grid_windows(
    grid: tuple[int, int], count: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """A grid cut into exactly ``count`` rectangles of nearly equal size that cover it.

    The rows are shared out evenly among bands (:func:`vllm_ficoco.schedule.bands`), the windows
    among the bands, the columns among the windows of a band; windows count in raster order.

    Args:
        grid: rows and columns.
        count: from 1 to rows * columns.
        device: where to.

    Returns:
        (n,) the window of every place; (count,) the first and (count,) the middle place of every
        window.
    """
    (rows, columns), bands = grid, schedule.bands(grid, count)

    def shared(index: Tensor, of: Tensor | int, among: Tensor | int) -> Tensor:
        """To which of ``among`` nearly equal shares of ``of`` things each thing goes."""
        return ((index + 1) * among - 1) // of

    place = torch.arange(rows * columns, device=device)
    row, column = place // columns, place % columns
    band = shared(row, rows, bands)
    before, behind = band * count // bands, (band + 1) * count // bands
    owner = before + shared(column, columns, behind - before)

    window = torch.arange(count, device=device)
    band = shared(window, count, bands)
    before, behind = band * count // bands, (band + 1) * count // bands
    top, bottom = band * rows // bands, (band + 1) * rows // bands
    number, here = window - before, behind - before
    left, right = number * columns // here, (number + 1) * columns // here
    return owner, top * columns + left, (top + bottom) // 2 * columns + (left + right) // 2
