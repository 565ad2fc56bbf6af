# SPDX-License-Identifier: Apache-2.0
"""How many replicas a traffic mix needs, from what a load test has measured of one.

    python -m loadtest plan reports/loadtest/runs.jsonl --mix text=1,none=1,score@64=4 --rate 40

Kinds of requests share a replica's time: one that can do X requests a second of a kind has spent
1 / X of a second on each, so r requests a second take r / X replicas. The sum over the kinds,
divided by the share of a replica's time that may be asked for (``--use``), is rounded up. What the
kinds hold of the KV cache adds up likewise, from the most that a replica has used at X. Without
budgets the same traffic has its images unreduced.

X is the best of the concurrencies that were measured, or of those within an objective
(``--within ttft:500``, of the 99th percentile). Where a mix was measured as such, too, that is
shown beside what the sum says of it: kinds that get on worse together than alone show there.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from loadtest.report import Line, groups, markdown
from loadtest.traffic import FULL, TEXT, Mix, Setting

OBJECTIVES = ("ttft", "tpot", "e2el")


class CannotPlan(ValueError):
    """What was measured does not say it."""


class Figures(NamedTuple):
    """What one replica can do of one kind of requests."""

    concurrency: int
    requests_per_s: float
    kv_of_one: float | None
    """Share of the KV cache that a request holds while it runs; None where none was seen to run."""
    kv: float
    """The largest share of the KV cache that was used."""


class Part(NamedTuple):
    """A kind of requests among others."""

    setting: Setting
    rate: float
    """Requests per second."""
    figures: Figures

    @property
    def replicas(self) -> float:
        """So many have nothing to do but these."""
        return self.rate / self.figures.requests_per_s

    @property
    def kv(self) -> float:
        """So many KV caches are full of these."""
        return self.replicas * self.figures.kv


class Need(NamedTuple):
    """What traffic needs."""

    parts: tuple[Part, ...]
    use: float
    """Share of a replica's time that may be asked for."""
    kv_use: float
    """Share of its KV cache."""

    @property
    def by_rate(self) -> float:
        """Replicas that have the time for it."""
        return sum(part.replicas for part in self.parts) / self.use

    @property
    def by_kv(self) -> float:
        """Replicas that have the KV cache for it."""
        return sum(part.kv for part in self.parts) / self.kv_use

    @property
    def replicas(self) -> int:
        """Whole ones, that have both."""
        return max(1, math.ceil(round(max(self.by_rate, self.by_kv), 9)))


def measured(lines: Sequence[Line], within: Mapping[str, float]) -> dict[str, Figures]:
    """What one replica can do, by setting or mix: medians over the rounds at the best concurrency.

    Args:
        lines: of the load test.
        within: milliseconds that the 99th percentile of ``ttft``, ``tpot``, ``e2el`` may have; a
            setting that has no concurrency within them is left out.

    Raises:
        CannotPlan: requests arrived at a rate.
    """
    best: dict[str, Figures] = {}
    for (setting, concurrency), group in groups(lines).items():
        if group[0]["conditions"]["rate"] is not None:
            raise CannotPlan(
                "these runs had a --rate: they say how many requests came, and not how many a "
                "replica can do. Measure without"
            )
        if any(_median(group, f"p99_{name}_ms") > most for name, most in within.items()):
            continue
        watches = [line["watch"] for line in group]
        ran = sum(sum(watch["running"]) for watch in watches)
        figures = Figures(
            concurrency,
            _median(group, "requests_per_s"),
            sum(sum(watch["kv_cache_usage"]) for watch in watches) / ran if ran else None,
            median(watch["most_kv_cache_usage"] for watch in watches),
        )
        if setting not in best or figures.requests_per_s > best[setting].requests_per_s:
            best[setting] = figures
    return best


def _median(group: Iterable[Line], name: str) -> float:
    """Of a figure, over the rounds; answers of one token have no time per output token."""
    return median(line.get(name, 0.0) for line in group)


def without_budgets(mix: Mix) -> Mix:
    """The same traffic with its images unreduced."""
    return Mix(
        tuple((one if one.method == TEXT else Setting(FULL), weight) for one, weight in mix.parts)
    )


def need(mix: Mix, rate: float, figures: Mapping[str, Figures], use: float, kv_use: float) -> Need:
    """What so much of a mix needs.

    Args:
        mix: of the traffic.
        rate: requests per second, of all kinds together.
        figures: of :func:`measured`.
        use: share of a replica's time that may be asked for.
        kv_use: share of its KV cache.

    Raises:
        CannotPlan: a kind was not measured, or was never within the objectives.
    """
    weights: dict[Setting, float] = {}
    for setting, weight in mix.parts:
        weights[setting] = weights.get(setting, 0.0) + weight
    total, parts = sum(weights.values()), []
    for setting, weight in weights.items():
        if str(setting) not in figures:
            raise CannotPlan(
                f"{setting} was not measured, or not within the objectives; there are: "
                f"{', '.join(figures) or 'none'}"
            )
        parts.append(Part(setting, rate * weight / total, figures[str(setting)]))
    return Need(tuple(parts), use, kv_use)


def as_measured(mix: Mix, figures: Mapping[str, Figures]) -> Figures | None:
    """What one replica did of this very mix, in whatever order it was named."""

    def shares(some: Mix) -> dict[Setting, float]:
        total = sum(weight for _, weight in some.parts)
        return {setting: round(weight / total, 9) for setting, weight in some.parts}

    for name, its in figures.items():
        if "," in name and shares(Mix.parse(name)) == shares(mix):
            return its
    return None


def arithmetic(title: str, needed: Need) -> str:
    """How many replicas, and how that comes about."""
    rows: list[Sequence[object]] = [
        (p.setting, p.rate, p.figures.requests_per_s, p.replicas, 100 * p.figures.kv, p.kv)
        for p in needed.parts
    ]
    time, kv = (sum(getattr(p, name) for p in needed.parts) for name in ("replicas", "kv"))
    rows.append(("sum", sum(p.rate for p in needed.parts), "", time, "", kv))
    heads = ("", "requests/s", "/ of one replica", "= replicas", "x % of its KV", "= KV caches")
    return (
        f"## {title}: {needed.replicas}\n\n{markdown(heads, rows)}\n"
        f"time: {time:.4g} / {needed.use:g} = {needed.by_rate:.4g}, "
        f"KV cache: {kv:.4g} / {needed.kv_use:g} = {needed.by_kv:.4g}; "
        f"the larger, rounded up: **{needed.replicas}**\n"
    )


def report(mix: Mix, rate: float, figures: Mapping[str, Figures], use: float, kv_use: float) -> str:
    """The plan, with and without budgets, as markdown; arguments and errors of :func:`need`."""
    needed = need(mix, rate, figures, use, kv_use)
    full = need(without_budgets(mix), rate, figures, use, kv_use)
    used = dict.fromkeys(str(part.setting) for part in needed.parts + full.parts)
    rows = [
        (
            name,
            its.concurrency,
            its.requests_per_s,
            "not seen" if its.kv_of_one is None else 100 * its.kv_of_one,
            100 * its.kv,
        )
        for name in used
        for its in [figures[name]]
    ]
    heads = ("", "at once", "requests/s", "% of the KV cache for a request", "% used at most")
    text = (
        f"# {rate:g} requests/s of {mix}\n\nOne replica, as measured:\n\n{markdown(heads, rows)}\n"
        f"{arithmetic('Replicas', needed)}\n{arithmetic('Without budgets', full)}"
    )
    its = as_measured(mix, figures)
    if its is not None:
        by_sum = rate / sum(part.replicas for part in needed.parts)
        text += (
            f"\nOf this mix a replica did {its.requests_per_s:.4g} requests/s when it was measured "
            f"(at {its.concurrency} at once); the sum says {by_sum:.4g}.\n"
        )
    return text


def conditions(lines: Sequence[Line]) -> str:
    """What the figures are of."""
    named = ("model", "vllm", "output_tokens", "image_size", "video_frames", "note")
    said = [f"{n}: {lines[0]['conditions'][n]}" for n in named if lines[0]["conditions"].get(n)]
    rounds = len({line["round"] for line in lines})
    days = " to ".join(dict.fromkeys(line["date"][:10] for line in (lines[0], lines[-1])))
    return f"\nMeasured {days}: {', '.join(said)}; medians of {rounds} rounds.\n"


def share(text: str) -> float:
    """A number above 0, up to 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} should be above 0, up to 1")
    return value


def positive(text: str) -> float:
    """A finite number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} should be above 0")
    return value


def objective(text: str) -> tuple[str, float]:
    """``ttft:500``."""
    name, _, most = text.partition(":")
    if name not in OBJECTIVES:
        raise argparse.ArgumentTypeError(f"{text!r} should be {' or '.join(OBJECTIVES)}, and ms")
    return name, positive(most)


def main(arguments: Sequence[str]) -> None:
    """``python -m loadtest plan``."""
    parser = argparse.ArgumentParser(
        "python -m loadtest plan", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("runs", type=Path, help="runs.jsonl of a load test on one replica")
    add("--mix", required=True, type=Mix.parse, metavar="text=1,none=2,score@64=4",
        help="the traffic, settings by weight; they and `none` must be measured")  # fmt: skip
    add("--rate", required=True, type=positive, help="requests per second at the busiest time")
    add("--within", nargs="*", default=[], type=objective, metavar="ttft:500",
        help="ms that the 99th percentile of ttft, tpot, e2el may have had")  # fmt: skip
    add("--use", type=share, default=0.8, help="share of a replica's time that may be asked for")
    add("--kv-use", type=share, default=0.9, help="share of its KV cache")
    args = parser.parse_args(arguments)
    try:
        lines = [json.loads(line) for line in args.runs.read_text().splitlines()]
        if not lines:
            raise CannotPlan(f"{args.runs} has no runs")
        figures = measured(lines, dict(args.within))
        print(report(args.mix, args.rate, figures, args.use, args.kv_use) + conditions(lines))
    except (CannotPlan, OSError, json.JSONDecodeError, KeyError) as error:
        raise SystemExit(f"loadtest plan: {error}") from error
