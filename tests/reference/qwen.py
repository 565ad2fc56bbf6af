# SPDX-License-Identifier: Apache-2.0
"""Qwen-VL with reduction on Hugging Face's own model, one image at a time.

The tower runs on the whole image. What its last layer in full attention was given (queries and
keys after rotary) goes to the literal transcription of a method, together with what the merger
made, all levels of deepstack side by side. Positions are Hugging Face's of the unreduced prompt,
and the rows of tokens that left are taken out of everything. Every step runs the whole prompt
again. No vLLM, nothing of the package.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image as Pictures
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForImageTextToText, AutoProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
from transformers.video_utils import VideoMetadata
from transformers.vision_utils import get_vision_window_index

from tests.reference.methods import ASKING, reduce_one, relevances


class Answer(NamedTuple):
    """What the model says, and what of each image it has seen."""

    tokens: list[int]
    first_logits: Tensor
    kept: list[list[int]]
    """Places on its grid of every image's tokens, in raster order."""
    grids: list[tuple[int, int]]
    """Rows and columns of tokens of every image as it went through the tower."""
    length: int
    """Of the prompt with what is left of its images."""


class Seen(NamedTuple):
    """An image that went through the tower and its merger."""

    tokens: Tensor
    """(n, D * (1 + levels)), in raster order."""
    query: Tensor
    """(H, 4 * n, d) of the last layer in full attention, in the same order."""
    key: Tensor
    scale: float
    grid: tuple[int, int]
    pixels: Tensor


class ReferenceQwen:
    """A checkpoint in float32 that answers with a reduction of each image."""

    def __init__(self, path: str) -> None:
        AttentionInterface.register("watched", self._watched)
        self.model = AutoModelForImageTextToText.from_pretrained(
            path,
            dtype=torch.float32,
            attn_implementation={"vision_config": "watched", "text_config": "eager"},
        ).eval()
        self.processor = AutoProcessor.from_pretrained(path)
        self.visual = self.model.model.visual
        in_full = getattr(self.visual, "fullatt_block_indexes", [len(self.visual.blocks) - 1])
        self.last = self.visual.blocks[max(in_full)].attn
        self.looked: list[tuple[Tensor, Tensor, float]] = []
        vision = self.model.config.vision_config
        self.unit = vision.patch_size * vision.spatial_merge_size
        self.levels = len(getattr(vision, "deepstack_visual_indexes", ()))
        self.shown: list[tuple[list[int], tuple[int, int]]] = []
        self.words: Tensor | None = None

    @torch.no_grad()
    def ask(self, question: str) -> None:
        """The question of the images that are shown from now on: all text behind them."""
        tokenizer = self.processor.tokenizer
        ids = tokenizer(question, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        spoken = [int(i) for i in ids if int(i) not in tokenizer.all_special_ids]
        self.words = self.model.get_input_embeddings()(torch.tensor(spoken).long())

    def _watched(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **more: Any
    ) -> tuple[Tensor, None]:
        """Attention of (1, H, patches, d), plainly."""
        if module is self.last:
            self.looked.append((query[0], key[0], more["scaling"]))
        mixed = (query @ key.mT * more["scaling"]).softmax(-1) @ value
        return mixed.transpose(1, 2), None

    # --- Images ---------------------------------------------------------------------------------

    def limits(self, options: dict[str, int]) -> dict[str, int]:
        """The fewest and the most pixels of an image, which a request may set."""
        size = self.processor.image_processor.size
        return {
            "shortest_edge": options.get("min_pixels", size["shortest_edge"]),
            "longest_edge": options.get("max_pixels", size["longest_edge"]),
        }

    def grid_of(self, width: int, height: int, options: dict[str, int]) -> tuple[int, int]:
        """Rows and columns of tokens that the processor makes of so many pixels."""
        limits = self.limits(options)
        fitted = smart_resize(
            height, width, self.unit, limits["shortest_edge"], limits["longest_edge"]
        )
        return fitted[0] // self.unit, fitted[1] // self.unit

    def scaled(self, image: Pictures.Image, budget: int, options: dict[str, int]) -> Pictures.Image:
        """The image at the largest size of whole tokens, nearly its shape, that is within a budget.

        How many tokens a size has is counted: the processor enlarges small images.
        """
        rows, columns = self.grid_of(*image.size, options)
        if rows * columns <= budget:
            return image
        sizes = []
        for step in (math.floor, math.ceil):
            sizes += [(r, max(1, step(columns * r / rows))) for r in range(1, rows + 1)]
            sizes += [(max(1, step(rows * c / columns)), c) for c in range(1, columns + 1)]

        def bent(row: int, column: int) -> float:
            return abs(math.log(row / column) - math.log(rows / columns))

        within = [
            (r, c)
            for r, c in sizes
            if math.prod(self.grid_of(c * self.unit, r * self.unit, options)) <= budget
        ]
        row, column = min(
            within, key=lambda size: (-size[0] * size[1], round(bent(*size), 9), size)
        )
        return image.resize((column * self.unit, row * self.unit), Pictures.Resampling.BICUBIC)

    @torch.no_grad()
    def see(self, image: Pictures.Image, options: dict[str, int]) -> Seen:
        """Puts it through the tower."""

        def processed(**more: Any) -> Any:
            limits = self.limits(options)
            return self.processor.image_processor([image], size=limits, return_tensors="pt", **more)

        # vLLM sends pixels as they are and normalises them in the tower: lots are drawn by those.
        pixels = processed(do_rescale=False, do_normalize=False)["pixel_values"]
        ready = processed()
        grids = ready["image_grid_thw"]
        self.looked.clear()
        out = self.model.model.get_image_features(ready["pixel_values"], grids)
        ((query, key, scale),) = self.looked
        if hasattr(self.visual, "window_size"):
            order, _ = get_vision_window_index(
                grids, self.visual.spatial_merge_size, self.visual.window_size,
                self.visual.patch_size,
            )  # fmt: skip
            # What the tower sees at a place is the token of this number.
            where = {int(token): place for place, token in enumerate(order)}
            patches = [4 * where[token] + i for token in range(len(where)) for i in range(4)]
            query, key = query[:, patches], key[:, patches]
        levels = [features[0] for features in getattr(out, "deepstack_features", None) or ()]
        grid = grids[0, 1:] // self.visual.spatial_merge_size
        return Seen(
            torch.cat([out.pooler_output[0], *levels], -1), query, key, scale,
            (int(grid[0]), int(grid[1])), pixels,
        )  # fmt: skip

    def reduced(
        self, seen: Seen, method: str, budget: int, options: dict[str, Any]
    ) -> tuple[Tensor, list[int]]:
        """What stays of an image, (kept, D * (1 + levels)), and its places."""
        n = len(seen.tokens)
        if method in ("none", "resize") or budget >= n:
            return seen.tokens, list(range(n))
        relevant: list[float] = []
        if method in ASKING:
            assert self.words is not None, "no question was asked"
            relevant = relevances(seen.tokens[:, : self.words.shape[1]], self.words)
        rows, places, _ = reduce_one(
            method, options, seen.tokens, seen.query, seen.key, seen.scale, False, seen.grid,
            list(range(n)), [1.0] * n, budget, seen.pixels, 4, relevant,
        )  # fmt: skip
        assert places == sorted(places) and len(places) == budget
        return rows, places

    # --- For a decoder in which tokens leave, tests.reference.decoder ----------------------------

    def visual_tokens(
        self,
        image: Pictures.Image,
        method: str = "none",
        budget: int = 0,
        options: dict[str, Any] | None = None,
    ) -> Tensor:
        """(kept, D * (1 + levels)); ``self.place``, ``spots`` and ``pixels`` as LLaVA's reference,
        and ``self.columns`` of its grid."""
        seen = self.see(self.scaled(image, budget, {}) if method == "resize" else image, {})
        tokens, self.place = self.reduced(seen, method, budget, options or {})
        rows, self.columns = seen.grid
        where = (divmod(place, self.columns) for place in self.place)
        self.spots = [(row / rows, column / self.columns) for row, column in where]
        self.pixels = seen.pixels
        self.shown.append((self.place, seen.grid))
        return tokens

    @torch.no_grad()
    def embed(self, prompt: str, visual: list[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
        """The prompt, (T, D), and where its images begin and end: those that were last shown.

        ``self.beside`` then has their positions and what deepstack adds.
        """
        shown, self.shown = self.shown, []
        token, sides = self.model.config.image_token_id, iter(shown)
        whole: list[int] = []
        for number in self.processor.tokenizer(prompt)["input_ids"]:
            whole += [number] * (math.prod(next(sides)[1]) if number == token else 1)
        ids = torch.tensor([whole])
        grids = torch.tensor([[1, 2 * rows, 2 * columns] for _, (rows, columns) in shown])
        turns = torch.arange(len(whole)).expand(3, -1)
        if shown:
            turns = self.model.model.get_rope_index(
                ids, mm_token_type_ids=(ids == token).int(), image_grid_thw=grids
            )[0][:, 0]
        later = turns.max() + 1 + torch.arange(64).expand(3, -1)
        embeds = self.model.get_input_embeddings()(ids[0])
        width = embeds.shape[1]
        levels = torch.zeros(len(whole), self.levels * width)
        stays, where = torch.ones(len(whole), dtype=torch.bool), (ids[0] == token).nonzero()[:, 0]
        parts = []
        for (places, grid), tokens in zip(shown, visual, strict=True):
            own, where = where[: math.prod(grid)], where[math.prod(grid) :]
            stays[own] = False
            stays[own[places]] = True
            embeds[own[places]], levels[own[places]] = tokens[:, :width], tokens[:, width:]
            start = int(stays[: own[0]].sum())
            parts.append((start, start + len(tokens)))
        self.beside = {"turns": torch.cat([turns[:, stays], later], 1), "levels": levels[stays]}
        return embeds[stays], parts

    # --- Prompts --------------------------------------------------------------------------------

    @torch.no_grad()
    def answer(
        self,
        prompt: str,
        images: Sequence[Pictures.Image],
        settings: Sequence[dict[str, Any] | None],
        new_tokens: int,
        options: dict[str, int] | None = None,
        video: np.ndarray | None = None,
    ) -> Answer:
        """Greedy, the end of the text is ignored.

        Args:
            prompt: with one ``<|image_pad|>`` an image, and perhaps a ``<|video_pad|>``.
            images: as they are sent.
            settings: of every image; None leaves it whole.
            new_tokens: how many to make.
            options: of the processor, such as ``max_pixels``.
            video: (frames, height, width, 3), two frames a second; never reduced.
        """
        options, images, kept, of_images = options or {}, list(images), [], []
        for i, given in enumerate(settings):
            given = given or {"method": "none"}
            if given["method"] == "resize":
                images[i] = self.scaled(images[i], given["budget"], options)
            seen = self.see(images[i], options)
            tokens, places = self.reduced(
                seen, given["method"], given.get("budget", 0), given.get("options", {})
            )
            of_images.append(tokens)
            kept.append((places, seen.grid))
        inputs = self._processed(prompt, images, options, video)
        model, ids = self.model.model, inputs["input_ids"][0]
        more = {
            name: inputs[name]
            for name in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
            if name in inputs
        }
        positions, _ = model.get_rope_index(
            inputs["input_ids"], mm_token_type_ids=inputs["mm_token_type_ids"], **more
        )
        following = int(positions.max()) + 1
        stays = torch.ones(len(ids), dtype=torch.bool)
        is_image = ids == self.model.config.image_token_id
        is_video = ids == self.model.config.video_token_id
        first = 0
        where = is_image.nonzero()[:, 0]
        for places, grid in kept:
            own = where[first : first + math.prod(grid)]
            stays[own] = False
            stays[own[places]] = True
            first += len(own)
        assert first == len(where)
        width = self.model.config.text_config.hidden_size
        embeds = model.get_input_embeddings()(ids)
        deep = torch.zeros(len(ids), self.levels * width)
        if of_images:
            rows = torch.cat(of_images)
            embeds[is_image & stays], deep[is_image & stays] = rows[:, :width], rows[:, width:]
        if video is not None:
            out = model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
            embeds[is_video] = torch.cat(list(out.pooler_output))
            if self.levels:
                levels = [torch.cat(list(level)) for level in out.deepstack_features]
                deep[is_video] = torch.cat(levels, -1)
        visual = (is_image | is_video)[stays]
        tokens, logits = self._continued(
            embeds[stays], positions[:, 0, stays], following, visual, deep[stays], new_tokens
        )
        return Answer(
            tokens, logits, [places for places, _ in kept], [grid for _, grid in kept],
            int(stays.sum()),
        )  # fmt: skip

    def _processed(
        self,
        prompt: str,
        images: list[Pictures.Image],
        options: dict[str, int],
        video: np.ndarray | None,
    ) -> dict[str, Tensor]:
        more: dict[str, Any] = {}
        if images:
            more |= {"images": images, "images_kwargs": {"size": self.limits(options)}}
        if video is not None:
            metadata = VideoMetadata(
                fps=2.0, duration=len(video) / 2, total_num_frames=len(video),
                frames_indices=list(range(len(video))),
            )  # fmt: skip
            more |= {"videos": [[video]], "video_metadata": [[metadata]]}
            more["videos_kwargs"] = {"do_sample_frames": False}
        return dict(self.processor(text=[prompt], return_tensors="pt", **more))

    def _continued(
        self,
        embeds: Tensor,
        positions: Tensor,
        following: int,
        visual: Tensor,
        deep: Tensor,
        new_tokens: int,
    ) -> tuple[list[int], Tensor]:
        """Tokens, and the logits of the first.

        Args:
            embeds: (T, D) of the prompt.
            positions: (3, T)
            following: the position behind the prompt.
            visual: (T,) bool, which rows are visual tokens.
            deep: (T, levels * D), what the decoder's first layers take in.
            new_tokens: how many to make.
        """
        made: list[int] = []
        first = embeds[0]
        while len(made) < new_tokens:
            more: dict[str, Any] = {}
            if self.levels and bool(visual.any()):
                levels = deep[visual].chunk(self.levels, -1)
                more = {"visual_pos_masks": visual[None], "deepstack_visual_embeds": list(levels)}
            out = self.model.model.language_model(
                inputs_embeds=embeds[None], position_ids=positions[:, None], use_cache=False, **more
            )
            logits = self.model.lm_head(out.last_hidden_state[0, -1])
            first = first if made else logits
            made.append(int(logits.argmax()))
            word = self.model.get_input_embeddings()(torch.tensor(made[-1:]))
            embeds = torch.cat([embeds, word])
            positions = torch.cat([positions, torch.full((3, 1), following)], 1)
            visual = torch.cat([visual, torch.zeros(1, dtype=torch.bool)])
            deep = torch.cat([deep, torch.zeros(1, deep.shape[1])])
            following += 1
        return made, first
