# SPDX-License-Identifier: Apache-2.0
"""What stays of a video, transcribed from the papers: one video, loops over frames and tokens.

In numpy and in float64, shares out with fractions, and knows nothing of the package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
"""(frames, places, channels): a video's tokens."""


def even(total: int, frames: int) -> list[int]:
    """So many tokens on a line, each in the middle of its stretch of it: how many a frame has."""
    shares = [0] * frames
    for token in range(total):
        middle = Fraction(2 * token + 1, 2 * total) * frames
        # A middle on the edge of two frames belongs to the one before.
        shares[int(middle) - (middle.denominator == 1)] += 1
    return shares


def handed_out(total: int, weights: Sequence[float], room: Sequence[int]) -> list[int]:
    """In proportion to weights; what a full one cannot hold is shared by the others, by their room
    where none has a weight; whole numbers by largest remainder, among equals the first."""
    full: set[int] = set()
    while True:
        left = total - sum(room[i] for i in full)
        if not any(w for i, w in enumerate(weights) if i not in full):
            weights = room
        weight = sum(w for i, w in enumerate(weights) if i not in full)
        due = [
            float(room[i]) if i in full else left * w / weight if left else 0.0
            for i, w in enumerate(weights)
        ]
        over = {i for i, share in enumerate(due) if share > room[i] and i not in full}
        if not over:
            break
        full |= over
    exact = [round(share * 2**24) for share in due]  # finer differences are rounding errors
    whole = [share >> 24 for share in exact]
    order = sorted(range(len(due)), key=lambda i: (-(exact[i] % 2**24), i))
    for i in order[: total - sum(whole)]:
        whole[i] += 1
    return whole


def by_rank(total: int, frames: int, size: int) -> list[int]:
    """Thirds of the ranks with weights 3, 2 and 1, one token each before that."""
    if total < frames:
        return [1] * total + [0] * (frames - total)
    weights = [3 if 3 * i < frames else 2 if 3 * i < 2 * frames else 1 for i in range(frames)]
    return [1 + s for s in handed_out(total - frames, weights, [size - 1] * frames)]


def like_the_video(video: Array) -> list[float]:
    """Cosine of a frame's mean token and the mean of all."""
    mean = video.mean((0, 1))
    return [cosine(frame.mean(0), mean) for frame in video]


def cosine(a: Array, b: Array) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def each_by_itself(
    video: Array, total: int, unique: bool, keep: Callable[[int, int], list[int]]
) -> list[int]:
    """Places that stay where a frame is reduced by itself.

    Args:
        video: its tokens.
        total: how many stay.
        unique: whether frames unlike the video get more.
        keep: (frame, how many) -> its places that stay.
    """
    frames, size = video.shape[:2]
    if unique:
        like = like_the_video(video)
        order = sorted(range(frames), key=lambda i: (like[i], i))
        ranked = by_rank(total, frames, size)
        shares = [ranked[order.index(frame)] for frame in range(frames)]
    else:
        shares = even(total, frames)
    return [
        frame * size + place
        for frame, share in enumerate(shares)
        if share
        for place in sorted(keep(frame, share) if share < size else range(size))
    ]


def vidcom2(video: Array, total: int, temperature: float = 0.01) -> list[int]:
    """Places that stay."""
    frames, size, channels = video.shape
    flat = video.reshape(-1, channels)
    by_variance = sorted(range(channels), key=lambda c: (flat[:, c].var(), c))
    video = video[..., sorted(by_variance[: max(1, channels // 2)])]
    unit = np.array([[x / np.linalg.norm(x) for x in frame] for frame in video])
    centre = unit.reshape(frames * size, -1).mean(0)

    def near(x: Array, c: Array) -> float:
        apart = float(((x - c) ** 2).sum())
        return sum(float(np.exp(-apart / (2 * a))) for a in (1 / 8, 1 / 4, 1 / 2, 1, 2))

    to_video = [[near(x, centre) for x in frame] for frame in unit]
    to_frame = [[near(x, frame.mean(0)) for x in frame] for frame in unit]
    unique = np.array([-np.mean(of_frame) for of_frame in to_video]) / temperature
    p = np.exp(unique - unique.max())
    p /= p.sum()
    share = [min(1.0, total / (frames * size) * (1 + one - 1 / frames)) for one in p]
    weights = [max(0.0, one * size - 1) for one in share]
    kept = [1 + s for s in handed_out(total - frames, weights, [size - 1] * frames)]
    places = []
    for frame in range(frames):
        both = [a + b for a, b in zip(to_video[frame], to_frame[frame], strict=True)]
        order = sorted(range(size), key=lambda i: (both[i], i))
        places += [frame * size + i for i in sorted(order[: kept[frame]])]
    return places


def dycoke(video: Array, total: int, window: int = 4) -> list[int]:
    """Places that stay."""
    frames, size, _ = video.shape
    heads = [i for i in range(frames) if i % window == 0]
    others = [i for i in range(frames) if i % window]
    kept = dict.fromkeys(heads, size)
    kept |= dict(zip(others, even(total - size * len(heads), len(others)), strict=True))
    places = []
    for frame in range(frames):
        likeness = [0.0] * size
        if frame in others:
            within = frame % window
            before = frame - (within & -within)  # 1 -> 0, 2 -> 0, 3 -> 2
            likeness = [cosine(video[frame, i], video[before, i]) for i in range(size)]
        order = sorted(range(size), key=lambda i: (likeness[i], i))
        places += [frame * size + i for i in sorted(order[: kept[frame]])]
    return places


def fastvid(
    video: Array,
    attention: NDArray[np.float64],
    total: int,
    segments: int = 8,
    alike: float = 0.9,
    merged: float = 0.4,
    every: int = 4,
    own: float = 0.6,
) -> dict[int, NDArray[np.float64]]:
    """What stays, and what it becomes.

    Args:
        video: its tokens.
        attention: (frames, places), of [CLS].
        total: how many stay.
        segments: at least so many.
        alike: frames that are less so are cut apart.
        merged: share of the budget for anchors.
        every: of so many frames one has anchors.
        own: the least weight of an anchor's own value.
    """
    frames, size, channels = video.shape
    anchors = int(total * merged)
    salient: list[list[int]] = []
    for looked_at, count in zip(attention, even(total - anchors, frames), strict=True):
        salient.append(sorted(range(size), key=lambda i: (-looked_at[i], i))[:count])

    # Scenes.
    means = video.mean(1)
    like = [cosine(means[i], means[i + 1]) for i in range(frames - 1)]
    lowest = sorted(range(frames - 1), key=lambda i: (like[i], i))[: segments - 1]
    scenes: list[list[int]] = [[]]
    for frame in range(frames):
        scenes[-1].append(frame)
        if frame < frames - 1 and (frame in lowest or like[frame] < alike):
            scenes.append([])

    # Who has how many anchors.
    weights = [0.0] * frames
    for scene in scenes:
        with_anchors = scene[::-1][::every]
        for frame in with_anchors:
            weights[frame] = len(scene) / len(with_anchors)
    room = [size - len(of_frame) for of_frame in salient]
    shares = handed_out(anchors, weights, room)

    # Which tokens they are.
    rest = [[i for i in range(size) if i not in of_frame] for of_frame in salient]
    chosen: list[list[int]] = []
    for frame in range(frames):
        there = rest[frame]
        apart = {
            (i, j): float(np.linalg.norm(video[frame, i] - video[frame, j])) / channels**0.5
            for i in there
            for j in there
        }
        density = {}
        for i in there:
            near = sorted(apart[i, j] for j in there)[:4]
            density[i] = float(np.exp(-np.mean(np.square(near))))
        score = {}
        for i in there:
            denser = [
                j for j in there if density[j] > density[i] or (density[j] == density[i] and j < i)
            ]
            away = min((apart[i, j] for j in denser), default=max(apart.values()))
            score[i] = density[i] * away
        chosen.append(sorted(there, key=lambda i: (-score[i], i))[: shares[frame]])

    kept = {f * size + i: video[f, i] for f in range(frames) for i in salient[f]}
    for scene in scenes:
        sources = [(f, i) for f in scene for i in rest[f]]
        for frame in scene:
            members: dict[int, list[NDArray[np.float64]]] = {i: [] for i in sorted(chosen[frame])}
            for f, i in sources if members else []:
                to = max(members, key=lambda j: cosine(video[f, i], video[frame, j]))
                members[to].append(video[f, i])
            for i, joined in members.items():
                weight = max(1 / (len(joined) + 1), own)
                mean = np.mean(joined, 0) if joined else 0.0
                kept[frame * size + i] = weight * video[frame, i] + (1 - weight) * mean
    return kept


def uniform_frames(
    frames: int, size: int, total: int, keep: Callable[[int], list[int]]
) -> list[int]:
    """Places that stay; of a frame that is cut those that ``keep`` says."""
    count = -(-total // size)
    chosen = np.linspace(0, frames - 1, count, dtype=int)
    places = []
    for frame in chosen:
        left = total - len(places)
        places += [int(frame) * size + i for i in (range(size) if left >= size else keep(left))]
    return places
