# SPDX-License-Identifier: Apache-2.0
"""Runs a decoder in stages, whose first layers let go of visual tokens.

Works on vLLM's LLaMA, Mistral, Qwen2 and Qwen3 by the names of their parts. How many tokens an
image keeps in a stage follows from the rows that the attention metadata leave of it
(:mod:`vllm_ficoco.engine.attention`); which ones, and what becomes of the others, is the method's.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import get_forward_context
from vllm.sequence import IntermediateTensors
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_ficoco.engine.attention import Rows, Shared, enter_stage, watch_keys
from vllm_ficoco.engine.projection import cut, parts_of
from vllm_ficoco.engine.visual import Leaving, VisualTokens
from vllm_ficoco.methods.decoding import DecoderEvidence
from vllm_ficoco.methods.paradigm import EVIDENCE_BYTES, DecoderPart, Steps, Tokens, reduce
from vllm_ficoco.methods.random import lot_of
from vllm_ficoco.preview import Follower
from vllm_ficoco.settings import Reduction
from vllm_ficoco.vision.geometry import Geometry
from vllm_ficoco.vision.layout import Layout, Raster


@dataclass
class Image:
    """An image among the rows of a batch."""

    start: int
    end: int
    """Exclusive."""
    reduction: Reduction
    part: DecoderPart
    """Of its method."""
    steps: dict[int, Steps]
    """What happens to it, by stage."""
    places: Tensor
    """(n,) numbers of the tokens that are left by now."""
    raster: Raster
    lot: Tensor
    follower: Follower | None
    """Where somebody follows it."""
    noted: Tensor | None = None
    """What its method has noted of the decoder's input."""


class Batch(NamedTuple):
    """The rows that come to a stage."""

    hidden: Tensor
    residual: Tensor
    positions: Tensor
    rows: Tensor | None
    """(n,) on the host: which rows of the whole batch they are; None for all."""


class Loss(NamedTuple):
    """An image of which tokens leave at a stage."""

    image: Image
    had: range
    """Its tokens among the rows that come."""
    has: range
    """Its tokens among the rows that run on."""
    text: Tensor
    """(M,) on the host: the text behind it, among the rows that come; none where its method does
    not look at it."""


class Heads(Sequence[Tensor]):
    """Queries, keys and values of some rows, each computed when it is first asked for.

    Args:
        attention: whose.
        x: (B * m, D), what comes to it.
        positions: (B * m,), or (3, B * m).
        shape: (B, m).
    """

    def __init__(
        self, attention: Any, x: Tensor, positions: Tensor, shape: tuple[int, ...]
    ) -> None:
        self.attention, self.positions, self.shape = attention, positions, shape
        self.part = parts_of(attention, x)
        self.known: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return 3

    def __getitem__(self, which: Any) -> Any:
        """(B, heads, m, d)"""
        if which not in self.known:
            self.known[which] = self._find(which)
        return self.known[which]

    def _find(self, which: int) -> Tensor:
        attention, size = self.attention, self.attention.head_dim
        found = self.part(which)
        if which < 2:
            if hasattr(attention, "q_norm"):  # Qwen3: of every head by itself
                found = _by_head((attention.q_norm, attention.k_norm)[which], found, size)
            # Some rotary embeddings want a key; one head is the least there can be.
            rotated = found.contiguous()
            found, _ = attention.rotary_emb(self.positions, rotated, rotated[:, :size].clone())
        return found.unflatten(-1, (-1, size)).unflatten(0, self.shape).transpose(1, 2)


NO_TEXT = torch.empty(0, dtype=torch.long)

LEVEL = "deepstack_input_embeds_"
"""What vLLM calls the visual tokens that are added behind one of the first layers (Qwen3-VL)."""

Kind = tuple[Reduction, tuple[int, int], int, int, int, Follower | None]
"""Settings of an image, its grid, tokens that it has and keeps, text tokens: one batch for all
alike, but those that somebody follows."""


def rows_of(ranges: Sequence[range], device: torch.device) -> Tensor:
    """(B, n) on the device: B ranges of one length."""
    first = torch.tensor([[r.start] for r in ranges])
    return async_tensor_h2d(first + torch.arange(len(ranges[0])), device=device)


def _rows_of_text(group: Sequence[Loss], device: torch.device) -> Tensor:
    """(B, M) on the device: the text behind B images."""
    return async_tensor_h2d(torch.stack([some.text for some in group]), device=device)


def _by_head(norm: nn.Module, x: Tensor, head_dim: int) -> Tensor:
    """(rows, heads * head_dim), every head normalised by itself."""
    normed: Tensor = norm(x.unflatten(-1, (-1, head_dim)))
    return normed.flatten(-2)


def stage_layers(number: int) -> type[nn.Module]:
    """The class of one stage's layers: what torch.compile sees, as their rows do not change there.

    Each stage has a class of its own. vLLM keeps compiled code on disk by the qualified name and
    the first line of ``forward``, and loads it without asking whether it fits: instances of one
    class would all run the layers of stage 0.
    """

    class StageLayers(nn.Module):
        def __init__(
            self, *, vllm_config: VllmConfig, prefix: str = "", layers: Sequence[nn.Module]
        ):
            super().__init__()
            self.layers = layers

        def forward(
            self,
            positions: Tensor,
            hidden: Tensor,
            residual: Tensor | None,
            levels: IntermediateTensors | None = None,
        ) -> tuple[Tensor, Tensor]:
            for number, layer in enumerate(self.layers):
                hidden, residual = layer(positions, hidden, residual)
                if levels is not None and number < len(levels):
                    hidden = hidden + levels[f"{LEVEL}{number}"]
            return hidden, residual

    forward = StageLayers.forward
    forward.__qualname__ = f"stage{number}.forward"
    # Dynamo keeps what it compiled by code object, and functions from one source share theirs.
    forward.__code__ = forward.__code__.replace(co_name=f"forward_stage{number}")
    # Positions may have three rows.
    dynamic = {"positions": -1, "hidden": 0, "residual": 0, "levels": 0}
    return support_torch_compile(dynamic_arg_dims=dynamic)(StageLayers)


class StagedDecoder:
    """A decoder in stages.

    Not a module: the weights stay where vLLM has put them.

    Args:
        model: vLLM's: ``embed_tokens``, ``layers``, ``norm``.
        geometry: of the checkpoint, with the first layer of every stage.
        vllm_config: vLLM's.
        sum_over_ranks: adds a tensor up over the ranks that share the heads.
    """

    def __init__(
        self,
        model: nn.Module,
        geometry: Geometry,
        vllm_config: VllmConfig,
        sum_over_ranks: Callable[[Tensor], Tensor],
    ) -> None:
        self.model, self.geometry = model, geometry
        self.sum_over_ranks = sum_over_ranks
        self.images: list[Image] = []
        self.visual: Tensor | None = None
        self.graphed_rows = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        self.seen: Tensor | None = None
        """(2, rows, D): what piecewise graphs of a stage read, allocated when the first is made."""
        edges = [0, *geometry.starts, len(model.layers)]
        self.stages: list[nn.Module] = []
        # What vLLM calls the attention layers of every stage.
        self.names: list[list[str]] = []
        for number, (first, end) in enumerate(pairwise(edges)):
            layers = model.layers[first:end]
            shared, block_size = Shared(), vllm_config.cache_config.block_size
            for place, layer in enumerate(layers, start=first):
                attention = layer.self_attn.attn
                enter_stage(attention, place, geometry.spans, block_size, shared)
            if number:
                cut(layers[0].self_attn)
            self.names.append([layer.self_attn.attn.layer_name for layer in layers])
            with set_model_tag(f"stage{number}"):  # names vLLM's folder of compiled pieces
                self.stages.append(stage_layers(number)(vllm_config=vllm_config, layers=layers))
        # Of every stage but the last one: tokens leave behind its last layer.
        self.watches = [watch_keys(stage.layers[-1].self_attn.attn) for stage in self.stages[:-1]]

    def mark(
        self,
        tokens: Tensor,
        reduction: Reduction | None,
        places: Tensor | None,
        pixels: Tensor,
        layout: Layout,
        mark: str = "",
    ) -> Tensor:
        """An image's visual tokens, so that :meth:`unmark` will know what to do with them.

        Args:
            tokens: (n, D).
            reduction: its settings.
            places: (n,) their numbers in the image, see :meth:`Layout.numbers`; None for all.
            pixels: (1, tiles, 3, height, width) of the image.
            layout: the image's.
            mark: where somebody follows it.
        """
        part = reduction.spec.decoder if reduction is not None else None
        if reduction is None or part is None:
            return tokens
        raster = layout.raster(reduced=places is not None)
        if places is None:
            places = torch.arange(len(tokens), device=tokens.device)
        lot = lot_of(pixels) if part.by_lot else places.new_zeros(1, 1)
        return VisualTokens.of(tokens, Leaving(reduction, places, raster, lot, mark))

    def unmark(self, embeddings: Sequence[Tensor], is_visual: Tensor | None) -> Sequence[Tensor]:
        """Plain tensors, and noted which rows of the coming forward pass are images to reduce.

        Args:
            embeddings: of the images among the rows, in their order.
            is_visual: (rows,) bool, which rows those are.
        """
        self.images, self.visual = [], None
        leaving = [e.leaving if isinstance(e, VisualTokens) else None for e in embeddings]
        if is_visual is None or not any(leaving):
            return [tokens.as_subclass(torch.Tensor) for tokens in embeddings]
        self.visual = is_visual.cpu()  # where vLLM has it; the host does not wait
        rows = self.visual.nonzero()[:, 0].tolist()
        first, plain = 0, []
        for tokens, how in zip(embeddings, leaving, strict=True):
            if how is not None:
                self.images.append(self._image(rows[first], len(tokens), how))
            plain.append(tokens.as_subclass(torch.Tensor))
            first += len(tokens)
        return plain

    def _image(self, start: int, count: int, how: Leaving) -> Image:
        part, stages = how.reduction.spec.decoder, self.geometry.decoder_stages(how.reduction)
        assert part is not None
        last = len(part.steps) - 1
        steps = {stage: part.steps[min(place, last)] for place, stage in enumerate(stages)}
        follower = Follower(how.mark) if how.mark else None
        marks = how.places, how.raster, how.lot, follower
        return Image(start, start + count, how.reduction, part, steps, *marks)

    def __call__(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        inputs_embeds: Tensor | None,
        levels: IntermediateTensors | None = None,
    ) -> Tensor:
        """The forward pass: (rows, D); rows that left on the way are zero, nobody reads them.

        Args:
            input_ids: (rows,), where there are no embeddings.
            positions: (rows,), or (3, rows).
            inputs_embeds: (rows, D).
            levels: (rows, D) to add behind each of the first layers, none of which starts a stage.
        """
        images, self.images = self.images, []
        hidden = self.model.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        total, residual, index = len(hidden), None, None
        context = get_forward_context()
        by_stage = self._rows_by_stage(context.attn_metadata)
        self._prepare(hidden, images, by_stage)
        for number, stage in enumerate(self.stages):
            rows = by_stage[number]
            if rows is not None:
                batch = Batch(hidden, residual, positions, index)
                hidden, residual, positions = self._reduce(number, batch, rows, images)
                index = rows.index
                for name in self.names[number]:
                    # Keys and values go where the context says, not where the metadata do.
                    context.slot_mapping[name] = context.attn_metadata[name].ficoco_rows.slots
                context.cudagraph_runtime_mode = CUDAGraphMode.NONE  # graphs are of all rows
            elif context.cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE and (
                number or inputs_embeds is None  # these are in the runner's buffer
            ):
                hidden, residual = self._where_graphs_look(hidden, residual)
            first = {} if number or levels is None else {"levels": levels}
            hidden, residual = stage(positions, hidden, residual, **first)
        hidden, _ = self.model.norm(hidden, residual)
        if index is None:
            return hidden
        return hidden.new_zeros(total, hidden.shape[1]).index_copy_(
            0, async_tensor_h2d(index, device=hidden.device), hidden
        )

    def _where_graphs_look(
        self, hidden: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What comes to a stage, where a piecewise CUDA graph of it has seen it at its capture.

        The last graph of a stage gives its output's memory back, so the next stage's graphs may
        write where they still have to read. Positions are in the runner's buffer.

        Args:
            hidden: (rows, D).
            residual: the same; None before the first layer.
        """
        if self.seen is None:
            most = self.graphed_rows
            self.seen = hidden.new_empty(2, most, hidden.shape[1])
        rows = len(hidden)
        self.seen[0, :rows].copy_(hidden)
        if residual is None:
            return self.seen[0, :rows], None
        self.seen[1, :rows].copy_(residual)
        return self.seen[0, :rows], self.seen[1, :rows]

    def _rows_by_stage(self, metadata: Any) -> list[Rows | None]:
        """Which rows each stage runs on; None for all of them."""
        if not isinstance(metadata, dict):
            return [None] * len(self.stages)
        later = [metadata[names[0]].ficoco_rows for names in self.names[1:]]
        return [None, *later]

    def _prepare(
        self, embeddings: Tensor, images: Sequence[Image], by_stage: Sequence[Rows | None]
    ) -> None:
        """Before any layer runs: what methods need of the decoder's input and of layers to come.

        Args:
            embeddings: (rows, D), the decoder's input. The first layer may change it in place (its
                norms do on GPUs), so what is noted of it must be noted now.
            images: among the rows.
            by_stage: the rows that stages run on.
        """
        for number, watch in enumerate(self.watches, start=1):
            watch.on = any(image.part.looks_before and number in image.steps for image in images)
        rows = next((rows for rows in by_stage if rows is not None), None)
        noting = [image for image in images if image.part.note is not None]
        if rows is None or not noting:
            return
        everything = torch.arange(len(embeddings))
        alike: dict[Kind, list[Loss]] = {}
        for image in noting:
            had = range(image.start, image.end)
            text = self._text_behind(image, everything, rows, image.end)
            # What is noted is the same for whom somebody follows.
            kind = (image.reduction, image.raster.grid, len(had), len(had), len(text), None)
            alike.setdefault(kind, []).append(Loss(image, had, had, text))
        for _, group in self._batches(alike):
            note = group[0].image.part.note
            assert note is not None
            visual = embeddings[rows_of([some.had for some in group], embeddings.device)]
            text = embeddings[_rows_of_text(group, embeddings.device)]
            for some, noted in zip(group, note(visual, text), strict=True):
                some.image.noted = noted

    def _reduce(
        self, number: int, batch: Batch, rows: Rows, images: Sequence[Image]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The rows that run on: text as it is, of every image the tokens that its method keeps.

        Args:
            number: of the stage; queries, keys and values of its first layer are the evidence.
            batch: what comes to the stage.
            rows: which rows run on.
            images: that may have lost rows.

        Returns:
            Hidden states, residual and positions of the rows that run on.
        """
        device = batch.hidden.device
        before = torch.arange(len(batch.hidden)) if batch.rows is None else batch.rows
        # Where each row that runs on is among those that came; of an image, where its tokens are.
        at = async_tensor_h2d(torch.searchsorted(before, rows.index), device=device)
        edges = torch.tensor([(i.start, i.end) for i in images], dtype=torch.long).view(-1, 2)
        had_by_image = torch.searchsorted(before, edges).tolist()
        has_by_image = torch.searchsorted(rows.index, edges).tolist()
        alike: dict[Kind, list[Loss]] = {}
        for image, came, run_on in zip(images, had_by_image, has_by_image, strict=True):
            had, has = range(*came), range(*run_on)
            if len(has) in (0, len(had)):
                continue  # nothing to choose
            looks = image.part.looks_at_question
            text = self._text_behind(image, before, rows, had.stop) if looks else NO_TEXT
            what = image.reduction, image.raster.grid, len(had), len(has), len(text)
            kind = (*what, image.follower)
            alike.setdefault(kind, []).append(Loss(image, had, has, text))
        merged: list[tuple[Tensor, Tensor]] = []
        for (reduction, _, _, keep, _, follower), group in self._batches(alike):
            had_rows = rows_of([some.had for some in group], device)
            has_rows = rows_of([some.has for some in group], device)
            stream = batch.hidden[had_rows] + batch.residual[had_rows]
            places = torch.stack([some.image.places for some in group])
            tokens = Tokens(stream, places, stream.new_ones(places.shape, dtype=torch.float32))
            steps = group[0].image.steps[number]
            fates: list[Tensor] | None = None if follower is None else []
            tokens = reduce(
                steps,
                tokens,
                self._evidence(number, batch, group, had_rows, stream),
                keep,
                reduction.parsed_options(),
                fates,
            )
            if follower is not None and fates is not None:
                start = self.geometry.starts[number - 1]
                follower.note("decoder", start, places[0], fates, tokens.position[0])
            for some, left in zip(group, tokens.position, strict=True):
                some.image.places = left
            at[has_rows] = had_rows.gather(1, torch.searchsorted(places, tokens.position))
            if steps.compress is not None:
                merged.append((has_rows, tokens.hidden))
        hidden, residual = batch.hidden[at], batch.residual[at]
        for where, stream in merged:
            hidden[where], residual[where] = 0, stream
        return hidden, residual, batch.positions[..., at]

    def _batches(self, alike: dict[Kind, list[Loss]]) -> Iterator[tuple[Kind, list[Loss]]]:
        """Images that can be reduced together, no more at once than memory allows."""
        heads = self.model.layers[0].self_attn.num_heads
        for kind, group in alike.items():
            _, _, had, _, text, _ = kind
            at_once = max(1, EVIDENCE_BYTES // (4 * heads * had * max(had, text)))
            for first in range(0, len(group), at_once):
                yield kind, group[first : first + at_once]

    def _text_behind(self, image: Image, before: Tensor, rows: Rows, end: int) -> Tensor:
        """(M,) on the host: which of the rows that come are the text behind an image.

        Args:
            image: of which request.
            before: which rows of the whole batch those that come are.
            rows: knows where requests end.
            end: of the image, among the rows that come.
        """
        request_end = rows.requests[bisect_right(rows.requests, image.start)]
        assert self.visual is not None
        behind = before[end:]
        behind = behind[: int(torch.searchsorted(behind, request_end))]
        text = (~self.visual[behind]).nonzero()[:, 0] + end
        # Nothing is asked: the image's last token speaks.
        return text if len(text) else torch.tensor([end - 1])

    def _evidence(
        self,
        number: int,
        batch: Batch,
        group: Sequence[Loss],
        had_rows: Tensor,
        stream: Tensor,
    ) -> DecoderEvidence:
        """What is to be seen at a stage of B images with equally many tokens and text behind them.

        Args:
            number: of the stage; queries, keys and values are those of its first layer.
            batch: what comes to it.
            group: the images.
            had_rows: (B, n) where their tokens are in the batch.
            stream: (B, n, D) their hidden states.
        """
        layer, part = self.stages[number].layers[0], group[0].image.part
        attention = layer.self_attn
        text_rows = _rows_of_text(group, batch.hidden.device)

        @functools.cache
        def text() -> Tensor:
            return batch.hidden[text_rows] + batch.residual[text_rows]

        def look(stream: Tensor, index: Tensor) -> Heads:
            """At rows (B, m), whose hidden states are (B, m, D)."""
            x = layer.input_layernorm(stream.flatten(0, 1))
            positions = batch.positions[..., index.flatten()]
            return Heads(attention, x, positions, index.shape)

        seen: dict[str, Any] = {}
        if attention.total_num_heads > attention.num_heads:
            seen["sum_over_ranks"] = self.sum_over_ranks
        if part.note is not None:
            noted = [some.image.noted for some in group if some.image.noted is not None]
            seen["noted"] = torch.stack(noted)
        if part.looks_before:
            lengths = self.watches[number - 1].lengths
            assert lengths is not None
            seen["before"] = (lengths[had_rows], lengths[text_rows])
        return DecoderEvidence(
            look_at_image=lambda: look(stream, had_rows),
            look_at_text=lambda: look(text(), text_rows),
            final_norm=self.model.norm.weight,
            lot=torch.cat([some.image.lot for some in group]),
            grid=group[0].image.raster.grid,
            rasters=tuple(some.image.raster for some in group),
            read_text=text,
            scale=attention.scaling,
            heads=attention.total_num_heads,
            **seen,
        )
