# SPDX-License-Identifier: Apache-2.0
"""Videos of LLaVA-OneVision and LLaVA-NeXT-Video with reduction, on plain Hugging Face modules.

What is not reduced is what Hugging Face's own model makes of the video. What is reduced goes frame
by frame through :class:`tests.reference.llava.ReferenceTower`; what comes out is pooled by Hugging
Face's own code, and so is, in OneVision, what the last layer's heads looked with. NeXT-Video's
tokens are squares of patches, which a method is shown as such. No vLLM, nothing of the package.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tests.reference.methods import ASKING, middles, reduce_one, relevances
from tests.reference.methods import Image as SeenImage
from tests.reference.tiles import ReferenceTiles
from tests.reference.videos import (
    by_rank,
    dycoke,
    even,
    fastvid,
    like_the_video,
    uniform_frames,
    vidcom2,
)

COMPARED = {"vidcom2": vidcom2, "dycoke": dycoke}
"""Methods that compare frames by their tokens alone."""


class Frame(NamedTuple):
    """What a method is shown of a frame."""

    tokens: Tensor
    """(n, D)"""
    query: Tensor
    """(H, m, d) of the tower's last layer; NeXT-Video's patches of a token side by side behind
    [CLS], where there is one."""
    key: Tensor
    pixels: Tensor
    """(3, height, width)"""
    unit: int
    """How many patches a token has of its own."""
    has_cls: bool


class ReferenceVideos(ReferenceTiles):
    """A checkpoint in float32 that answers with a reduction of each image and each video."""

    @property
    def has_newline(self) -> bool:
        """Whether one stands behind the last frame."""
        return self.model.config.model_type == "llava_onevision"

    def visual_tokens(
        self,
        image: Image.Image | np.ndarray,
        method: str = "none",
        budget: int = 0,
        options: dict | None = None,
    ) -> Tensor:
        """Of an image, or of a video."""
        if isinstance(image, np.ndarray):
            return self.video_tokens(image, method, budget, options)
        return super().visual_tokens(image, method, budget, options)

    @torch.no_grad()
    def video_tokens(
        self, video: np.ndarray, method: str = "none", budget: int = 0, options: dict | None = None
    ) -> Tensor:
        """(kept, hidden size of the decoder), of a video (frames, height, width, 3).

        ``self.place`` then has their numbers, which run on from frame to frame; the newline has the
        last one. ``self.spots`` and ``self.pixels`` are as of images, of all frames.
        """
        processed = self.processor.video_processor([video], return_tensors="pt")
        self.pixels = processed["pixel_values_videos"][0]
        whole = self.model.model.get_video_features(
            self.pixels[None],
            vision_feature_layer=self.model.config.vision_feature_layer,
            vision_feature_select_strategy=self.model.config.vision_feature_select_strategy,
        ).pooler_output
        whole = whole[0] if self.has_newline else torch.cat([*whole])
        if not self.has_newline:
            whole = whole.flatten(0, 1)
        frames, each = len(self.pixels), (len(whole) - self.has_newline) // len(self.pixels)
        side = round(each**0.5)
        if method == "none" or budget >= len(whole):
            self.place, tokens = list(range(len(whole))), whole
        else:
            seen = [self.frame(pixels) for pixels in self.pixels]
            tokens, self.place = self._reduced_frames(
                seen, (side, side), method, budget - self.has_newline, dict(options or {})
            )
            if self.has_newline:
                tokens = torch.cat([tokens, whole[-1:]])
                self.place = [*self.place, frames * each]
        self.spots = [
            (place % each // side / side, place % side / side) if place < frames * each else (1, 1)
            for place in self.place
        ]
        return tokens

    @torch.no_grad()
    def embed(self, prompt: str, visual: list[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
        """As of images alone, with one ``<video>`` a video among them."""
        config, ids = self.model.config, self.processor.tokenizer(prompt)["input_ids"]
        words = self.model.get_input_embeddings()(torch.tensor(ids))
        shown, parts, places = iter(visual), [], []
        for number, word in zip(ids, words, strict=True):
            start = sum(map(len, parts))
            stands_for_more = number in (config.image_token_index, config.video_token_index)
            parts.append(next(shown) if stands_for_more else word[None])
            if stands_for_more:
                places.append((start, start + len(parts[-1])))
        return torch.cat(parts), places

    def frame(self, pixels: Tensor) -> Frame:
        """Puts (3, height, width) through the tower."""
        hidden, _ = self.tower(pixels)
        query, key = self.tower.looked[-1]
        if self.has_newline:
            pool = self.model.model.apply_pooling
            tokens = pool(self.model.model.multi_modal_projector(hidden)[None])[0]
            return Frame(tokens, pool(query), pool(key), pixels, 1, False)
        tokens = self.model.model.vision_resampler(hidden[None])[0]
        stride, side = self.model.config.spatial_pool_stride, self.tower.side
        first, order = int(self.tower.has_cls), []
        for row in range(0, side, stride):
            for column in range(0, side, stride):
                order += [
                    first + (row + down) * side + column + right
                    for down in range(stride)
                    for right in range(stride)
                ]
        seen = [*range(first), *order]
        return Frame(
            tokens, query[:, seen], key[:, seen], pixels, stride**2, self.tower.has_cls
        )  # fmt: skip

    def _reduced_frames(
        self, frames: list[Frame], grid: tuple[int, int], method: str, patches: int, options: dict
    ) -> tuple[Tensor, list[int]]:
        """What stays, the newline left out, and its numbers."""
        options.pop("newlines", None)  # the one there is stays either way
        video = torch.stack([frame.tokens for frame in frames]).double().numpy()
        count, each = video.shape[:2]
        if method == "uniform-frames":
            places = uniform_frames(count, each, patches, lambda left: middles(grid, left))
        elif method == "fastvid":
            looked_at = [self._looked_at(frame, grid) for frame in frames]
            kept = fastvid(video, np.array(looked_at), patches, **options)
            tokens = torch.stack([torch.from_numpy(kept[place]) for place in sorted(kept)])
            return self._projected(tokens.float()), sorted(kept)
        elif method in COMPARED:
            places = COMPARED[method](video, patches, **options)
        else:
            return self._by_themselves(frames, grid, method, patches, options)
        tokens = torch.cat([frame.tokens for frame in frames])[places]
        return self._projected(tokens), places

    def _looked_at(self, frame: Frame, grid: tuple[int, int]) -> list[float]:
        """[CLS]'s attention, or what a token receives where there is none."""
        n = len(frame.tokens)
        seen = SeenImage(
            [*frame.tokens], frame.query, frame.key, frame.query.shape[-1] ** -0.5,
            frame.has_cls, grid, list(range(n)), [1.0] * n, frame.pixels, frame.unit,
        )  # fmt: skip
        return seen.of_cls()

    def _by_themselves(
        self, frames: list[Frame], grid: tuple[int, int], method: str, patches: int, options: dict
    ) -> tuple[Tensor, list[int]]:
        """The same by a method that takes a frame for an image."""
        count, each = len(frames), len(frames[0].tokens)
        shares = even(patches, count)
        if options.pop("frames", "even") == "unique":
            like = like_the_video(torch.stack([f.tokens for f in frames]).double().numpy())
            order = sorted(range(count), key=lambda i: (like[i], i))
            for frame, share in zip(order, by_rank(patches, count, each), strict=True):
                shares[frame] = share
        kept, places = [], []
        for number, (frame, keep) in enumerate(zip(frames, shares, strict=True)):
            rows, of_frame = self._reduced_frame(frame, grid, method, keep, options)
            kept.append(rows)
            places += [number * each + place for place in of_frame]
        return self._projected(torch.cat(kept)), places

    def _reduced_frame(
        self, frame: Frame, grid: tuple[int, int], method: str, keep: int, options: dict
    ) -> tuple[Tensor, list[int]]:
        """What stays of a frame, and its places."""
        n = len(frame.tokens)
        if keep in (0, n):
            return frame.tokens[:keep], list(range(keep))
        relevant: list[float] = []
        if method in ASKING:
            assert self.tower.words is not None, "no question was asked"
            relevant = relevances(self._projected(frame.tokens), self.tower.words)
        scale = frame.query.shape[-1] ** -0.5
        rows, places, _ = reduce_one(
            method, options, frame.tokens, frame.query, frame.key, scale, frame.has_cls, grid,
            list(range(n)), [1.0] * n, keep, frame.pixels, frame.unit, relevant,
        )  # fmt: skip
        return rows, places

    def _projected(self, tokens: Tensor) -> Tensor:
        """As they enter the decoder."""
        return tokens if self.has_newline else self.model.model.multi_modal_projector(tokens)
