# SPDX-License-Identifier: Apache-2.0
"""Every method that acts before the decoder, one image and one token at a time, in float64.

Written from the papers and from what the methods say of themselves; shares no code with the
package and imports nothing of it. Nothing here is fast. An integration test can run it inside a
plain tower: at every ``(layer, keep)`` of :func:`stages`, call :func:`reduce_one` between
attention and MLP (``PLACE[method] == "tower"``) or on the layer's output (``"output"``), and let
the layers of a method in ``PROPORTIONAL`` attend with log(size) added to the scores.

Where two things are equal, the lower index wins: it leaves first, receives first, leads a window.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction

import torch
from torch import Tensor

PLACE = {
    "ficoco-v": "tower",
    "ficoco-k": "tower",
    "tome": "tower",
    "evit": "tower",
    "score": "output",
    "dpp": "output",
    "scope": "output",
    "apet": "output",
    "topk": "output",
    "visionzip": "output",
    "prumerge": "output",
    "globalcom2": "output",
    "hired": "output",
    "pooling": "output",
    "uniform": "output",
    "random": "output",
    "cdpruner": "output",
    "recoverable": "output",
    "resize": "input",
    "tops": "output",
    "mustdrop": "output",
}
"""Between attention and MLP of a layer, on the output of the last layer, or before the tower."""

AT_OUTPUT = {"ficoco-v"}
"""Of those between attention and MLP, what acts on the output of a tower that merges patches."""

SAMPLED = 256
"""Of how many tokens at most the patches are asked, where a tower merges patches into tokens."""

COVERED = 1024
"""Of how many tokens at most ``scope`` counts who covers them."""

ALIKE = 1e-6
"""A greedy choice that adds less than this, of 1, adds this: then weight and place decide."""

PROPORTIONAL = {"ficoco-k", "tome"}
"""Methods under which every layer adds log(size) of a token to the scores of attending to it."""

DEFAULTS = {
    "ficoco-v": {
        "attention": "logits",
        "normalise": True,
        "lambda": 0.35,
        "coefficient": 2.0,
        "window": 2,
        "epsilon": 0.998,
        "quantile": "row",
        "receivers": None,
        "weighted": True,
    },
    "ficoco-k": {"protect": 0.5},
    "score": {"alpha": None},
    "dpp": {"alpha": 0.0},
    "scope": {"alpha": 1.0},
    "apet": {"basis": 10},
    "visionzip": {"contextual": 5 / 32},
    "prumerge": {"neighbours": 32},
    "globalcom2": {"attention": "logits", "temperature": 10.0},
    "hired": {"alpha": 0.5},
    "random": {"seed": 0},
    "tops": {"tokens": None, "diversity": 0.5, "coverage": 0.5},
    "mustdrop": {"tokens": None},
    "cdpruner": {"alpha": 1.0},
    "recoverable": {"recovered": 0.25, "merged": 0.125, "neighbours": 5},
}

ASKING = {"cdpruner", "recoverable"}
"""Methods that look at the question, before the decoder."""

Reduced = tuple[list[Tensor], list[int], list[float]]
"""Hidden states, places and sizes of the tokens that stay."""


def reduce_one(
    method: str,
    options: dict,
    hidden: Tensor,
    query: Tensor,
    key: Tensor,
    scale: float,
    has_cls: bool,
    grid: tuple[int, int],
    position: list[int],
    size: list[float],
    keep: int,
    pixels: Tensor,
    unit: int = 1,
    relevance: Sequence[float] = (),
) -> tuple[Tensor, list[int], list[float]]:
    """One stage for one image.

    Args:
        method: one of :data:`PLACE`.
        options: those that differ from :data:`DEFAULTS`.
        hidden: (n, D) the tokens, [CLS] not among them.
        query: (H, m, d) before scaling; m = n * unit patches, one more with [CLS] first.
        key: (H, m, d).
        scale: factor of the products.
        has_cls: whether the layer attends over [CLS] as well.
        grid: rows and columns of the image.
        position: grid place of every token.
        size: how many patches every token stands for.
        keep: how many tokens stay.
        pixels: (3, height, width).
        unit: how many patches, one after another, the tower merges into a token.
        relevance: of every token to the question, for :data:`ASKING`; see :func:`relevances`.

    Returns:
        Hidden states (keep, D) in the type given, places and sizes.
    """
    image = Image(
        [row.double() for row in hidden],
        query,
        key,
        scale,
        has_cls,
        grid,
        position,
        size,
        pixels,
        unit,
        relevance,
    )
    chosen = {**DEFAULTS.get(method, {}), **options}
    rows, position, size = FUNCTIONS[method](image, keep, **chosen)
    return torch.stack(rows).to(hidden.dtype), position, size


class Image:
    """The tokens of one image at one layer, and its attention in float64."""

    def __init__(
        self,
        hidden: list[Tensor],
        query: Tensor,
        key: Tensor,
        scale: float,
        has_cls: bool,
        grid: tuple[int, int],
        position: list[int],
        size: list[float],
        pixels: Tensor,
        unit: int = 1,
        relevance: Sequence[float] = (),
    ) -> None:
        self.hidden, self.scale, self.has_cls, self.grid = hidden, scale, has_cls, grid
        self.query, self.key, self.pixels = query.double(), key.double(), pixels
        self.position, self.size = list(position), list(size)
        self.n, self.unit, self.relevance = len(hidden), unit, list(relevance)
        self.first = 1 if has_cls else 0
        self.heads = len(self.query)

    def patches(self, token: int) -> range:
        """Where a token's patches are among what is attended to."""
        return range(self.first + token * self.unit, self.first + (token + 1) * self.unit)

    def attends(self, place: int, kind: str) -> Tensor:
        """What a patch (0 is [CLS] if there is one) gives to everything that is attended to."""
        total = torch.zeros(self.key.shape[1], dtype=torch.float64)
        for head in range(self.heads):
            row = self.scale * (self.key[head] @ self.query[head, place])
            if kind == "probabilities":
                row = torch.exp(row - row.max())
                row = row / row.sum()
            total += row
        return total / self.heads

    def to_tokens(self, row: Tensor, kind: str) -> Tensor:
        """(n,): what the tokens get of it: of probabilities the sum over their patches, of logits
        the mean."""
        values = row.tolist()
        got = [sum(values[patch] for patch in self.patches(token)) for token in range(self.n)]
        if kind == "logits":
            got = [value / self.unit for value in got]
        return torch.tensor(got, dtype=torch.float64)

    def among_tokens(self, kind: str) -> list[Tensor]:
        """A: row i is what token i gives to every token, the mean over its patches."""
        matrix = []
        for token in range(self.n):
            row = torch.zeros(self.n, dtype=torch.float64)
            for patch in self.patches(token):
                row += self.to_tokens(self.attends(patch, kind), kind)
            matrix.append(row / self.unit)
        return matrix

    def given(self, kind: str) -> list[float]:
        """What a token gives: the mean over its patches and over all patches."""
        found = []
        for token in range(self.n):
            total = 0.0
            for patch in self.patches(token):
                total += sum(self.attends(patch, kind).tolist()[self.first :])
            found.append(total / self.unit / (self.n * self.unit))
        return found

    def of_cls(self, kind: str = "probabilities") -> list[float]:
        """a; without [CLS] what a token receives from the patches on average, or from those of the
        middle tokens of so many windows of the grid."""
        if self.has_cls:
            return self.to_tokens(self.attends(0, kind), kind).tolist()
        asked = list(range(self.n))
        if self.unit > 1 and self.n > SAMPLED and kind == "probabilities":
            asked = middles(self.grid, SAMPLED)
        received = torch.zeros(self.n, dtype=torch.float64)
        for token in asked:
            for patch in self.patches(token):
                received += self.to_tokens(self.attends(patch, kind), kind)
        return (received / (len(asked) * self.unit)).tolist()

    def mean_keys(self) -> list[Tensor]:
        """(d,) for every token: the keys of its patches, mean over them and over heads."""
        keys = []
        for token in range(self.n):
            total = torch.zeros_like(self.key[0, 0])
            for head in range(self.heads):
                for patch in self.patches(token):
                    total += self.key[head, patch]
            keys.append(total / (self.heads * self.unit))
        return keys


def ranked(score: list[float]) -> list[int]:
    """Indices from the highest score to the lowest."""
    return sorted(range(len(score)), key=lambda i: (-score[i], i))


def likeness(a: Tensor, b: Tensor) -> float:
    """Cosine of two vectors."""
    lengths = math.sqrt(float(a @ a)) * math.sqrt(float(b @ b))
    return float(a @ b) / lengths if lengths else 0.0


def kept(image: Image, target: list[int]) -> Reduced:
    """The targets as they are."""
    return (
        [image.hidden[j] for j in target],
        [image.position[j] for j in target],
        [image.size[j] for j in target],
    )


def without(n: int, leaving: list[int]) -> list[int]:
    """The indices that stay, in raster order."""
    gone = set(leaving)
    return [i for i in range(n) if i not in gone]


# --- Methods ------------------------------------------------------------------------------------


def ficoco_v(
    image: Image,
    keep: int,
    attention: str,
    normalise: bool,
    coefficient: float,
    window: int,
    epsilon: float,
    quantile: str,
    receivers: int | None,
    weighted: bool,
    **more: float,
) -> Reduced:
    """Equations 11 to 13 of arXiv 2411.17686 with the local penalty."""
    weight, n = more["lambda"], image.n
    matrix = [row.tolist() for row in image.among_tokens(attention)]
    local = image.given(attention)
    task = image.of_cls(attention)
    if normalise:
        local, task = unit(local), unit(task)
    score = [weight * local[i] - (1 - weight) * task[i] for i in range(n)]
    score = penalised(score, image.position, image.grid, window, coefficient)
    source = sorted(ranked(score)[: n - keep])
    target = without(n, source)

    total = {j: image.hidden[j].clone() for j in target}
    share = dict.fromkeys(target, 1.0)
    between = {i: [matrix[i][j] for j in target] for i in source}
    everything = [x for row in between.values() for x in row]
    for i, row in between.items():
        threshold = quantile_of(everything if quantile == "matrix" else row, epsilon)
        if attention == "logits":
            threshold = math.exp(threshold - max(row))
            row = [math.exp(x - max(row)) for x in row]
        if receivers is None:
            receives = [(j, x) for j, x in zip(target, row, strict=True) if x >= threshold]
        else:
            receives = [(target[k], row[k]) for k in ranked(row)[:receivers]]
        if not weighted:
            receives = [(j, 1.0) for j, _ in receives]
        whole = sum(x for _, x in receives)
        if whole == 0:
            continue  # nobody who stays receives of i
        for j, x in receives:
            total[j] = total[j] + x / whole * image.hidden[i]
            share[j] += x / whole
    _, position, size = kept(image, target)
    return [total[j] / share[j] for j in target], position, size


def unit(values: list[float]) -> list[float]:
    """Divided by their length."""
    length = math.sqrt(sum(x * x for x in values))
    return [x / length for x in values] if length else values


def penalised(
    score: list[float],
    position: list[int],
    grid: tuple[int, int],
    window: int,
    coefficient: float,
) -> list[float]:
    """The highest score of every window: times the coefficient if positive, divided if not."""
    leader: dict[tuple[int, int], int] = {}
    for i, place in enumerate(position):
        row, column = divmod(place, grid[1])
        here = (row // window, column // window)
        if here not in leader or score[i] > score[leader[here]]:
            leader[here] = i
    scaled = list(score)
    for i in leader.values():
        scaled[i] = score[i] * coefficient if score[i] > 0 else score[i] / coefficient
    return scaled


def quantile_of(values: list[float], q: float) -> float:
    """Between the two entries next to rank q (n - 1), by linear interpolation."""
    ordered = sorted(values)
    rank = q * (len(ordered) - 1)
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def tome(image: Image, keep: int) -> Reduced:
    """Bipartite matching of arXiv 2210.09461: even tokens are A, odd ones B, key cosine."""
    return paired(image, keep, lambda strength: strength)


def ficoco_k(image: Image, keep: int, protect: float) -> Reduced:
    """ToMe, but of the strengths, in deviations from their mean, those of the scaled products of
    [CLS] with the keys are taken off, in theirs."""
    looked = deviations(dict(enumerate(image.of_cls("logits"))))

    def spared(strength: dict[int, float]) -> dict[int, float]:
        alike = deviations(strength)
        return {a: alike[a] - protect * looked[a] for a in strength}

    return paired(image, keep, spared)


def deviations(values: dict[int, float]) -> dict[int, float]:
    """How many standard deviations each lies above the mean."""
    mean = sum(values.values()) / len(values)
    spread = math.sqrt(sum((x - mean) ** 2 for x in values.values()) / len(values))
    return {key: (x - mean) / max(spread, 1e-6) for key, x in values.items()}


def paired(
    image: Image, keep: int, rank: Callable[[dict[int, float]], dict[int, float]]
) -> Reduced:
    """Merge the even tokens that rank highest, each into the odd one whose key is most alike."""
    keys = image.mean_keys()
    odd = range(1, image.n, 2)
    strength, partner = {}, {}
    for a in range(0, image.n, 2):
        strength[a] = -math.inf
        for b in odd:
            similarity = likeness(keys[a], keys[b])
            if similarity > strength[a]:
                strength[a], partner[a] = similarity, b
    order = rank(strength)
    source = sorted(order, key=lambda a: (-order[a], a))[: image.n - keep]
    target = without(image.n, source)
    hidden, position, size = [], [], []
    for j in target:
        total, count = image.size[j] * image.hidden[j], image.size[j]
        for i in source:
            if partner[i] == j:
                total = total + image.size[i] * image.hidden[i]
                count += image.size[i]
        hidden.append(total / count)
        position.append(image.position[j])
        size.append(count)
    return hidden, position, size


def evit(image: Image, keep: int) -> Reduced:
    """arXiv 2202.07800: keep - 1 tokens stay, the others become one, placed behind them."""
    attention = image.of_cls()
    source = sorted(ranked([-a for a in attention])[: image.n - keep + 1])
    hidden, position, size = kept(image, without(image.n, source))
    whole = sum(attention[i] for i in source)
    fused = torch.zeros_like(image.hidden[0])
    for i in source:
        fused += (attention[i] / whole if whole else 1 / len(source)) * image.hidden[i]
    return (
        [*hidden, fused],
        [*position, max(image.position[i] for i in source)],
        [*size, sum(image.size[i] for i in source)],
    )


def score(image: Image, keep: int, alpha: float | None) -> Reduced:
    """Weighted k-centre: the most salient token, then whichever has the largest product of 1 - its
    highest cosine to a chosen one and saliency ** alpha. For alpha 0 the first is the one least
    like the mean of all directions."""
    if alpha is None:
        alpha = 0.2 if image.has_cls else 0.0
    alike, saliency = directions(image) @ directions(image).T, image.of_cls()
    average = (alike.sum(0) / image.n).tolist()
    unusual = [1.0 if x > min(average) + ALIKE else 2.0 for x in average]
    weight = [a**alpha for a in saliency]

    def worth(chosen: list[int]) -> list[float]:
        if not chosen:
            return saliency if alpha else unusual
        highest = alike[chosen].amax(0).tolist()
        return [max(1 - x, ALIKE) * w for x, w in zip(highest, weight, strict=True)]

    return kept(image, sorted(greedily(image.n, keep, worth)))


def directions(image: Image) -> Tensor:
    """(n, D): the tokens with length 1, or 0."""
    return torch.stack([x / (x.norm() or 1.0) for x in image.hidden])


def dpp(image: Image, keep: int, alpha: float) -> Reduced:
    """The largest determinant of the kernel of what is chosen, step by step (arXiv 2506.10967,
    section 3, without relevance)."""
    saliency = image.of_cls()
    quality = [(a / max(saliency)) ** alpha if alpha else 1.0 for a in saliency]
    return kept(image, sorted(volume(image, keep, quality)))


def volume(image: Image, keep: int, quality: list[float]) -> list[int]:
    """Greedily the largest determinant of quality x cosine x quality.

    It grows by the square of what is at right angles to all that are chosen, times that of the
    quality. A round takes no more tokens than half as many as there are channels.
    """
    outside = directions(image)

    def worth(chosen: list[int]) -> list[float]:
        nonlocal outside
        within = len(chosen) % max(1, len(image.hidden[0]) // 2)
        if within == 0:
            outside = directions(image)
        else:
            last = outside[chosen[-1]]
            if float(last @ last) > ALIKE:  # else it lies in what the others span
                along = last / last.norm()
                outside = outside - (outside @ along)[:, None] * along
        left = [round(float(x @ x), 12) for x in outside]
        return [max(x, ALIKE) * q**2 for x, q in zip(left, quality, strict=True)]

    return greedily(image.n, keep, worth)


def scope(image: Image, keep: int, alpha: float) -> Reduced:
    """arXiv 2510.24214: the largest product of what is covered more, over all tokens or those in
    the middles of so many windows, and saliency ** alpha."""
    saliency = image.of_cls()
    seen = middles(image.grid, COVERED) if image.n > COVERED else list(range(image.n))
    alike = directions(image) @ directions(image)[seen].T

    def worth(chosen: list[int]) -> list[float]:
        covered = torch.zeros(len(seen), dtype=torch.float64)
        if chosen:
            covered = alike[chosen].amax(0).clamp_min(0)
        gain = [float((torch.maximum(row, covered) - covered).sum()) for row in alike]
        least = ALIKE * len(seen)
        return [max(g, least) * a**alpha for g, a in zip(gain, saliency, strict=True)]

    return kept(image, sorted(greedily(image.n, keep, worth)))


def greedily(n: int, count: int, worth: Callable[[list[int]], list[float]]) -> list[int]:
    """One after another the token that is worth most beside those that are chosen."""
    chosen: list[int] = []
    while len(chosen) < count:
        values = worth(chosen)
        chosen.append(next(i for i in ranked(values) if i not in chosen))
    return chosen


def apet(image: Image, keep: int, basis: int) -> Reduced:
    """arXiv 2602.19870: what a basis, farthest points, reconstructs worst stays; every other one
    joins the kept one that it is most alike, which becomes the mean."""
    mean = sum(image.hidden) / image.n
    chosen = [ranked([float((x - mean).square().sum()) for x in image.hidden])[0]]
    apart = [math.inf] * image.n
    while len(chosen) < min(basis, image.n):
        for i, x in enumerate(image.hidden):
            apart[i] = min(apart[i], float((x - image.hidden[chosen[-1]]).square().sum()))
        chosen.append(ranked(apart)[0])
    rows = torch.stack([image.hidden[b] for b in chosen]).T
    every = torch.stack(image.hidden).T
    left = every - rows @ torch.linalg.lstsq(rows, every, driver="gelsd").solution
    error = [float(x @ x) for x in left.T]
    for i, x in enumerate(image.hidden):
        if error[i] < 10 * ALIKE * float(x @ x):
            error[i] = 0.0
    source = ranked([-e for e in error])[: image.n - keep]
    target = without(image.n, source)
    groups = {j: [j] for j in target}
    for i in sorted(source):
        order = ranked([likeness(image.hidden[i], image.hidden[j]) for j in target])
        groups[target[order[0]]].append(i)
    hidden = [sum(image.hidden[i] for i in groups[j]) / len(groups[j]) for j in target]
    _, position, size = kept(image, target)
    return hidden, position, size


def topk(image: Image, keep: int) -> Reduced:
    """The lowest [CLS] attention leaves."""
    source = ranked([-a for a in image.of_cls()])[: image.n - keep]
    return kept(image, without(image.n, source))


def visionzip(image: Image, keep: int, contextual: float) -> Reduced:
    """arXiv 2412.04467: dominant tokens by [CLS] attention, strided contextual ones of the rest."""
    keys, count = image.mean_keys(), math.floor(keep * contextual)
    dominant = ranked(image.of_cls())[: keep - count]
    rest = without(image.n, dominant)
    centres = [rest[i * len(rest) // count] for i in range(count)]
    groups = {j: [j] for j in centres}
    for i in rest:
        if i not in groups and centres:
            order = ranked([likeness(keys[i], keys[j]) for j in centres])
            groups[centres[order[0]]].append(i)
    hidden, position, size = [], [], []
    for j in sorted([*dominant, *centres]):
        group = groups.get(j, [j])
        total = torch.zeros_like(image.hidden[j])
        for i in group:
            total += image.hidden[i]
        hidden.append(total / len(group))
        position.append(image.position[j])
        size.append(sum(image.size[i] for i in group))
    return hidden, position, size


def prumerge(image: Image, keep: int, neighbours: int) -> Reduced:
    """arXiv 2403.15388 at a fixed count: a token weighs 1, its nearest leaving neighbours what
    [CLS] gives them."""
    attention, keys = image.of_cls(), image.mean_keys()
    source = sorted(ranked([-a for a in attention])[: image.n - keep])
    target = without(image.n, source)
    hidden = []
    for j in target:
        nearest = ranked([likeness(keys[j], keys[i]) for i in source])[:neighbours]
        total, whole = image.hidden[j], 1.0
        for i in (source[place] for place in nearest):
            total = total + attention[i] * image.hidden[i]
            whole += attention[i]
        hidden.append(total / whole)
    _, position, size = kept(image, target)
    return hidden, position, size


def relevances(tokens: Tensor, words: Tensor) -> list[float]:
    """Of tokens (n, C) to the words (M, C) of a question: their likenesses' mean; 0 without any."""
    return [
        sum(likeness(token, word) for word in words.double()) / max(len(words), 1)
        for token in tokens.double()
    ]


def cdpruner(image: Image, keep: int, alpha: float) -> Reduced:
    """arXiv 2506.10967: the largest determinant of relevance x likeness x relevance, greedily."""
    low, high = min(image.relevance), max(image.relevance)
    quality = [
        max((r - low) / (high - low), 1e-4) ** alpha if high > low else 1.0 for r in image.relevance
    ]
    return kept(image, sorted(volume(image, keep, quality)))


def recoverable(
    image: Image, keep: int, recovered: float, merged: float, neighbours: int
) -> Reduced:
    """arXiv 2409.01179 at fixed counts: by [CLS], by the question, and leaders of clusters."""
    keys = image.mean_keys()
    by_question, clusters = math.floor(keep * recovered), math.floor(keep * merged)
    own = ranked(image.of_cls())[: keep - by_question - clusters]
    own += [i for i in ranked(image.relevance) if i not in own][:by_question]
    dropped = without(image.n, own)
    pairs = {frozenset((i, j)) for i in dropped for j in dropped if clusters}
    distance = {
        pair: max(2 - 2 * likeness(keys[min(pair)], keys[max(pair)]), 0.0) for pair in pairs
    }

    def apart(i: int, j: int) -> float:
        return distance[frozenset((i, j))]

    density, peak = {}, {}
    for i in dropped if clusters else ():
        nearest = sorted(apart(i, j) for j in dropped if j != i)[:neighbours]
        density[i] = math.exp(-sum(nearest) / len(nearest)) if nearest else 1.0
    for i in density:
        denser = [j for j in density if (density[j], -j) > (density[i], -i)]
        far = min((apart(i, j) for j in denser), default=max(apart(i, j) for j in dropped))
        peak[i] = density[i] * math.sqrt(far)
    leaders = sorted(dropped[k] for k in ranked([*peak.values()])[:clusters])
    groups = {j: [j] for j in leaders}
    for i in dropped:
        if i not in groups and leaders:
            groups[leaders[ranked([likeness(keys[i], keys[j]) for j in leaders])[0]]].append(i)
    hidden, position, size = [], [], []
    for j in sorted([*own, *leaders]):
        group = groups.get(j, [j])
        hidden.append(sum(image.hidden[i] for i in group) / len(group))
        position.append(image.position[j])
        size.append(sum(image.size[i] for i in group))
    return hidden, position, size


def globalcom2(image: Image, keep: int, attention: str, temperature: float) -> Reduced:
    """arXiv 2501.05179 on a thumbnail alone: the lowest score leaves."""
    source = ranked([-a for a in image.of_cls(attention)])[: image.n - keep]
    return kept(image, without(image.n, source))


def hired(image: Image, keep: int, alpha: float) -> Reduced:
    """arXiv 2408.10945 on a thumbnail alone: the lowest [CLS] attention leaves."""
    return topk(image, keep)


def pooling(image: Image, keep: int) -> Reduced:
    """The mean of every window, at the window's first place."""
    hidden, position, size = [], [], []
    for places in cut(image.grid, keep):
        total = torch.zeros_like(image.hidden[0])
        for place in places:
            total += image.hidden[place]
        hidden.append(total / len(places))
        position.append(places[0])
        size.append(sum(image.size[place] for place in places))
    return hidden, position, size


def uniform(image: Image, keep: int) -> Reduced:
    """The middle place of every window; of an even number the one behind the middle."""
    return kept(image, middles(image.grid, keep))


def middles(grid: tuple[int, int], count: int) -> list[int]:
    """The middle place of each of so many windows, ascending."""
    found = []
    for places in cut(grid, count):
        rows = sorted({place // grid[1] for place in places})
        columns = sorted({place % grid[1] for place in places})
        found.append(rows[len(rows) // 2] * grid[1] + columns[len(columns) // 2])
    return sorted(found)


def cut(grid: tuple[int, int], count: int) -> list[list[int]]:
    """The places of every window, raster order.

    A square window has an area of rows * columns / count, so its side is the root of that and
    rows / side bands of rows are wanted: not more than there are rows or windows, and so many
    that no band must hold more windows than columns. Bands share the rows evenly, the windows
    are dealt evenly to the bands and share the columns of their band evenly.
    """
    rows, columns = grid
    bands = round(rows / math.sqrt(rows * columns / count))
    while bands * columns < count or bands < 1:
        bands += 1
    bands = min(bands, rows, count)
    found = []
    for band in range(bands):
        lines = evenly(range(rows), band, bands)
        here = len(evenly(range(count), band, bands))
        for number in range(here):
            across = evenly(range(columns), number, here)
            found.append([line * columns + column for line in lines for column in across])
    return found


def evenly(items: range, part: int, parts: int) -> list[int]:
    """The part-th of so many parts of nearly equal length: it ends at floor((part + 1) share)."""
    n = len(items)
    return [x for x in items if part * n // parts <= x < (part + 1) * n // parts]


def resize(image: Image, keep: int) -> Reduced:
    """Nothing: the image has been scaled down before."""
    return kept(image, list(range(image.n)))


def random(image: Image, keep: int, seed: int) -> Reduced:
    """Lots from splitmix64 over the bits of the float32 pixels, the seed and the place.

    The image's number is the sum over its values, place by place, of the value's bits (as a
    signed number) times mix((place + 1) * step). The lot of a token is mix(mix(number + seed) +
    (place + 1) * step) as a signed number. All modulo 2 ** 64. The highest lots leave.
    """
    lots_of = lots(image.pixels, image.position, seed)
    return kept(image, without(image.n, ranked(lots_of)[: image.n - keep]))


def lots(pixels: Tensor, places: Sequence[int], seed: int) -> list[int]:
    """The lot of the token at each place, see :func:`random`."""
    number = 0
    for place, value in enumerate(pixels.flatten().tolist()):
        (bits,) = struct.unpack("<i", struct.pack("<f", value))
        number += bits * splitmix((place + 1) * STEP)
    start = splitmix(number + seed)
    drawn = [splitmix(start + (place + 1) * STEP) for place in places]
    return [lot - 2**64 if lot >= 2**63 else lot for lot in drawn]


STEP = 0x9E3779B97F4A7C15
"""The increment of splitmix64."""


def splitmix(x: int) -> int:
    """The finaliser of splitmix64."""
    x %= 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def tops(
    image: Image, keep: int, diversity: float, coverage: float, tokens: list[int] | None
) -> Reduced:
    """Relevance is the attention of [CLS]; ``tokens`` is for the decoder."""
    vectors = torch.stack(image.hidden)
    return kept(image, optimal_set(vectors, image.of_cls(), keep, diversity, coverage))


def optimal_set(
    vectors: Tensor, relevance: Sequence[float], keep: int, diversity: float, coverage: float
) -> list[int]:
    """TOPS: greedily by three terms, each over its mean; of more than :data:`COVERED` tokens, as
    many spread evenly are to be covered."""
    n = len(vectors)
    vectors = vectors.double()
    vectors = vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-300)
    alike = vectors @ vectors.T
    seen = [k * n // min(n, COVERED) for k in range(min(n, COVERED))]

    def over_mean(values: Tensor) -> Tensor:
        mean = values.sum() / n
        return values / mean if mean > 0 else torch.zeros(n)

    relevant, chosen = over_mean(torch.tensor(relevance).double()), list[int]()
    for _ in range(keep):
        nearest, covered = torch.zeros(n), torch.zeros(len(seen))
        if chosen:
            nearest = alike[chosen].amax(0).clamp(0, 1)
            covered = alike[chosen][:, seen].amax(0).clamp_min(0)
        gain = (alike[:, seen] - covered).clamp_min(0).sum(1).clamp_min(ALIKE * len(seen))
        unlike = (1 - nearest).clamp_min(ALIKE)
        score = relevant + diversity * over_mean(unlike) + coverage * over_mean(gain)
        order = ranked(score.tolist())
        chosen.append(next(i for i in order if i not in chosen))
    return sorted(chosen)


def mustdrop(image: Image, keep: int, tokens: list[int] | None) -> Reduced:
    """Windows of 3 x 3 in the order of their likeness, then the rest by attention, keys last."""
    n, attention = image.n, image.of_cls()
    by_attention = ranked([-a for a in attention])
    keys = ranked(attention)[: math.ceil(0.08 * n)]
    windows: dict[tuple[int, int], list[int]] = {}
    for i, place in enumerate(image.position):
        row, column = divmod(place, image.grid[1])
        members = windows.setdefault((row // 3, column // 3), [])
        if i not in keys:
            members.append(i)
    alike = {}
    for window, members in windows.items():
        pairs = [(i, j) for i in members for j in members if i < j]
        if pairs:
            cosines = [likeness(image.hidden[i], image.hidden[j]) for i, j in pairs]
            alike[window] = round(sum(cosines) / len(pairs), 5)
    leaving, into = list[int](), dict[int, int]()
    for window in sorted(alike, key=lambda w: (-alike[w], w)):
        *before, last = windows[window]
        leaving += before
        into |= dict.fromkeys(before, last)
    for group in (set(range(n)) - set(keys) - set(leaving), set(keys)):
        leaving += [i for i in by_attention if i in group]
    leaving = leaving[: n - keep]
    target = without(n, leaving)
    _, position, size = kept(image, target)
    rows = []
    for j in target:
        merged = [image.hidden[i] for i in leaving if into.get(i) == j]
        rows.append(sum(merged, image.hidden[j]) / (1 + len(merged)))
    return rows, position, size


FUNCTIONS = {
    "ficoco-v": ficoco_v,
    "ficoco-k": ficoco_k,
    "tome": tome,
    "evit": evit,
    "score": score,
    "dpp": dpp,
    "scope": scope,
    "apet": apet,
    "topk": topk,
    "visionzip": visionzip,
    "prumerge": prumerge,
    "globalcom2": globalcom2,
    "hired": hired,
    "pooling": pooling,
    "uniform": uniform,
    "random": random,
    "cdpruner": cdpruner,
    "recoverable": recoverable,
    "resize": resize,
    "tops": tops,
    "mustdrop": mustdrop,
}


# --- Images in tiles, methods that compare them -------------------------------------------------

ACROSS = {"globalcom2", "hired"}
"""Methods by which tiles share what they keep as one of them, or the thumbnail, says."""

Places = tuple[int, int, int, int]
"""A rectangle of a stitched grid: top, left, rows, columns."""


def choose_among_parts(
    method: str,
    options: dict,
    first: Sequence[tuple[Tensor, Tensor]],
    last: Sequence[tuple[Tensor, Tensor]],
    scale: float,
    has_cls: bool,
    grid: tuple[int, int],
    tiles: tuple[int, int],
    window: Places,
    patches: int,
) -> list[list[int]]:
    """The places that stay of every part of one image, in raster order of the part's whole grid.

    Args:
        method: one of :data:`ACROSS`.
        options: those that differ from :data:`DEFAULTS`.
        first: of the thumbnail and of every tile in raster order, query and key (H, m, d) of the
            tower's first layer, over the whole grid.
        last: the same of the last layer that runs.
        scale: factor of the products.
        has_cls: whether [CLS] comes first.
        grid: rows and columns of every part.
        tiles: rows and columns of tiles.
        window: what of the stitched tiles is the image.
        patches: how many stay of all parts together, newlines not counted.
    """
    chosen = {**DEFAULTS[method], **options}
    every = [(row, column) for row in range(tiles[0]) for column in range(tiles[1])]
    inside = [inside_tile(window, grid, *tile) for tile in every]
    shown = [shown_of_thumbnail(window, grid, *tile) for tile in every]
    sizes = [len(places) for places in inside]
    n = grid[0] * grid[1]

    def of_cls(part: tuple[Tensor, Tensor], kind: str = "probabilities") -> list[float]:
        blank, none = [torch.zeros(1)] * n, torch.zeros(0)
        image = Image(blank, *part, scale, has_cls, grid, range(n), [1.0] * n, none)
        return image.of_cls(kind)

    if method == "globalcom2":
        score, *own = (of_cls(part, chosen["attention"]) for part in last)
        # The thumbnail's part of the patches; of half a patch that both claim, it is the first.
        whole = by_largest_remainder([n, sum(sizes)], [n, sum(sizes)], patches)[0]
        there = [i for i, size in enumerate(sizes) if size]
        seen = {}
        for i in there:
            # The mean over the region times the patches that an equal region would have.
            total = sum(float(part) * score[place] for place, part in shown[i].items())
            mean = total / float(sum(shown[i].values()))
            seen[i] = mean * n / len(there) / chosen["temperature"]
        weights = [0.0] * len(sizes)
        for i in there:
            softmax = 1 / sum(math.exp(seen[j] - seen[i]) for j in there)
            weights[i] = sizes[i] * (1 + softmax - 1 / len(there))
        ranking = [score]
        for i, (row, column) in enumerate(every):
            top, left = row * grid[0] - window[0], column * grid[1] - window[1]
            commander = [
                interpolated(score, grid, top + p // grid[1], left + p % grid[1], window[2:])
                for p in inside[i]
            ]
            pairs = zip(unit([own[i][p] for p in inside[i]]), unit(commander), strict=True)
            ranking.append([a + b for a, b in pairs])
    else:
        alpha = chosen["alpha"]
        whole = min(math.floor(patches * alpha), n)
        whole = max(whole, patches - sum(sizes))
        looked_at = ranked(of_cls(first[0]))[: math.floor(n * (1 - alpha))]
        weights = [sum(region[place] for place in looked_at) for region in shown]
        score, *own = (of_cls(part) for part in last)
        ranking = [score, *([own[i][p] for p in places] for i, places in enumerate(inside))]
    shares = [whole, *by_largest_remainder(weights, sizes, patches - whole)]
    parts = zip([range(n), *inside], ranking, shares, strict=True)
    return [sorted(places[k] for k in ranked(score)[:share]) for places, score, share in parts]


def inside_tile(window: Places, grid: tuple[int, int], row: int, column: int) -> list[int]:
    """The places of a tile that are the image."""
    top, left, height, width = window
    return [
        y * grid[1] + x
        for y in range(grid[0])
        for x in range(grid[1])
        if top <= row * grid[0] + y < top + height and left <= column * grid[1] + x < left + width
    ]


def shown_of_thumbnail(
    window: Places, grid: tuple[int, int], row: int, column: int
) -> dict[int, Fraction]:
    """What share of every place of the thumbnail lies in a tile.

    The thumbnail is the window stretched to the grid: its row y is what in the window lies from
    y / rows to (y + 1) / rows of its height.
    """
    top, left, height, width = window

    def along(place: int, side: int, length: int, start: int, tile: int) -> Fraction:
        begin = start + Fraction(place * length, side)
        end = start + Fraction((place + 1) * length, side)
        common = min(end, (tile + 1) * side) - max(begin, tile * side)
        return max(common, Fraction(0)) / (end - begin) if end > begin else Fraction(0)

    return {
        y * grid[1] + x: along(y, grid[0], height, top, row)
        * along(x, grid[1], width, left, column)
        for y in range(grid[0])
        for x in range(grid[1])
    }


def interpolated(
    values: list[float], grid: tuple[int, int], row: int, column: int, size: Sequence[int]
) -> float:
    """A grid of values stretched to a size, bilinearly, at a place: pixel centres are matched."""

    def between(place: int, side: int, length: int) -> tuple[int, int, float]:
        at = max((place + 0.5) * side / length - 0.5, 0.0)
        low = min(math.floor(at), side - 1)
        return low, min(low + 1, side - 1), at - low

    top, bottom, down = between(row, grid[0], size[0])
    left, right, across = between(column, grid[1], size[1])
    upper = (1 - across) * values[top * grid[1] + left] + across * values[top * grid[1] + right]
    lower = (1 - across) * values[bottom * grid[1] + left] + across * values[
        bottom * grid[1] + right
    ]
    return (1 - down) * upper + down * lower


def by_largest_remainder(weights: Sequence[float], room: Sequence[int], total: int) -> list[int]:
    """Whole numbers that sum to the total, in proportion to weights, none above its room.

    Who cannot hold its part is filled, and what it cannot hold goes to the others in proportion;
    where these have no weight, by their room. Of what is not whole, everybody gets the whole part
    and then, one by one, those with the largest fractions one more, among equals (to a millionth)
    the first.
    """
    part = [Fraction(0)] * len(room)
    still = set(range(len(room)))
    left = Fraction(total)
    while still and left:
        pull = {i: Fraction(weights[i]) for i in still}
        if not any(pull.values()):
            pull = {i: Fraction(room[i]) for i in still}
        everything = sum(pull.values())
        if not everything:
            break
        full = [i for i in still if left * pull[i] / everything >= room[i]]
        if not full:
            for i in still:
                part[i] = left * pull[i] / everything
            break
        for i in full:
            part[i] = Fraction(room[i])
        left -= sum(room[i] for i in full)
        still -= set(full)
    shares = [math.floor(x) for x in part]
    fractions = [round(float(x - share), 6) for x, share in zip(part, shares, strict=True)]
    for i in ranked(fractions)[: total - sum(shares)]:
        shares[i] += 1
    return shares


# --- Schedules ----------------------------------------------------------------------------------


def stages(method: str, tokens: int, budget: int, layers: int) -> list[tuple[int, int]]:
    """``(layer, keep)`` wherever tokens leave, for a tower in which so many layers run."""
    if method == "ficoco-v":
        start = 11 * layers // 23
        share, more = divmod(tokens - budget, layers - start)
        return plan(
            tokens, [(layer, share + (layer - start < more)) for layer in range(start, layers)]
        )
    if method in ("ficoco-k", "tome"):
        return plan(tokens, list(enumerate(halved(tokens, budget, layers))))
    if method == "evit":
        places = sorted({depth * layers // 12 for depth in (3, 6, 9)})
        found, left = [], tokens
        for i, layer in enumerate(places, start=1):
            keep = round(tokens * (budget / tokens) ** (i / len(places)))
            keep = max(keep, budget)
            if keep < left:
                found.append((layer, keep))
                left = keep
        return found
    if PLACE[method] == "output":
        return [(layers - 1, budget)]
    if PLACE[method] == "input":
        return []
    raise KeyError(method)


def plan(tokens: int, leaving: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """``(layer, keep)`` from ``(layer, how many leave)``."""
    found = []
    for layer, leave in leaving:
        tokens -= leave
        if leave:
            found.append((layer, tokens))
    return found


def halved(tokens: int, budget: int, layers: int) -> list[int]:
    """How many leave at every layer: evenly, but never more than half.

    From the last layer to the first: a layer takes its even share of what still has to leave, or
    as many as stay after it where that is less. So what the last layers cannot take falls evenly
    to the first ones, the remainder to the very first.
    """
    leaving, to_leave, stay = [0] * layers, tokens - budget, budget
    for layer in reversed(range(layers)):
        leave = min(to_leave // (layer + 1), stay)
        leaving[layer] = leave
        to_leave -= leave
        stay += leave
    if to_leave:
        raise ValueError(f"{budget} of {tokens} is out of reach of {layers} halvings")
    return leaving
