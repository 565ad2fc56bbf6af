# SPDX-License-Identifier: Apache-2.0
"""A decoder that drops visual tokens on the way, one request at a time, with a KV list per layer.

Hugging Face's weights and plain PyTorch; no vLLM, no block, nothing of the package. The methods
are transcribed a second time, token by token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tests.reference.methods import lots, optimal_set, penalised


class Look(NamedTuple):
    """What a method sees of a layer, for one image."""

    query: Tensor
    """(rows, H, d), all rows of the request that are left, rotated."""
    key: Tensor
    """(rows, G, d)"""
    value: Tensor
    hidden: Tensor
    """(rows, D)"""
    image: list[int]
    """Rows of the image's tokens."""
    text: list[int]
    """Rows of the text behind it, or of its last token."""
    places: list[int]
    """Of the image's tokens on the grid."""
    before: Tensor
    """(rows, G, d): the same rows' keys in the layer before."""
    entered: tuple[Tensor, Tensor]
    """(n, D) and (M, D): embeddings of all the image's tokens and of the text, before any layer."""
    final_norm: Tensor
    """(D,): weight of the decoder's last norm."""

    def scores(self, rows: Sequence[int], columns: Sequence[int]) -> Tensor:
        """(H, rows, columns): scaled products."""
        shared = self.query.shape[1] // self.key.shape[1]
        key = self.key[list(columns)].repeat_interleave(shared, 1)
        scale = self.query.shape[-1] ** -0.5
        return torch.einsum("qhd,khd->hqk", self.query[list(rows)], key) * scale


Chosen = dict[int, Tensor]
"""Rows that stay, and their new hidden states."""
Choose = Callable[[Look, int], Chosen]


def best(rows: Sequence[int], score: Tensor, count: int) -> list[int]:
    """The rows with the highest scores; among equals the first."""
    order = sorted(range(len(rows)), key=lambda i: (-float(score[i]), i))
    return [rows[i] for i in order[:count]]


def k_norm(look: Look, keep: int) -> Chosen:
    length = look.key[look.image].square().sum((1, 2))
    return {row: look.hidden[row] for row in best(look.image, -length, keep)}


def v_norm(look: Look, keep: int) -> Chosen:
    length = look.value[look.image].square().sum((1, 2))
    return {row: look.hidden[row] for row in best(look.image, length, keep)}


def random_decoder(look: Look, keep: int, pixels: Tensor, seed: int = 0) -> Chosen:
    lot = lots(pixels, look.places, seed)
    order = sorted(range(len(lot)), key=lambda i: (lot[i], -i))
    return {look.image[i]: look.hidden[look.image[i]] for i in order[:keep]}


def fastv(look: Look, keep: int) -> Chosen:
    attention = look.scores(look.text[-1:], look.image).softmax(-1).mean(0)[0]
    return {row: look.hidden[row] for row in best(look.image, attention, keep)}


def a_score(look: Look, keep: int) -> Chosen:
    attention = look.scores(look.text, look.image).softmax(-1).mean((0, 1))
    return {row: look.hidden[row] for row in best(look.image, attention, keep)}


def of_raters(look: Look) -> Tensor:
    """(n,): what the words that resemble the image look at."""
    visual, text = look.entered
    relevance = (visual @ text.T).softmax(-1).mean(0)
    raters = [t for t, r in zip(look.text, relevance, strict=True) if r >= relevance.mean()]
    return look.scores(raters, look.image).softmax(-1).mean(0).sum(0)


def sparsevlm(look: Look, keep: int) -> Chosen:
    attention = of_raters(look)
    return {row: look.hidden[row] for row in best(look.image, attention, keep)}


def dart(look: Look, keep: int) -> Chosen:
    length = look.before.abs().sum((1, 2))
    hidden = look.hidden / look.hidden.square().mean(1, keepdim=True).sqrt() * look.final_norm
    pivots = best(look.image, length[look.image], min(4, keep))
    kept, more = list(pivots), keep - len(pivots)
    pivots = best(look.text, length[look.text], 4) + pivots
    for number, pivot in enumerate(pivots):
        share = more // len(pivots) + (number < more % len(pivots))
        rest = [row for row in look.image if row not in kept]
        if share:
            likeness = torch.cosine_similarity(hidden[[pivot]], hidden[rest])
            kept += best(rest, -likeness, share)
    return {row: look.hidden[row] for row in kept}


def ficoco_l(
    look: Look,
    keep: int,
    attention: str = "logits",
    text: str = "looks",
    causal: bool = False,
    normalise: bool = True,
    beta: float = 0.6,
    gamma: float = 0.6,
    penalty: float = 1.0,
    side: int = 12,
) -> Chosen:
    image, words = look.image, look.text
    among, from_text = look.scores(image, image), look.scores(words, image)
    to_text = look.scores(image, words)
    after = torch.ones(len(image), len(image)).triu(1).bool()
    if attention == "probabilities":
        from_text, to_text = from_text.softmax(-1), to_text.softmax(-1)
        if causal:
            among = among.masked_fill(after, float("-inf"))
        among = among.softmax(-1)
    elif causal:
        among = among.masked_fill(after, 0.0)
    among, from_text, to_text = among.mean(0), from_text.mean(0), to_text.mean(0)
    if text == "looks":
        to_text = from_text.T
    local, task = among.mean(1), to_text.sum(1)
    if normalise:
        local, task = local / local.norm(), task / task.norm()
    redundant = (beta * local - (1 - beta) * task).tolist()
    redundant = torch.tensor(penalised(redundant, look.places, (side, side), 2, penalty))
    leaves = best(range(len(image)), redundant, len(image) - keep)
    stays = [i for i in range(len(image)) if i not in leaves]
    total = look.hidden[[image[j] for j in stays]].clone()
    weight = torch.ones(len(stays))
    for i in leaves:
        direct = among[i, stays]
        indirect = to_text[i] @ from_text[:, stays]
        if attention == "logits":
            direct, indirect = ((x - x.max()).exp() for x in (direct, indirect))
        correlation = gamma * direct + (1 - gamma) * indirect
        receives = correlation >= torch.quantile(correlation, 0.998)
        share = torch.where(receives, correlation, 0.0)
        share = share / share.sum() if share.sum() > 0 else share
        total += share[:, None] * look.hidden[image[i]]
        weight += share
    return {image[j]: row for j, row in zip(stays, total / weight[:, None], strict=True)}


def vitcop(
    look: Look, keep: int, side: int = 12, spots: dict[int, tuple[float, float]] | None = None
) -> Chosen:
    """The second place of ViTCoP, algorithms 2 and 3; what rounding leaves over goes to clusters
    in the order of their next token: nearest to its quota, then shortest key.

    Places are on a square of a side, or where ``spots`` says.
    """
    rows, n = look.image, len(look.image)
    hidden, length = look.hidden[rows], look.key[rows].square().sum((1, 2)).sqrt()
    apart = torch.cdist(hidden, hidden, compute_mode="donot_use_mm_for_euclid_dist")
    where = [spots[p] if spots else (p // side / side, p % side / side) for p in look.places]
    density = [sum(math.exp(-((float(apart[i, j]) / 8) ** 2)) for j in range(n) if j != i)
               for i in range(n)]  # fmt: skip
    count = min(keep, math.ceil(keep * 0.1))
    parent, distance = [-1] * n, [math.inf] * n
    for i in range(n):
        for j in range(n):
            near = math.dist(where[i], where[j]) <= 0.6
            if density[j] > density[i] and near and apart[i, j] < distance[i]:
                distance[i], parent[i] = float(apart[i, j]), j
    importance = [
        math.inf if distance[i] == math.inf else density[i] * distance[i] for i in range(n)
    ]
    centres = sorted(range(n), key=lambda i: (-importance[i], i))[:count]
    label = [-1] * n
    for number, centre in enumerate(centres):
        label[centre] = number
    for i in sorted(range(n), key=lambda i: -density[i]):
        if label[i] < 0 and parent[i] < 0:
            label[i] = min(range(count), key=lambda c: float(apart[i, centres[c]]))
        elif label[i] < 0:
            label[i] = label[parent[i]]
    members = [
        sorted((i for i in range(n) if label[i] == c), key=lambda i: (float(length[i]), i))
        for c in range(count)
    ]
    quota = [len(m) * (keep - count) // n for m in members]
    elite = [i for m, q in zip(members, quota, strict=True) for i in m[:q]]
    spare = [
        (rank - quota[c], float(length[i]), i)
        for c, m in enumerate(members)
        for rank, i in enumerate(m)
        if quota[c] <= rank < len(m) - 1
    ]
    elite += [i for *_, i in sorted(spare)[: keep - count - len(elite)]]
    chosen = {rows[i]: look.hidden[rows[i]] for i in elite}
    for m in members:
        rest = [i for i in m if i not in elite]
        chosen[rows[rest[0]]] = look.hidden[[rows[i] for i in rest]].mean(0)
    return chosen


def sieve(look: Look, keep: int) -> Chosen:
    """Attention squared times the square of what a ridge regression on the text leaves; each that
    is kept damps those whose residuals are like its own."""
    attention = look.scores(look.text, look.image).softmax(-1).mean((0, 1)).double()
    text = [look.hidden[row].double() / look.hidden[row].double().norm() for row in look.text]
    spread = torch.stack(text).T  # columns of length 1
    ridge = spread.T @ spread + 0.01 * torch.eye(len(text), dtype=torch.float64)
    left, worth = [], []
    for row, a in zip(look.image, attention, strict=True):
        x = look.hidden[row].double()
        left.append(x - spread @ torch.linalg.solve(ridge, spread.T @ x))
        worth.append(float(a) ** 2 * float(left[-1] @ left[-1]))
    cosine = [[float(torch.cosine_similarity(x, y, 0)) for y in left] for x in left]
    chosen: list[int] = []
    for _ in range(keep):
        i = max((i for i in range(len(left)) if i not in chosen), key=lambda i: (worth[i], -i))
        chosen.append(i)
        for j in range(len(left)):
            worth[j] *= max(1 - cosine[i][j] ** 2, 1e-6)
    return {look.image[i]: look.hidden[look.image[i]] for i in chosen}


def fitprune(look: Look, keep: int) -> Chosen:
    n = len(look.image)
    among = look.scores(look.image, look.image)
    among = among.masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf")).softmax(-1)
    from_text = look.scores(look.text, look.image).softmax(-1)
    score = among.mean(0).sum(0) * from_text.mean(0).sum(0)
    return {row: look.hidden[row] for row in best(look.image, score, keep)}


def tops(look: Look, keep: int, diversity: float = 0.5, coverage: float = 0.5) -> Chosen:
    relevance = of_raters(look).tolist()
    chosen = optimal_set(look.hidden[look.image], relevance, keep, diversity, coverage)
    return {look.image[i]: look.hidden[look.image[i]] for i in chosen}


def mustdrop(look: Look, keep: int) -> Chosen:
    attention = look.scores(look.text, look.image).softmax(-1).mean(0)
    as_a_whole, by_a_word = attention.sum(0), attention.amax(0)
    relative = [x / x.mean() for x in (as_a_whole, by_a_word)]
    score = torch.stack(relative).amax(0)
    return {row: look.hidden[row] for row in best(look.image, score, keep)}


CHOOSE: dict[str, Choose] = {
    "k-norm": k_norm,
    "v-norm": v_norm,
    "a-score": a_score,
    "fastv": fastv,
    "pyramiddrop": fastv,
    "sparsevlm": sparsevlm,
    "dart": dart,
    "ficoco-l": ficoco_l,
    "ficoco-vl": ficoco_l,
    "vitcop": vitcop,
    "sieve": sieve,
    "tops": tops,
    "mustdrop": mustdrop,
    "fitprune": fitprune,
    "random-decoder": random_decoder,
}
"""At the method's first stage; ViTCoP's second is K-norm."""


class Answer(NamedTuple):
    """What the decoder says, and what it holds at the end."""

    tokens: list[int]
    first_logits: Tensor
    held: list[int]
    """Tokens in every layer's KV list."""
    kept: dict[tuple[int, int], list[int]]
    """Places on the grid of the tokens that a method has left, by layer and image."""
    apart: list[float]
    """Where streams were given, the mean difference of each from what the loop had."""


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cosine + torch.cat([-x[..., half:], x[..., :half]], -1) * sine


@torch.no_grad()
def answer(
    model: object,
    embeds: Tensor,
    images: Sequence[tuple[int, int]],
    keep: dict[int, Sequence[int]],
    choose: Sequence[Callable[[int], Choose] | None],
    places: Sequence[list[int]],
    new_tokens: int,
    turns: Tensor | None = None,
    levels: Tensor | None = None,
    streams: Sequence[Tensor] = (),
) -> Answer:
    """Greedy generation.

    Args:
        model: Hugging Face's LLaVA or Qwen-VL, of any family.
        embeds: (T, D), the prompt with its images.
        images: start and end of each.
        keep: by layer, tokens of each image that stay from there on.
        choose: by layer, the method of each image; None leaves it whole.
        places: of each image's tokens on its grid.
        new_tokens: how many to make.
        turns: (3, T and more) positions of three rows, where they are not those in the prompt.
        levels: (T, levels * D) what is added to the prompt behind each of the first layers.
        streams: (rows, D) that come to each layer, and leave the last, of another run of the
            prompt: every layer goes on from these, so that it can be compared by itself.
    """
    decoder = model.model.language_model
    config = decoder.config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    size = config.hidden_size // heads
    cache: list[tuple[Tensor, Tensor] | None] = [None] * len(decoder.layers)
    kept: dict[tuple[int, int], list[int]] = {}
    apart: list[float] = []

    def follow(x: Tensor) -> Tensor:
        if len(apart) == len(streams):
            return x
        given = streams[len(apart)]
        apart.append(float((x - given).abs().mean()))
        return given

    def forward(x: Tensor, position: list[int]) -> Tensor:
        before = x[:0]
        for number, layer in enumerate(decoder.layers):
            x = follow(x)

            def project(x: Tensor, position: list[int], layer=layer) -> tuple[Tensor, ...]:
                y, attention = layer.input_layernorm(x), layer.self_attn
                where = torch.tensor(position)[None]
                if turns is not None:
                    where = turns[:, position][:, None]
                cosine, sine = (p[0][:, None] for p in decoder.rotary_emb(y[None], where))
                query = attention.q_proj(y).view(-1, heads, size)
                key = attention.k_proj(y).view(-1, groups, size)
                if hasattr(attention, "q_norm"):
                    query, key = attention.q_norm(query), attention.k_norm(key)
                query, key = rotate(query, cosine, sine), rotate(key, cosine, sine)
                return query, key, attention.v_proj(y).view(-1, groups, size)

            if number in keep and len(x) > 1:
                seen = project(x, position)
                chosen: Chosen = {}
                for i, (start, end) in enumerate(images):
                    rows = [r for r, p in enumerate(position) if start <= p < end]
                    text = [
                        r
                        for r, p in enumerate(position)
                        if p >= end and not any(a <= p < b for a, b in images)
                    ]
                    method, count = choose[i], keep[number][i]
                    if method is None or count >= len(rows):
                        chosen |= {r: x[r] for r in rows}
                    elif count:
                        here = [places[i][position[r] - start] for r in rows]
                        words = text or rows[-1:]
                        entered = (embeds[start:end], embeds[[position[r] for r in words]])
                        norm = decoder.norm.weight
                        look = Look(*seen, x, rows, words, here, before, entered, norm)
                        left = method(number)(look, count)
                        kept[number, i] = [places[i][position[r] - start] for r in sorted(left)]
                        chosen |= left
                rest = {
                    r: x[r]
                    for r, p in enumerate(position)
                    if not any(a <= p < b for a, b in images)
                }
                chosen |= rest
                x = torch.stack([chosen[r] for r in sorted(chosen)])
                position = [position[r] for r in sorted(chosen)]
            query, key, value = project(x, position)
            before = key
            if cache[number] is not None:
                key = torch.cat([cache[number][0], key])
                value = torch.cat([cache[number][1], value])
            cache[number] = (key, value)
            key, value = (y.repeat_interleave(heads // groups, 1) for y in (key, value))
            scores = torch.einsum("qhd,khd->hqk", query, key) * size**-0.5
            later = torch.ones(len(query), len(key)).triu(1 + len(key) - len(query)).bool()
            shares = scores.masked_fill(later, float("-inf")).softmax(-1)
            mixed = torch.einsum("hqk,khd->qhd", shares, value).flatten(1)
            x = x + layer.self_attn.o_proj(mixed)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            if levels is not None and position[-1] < len(levels):
                own = levels[position, number * x.shape[1] : (number + 1) * x.shape[1]]
                x = x + own if own.shape[1] else x
        x = follow(x)
        return model.lm_head(decoder.norm(x[-1]))

    first = logits = forward(embeds, list(range(len(embeds))))
    made = [int(logits.argmax())]
    while len(made) < new_tokens:
        words = decoder.embed_tokens(torch.tensor(made[-1:]))
        logits = forward(words, [len(embeds) + len(made) - 1])
        made.append(int(logits.argmax()))
    return Answer(made, first, [len(entry[0]) for entry in cache if entry], kept, apart)
