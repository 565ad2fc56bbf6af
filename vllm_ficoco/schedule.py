# SPDX-License-Identifier: Apache-2.0
"""All count arithmetic: how many visual tokens are left after which layer.

vLLM fixes an image's placeholders before the image is seen, so every schedule is a function of
counts alone and ends at exactly the budget. Nothing here looks at a tensor.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import accumulate, combinations, pairwise
from typing import NamedTuple


class Stage(NamedTuple):
    """One place where tokens leave."""

    layer: int
    """0-based layer of the vision tower, counted among the layers that run."""
    keep: int
    """Visual tokens that are left after it."""


def even(tokens: int, budget: int, layers: range) -> list[Stage]:
    """Spread the tokens that leave evenly over the layers, the remainder on the first ones.

    Layers at which nothing leaves are left out.
    """
    share, more = divmod(tokens - budget, len(layers))
    stages, left = [], tokens
    for i, layer in enumerate(layers):
        leave = share + (i < more)
        left -= leave
        if leave:
            stages.append(Stage(layer, left))
    return stages


def halving(tokens: int, budget: int, layers: range) -> list[Stage]:
    """As :func:`even`, where a layer can let go of no more than half of its tokens (ToMe).

    Where an even share is more than half of what is left at the end, the last layers halve and
    the layers before them share the rest evenly.

    Raises:
        ValueError: the budget cannot be reached; the message names the smallest that can.
    """
    smallest = math.ceil(tokens / 2 ** len(layers))
    if budget < smallest:
        raise ValueError(f"at least {smallest}, which is what {len(layers)} halvings can reach")
    last = 0  # how many of the last layers halve
    while math.ceil((tokens - budget * 2**last) / (len(layers) - last)) > budget * 2**last:
        last += 1
    stages = even(tokens, budget * 2**last, layers[: len(layers) - last])
    for i, layer in enumerate(layers[len(layers) - last :], start=1):
        stages.append(Stage(layer, budget * 2 ** (last - i)))
    return stages


def geometric(tokens: int, budget: int, layers: tuple[int, ...]) -> list[Stage]:
    """The same kept share at every layer: ``tokens * (budget / tokens) ** (i / n)`` after the i-th.

    Rounded to whole tokens; a layer at which nothing would leave is left out.
    """
    stages, left = [], tokens
    for i, layer in enumerate(layers, start=1):
        keep = round(tokens * (budget / tokens) ** (i / len(layers)))
        keep = budget if i == len(layers) else min(max(keep, budget), left)
        if keep < left:
            stages.append(Stage(layer, keep))
            left = keep
    return stages


def at_output(budget: int, layers: int) -> list[Stage]:
    """All at once, on the output of the last of so many layers."""
    return [Stage(layers - 1, budget)]


def same_depth(layer: int, of: int, layers: int) -> int:
    """The layer of a tower of ``layers`` layers that lies as deep as ``layer`` in one of ``of``."""
    return layer * layers // of


def bands(grid: tuple[int, int], count: int) -> int:
    """Into how many bands of rows a grid is cut, to be cut into windows as square as can be.

    Args:
        grid: rows and columns.
        count: of windows, from 1 to rows * columns.
    """
    rows, columns = grid
    wanted = round(math.sqrt(count * rows / columns))
    return min(max(wanted, math.ceil(count / columns), 1), rows, count)


def largest_remainder(total: int, sizes: Sequence[int]) -> list[int]:
    """Share a number out in proportion to sizes, in whole numbers that sum to it exactly.

    Everybody gets the whole part of a proportional share; what is left over goes, one by one, to
    the largest fractions, among equals to the first. Nobody gets more than its size.

    Args:
        total: at most the sum of the sizes, or those get more in proportion.
        sizes: not negative.
    """
    whole = sum(sizes)
    shares, fractions = [], []
    for size in sizes:
        share, fraction = divmod(total * size, max(whole, 1))
        shares.append(share)
        fractions.append(fraction)
    order = sorted(range(len(sizes)), key=lambda i: -fractions[i])
    for i in order[: total - sum(shares)]:
        shares[i] += 1
    return shares


# --- Frames of a video --------------------------------------------------------------------------


def evenly(total: int, count: int) -> list[int]:
    """A number shared out among so many frames, as equally as whole numbers allow.

    A largest remainder whose frames are all alike: those that get one more are spread over the
    video, so that few tokens come from frames all along it.
    """
    edges = [(i * total + count // 2) // count for i in range(count + 1)]
    return [end - start for start, end in pairwise(edges)]


def by_rank(total: int, count: int, size: int) -> list[int]:
    """The same by rank, not ascending: the third of the frames that comes first gets thrice as much
    as the last one, the middle one twice as much.

    Nobody gets more than its size: what is beyond that goes to the others, likewise. Everybody gets
    at least one, if there are as many; else those that come first.

    Args:
        total: at most ``count * size``.
        count: of the frames.
        size: of each of them.
    """
    if total < count:
        return [int(rank < total) for rank in range(count)]
    weights = [3 - 3 * rank // count for rank in range(count)]

    def rest(full: int) -> list[int]:
        """What those get that are not full, beside the one that everybody gets."""
        return largest_remainder(total - count - full * (size - 1), weights[full:])

    full = bisect_left(range(count), True, key=lambda full: rest(full)[0] < size)
    return [size] * full + [1 + share for share in rest(full)]


# --- Ladders of budgets -------------------------------------------------------------------------


def rung(text: str) -> Fraction | int:
    """One rung of a ladder: a share of an image's tokens (``1/3``, ``1`` for all) or a number of
    them (from 2).

    Raises:
        ValueError: it is neither; says what is allowed.
    """
    words = "a share of the tokens such as 1/3, 1 for all of them, or a whole number from 2"
    above, _, below = text.partition("/")
    try:
        number = Fraction(int(above), int(below or 1))
    except (ValueError, ZeroDivisionError):
        raise ValueError(words) from None
    if (below and 0 < number <= 1) or (not below and number == 1):
        return number
    if below or number < 2:
        raise ValueError(words)
    return int(number)


def rung_name(of: Fraction | int) -> str:
    """How a rung is called: ``N``, ``N/3``, ``2N/9``, or its number of tokens."""
    if isinstance(of, int):
        return str(of)
    times = "" if of.numerator == 1 else str(of.numerator)
    return f"{times}N" + ("" if of.denominator == 1 else f"/{of.denominator}")


def ladder(
    tokens: int, rungs: Sequence[Fraction | int], least: int = 1, most: int | None = None
) -> list[int]:
    """The budgets of a ladder for an image of so many tokens, one a rung, in their order.

    A share is rounded down. What is outside of the limits moves to them; nothing is more than the
    image has. Several rungs can come to one number where an image has few tokens.

    Args:
        tokens: of the image.
        rungs: shares of its tokens, and numbers of tokens.
        least: smallest budget.
        most: largest budget, not below ``least``; None for no limit.
    """
    counts = (int(tokens * rung) if isinstance(rung, Fraction) else rung for rung in rungs)
    return [min(max(count, least, 1), most or tokens, tokens) for count in counts]


# --- Stages of the decoder ----------------------------------------------------------------------


def spans(starts: Sequence[int], layers: int) -> list[int]:
    """How many layers every stage has: those before the first start, then one entry a start."""
    edges = [0, *starts, layers]
    return [end - start for start, end in pairwise(edges)]


def groups(spans: Sequence[int]) -> list[int]:
    """How many KV cache groups vLLM makes of every stage's layers where all have one block size.

    All its groups have equally many layers: as many as the shortest stage, or as the longest where
    that has less than half as many more; the last group of a stage may be padded.
    """
    shortest, longest = min(spans), max(spans)
    size = longest if longest < 1.5 * shortest else shortest
    return [math.ceil(span / size) for span in spans]


FIRST_BLOCK = 80
"""Tokens that a KV block of the first stage may have. Prefix hits end at its multiples."""

GROUP = Fraction(1, 200)
"""The share of the KV cache that one group less is worth: about as much as of a decode step."""


class Part(NamedTuple):
    """Layers of one stage that share a block table: a KV cache group."""

    stage: int
    layers: int
    """How many; those of the parts before it come before them."""
    block: int
    """Tokens of a KV block."""


def parts(spans: Sequence[int], block: int, packed: bool) -> list[Part]:
    """The KV cache groups of a decoder with these stages.

    A block of every group takes the same memory, that of the largest. The first stage is short, and
    no group may have layers of two stages. Where all blocks have one size, the other stages are cut
    into groups as short as the first one. Where they need not, the first stage, which holds all
    tokens, gets larger blocks, so that the others are cut into few long parts: of 2, 20 and 10
    layers four groups, 80 tokens of 2 layers and 16 tokens of 10, 10 and 10, instead of sixteen. Of
    all such cuts, and the one with equal blocks, it is the one with the least waste and groups.

    Stages from 1 on keep the server's block: their gaps are whole blocks, and where blocks differed
    a later stage could hold a token that an earlier one has let go.

    Args:
        spans: layers of every stage.
        block: tokens of a KV block, as the server is configured.
        packed: whether a block may hold few layers of many tokens, or many layers of few tokens.
    """
    equal = [
        Part(stage, layers, block)
        for stage, count in enumerate(groups(spans))
        for layers in _evenly(spans[stage], count)
    ]
    cuts = [equal]
    first, *later = spans
    for longest in range(2 * first, max(later, default=0) + 1) if packed else ():
        times = min(longest // first, FIRST_BLOCK // block)
        if times < 2:
            break
        cut = [
            Part(stage, layers, block)
            for stage, span in enumerate(later, start=1)
            for layers in _evenly(span, math.ceil(span / longest))
        ]
        cuts.append([Part(0, first, times * block), *cut])
    cuts = [cut for cut in cuts if len(cut) <= len(equal)]
    return min(cuts, key=lambda cut: (waste(cut) + len(cut) * GROUP, len(cut)))


def _evenly(span: int, count: int) -> list[int]:
    """So many layers in so many parts, the longer ones first."""
    share, more = divmod(span, count)
    return [share + (number < more) for number in range(count)]


def blocks_differ(parts: Sequence[Part]) -> bool:
    """Whether the parts need a KV cache whose blocks hold different numbers of layers."""
    return len({part.block for part in parts}) > 1


def part_of(parts: Sequence[Part], layer: int) -> int:
    """The number of the part that a layer of the decoder belongs to."""
    ends = list(accumulate(part.layers for part in parts))
    return bisect_right(ends, layer)


def waste(parts: Sequence[Part]) -> Fraction:
    """Memory of the KV cache that holds nothing, as a share of what tokens take in all layers."""
    largest = max(part.layers * part.block for part in parts)
    taken = sum((Fraction(largest, part.block) for part in parts), Fraction())
    return taken / sum(part.layers for part in parts) - 1


def nearest_stages(
    starts: Sequence[int], layers: int, wanted: Sequence[int], of: int
) -> tuple[int, ...]:
    """Which stages lie nearest to the depths at which a method is published.

    Args:
        starts: first layer of every stage.
        layers: of this decoder.
        wanted: the published layers, ascending; no more of them than there are stages.
        of: layers of the decoder that they are published for.

    Returns:
        As many stages, counted from 1, ascending.
    """

    def distance(chosen: tuple[int, ...]) -> int:
        pairs = zip(chosen, wanted, strict=True)
        return sum(abs(starts[stage - 1] * of - layer * layers) for stage, layer in pairs)

    return min(combinations(range(1, len(starts) + 1), len(wanted)), key=distance)


def total_over_layers(kept: Sequence[int], spans: Sequence[int]) -> int:
    """Tokens that all layers hold together: ``kept[i]`` in each of ``spans[i]`` layers."""
    return sum(tokens * layers for tokens, layers in zip(kept, spans, strict=True))


def average_over_layers(kept: Sequence[int], spans: Sequence[int]) -> Fraction:
    """Tokens that a layer holds on average."""
    return Fraction(total_over_layers(kept, spans), sum(spans))


def within_average(
    budget: int, spans: Sequence[int], most: int, kept: Callable[[int], Sequence[int]]
) -> list[int]:
    """The largest of a family of schedules whose average over layers is within the budget.

    Args:
        budget: tokens that a layer may hold on average.
        spans: layers of every stage.
        most: the family's last member.
        kept: the family: tokens in every stage, not fewer for a larger argument from 0 to ``most``.

    Raises:
        ValueError: none is; the message names the smallest budget that one would reach.
    """
    smallest = math.ceil(average_over_layers(kept(0), spans))
    if budget < smallest:
        raise ValueError(
            f"at least {smallest}, the average over {sum(spans)} layers where these stages keep as "
            "little as they can"
        )
    layers = sum(spans)
    fitting = bisect_right(
        range(most + 1), budget * layers, key=lambda i: total_over_layers(kept(i), spans)
    )
    return list(kept(fitting - 1))


def equal_shares(tokens: int, first: int, stages: int) -> list[int]:
    """``first`` tokens after the first stage, and in each further one as small a share again."""
    return [first**i // tokens ** (i - 1) for i in range(1, stages + 1)]
