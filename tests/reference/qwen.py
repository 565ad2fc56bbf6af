# SPDX-License-Identifier: Apache-2.0
"""Qwen-VL with reduction on Hugging Face's own model, one image or frame at a time.

The tower runs on the whole image. What its last layer in full attention was given (queries and
keys after rotary) goes to the literal transcription of a method, together with what the merger
made, all levels of deepstack side by side. Positions are those of the unreduced prompt, and the
rows of tokens that left are taken out of everything. Every step runs the whole prompt again. No
vLLM, nothing of the package.

Positions are Hugging Face's but for one thing: text behind a video goes on from the end of its
time where that is longer than its sides, as in the paper; there they go on from its sides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image as Pictures
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForImageTextToText, AutoProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
from transformers.video_utils import VideoMetadata
from transformers.vision_utils import get_vision_window_index

from tests.reference.methods import ASKING, Image, middles, reduce_one, relevances
from tests.reference.videos import dycoke, each_by_itself, fastvid, uniform_frames, vidcom2

COMPARING = {"vidcom2": vidcom2, "dycoke": dycoke}
"""Methods that compare the frames of a video."""


class Answer(NamedTuple):
    """What the model says, and what of each image it has seen."""

    tokens: list[int]
    first_logits: Tensor
    kept: list[list[int]]
    """Places on its grid of every image's tokens, in raster order."""
    grids: list[tuple[int, int]]
    """Rows and columns of tokens of every image as it went through the tower."""
    of_films: list[list[int]]
    """Of every video, places frame after frame."""
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


class Film(NamedTuple):
    """A video as it is sent."""

    frames: np.ndarray
    """(frames, height, width, 3)"""
    metadata: dict[str, Any]
    """What vLLM's loader says of it."""


class Frames(NamedTuple):
    """A video that went through the tower: of what it makes of every two frames one image."""

    seen: list[Seen]
    each: float
    """Positions from one to the next."""


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
        self.shown: list[tuple[list[int], Seen | Frames]] = []
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

    # --- Videos ---------------------------------------------------------------------------------

    def _of_film(self, film: Film) -> dict[str, Any]:
        """What the processor wants to know of a video."""
        metadata = {k: v for k, v in film.metadata.items() if k != "do_sample_frames"}
        samples = self.levels > 0 and film.metadata["do_sample_frames"]  # Qwen3-VL alone
        return {
            "videos": [[film.frames]],
            "video_metadata": [[VideoMetadata(**metadata)]],
            "do_sample_frames": samples,
        }

    @torch.no_grad()
    def watch(self, film: Film) -> Frames:
        """Puts it through the tower."""

        def processed(**more: Any) -> Any:
            shown = "<|vision_start|> <|video_pad|> <|vision_end|>"
            return self.processor(
                text=[shown], return_tensors="pt", videos_kwargs=more, **self._of_film(film)
            )

        pixels = processed(do_rescale=False, do_normalize=False)["pixel_values_videos"]
        ready = processed()
        grids = ready["video_grid_thw"]
        self.looked.clear()
        out = self.model.model.get_video_features(ready["pixel_values_videos"], grids)
        count, rows, columns = (int(side) for side in grids[0] // torch.tensor([1, 2, 2]))
        n, looked = rows * columns, [*self.looked]
        assert len(looked) == count, "a frame attends to itself alone"
        order = list(range(count * n))
        if hasattr(self.visual, "window_size"):
            order = get_vision_window_index(
                grids, self.visual.spatial_merge_size, self.visual.window_size,
                self.visual.patch_size,
            )[0].tolist()  # fmt: skip
        levels = getattr(out, "deepstack_features", None) or ()
        tokens = torch.cat([out.pooler_output[0], *(torch.cat(list(x)) for x in levels)], -1)
        seen = []
        for frame, (query, key, scale) in enumerate(looked):
            own = slice(frame * n, (frame + 1) * n)
            where = {int(token) - frame * n: place for place, token in enumerate(order[own])}
            patches = [4 * where[token] + i for token in range(n) for i in range(4)]
            seen.append(
                Seen(
                    tokens[own], query[:, patches], key[:, patches], scale, (rows, columns),
                    pixels.unflatten(0, (count, -1))[frame],
                )
            )  # fmt: skip
        seconds = ready.get("second_per_grid_ts")
        per_second = getattr(self.model.config.vision_config, "tokens_per_second", 1)
        return Frames(seen, 1.0 if seconds is None else float(seconds[0]) * per_second)

    def reduced_film(self, frames: Frames, given: dict[str, Any]) -> tuple[Tensor, list[int]]:
        """What stays of a video, (kept, D * (1 + levels)), and its places frame after frame."""
        whole = torch.cat([seen.tokens for seen in frames.seen])
        n, count, method = len(frames.seen[0].tokens), len(frames.seen), given["method"]
        budget, options = given.get("budget", len(whole)), {**given.get("options", {})}
        if method == "none" or budget >= len(whole):
            return whole, list(range(len(whole)))
        video = whole.double().unflatten(0, (count, n)).numpy()
        if method in COMPARING:
            places = COMPARING[method](video, budget, **options)
            return whole[places], places
        if method == "fastvid":
            attention = np.array([received(seen) for seen in frames.seen])
            left = fastvid(video, attention, budget, **options)
            places = sorted(left)
            return torch.tensor(np.stack([left[place] for place in places])).float(), places
        if method == "uniform-frames":
            keep = partial(middles, frames.seen[0].grid)
            places = uniform_frames(count, n, budget, keep)
            return whole[places], places
        unique = options.pop("frames", "even") == "unique"
        shared = each_by_itself(video, budget, unique, lambda _, share: list(range(share)))
        tokens, places = [], []
        for frame, seen in enumerate(frames.seen):
            share = sum(place // n == frame for place in shared)
            if share:
                kept, at = self.reduced(seen, method, share, options)
                tokens.append(kept)
                places += [frame * n + place for place in at]
        return torch.cat(tokens), places

    def turns(
        self,
        ids: Tensor,
        images: Sequence[tuple[int, int]],
        films: Sequence[Frames],
    ) -> Tensor:
        """(3, T): positions of a prompt whose images and videos are whole.

        Args:
            ids: (T,) of it.
            images: rows and columns of tokens of each.
            films: of each, in their order.
        """
        config, length = self.model.config, len(ids)
        grids = {config.image_token_id: [(1, *grid, 1.0) for grid in images]}
        whole = [(len(f.seen), *f.seen[0].grid, f.each) for f in films]
        if self.levels:  # text stands between frames
            whole = [(1, *grid, 1.0) for count, *grid, _ in whole for _ in range(count)]
        grids[config.video_token_id] = whole
        rows: list[tuple[int, int, int]] = []
        following = 0
        while len(rows) < length:
            token = int(ids[len(rows)])
            if token not in grids:
                rows.append((following,) * 3)
                following += 1
                continue
            count, down, across, each = grids[token].pop(0)
            own = [
                (following + int(turn * each), following + row, following + column)
                for turn in range(count)
                for row in range(down)
                for column in range(across)
            ]
            rows += own
            following = 1 + max(max(row) for row in own)
        assert not any(grids.values())
        return torch.tensor(rows).T

    # --- For a decoder in which tokens leave, tests.reference.decoder ----------------------------

    def visual_tokens(
        self,
        image: Pictures.Image | Film,
        method: str = "none",
        budget: int = 0,
        options: dict[str, Any] | None = None,
    ) -> Tensor:
        """(kept, D * (1 + levels)); ``self.place``, ``spots`` and ``pixels`` as LLaVA's reference,
        and ``self.columns`` of its grid."""
        options = options or {}
        if isinstance(image, Film):
            frames = self.watch(image)
            given = {"method": method, "budget": budget, "options": options}
            tokens, self.place = self.reduced_film(frames, given)
            seen, shown = frames.seen[0], frames
            self.pixels = torch.cat([seen.pixels for seen in frames.seen])
        else:
            shown = seen = self.see(
                self.scaled(image, budget, {}) if method == "resize" else image, {}
            )
            tokens, self.place = self.reduced(seen, method, budget, options)
            self.pixels = seen.pixels
        rows, self.columns = seen.grid
        where = (divmod(place % (rows * self.columns), self.columns) for place in self.place)
        self.spots = [(row / rows, column / self.columns) for row, column in where]
        self.shown.append((self.place, shown))
        return tokens

    @torch.no_grad()
    def embed(self, prompt: str, visual: list[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
        """The prompt, (T, D), and where its images and videos begin and end: those that were last
        shown. No text stands between the frames of a video.

        ``self.beside`` then has their positions and what deepstack adds.
        """
        shown, self.shown = self.shown, []
        of_image, of_video = self.model.config.image_token_id, self.model.config.video_token_id
        sides = iter(shown)
        whole: list[int] = []
        for number in self.processor.tokenizer(prompt)["input_ids"]:
            whole += [number] * (tokens_of(next(sides)[1]) if number in (of_image, of_video) else 1)
        ids = torch.tensor(whole)
        images = [of.grid for _, of in shown if isinstance(of, Seen)]
        turns = self.turns(ids, images, [of for _, of in shown if isinstance(of, Frames)])
        later = turns.max() + 1 + torch.arange(64).expand(3, -1)
        embeds = self.model.get_input_embeddings()(ids)
        width = embeds.shape[1]
        levels = torch.zeros(len(whole), self.levels * width)
        stays = torch.ones(len(whole), dtype=torch.bool)
        where = ((ids == of_image) | (ids == of_video)).nonzero()[:, 0]
        parts = []
        for (places, of), tokens in zip(shown, visual, strict=True):
            own, where = where[: tokens_of(of)], where[tokens_of(of) :]
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
        films: Sequence[tuple[Film, dict[str, Any] | None]] = (),
    ) -> Answer:
        """Greedy, the end of the text is ignored.

        Args:
            prompt: with one ``<|image_pad|>`` an image, and one ``<|video_pad|>`` a video.
            images: as they are sent.
            settings: of every image; None leaves it whole.
            new_tokens: how many to make.
            options: of the processor, such as ``max_pixels``.
            films: videos, and the settings of each.
        """
        options, images = options or {}, list(images)
        seen: list[Seen] = []
        kept: dict[str, list[list[int]]] = {"image": [], "video": []}
        rows: dict[str, list[Tensor]] = {"image": [], "video": []}
        for i, given in enumerate(settings):
            given = given or {"method": "none"}
            if given["method"] == "resize":
                images[i] = self.scaled(images[i], given["budget"], options)
            seen.append(self.see(images[i], options))
            tokens, places = self.reduced(
                seen[-1], given["method"], given.get("budget", 0), given.get("options", {})
            )
            rows["image"].append(tokens)
            kept["image"].append(places)
        watched = [self.watch(film) for film, _ in films]
        for frames, (_, given) in zip(watched, films, strict=True):
            tokens, places = self.reduced_film(frames, given or {"method": "none"})
            rows["video"].append(tokens)
            kept["video"].append(places)
        inputs = self._processed(prompt, images, options, [film for film, _ in films])
        ids, config = inputs["input_ids"][0], self.model.config
        positions = self.turns(ids, [image.grid for image in seen], watched)
        self._check_turns(inputs, positions, watched)
        width = config.text_config.hidden_size
        embeds = self.model.get_input_embeddings()(ids)
        deep = torch.zeros(len(ids), self.levels * width)
        stays, visual = torch.ones(len(ids), dtype=torch.bool), torch.zeros(len(ids)).bool()
        for token, kind, shown in (
            (config.image_token_id, "image", seen),
            (config.video_token_id, "video", watched),
        ):
            where = (ids == token).nonzero()[:, 0]
            visual[where] = True
            for of, places, tokens in zip(shown, kept[kind], rows[kind], strict=True):
                own, where = where[: tokens_of(of)], where[tokens_of(of) :]
                stays[own] = False
                stays[own[places]] = True
                embeds[own[places]], deep[own[places]] = tokens[:, :width], tokens[:, width:]
            assert not len(where)
        made, logits = self._continued(
            embeds[stays], positions[:, stays], int(positions.max()) + 1, visual[stays],
            deep[stays], new_tokens,
        )  # fmt: skip
        return Answer(
            made, logits, kept["image"], [image.grid for image in seen], kept["video"],
            int(stays.sum()),
        )  # fmt: skip

    def _check_turns(
        self, inputs: dict[str, Tensor], positions: Tensor, films: Sequence[Frames]
    ) -> None:
        """Positions are Hugging Face's where these are not known to be others."""
        far = any((len(f.seen) - 1) * f.each >= max(f.seen[0].grid) for f in films)
        if far and not self.levels:
            return
        more = {
            name: inputs[name]
            for name in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
            if name in inputs
        }
        theirs, _ = self.model.model.get_rope_index(
            inputs["input_ids"], mm_token_type_ids=inputs["mm_token_type_ids"], **more
        )
        assert torch.equal(theirs[:, 0], positions)

    def _processed(
        self,
        prompt: str,
        images: list[Pictures.Image],
        options: dict[str, int],
        films: Sequence[Film],
    ) -> dict[str, Tensor]:
        more: dict[str, Any] = {}
        if images:
            more |= {"images": images, "images_kwargs": {"size": self.limits(options)}}
        if films:
            each = [self._of_film(film) for film in films]
            more |= {
                "videos": [video for one in each for video in one["videos"]],
                "video_metadata": [about for one in each for about in one["video_metadata"]],
                "videos_kwargs": {"do_sample_frames": each[0]["do_sample_frames"]},
            }
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


def tokens_of(shown: Seen | Frames) -> int:
    """How many it has, whole."""
    each = shown.seen if isinstance(shown, Frames) else [shown]
    return sum(len(one.tokens) for one in each)


def received(seen: Seen) -> list[float]:
    """What every token of an image is attended to, there being no [CLS]."""
    n = len(seen.tokens)
    image = Image(
        [*seen.tokens], seen.query, seen.key, seen.scale, False, seen.grid, list(range(n)),
        [1.0] * n, seen.pixels, 4,
    )  # fmt: skip
    return image.of_cls()
