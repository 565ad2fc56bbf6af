# SPDX-License-Identifier: Apache-2.0
"""vLLM's M-RoPE area: the tokens that an image keeps stand where they stood.

Qwen-VL's positions have three rows: time, row and column. An image's tokens get those of their
places from its first position on, and text behind it goes on from the larger side of its grid,
however many of them stay; a video's likewise, with its time. vLLM makes the positions of a prompt
before its images go through the tower, so which tokens stay is not known yet: it gives all that
stay the image's first position, and what is behind the image its right one (:func:`shortened`).
Time, rows and columns come with the tokens out of the tower, and are added before the model runs
(:class:`Offsets`).

vLLM's own way for pruned videos (``SupportsMultiModalPruning``) sends positions as columns of the
embeddings, whose type cannot hold whole numbers above 256 (bfloat16), and is on for a whole server.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from vllm_ficoco.engine.visual import VisualTokens
from vllm_ficoco.methods.paradigm import on_device

FACTOR = 4
"""Positions that the rotary table has for each that the model was trained on. vLLM gives Qwen2-VL
and Qwen2.5-VL as many, for the sake of videos; Qwen3-VL gets them here: reduced images take
positions that no token stands at, so a prompt reaches farther than it is long."""

Positions = Callable[[list[int], list[MultiModalFeatureSpec]], tuple[Tensor, int]]


def table_size(text_config: Any) -> int:
    """How many positions the rotary table has."""
    rope = text_config.rope_parameters
    trained = rope.get("original_max_position_embeddings") or text_config.max_position_embeddings
    return FACTOR * int(trained)


def enlarge_table(layers: Sequence[nn.Module], text_config: Any) -> None:
    """Gives a decoder's layers the table of :func:`table_size`; most have it already."""
    for layer in layers:
        attention = layer.self_attn
        table = attention.rotary_emb
        if len(table.cos_sin_cache) < table_size(text_config):
            attention.rotary_emb = get_rope(
                attention.head_dim,
                max_position=text_config.max_position_embeddings,
                rope_parameters=text_config.rope_parameters,
                mrope_positions_factor=FACTOR,
            )


def turns_of(frames: int, vision_config: Any, seconds: float | None) -> list[int]:
    """The first row of the positions of every frame of a video, from its first place on.

    Args:
        frames: how many.
        vision_config: says how many positions a second has, in Qwen2.5-VL.
        seconds: of a frame, there; None where each frame has one position.
    """
    each = (1.0 if seconds is None else seconds) * getattr(vision_config, "tokens_per_second", 1.0)
    return [int(frame * each) for frame in range(frames)]  # as vLLM, which cuts off


Marks = tuple[int, int, int]
"""Tokens of Qwen3-VL: what begins a frame, a visual token of it, what ends it."""


def _visual(
    own: Sequence[int], modality: str, frames: int, marks: Marks | None
) -> list[tuple[int, int]]:
    """Where an item's visual tokens stand in its placeholder: runs of first and count.

    Args:
        own: the placeholder's tokens.
        modality: of the item.
        frames: of a video.
        marks: where every frame of a video is a run of its own.
    """
    if marks is None or modality != "video":
        return [(0, len(own))]
    runs, at = [], 0
    start, _, end = marks
    for _ in range(frames):
        first = own.index(start, at) + 1
        at = own.index(end, first)
        runs.append((first, at - first))
    return runs


def shortened(
    of_whole: Positions,
    input_tokens: list[int],
    mm_features: list[MultiModalFeatureSpec],
    merge_size: int,
    marks: Marks | None = None,
) -> tuple[Tensor, int]:
    """The positions of a prompt whose images have fewer tokens than their grids have places.

    They are vLLM's of the unreduced prompt, cut. All tokens of a reduced image or video get the
    position of its first place; where text stands between the frames of a video, those of a frame
    get that of the frame's.

    Args:
        of_whole: vLLM's own way to make positions.
        input_tokens: of the prompt.
        mm_features: its images and videos.
        merge_size: patches of a side of what the tower merges into a token.
        marks: of models with text between frames.

    Returns:
        (3, tokens), and what to add to a number of tokens for the position behind them.
    """
    whole_tokens: list[int] = []
    whole_features, cuts, at = [], [], 0
    for feature in sorted(mm_features, key=lambda f: f.mm_position.offset):
        place = feature.mm_position
        whole_tokens += input_tokens[at : place.offset]
        start, at = len(whole_tokens), place.offset + place.length
        own = input_tokens[place.offset : at]
        assert feature.data is not None
        grid: Any = feature.data[f"{feature.modality}_grid_thw"].data
        runs = _visual(own, feature.modality, int(grid[0]), marks)
        each = int(grid.prod()) // merge_size**2 // len(runs)
        # All of a reduced video's tokens come with their places, those of a whole frame among them.
        is_reduced, done = any(kept != each for _, kept in runs), 0
        for first, kept in runs:
            whole_tokens += own[done:first]
            done = first + kept
            if is_reduced:
                cuts.append((len(whole_tokens), kept, each))
            token = own[first] if marks is None or kept else marks[1]
            whole_tokens += own[first:done] if kept == each else [token] * each
        whole_tokens += own[done:]
        length = len(whole_tokens) - start
        whole_features.append(
            replace(feature, mm_position=replace(place, offset=start, length=length))
        )
    if not cuts:
        return of_whole(input_tokens, mm_features)
    whole_tokens += input_tokens[at:]
    positions, delta = of_whole(whole_tokens, whole_features)
    stays = torch.ones(len(whole_tokens), dtype=torch.bool)
    for start, kept, length in cuts:
        positions[:, start : start + kept] = positions[:, start : start + 1].clone()
        stays[start + kept : start + length] = False
    return positions[:, stays].contiguous(), delta + len(whole_tokens) - len(input_tokens)


class Offsets:
    """What a step has to add to its positions, in the runner's buffer of them.

    It must be there before the model runs: a step in which every request has one row, be it the
    last one of a prompt, replays a CUDA graph of the whole model, and no code of the model. Model
    Runner V1 has filled the buffer when it asks for embeddings, so that is when it is added; V2
    fills it later, and calls :class:`PlacedState` then.
    """

    def __init__(self) -> None:
        self._rows: list[int] = []
        self._offsets: list[Tensor] = []
        self.buffer: Tensor | None = None
        """(3, rows) V1's, known since its first run; graphs are captured before any request."""
        self.filled_later = False
        """Whether the buffer is filled behind :meth:`note` (V2)."""
        self._added = False

    def note(self, embeddings: Sequence[Tensor], is_visual: Tensor | None) -> None:
        """Notes which rows are tokens of reduced images, and where those stand.

        Args:
            embeddings: of the images among the rows, in their order.
            is_visual: (rows,) bool, which rows those are.
        """
        self._rows, self._offsets = [], []
        placed = [isinstance(e, VisualTokens) and e.offsets is not None for e in embeddings]
        if is_visual is None or not any(placed):
            return
        rows = is_visual.cpu().nonzero()[:, 0].tolist()  # where vLLM has it; the host does not wait
        first = 0
        for tokens, has_places in zip(embeddings, placed, strict=True):
            if has_places:
                assert isinstance(tokens, VisualTokens) and tokens.offsets is not None
                self._rows += rows[first : first + len(tokens)]
                self._offsets.append(tokens.offsets)
            first += len(tokens)
        if self.buffer is not None:
            self.add(self.buffer)
            self._added = True

    def before_run(self, positions: Tensor) -> None:
        """Sees to it that the positions of a run have what was noted.

        Args:
            positions: (3, rows), of the runner's buffer.

        Raises:
            RuntimeError: they are of another buffer than they were.
        """
        known = self.buffer is not None and positions.data_ptr() == self.buffer.data_ptr()
        if self._added and not known:
            raise RuntimeError("vLLM has moved its positions: a reduced image's would be wrong")
        self._added = False
        self.add(positions)
        if not self.filled_later:  # of the buffer these are the first columns
            columns = positions.stride(0)
            self.buffer = positions.as_strided((len(positions), columns), (columns, 1))

    def add(self, positions: Tensor) -> None:
        """Adds what was noted to (3, rows) positions in place, once."""
        if not self._offsets:
            return
        rows = on_device(self._rows, positions.device)
        positions.index_add_(1, rows, torch.cat(self._offsets).T.to(positions.dtype))
        self._rows, self._offsets = [], []


class PlacedState(DefaultModelState):
    """Model Runner V2's state of a model whose reduced images have places."""

    def __init__(self, vllm_config: VllmConfig, model: Any, *args: Any) -> None:
        super().__init__(vllm_config, model, *args)
        self.offsets: Offsets = model.offsets
        self.offsets.filled_later = True

    def prepare_inputs(self, *args: Any, **kwargs: Any) -> dict[str, Tensor | None]:
        """As vLLM's, which fills the buffer; then the places are added."""
        inputs = super().prepare_inputs(*args, **kwargs)
        positions = inputs["positions"]
        assert positions is not None
        self.offsets.add(positions)
        return inputs
