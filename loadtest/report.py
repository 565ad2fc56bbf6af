# SPDX-License-Identifier: Apache-2.0
"""Makes a report and pictures of the lines that a load test has left."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

Line = dict[str, Any]
Group = tuple[str, int]
"""Setting and concurrency."""

COLUMNS: dict[str, Callable[[Line], float | None]] = {
    "requests/s": lambda line: line["requests_per_s"],
    "TTFT p50, ms": lambda line: line.get("p50_ttft_ms"),
    "TTFT p99, ms": lambda line: line.get("p99_ttft_ms"),
    "TPOT p50, ms": lambda line: line.get("p50_tpot_ms"),
    "goodput/s": lambda line: line["goodput_per_s"],
    "good, %": lambda line: share_of_good(line),
    "most KV used, %": lambda line: 100 * line["watch"]["most_kv_cache_usage"],
    "most running": lambda line: line["watch"]["most_running"],
    "preemptions": lambda line: line["watch"]["preemptions"],
    "lowered, %": lambda line: (
        100 * line["watch"]["lowered"] / line["requests"] if line["watch"].get("lowered") else None
    ),
}
UNREDUCED = "none"


def share_of_good(line: Line) -> float | None:
    """Requests that met the objectives, in percent of all; None where there are no objectives."""
    if line["goodput_per_s"] is None:
        return None
    return 100 * round(line["goodput_per_s"] * line["duration_s"]) / line["requests"]


def groups(lines: Iterable[Line]) -> dict[Group, list[Line]]:
    """Lines of the same setting at the same concurrency, in the order of both."""
    found: dict[Group, list[Line]] = defaultdict(list)
    for line in lines:
        found[line["setting"], line["concurrency"]].append(line)
    return dict(sorted(found.items(), key=lambda item: item[0][1]))


def cell(lines: Iterable[Line], read: Callable[[Line], float | None]) -> str:
    """Median over the rounds, and between what they lie."""
    values = [value for line in lines if (value := read(line)) is not None]
    if not values:
        return ""
    low, high = min(values), max(values)
    return f"{median(values):.4g}" + (f" ({low:.4g} to {high:.4g})" if low < high else "")


def against_unreduced(group: Iterable[Line], by_round: dict[tuple[int, int], Line]) -> list[float]:
    """Throughput over that of unreduced images in the same round, at the same concurrency."""
    return [
        line["requests_per_s"] / base["requests_per_s"]
        for line in group
        if (base := by_round.get((line["round"], line["concurrency"])))
    ]


def markdown(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; numbers with four digits."""
    lines = [heads, ["---"] * len(heads)]
    lines += [[f"{x:.4g}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def table(lines: list[Line]) -> str:
    """All settings at every concurrency, as markdown."""
    bases = {(x["round"], x["concurrency"]): x for x in lines if x["setting"] == UNREDUCED}
    used = {n: r for n, r in COLUMNS.items() if any(r(line) is not None for line in lines)}
    heads = ["concurrency", "setting", "of unreduced requests/s", *used]
    rows = []
    for (setting, concurrency), group in groups(lines).items():
        ratios = against_unreduced(group, bases)
        ratio = f"{median(ratios):.2f}" if ratios else ""
        cells = (cell(group, read) for read in used.values())
        rows.append([str(concurrency), setting, ratio, *cells])
    return markdown(heads, rows)


def write(folder: Path, accuracy: Path | None = None) -> str:
    """Writes ``report.md`` and the pictures beside it.

    Args:
        folder: where ``runs.jsonl`` is.
        accuracy: ``results.json`` of ``benchmarks/accuracy.py``.

    Returns:
        The report.
    """
    lines = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    if not lines:
        return ""
    rounds = len({line["round"] for line in lines})
    conditions = "\n".join(f"- {key}: {value}" for key, value in lines[0]["conditions"].items())
    pictures = draw(folder, lines, accuracy)
    report = (
        f"# Load test, {lines[0]['date']} to {lines[-1]['date']}\n\n{conditions}\n\n"
        f"Medians over {rounds} rounds, and between what they lie. Requests/s are compared with "
        f"those of unreduced images in the same round.\n\n{table(lines)}\n"
        + "".join(f"![{name}]({name}.png)\n" for name in pictures)
    )
    (folder / "report.md").write_text(report)
    return report


def draw(folder: Path, lines: list[Line], accuracy: Path | None) -> list[str]:
    """The pictures; their names."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_setting: dict[str, list[tuple[int, list[Line]]]] = defaultdict(list)
    for (setting, concurrency), group in groups(lines).items():
        by_setting[setting].append((concurrency, group))

    def picture(name: str, x: str, y: str, plot: Callable[[Any], None]) -> str:
        figure, axes = pyplot.subplots(figsize=(8, 5))
        plot(axes)
        axes.set(xlabel=x, ylabel=y)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        figure.tight_layout()
        figure.savefig(folder / f"{name}.png", dpi=120)
        pyplot.close(figure)
        return name

    def by_concurrency(*reads: tuple[str, Callable[[Line], float | None]]) -> Callable[[Any], None]:
        def plot(axes: Any) -> None:
            for number, (label, read) in enumerate(reads):
                axes.set_prop_cycle(None)  # the same colour for the same setting
                for setting, points in by_setting.items():
                    there = [(c, [v for x in g if (v := read(x)) is not None]) for c, g in points]
                    there = [(c, values) for c, values in there if values]
                    axes.plot(
                        [c for c, _ in there],
                        [median(values) for _, values in there],
                        "o-" if number == 0 else "x:",
                        label=f"{setting}{label}",
                    )
            axes.set_xscale("log", base=2)

        return plot

    most = max(line["concurrency"] for line in lines)

    def kv(axes: Any) -> None:
        for line in lines:
            if line["round"] == 0 and line["concurrency"] == most:
                watch = line["watch"]
                share = [100 * value for value in watch["kv_cache_usage"]]
                axes.plot(watch["seconds"], share, label=line["setting"])

    at_once, ms = "requests under way at once", "milliseconds"
    names = [
        picture("throughput", at_once, "requests/s", by_concurrency(("", COLUMNS["requests/s"]))),
        picture(
            "ttft",
            at_once,
            f"time to first token, {ms}",
            by_concurrency((", p50", COLUMNS["TTFT p50, ms"]), (", p99", COLUMNS["TTFT p99, ms"])),
        ),
        picture(
            "tpot",
            at_once,
            f"time per output token, {ms}",
            by_concurrency((", p50", COLUMNS["TPOT p50, ms"])),
        ),
        picture("kv", f"seconds, at {most} at once", "KV cache used, %", kv),
    ]
    if any(line["goodput_per_s"] is not None for line in lines):
        plot = by_concurrency(("", COLUMNS["goodput/s"]))
        names.append(picture("goodput", at_once, "requests/s within the objectives", plot))
    if accuracy is not None:
        known = accuracies(accuracy)

        def pareto(axes: Any) -> None:
            for setting, points in by_setting.items():
                if setting in known and points[-1][0] == most:
                    speed = median(line["requests_per_s"] for line in points[-1][1])
                    axes.plot(speed, 100 * known[setting], "o", label=setting)

        names.append(picture("pareto", f"requests/s, {most} at once", "accuracy, %", pareto))
    return names


def accuracies(file: Path) -> dict[str, float]:
    """Average accuracy by setting, from ``results.json`` of ``benchmarks/accuracy.py``."""
    results = json.loads(file.read_text())
    return {
        UNREDUCED if name.startswith("none@") else name: result["average"]
        for name, result in results.items()
    }
