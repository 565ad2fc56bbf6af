# SPDX-License-Identifier: Apache-2.0
"""LLaVA with the small heads that it is trained with, and what they are taught.

Shapes as in :mod:`vllm_ficoco.tiny_llava.lessons`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vllm_ficoco.tiny_llava.lessons import CELLS, NOTHING, PHRASES, Lesson
from vllm_ficoco.tiny_llava.scenes import COLOURS, SHAPES

MENTIONS, ANSWERS = 2, 4
"""Decoder layers in which mentions and answers are shown where to look."""
TELLS = 4
"""The decoder layer before which a mention must tell what it found."""
COMPARES = 5
"""The decoder layer before which an answer must tell how two things lie to each other."""
COUNTS = 7
"""A mention tells 0 to 6 things."""


class Pupil(nn.Module):
    """LLaVA and the heads it is trained with.

    Args:
        llava: Hugging Face's ``LlavaForConditionalGeneration``.
        vocabulary: number of every word.
    """

    def __init__(self, llava: nn.Module, vocabulary: dict[str, int]) -> None:
        super().__init__()
        self.llava = llava
        tower = llava.model.vision_tower
        self.tower = getattr(tower, "vision_model", tower)
        self.decoder = llava.model.language_model
        config = llava.config
        width, embedding = config.vision_config.hidden_size, config.vision_config.projection_dim
        self.used = len(self.tower.encoder.layers) + 1 + config.vision_feature_layer
        self.grid = config.vision_config.image_size // config.vision_config.patch_size
        depths = range(self.used // 2, self.used, 2)
        self.cls = nn.ModuleDict({str(d): nn.LayerNorm(width) for d in depths})
        self.cls[str(self.used + 1)] = nn.Identity()
        self.image = nn.ModuleDict({d: nn.Linear(width, embedding) for d in self.cls})
        self.colour = nn.Embedding(len(COLOURS), embedding)
        self.shape = nn.Embedding(len(SHAPES), embedding)
        self.phrase = nn.Embedding(len(PHRASES), embedding)
        for table in (self.colour, self.shape, self.phrase):
            nn.init.normal_(table.weight, std=0.5)
        self.caption = nn.Sequential(
            nn.Linear(embedding, 256), nn.GELU(), nn.Linear(256, embedding)
        )
        self.contrast = nn.Parameter(torch.tensor([math.log(10.0), math.log(5.0), -3.0]))
        self.silhouette = nn.Linear(width, CELLS**2)
        self.spot = nn.Linear(self.decoder.config.hidden_size, 2)
        self.background = nn.Linear(self.decoder.config.hidden_size, 2)  # and centre of a thing
        self.dense_scale = nn.Parameter(torch.tensor(1.0))
        self.tell = nn.Linear(self.decoder.config.hidden_size, COUNTS + len(PHRASES) + 2)
        self.compare = nn.Linear(self.decoder.config.hidden_size, 2)
        names = [*COLOURS, *SHAPES, *PHRASES[len(COLOURS) * len(SHAPES) :]]
        self.register_buffer("names", torch.tensor([vocabulary[n] for n in names]), False)
        self.register_buffer("user", torch.tensor(vocabulary["USER:"]), False)

    def embed(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) of 0 to 255 to the tower's first input, (B, 1 + N, width)."""
        mean = pixels.new_tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.float)
        deviation = pixels.new_tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.float)
        x = (pixels.float() / 255 - mean[:, None, None]) / deviation[:, None, None]
        return self.tower.pre_layrnorm(self.tower.embeddings(x))

    def see(self, pixels: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Runs the tower.

        Args:
            pixels: (B, 3, S, S), 0 to 255.

        Returns:
            Patches as LLaVA uses them and as an early layer leaves them, both (B, N, width);
            [CLS] at every depth that is contrasted, (B, width) each.
        """
        x = self.embed(pixels)
        classes = []
        for number, layer in enumerate(self.tower.encoder.layers, 1):
            x = layer(x, None)
            if number == 3:
                early = x[:, 1:]
            if number == self.used:
                patches = x[:, 1:]
            if number < self.used and str(number) in self.cls:
                classes.append(self.cls[str(number)](x[:, 0]))
        return patches, early, [*classes, self.tower.post_layernorm(x[:, 0])]

    def phrases(self) -> Tensor:
        """(phrases, embedding): colour plus shape, and each phrase's own."""
        pairs = (self.colour.weight[:, None] + self.shape.weight).flatten(0, 1)
        own = self.phrase.weight
        return torch.cat([pairs + 0.4 * own[: len(pairs)], own[len(pairs) :]])

    def tower_losses(
        self, lesson: Lesson, patches: Tensor, early: Tensor, classes: list[Tensor]
    ) -> dict[str, Tensor]:
        """What the tower is taught, by name."""
        phrases, present = self.phrases(), lesson.present
        said = (present @ phrases) / present.sum(1, keepdim=True).clamp(min=1).sqrt()
        captions = F.normalize(said + self.caption(said), dim=-1)
        first, second, bias = self.contrast
        same = torch.arange(len(present), device=present.device)
        there = (present > 0).float()
        contrast = sigmoid = 0.0
        for head, cls in zip(self.image.values(), classes, strict=True):
            image = F.normalize(head(cls).float(), dim=-1)
            likeness = image @ captions.T * first.exp().clamp(max=50)
            contrast += (F.cross_entropy(likeness, same) + F.cross_entropy(likeness.T, same)) / 2
            each = image @ F.normalize(phrases, dim=-1).T * second.exp().clamp(max=50) + bias
            loss = F.binary_cross_entropy_with_logits(each, there, reduction="none")
            sigmoid += (loss * (there * 4 + 1)).sum(1).mean() / 20
        # Patches say what they show in the decoder's own words: colour + shape, digit or word.
        projected = self.llava.model.multi_modal_projector(patches)
        words = F.embedding(self.names, self.decoder.embed_tokens.weight)
        scores = (projected @ words.T).float() * self.dense_scale
        colour, shape, rest = scores.split([len(COLOURS), len(SHAPES), len(words) - 16], -1)
        pairs = (colour[..., :, None] + shape[..., None, :]).flatten(-2)
        background, centre = self.background(projected).float().unbind(-1)
        scores = torch.cat([pairs, rest, background[..., None]], -1)
        weight = scores.new_ones(scores.shape[-1])
        weight[pairs.shape[-1] : -1], weight[-1] = 3.0, 0.15
        dense = F.cross_entropy(
            scores.flatten(0, 1), lesson.patch_phrase.flatten(), weight, ignore_index=NOTHING
        )
        shown = lesson.covers.sum(1) > 0.03
        cells = F.binary_cross_entropy_with_logits(
            self.silhouette(early).float(), lesson.silhouette.clamp(max=1), reduction="none"
        ).mean(-1)
        silhouette = cells[shown].mean() + 0.2 * cells[~shown].mean()
        # Where a patch lies must be plain to the decoder, for its order does not tell: tokens that
        # leave move the others up. Linear, so that a mean over patches is the middle of a thing.
        number = torch.arange(self.grid**2, device=present.device)
        spots = torch.stack([number % self.grid, number // self.grid], -1).add(0.5) / self.grid
        far = F.smooth_l1_loss(
            self.spot(projected).float(),
            spots.expand(len(present), -1, -1),
            beta=0.05,
            reduction="none",
        )
        spot = 3 * far[shown].mean() + far[~shown].mean()  # else things would lose theirs
        positive = centre.new_tensor(4.0)
        return {
            "contrast": 0.5 * contrast / len(classes),
            "sigmoid": sigmoid / len(classes),
            "dense": dense,
            "silhouette": silhouette,
            "spot": 3 * spot,
            "centre": F.binary_cross_entropy_with_logits(
                centre, lesson.centre.float(), pos_weight=positive
            ),
        }

    def answer_losses(
        self, lesson: Lesson, patches: Tensor, chosen: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """What the decoder is taught, and which words it would say.

        Args:
            lesson: the batch.
            patches: (B, N, width).
            chosen: (B, K) patches that it sees; None for all.

        Returns:
            The losses, and (B, L): the likeliest next word at every packed word.
        """
        visual = self.llava.model.multi_modal_projector(patches)
        covers = lesson.covers
        if chosen is not None:
            visual = visual.gather(1, chosen[..., None].expand(-1, -1, visual.shape[-1]))
            covers = covers.gather(2, chosen[:, None].expand(-1, covers.shape[1], -1))
        batch, count, _ = visual.shape
        text = F.embedding(
            torch.cat([self.user.expand(batch, 1), lesson.words], 1),
            self.decoder.embed_tokens.weight,
        )
        x = torch.cat([text[:, :1], visual, text[:, 1:]], 1)
        before = torch.arange(count + 1, device=x.device).expand(batch, -1)
        position = torch.cat([before, count + 1 + lesson.offset], 1)
        segment = torch.cat([torch.zeros_like(before), lesson.segment], 1)
        mask = segment[:, None, :] == segment[:, :, None]  # a question sees itself …
        mask = (mask | (segment[:, None, :] == 0)).tril()  # … and the image, nothing later
        bias = torch.zeros(mask.shape, device=x.device).masked_fill_(~mask, -1e4)[:, None]
        turn = self.decoder.rotary_emb(x, position)
        image, word = lesson.mention.unbind(1)
        losses: dict[str, Tensor] = {}
        for number, layer in enumerate(self.decoder.layers):
            if number == MENTIONS:
                shown = _mention_targets(lesson, covers, chosen, self.grid)
                at = (image, count + 1 + word)
                losses |= _looks(layer, x, turn, bias, at, shown)
            if number == ANSWERS:
                rows, words, shown = _answer_targets(lesson, covers, x.shape[1])
                at = (rows, count + 1 + words)
                losses |= _looks(layer, x, turn, bias, at, shown)
            if number == TELLS:
                losses["tell"] = self._tell(x[image, count + 1 + word], lesson)
            if number == COMPARES:
                losses["compare"] = self._compare(x[:, count + 1 :], lesson)
            x = layer(x, attention_mask=bias, position_embeddings=turn)
        x = self.decoder.norm(x[:, count + 1 :])
        asked = lesson.target != NOTHING
        logits = self.llava.lm_head(x[asked]).float()
        losses["answer"] = F.cross_entropy(logits, lesson.target[asked])
        said = torch.full_like(lesson.target, NOTHING)
        said[asked] = logits.argmax(-1)
        return losses, said

    def _tell(self, x: Tensor, lesson: Lesson) -> Tensor:
        """How many things a mention means; and of a single one what and where it is."""
        x = F.layer_norm(x.float(), x.shape[-1:])
        number, phrase, place = self.tell(x).split([COUNTS, len(PHRASES), 2], -1)
        many = lesson.mentioned.sum(1)
        loss = F.cross_entropy(number, many.clamp(max=COUNTS - 1))
        single = many == 1
        image, thing = lesson.mention[single, 0], lesson.mentioned[single].int().argmax(1)
        loss = loss + 0.3 * F.cross_entropy(phrase[single], lesson.thing_phrase[image, thing])
        distance = F.smooth_l1_loss(place[single], lesson.thing_place[image, thing], beta=0.05)
        return loss + 4 * distance

    def _compare(self, x: Tensor, lesson: Lesson) -> Tensor:
        """From the first to the second of the two things that a question mentions, how far."""
        same = _mentions_of_answers(lesson) & (lesson.mentioned.sum(1) == 1)
        rows, words = (lesson.task >= 0).nonzero().unbind(1)
        two = same.sum(1) == 2
        first, second = same[two].nonzero()[:, 1].view(-1, 2).unbind(1)
        thing = lesson.mentioned.int().argmax(1)
        place = lesson.thing_place[lesson.mention[:, 0], thing]
        x = x[rows[two], words[two]].float()
        said = self.compare(F.layer_norm(x, x.shape[-1:]))
        # No question with two things in a batch: nothing to learn, and no mean of nothing either.
        loss = F.smooth_l1_loss(said, place[second] - place[first], beta=0.05, reduction="sum")
        return 4 * loss / max(said.numel(), 1)


def _mentions_of_answers(lesson: Lesson) -> Tensor:
    """(a, m), bool: which mentions the question of each answer makes."""
    image, word = lesson.mention.unbind(1)
    rows, words = (lesson.task >= 0).nonzero().unbind(1)
    question = lesson.segment[rows, words]
    return (rows[:, None] == image) & (question[:, None] == lesson.segment[image, word])


Shown = dict[str, tuple[Tensor, bool]]
"""Where to look, one head each, by name: (m, T) which places, and whether each of them must have
an equal share, or any of them may have it all. A row without places teaches nothing."""


def _mention_targets(lesson: Lesson, covers: Tensor, chosen: Tensor | None, grid: int) -> Shown:
    """Where a mention is to look.

    One head finds the mentioned things. Another counts them: it shares its attention out evenly
    between the first word, which is always there, and one patch of each thing.

    Args:
        lesson: the batch.
        covers: (B, M, K) of the visible patches.
        chosen: (B, K) which those are; None for all.
        grid: patches along a side.
    """
    image = lesson.mention[:, 0]
    things = lesson.mentioned
    found = torch.einsum("ms,msk->mk", things.float(), covers[image]) > 0.05
    # Of each thing the patch of its centre, or else the one with most of it on.
    column, row = (lesson.thing_place * grid).long().clamp(max=grid - 1).unbind(-1)
    middle = row * grid + column
    if chosen is None:
        is_middle = torch.arange(covers.shape[-1], device=covers.device) == middle[..., None]
    else:
        is_middle = chosen[:, None] == middle[..., None]
    best = (covers + is_middle).max(-1)
    seen = things & (best.values[image] > 0.05)
    each = torch.zeros_like(found).scatter_add_(1, best.indices[image], seen)
    one = torch.ones_like(found[:, :1])
    text = torch.zeros(len(image), lesson.words.shape[1], device=image.device, dtype=torch.bool)
    return {
        "find": (torch.cat([~one, found, text], 1), False),
        "count": (torch.cat([one, each, text], 1), True),
    }


def _answer_targets(lesson: Lesson, covers: Tensor, length: int) -> tuple[Tensor, Tensor, Shown]:
    """Where an answer is to look: at all that its question mentions, and at who found something.

    One head sees the things themselves, one the first mention that means any, one the last.

    Args:
        lesson: the batch.
        covers: (B, M, K) of the visible patches.
        length: T of the decoder's rows.

    Returns:
        (a,) image and (a,) packed word of every answer, and where it is to look.
    """
    word = lesson.mention[:, 1]
    rows, words = (lesson.task >= 0).nonzero().unbind(1)
    same = _mentions_of_answers(lesson)
    things = (same.float() @ lesson.mentioned.float()) > 0
    found = torch.einsum("as,ask->ak", things.float(), covers[rows]) > 0.05
    sees = torch.zeros(len(rows), length, device=rows.device, dtype=torch.bool)
    sees[:, 1 : 1 + found.shape[1]] = found
    meant = same & lesson.mentioned.any(1)
    place = length - lesson.words.shape[1] + word
    first = place.masked_fill(~meant, length).amin(1)
    last = place.masked_fill(~meant, -1).amax(1)
    every = torch.arange(length, device=rows.device)
    return (
        rows,
        words,
        {
            "see": (sees, False),
            "first": (every == first[:, None], False),
            "last": (every == last[:, None], False),
        },
    )


def _looks(
    layer: nn.Module,
    x: Tensor,
    turn: tuple[Tensor, Tensor],
    bias: Tensor,
    at: tuple[Tensor, Tensor],
    shown: Shown,
) -> dict[str, Tensor]:
    """How far the attention of a layer's first heads is from where they are shown to look.

    Args:
        layer: of the decoder.
        x: (B, T, width), its input.
        turn: cosine and sine of the rotary positions.
        bias: (B, 1, T, T), the mask.
        at: image and row of the m words that look.
        shown: one entry a head.
    """
    attention, size = layer.self_attn, layer.self_attn.head_dim
    h = layer.input_layernorm(x)

    def rotate(y: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        one, other = y.chunk(2, -1)
        return y * cosine + torch.cat([-other, one], -1) * sine

    losses = {}
    for head, (name, (places, evenly)) in enumerate(shown.items()):
        own = slice(head * size, (head + 1) * size)
        query = F.linear(h[at], attention.q_proj.weight[own])
        query = rotate(query, turn[0][at], turn[1][at])
        key = rotate(F.linear(h, attention.k_proj.weight[own]), *turn)
        scores = torch.einsum("md,mtd->mt", query, key[at[0]]) * size**-0.5
        share = (scores + bias[at[0], 0, at[1]]).float().log_softmax(-1)
        some = places.any(1)
        share, places = share[some], places[some]
        if evenly:
            loss = -(share * places).sum(1) / places.sum(1) - places.sum(1).log()
        else:
            loss = -share.masked_fill(~places, -torch.inf).logsumexp(1)
        losses[name] = loss.mean()
    return losses
