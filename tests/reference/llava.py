# SPDX-License-Identifier: Apache-2.0
"""LLaVA with reduction on plain Hugging Face modules: one image at a time, no vLLM, no package.

The tower is a loop over Hugging Face's layers with attention written out, which calls the literal
transcription of a method (:mod:`tests.reference.methods`) where its schedule says. The language
model is Hugging Face's own, greedy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.reference.methods import (
    ASKING,
    PLACE,
    PROPORTIONAL,
    reduce_one,
    relevances,
    stages,
)


@contextmanager
def one_thread() -> Iterator[None]:
    """A reference is thousands of small operations, which wait for threads more than they run.

    An engine in this process may have bound its threads to few cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class ReferenceTower:
    """The tower of a LLaVA, one input at a time: an image, its thumbnail or one of its tiles."""

    def __init__(self, model: torch.nn.Module) -> None:
        config = model.config
        vision = config.vision_config
        self.side = vision.image_size // vision.patch_size
        self.has_cls = vision.model_type == "clip_vision_model"
        self.layers = vision.num_hidden_layers + config.vision_feature_layer + 1
        self.looked: list[tuple[Tensor, Tensor]] = []
        self.words: Tensor | None = None
        """(M, C) of the question, as the decoder gets them."""
        self.project = model.model.multi_modal_projector
        tower = model.model.vision_tower
        self.model = getattr(tower, "vision_model", tower)

    def __call__(
        self,
        pixels: Tensor,
        method: str = "none",
        keep: int = 0,
        options: dict | None = None,
        grid: tuple[int, int] | None = None,
        among: list[int] | None = None,
    ) -> tuple[Tensor, list[int]]:
        """(kept, D), what LLaVA takes of the tower, and the places of its tokens on the grid.

        ``self.looked`` then has the queries and keys of every layer.

        Args:
            pixels: (3, height, width).
            method: a reduction.
            keep: to how many tokens; what has no more is left as it is.
            options: of the method.
            grid: rows and columns of the places that are seen, default all of the tower.
            among: these places: the others are cut off behind the last layer, before a method that
                works on its output.
        """
        x = self.model.embeddings(pixels[None])
        if hasattr(self.model, "pre_layrnorm"):
            x = self.model.pre_layrnorm(x)
        x, first, n, self.looked = x[0], int(self.has_cls), self.side**2, []
        grid, among = grid or (self.side, self.side), among or list(range(n))
        reduce = method != "none" and keep < len(among)
        keep_after = dict(stages(method, len(among), keep, self.layers)) if reduce else {}
        place = list(range(len(among)))
        size = [1.0] * len(among)
        for i in range(self.layers):
            layer = self.model.encoder.layers[i]
            attention, y = layer.self_attn, layer.layer_norm1(x)
            heads = attention.num_heads
            q, k, v = (
                projection(y).view(len(y), heads, -1).transpose(0, 1)
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            scale = q.shape[-1] ** -0.5
            self.looked.append((q, k))
            scores = q @ k.transpose(-1, -2) * scale
            if reduce and method in PROPORTIONAL:
                scores = scores + torch.tensor([1.0] * first + size).log()
            mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(len(y), -1)
            x = x + attention.out_proj(mixed)

            def mlp(x: Tensor, layer=layer) -> Tensor:
                return x + layer.mlp(layer.layer_norm2(x))

            before_mlp = i in keep_after and PLACE[method] == "tower"
            if not before_mlp:
                x = mlp(x)
            if i == self.layers - 1 and len(among) < n:
                seen = [*range(first), *(first + p for p in among)]
                x, q, k = x[seen], q[:, seen], k[:, seen]
            if i in keep_after:
                relevant: list[float] = []
                if method in ASKING:
                    assert self.words is not None, "no question was asked"
                    relevant = relevances(self.project(x[first:]), self.words)
                hidden, place, size = reduce_one(
                    method, options or {}, x[first:], q, k, scale, self.has_cls,
                    grid, place, size, keep_after[i], pixels, 1, relevant,
                )  # fmt: skip
                x = torch.cat([x[:first], hidden.to(x.dtype)])
            if before_mlp:
                x = mlp(x)
        return x[first:], [among[p] for p in place]


class ReferenceLlava:
    """A checkpoint in float32 that answers with a reduction of each image."""

    beside: dict[str, Tensor] = {}
    """What goes with the embeddings of a prompt, for :func:`tests.reference.decoder.answer`."""

    def __init__(self, path: str) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.processor = AutoProcessor.from_pretrained(path)
        self.tower = ReferenceTower(self.model)

    @torch.no_grad()
    def ask(self, question: str) -> None:
        """The question of the images that are shown from now on: all text behind them."""
        tokenizer = self.processor.tokenizer
        ids = tokenizer(question, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        spoken = [int(i) for i in ids if int(i) not in tokenizer.all_special_ids]
        self.tower.words = self.model.get_input_embeddings()(torch.tensor(spoken).long())

    @torch.no_grad()
    def visual_tokens(
        self, image: Image.Image, method: str = "none", budget: int = 0, options: dict | None = None
    ) -> Tensor:
        """(kept, hidden size of the decoder); ``self.place`` then has their grid places, the same
        in sides of the image are ``self.spots``, and ``self.pixels`` is the image."""
        pixels = self.processor.image_processor([image], return_tensors="pt")["pixel_values"]
        hidden, self.place = self.tower(pixels[0], method, budget, options)
        self.pixels, side = pixels[0], self.tower.side
        self.spots = [(place // side / side, place % side / side) for place in self.place]
        return self.model.model.multi_modal_projector(hidden)

    @torch.no_grad()
    def embed(self, prompt: str, visual: list[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
        """The prompt, (T, D), and where its images begin and end.

        Args:
            prompt: with one ``<image>`` an image.
            visual: of every image.
        """
        ids = self.processor.tokenizer(prompt, return_tensors="pt")["input_ids"][0]
        words = self.model.get_input_embeddings()(ids)
        images, token = iter(visual), self.model.config.image_token_index
        parts, places = [], []
        for number, word in zip(ids, words, strict=True):
            start = sum(map(len, parts))
            parts.append(next(images) if number == token else word[None])
            if number == token:
                places.append((start, start + len(parts[-1])))
        return torch.cat(parts), places

    @torch.no_grad()
    def generate(self, prompt: str, visual: list[Tensor], new_tokens: int) -> tuple[list[int], int]:
        """Greedy tokens, and the length of the prompt with its visual tokens.

        Args:
            prompt: with one ``<image>`` an image.
            visual: of every image.
            new_tokens: how many to make; the end of the text is ignored.
        """
        embeds = self.embed(prompt, visual)[0][None]
        length = embeds.shape[1]
        made: list[int] = []
        cache = None
        for _ in range(new_tokens):
            out = self.model.model.language_model(
                inputs_embeds=embeds, past_key_values=cache, use_cache=True
            )
            cache = out.past_key_values
            made.append(int(self.model.lm_head(out.last_hidden_state[0, -1]).argmax()))
            embeds = self.model.get_input_embeddings()(torch.tensor([[made[-1]]]))
        return made, length
