# SPDX-License-Identifier: Apache-2.0
"""What ``visual_token_budget: "auto"`` is worth: against fixed budgets of as many tokens.

    python benchmarks/auto.py --questions 2000                     # RESULTS.md's table and picture
    python benchmarks/auto.py --questions 300 --worlds plain       # a part of it, in a minute

Asks an engine in this process the questions of ``benchmarks/accuracy.py``, in every world: with
``auto``, with all tokens, with the rungs, and with the two whole numbers around the tokens that
``auto`` keeps on average, in each world and in all of them together. Answers are compared question
by question; all questions to one scene count as one draw, as they see the same tokens. Every answer
is written as it comes, and a run that was stopped goes on where it was.

Needs the package's extra ``eval``.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from accuracy import (
    WORLDS,
    Answer,
    Engine,
    Paired,
    by_scene,
    conditions_of,
    held_out,
    interval,
    load,
    same_conditions,
)
from vllm_ficoco.methods import METHODS
from vllm_ficoco.settings import AUTO, DEFAULT_METHOD, AutoBudget
from vllm_ficoco.vision.complexity import asks_for

TOKENS = 144
"""Of an image of the shipped model."""

AT_ONCE = 500
"""Questions of a batch, after which their answers are written."""


class Setting(NamedTuple):
    """How a question is asked."""

    method: str
    budget: int | str

    @property
    def name(self) -> str:
        """Key of the answers."""
        return f"{self.method}@{self.budget}"

    @property
    def reduction(self) -> dict[str, Any]:
        """The request's field."""
        whole = self.budget == TOKENS
        return {"method": "none"} if whole else {"method": self.method, "budget": self.budget}


class World:
    """The questions of a world, and what was answered.

    Args:
        name: of the world.
        questions: how many.
        model: what is asked.
        out: folder for its answers.
    """

    def __init__(self, name: str, questions: int, model: str, out: Path) -> None:
        self.name, self.file = name, out / name / "answers.jsonl"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.asked = held_out(questions, name)
        same_conditions(self.file.parent, conditions_of(model, 16, self.asked, name))
        self.answers = load(self.file)

    def ask(self, engine: Engine, setting: Setting) -> None:
        """Put what has not been asked yet."""
        known = self.answers.setdefault(setting.name, {})
        left = [i for i in range(len(self.asked)) if i not in known]
        with self.file.open("a") as file:
            for start in range(0, len(left), AT_ONCE):
                batch = [(i, *self.asked[i]) for i in left[start : start + AT_ONCE]]

                def done(index: int, answer: Answer) -> None:
                    known[index] = answer
                    row = {"setting": setting.name, "index": index, "answer": answer}
                    file.write(json.dumps(row) + "\n")

                engine.ask(batch, setting, done)  # type: ignore[arg-type]
                file.flush()

    def of(self, setting: Setting) -> dict[int, Answer]:
        """The answers to these questions; an earlier run may have asked more."""
        return {i: a for i, a in self.answers[setting.name].items() if i < len(self.asked)}

    def kept(self, setting: Setting) -> list[int]:
        """Tokens that were kept for every question."""
        return [answer.kept for answer in self.of(setting).values()]

    def right(self, setting: Setting) -> int:
        """How many answers are."""
        given = self.of(setting)
        return sum(a.text.strip() == self.asked[i][1].answer for i, a in given.items())


def against(worlds: Iterable[World], one: Setting, other: Setting) -> Paired:
    """One setting against another in some worlds, scene by scene."""
    return by_scene((w.name, w.asked, w.of(one), w.of(other)) for w in worlds)


def mean_of(worlds: Iterable[World], setting: Setting) -> float:
    """Tokens that were kept on average."""
    kept = [count for world in worlds for count in world.kept(setting)]
    return sum(kept) / len(kept)


def around(mean: float) -> list[int]:
    """The whole numbers at either side of a mean."""
    return [*dict.fromkeys((math.floor(mean), math.ceil(mean)))]


def accuracy(worlds: Sequence[World], setting: Setting) -> tuple[float, float, float]:
    """Share of the right answers, and the 95 % interval of it as of single questions."""
    right = sum(world.right(setting) for world in worlds)
    questions = sum(len(world.asked) for world in worlds)
    return right / questions, *interval(right, questions)


def table(groups: dict[str, list[World]], method: str) -> str:
    """As markdown: auto and the fixed budgets around it, in every world and in all."""
    auto, whole = Setting(method, AUTO), Setting(method, TOKENS)
    lines = [
        "| world | questions | auto keeps | right | fixed at | right | against it | all tokens |",
        "| --- " * 8 + "|",
    ]
    for name, worlds in groups.items():
        mean = mean_of(worlds, auto)
        for budget in around(mean):
            fixed = Setting(method, budget)
            lines.append(
                f"| {name} | {sum(len(world.asked) for world in worlds)} | {mean:.2f} "
                f"| {100 * accuracy(worlds, auto)[0]:.2f} | {budget} "
                f"| {100 * accuracy(worlds, fixed)[0]:.2f} | {against(worlds, auto, fixed)} "
                f"| {100 * accuracy(worlds, whole)[0]:.2f} |"
            )
    return "\n".join(lines) + "\n"


def rungs(worlds: Sequence[World]) -> str:
    """As markdown: how many scenes of every world come to which budget."""
    ladder = AutoBudget().ladder(TOKENS)
    lines = [f"| world | {' | '.join(map(str, ladder))} |", "| --- " * (1 + len(ladder)) + "|"]
    for world in worlds:
        scenes = {scene for scene, _ in world.asked}
        chosen = Counter(AutoBudget().choices(TOKENS, *asks_for(s.image))[0] for s in scenes)
        counts = (f"{chosen[budget]} of {len(scenes)}" for budget in ladder)
        lines.append(f"| {world.name} | {' | '.join(counts)} |")
    return "\n".join(lines) + "\n"


def plot(
    groups: dict[str, list[World]], method: str, fixed: dict[str, list[int]], file: Path
) -> None:
    """Accuracy by tokens: fixed budgets as a line, auto as a star at what it keeps on average."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, all_axes = pyplot.subplots(
        1, len(groups), figsize=(4 * len(groups), 4), sharey=True, squeeze=False
    )
    for axes, (name, worlds) in zip(all_axes[0], groups.items(), strict=True):
        budgets = [budget for budget in fixed[name] if budget < TOKENS]
        shares = [accuracy(worlds, Setting(method, budget)) for budget in budgets]
        edges = [
            [100 * (share - low) for share, low, _ in shares],
            [100 * (high - share) for share, _, high in shares],
        ]
        y = [100 * share for share, *_ in shares]
        axes.errorbar(budgets, y, edges, marker="o", capsize=2, label=f"{method}, fixed")
        auto = Setting(method, AUTO)
        mean, share = mean_of(worlds, auto), 100 * accuracy(worlds, auto)[0]
        axes.plot([mean], [share], "*", color="crimson", markersize=14, label="auto")
        whole = 100 * accuracy(worlds, Setting(method, TOKENS))[0]
        axes.axhline(whole, color="grey", linestyle=":", label="all tokens")
        axes.set_title(name)
        axes.set_xlabel("visual tokens kept, mean")
        axes.grid(alpha=0.3)
    all_axes[0][0].set_ylabel("accuracy, %")
    all_axes[0][0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="tiny-llava")
    parser.add_argument("--method", default=DEFAULT_METHOD, choices=METHODS)
    parser.add_argument("--questions", type=int, default=2000, help="of every world")
    parser.add_argument("--worlds", default=",".join(WORLDS), help="with commas")
    parser.add_argument("--out", type=Path, default=Path("reports/auto"))
    args = parser.parse_args()
    names = args.worlds.split(",")
    worlds = [World(name, args.questions, args.model, args.out) for name in names]
    engine = Engine.start(args.model)
    auto = Setting(args.method, AUTO)
    groups = {world.name: [world] for world in worlds}
    if len(worlds) > 1:
        groups["all"] = worlds
    for world in worlds:
        world.ask(engine, auto)
    fixed: dict[str, list[int]] = {}
    for name, members in groups.items():
        fixed[name] = sorted({*AutoBudget().ladder(TOKENS), *around(mean_of(members, auto))})
        for world in members:
            for budget in fixed[name]:
                world.ask(engine, Setting(args.method, budget))
    text = f"{table(groups, args.method)}\n{rungs(worlds)}"
    (args.out / "table.md").write_text(text)
    plot(groups, args.method, fixed, args.out / "auto.png")
    print(text, end="")


if __name__ == "__main__":
    main()
