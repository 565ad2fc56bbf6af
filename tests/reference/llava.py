# SPDX-License-Identifier: Apache-2.0
"""LLaVA with reduction on plain Hugging Face modules: one image at a time, no vLLM, no package.

The tower is a loop over Hugging Face's layers with attention written out, which calls the literal
transcription of a method (:mod:`tests.reference.methods`) where its schedule says. The language
model is Hugging Face's own, greedy.
"""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration

from tests.reference.methods import PLACE, PROPORTIONAL, reduce_one, stages


class ReferenceLlava:
    """A checkpoint in float32 that answers with a reduction of each image."""

    def __init__(self, path: str) -> None:
        self.model = LlavaForConditionalGeneration.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.processor = AutoProcessor.from_pretrained(path)
        config = self.model.config
        vision = config.vision_config
        self.side = vision.image_size // vision.patch_size
        self.has_cls = vision.model_type == "clip_vision_model"
        self.layers = vision.num_hidden_layers + config.vision_feature_layer + 1
        self.tower = self.model.model.vision_tower
        self.tower = getattr(self.tower, "vision_model", self.tower)

    @torch.no_grad()
    def visual_tokens(
        self, image: Image.Image, method: str = "none", budget: int = 0, options: dict | None = None
    ) -> Tensor:
        """(kept, hidden size of the decoder); ``self.place`` then has their grid places,
        ``self.pixels`` the image."""
        pixels = self.processor.image_processor([image], return_tensors="pt")["pixel_values"]
        x = self.tower.embeddings(pixels)
        if hasattr(self.tower, "pre_layrnorm"):
            x = self.tower.pre_layrnorm(x)
        x, first, n = x[0], int(self.has_cls), self.side**2
        reduce = method != "none" and budget < n
        keep_after = dict(stages(method, n, budget, self.layers)) if reduce else {}
        place = list(range(n))
        size = [1.0] * n
        for i in range(self.layers):
            layer = self.tower.encoder.layers[i]
            attention, y = layer.self_attn, layer.layer_norm1(x)
            heads = attention.num_heads
            q, k, v = (
                projection(y).view(len(y), heads, -1).transpose(0, 1)
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            scale = q.shape[-1] ** -0.5
            scores = q @ k.transpose(-1, -2) * scale
            if reduce and method in PROPORTIONAL:
                scores = scores + torch.tensor([1.0] * first + size).log()
            mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(len(y), -1)
            x = x + attention.out_proj(mixed)

            def mlp(x: Tensor, layer=layer) -> Tensor:
                return x + layer.mlp(layer.layer_norm2(x))

            here = i in keep_after
            if here and PLACE[method] == "output":
                x = mlp(x)
            if here:
                hidden, place, size = reduce_one(
                    method, options or {}, x[first:], q, k, scale, self.has_cls,
                    (self.side, self.side), place, size, keep_after[i], pixels[0],
                )  # fmt: skip
                x = torch.cat([x[:first], hidden.to(x.dtype)])
            if not (here and PLACE[method] == "output"):
                x = mlp(x)
        self.place, self.pixels = place, pixels[0]
        return self.model.model.multi_modal_projector(x[first:])

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
