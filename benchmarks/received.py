# SPDX-License-Identifier: Apache-2.0
"""What stands in for [CLS] in a tower without one: which patches' attention keeps what answers.

    python benchmarks/received.py --questions 500

Top-K on the shipped model, whose [CLS] is left out of all but one of them: what a patch receives
from all patches, from those of a sample, by logits, and the least of it instead of the most. And
what `score` keeps where there is no [CLS], with and without what a patch receives.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from accuracy import Engine, Setting, held_out
from budgets import table
from engines import environment
from vllm_ficoco.methods import METHODS, Evidence, Tokens
from vllm_ficoco.methods.paradigm import grid_windows, highest
from vllm_ficoco.methods.score import SCORE, ScoreOptions
from vllm_ficoco.methods.score import filter as choose
from vllm_ficoco.methods.topk import TOPK

Look = Callable[[Evidence], Tensor]


def from_sample(count: int) -> Look:
    """Attention received from the patches in the middle of so many windows of the grid."""

    def look(evidence: Evidence) -> Tensor:
        middles = grid_windows(evidence.grid, count, evidence.key.device)[2]
        everywhere = middles.expand(len(evidence.key), -1)
        places = Tokens.of(evidence.key[:, 0, evidence._first :]).position
        return evidence.attention_between(everywhere, places).mean(1)

    return look


LOOKS: dict[str, Look] = {
    "[CLS]": lambda e: e.attention_of_cls(),
    "received": lambda e: e.attention_received(),
    "received from 36": from_sample(36),
    "received from 16": from_sample(16),
    "received, logits": lambda e: e.attention_received("logits"),
    "least received": lambda e: -e.attention_received(),
    "least received, logits": lambda e: -e.attention_received("logits"),
}


def without_cls(evidence: Evidence) -> Evidence:
    """What the same layer would show of a tower that has none."""
    query, key = (x[:, :, 1:] for x in (evidence.query, evidence.key))
    return replace(evidence, query=query, key=key, has_cls=False)


SCORES = {
    "score, no [CLS]": ScoreOptions(),
    "score, no [CLS], received": ScoreOptions(alpha=0.2),
}


def main() -> None:
    """``python benchmarks/received.py``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--budgets", type=lambda t: [*map(int, t.split(","))], default=[36, 18, 9])
    args = parser.parse_args()
    environment()
    for name, look in LOOKS.items():
        METHODS[name] = replace(
            TOPK,
            name=name,
            filter=lambda _, evidence, leave, __, look=look: highest(-look(evidence), leave),
        )
    for name, options in SCORES.items():
        METHODS[name] = replace(
            SCORE,
            name=name,
            filter=lambda tokens, evidence, leave, _, options=options: choose(
                tokens, without_cls(evidence), leave, options
            ),
        )
    engine = Engine.start("tiny-llava")
    asked = [(i, *question) for i, question in enumerate(held_out(args.questions))]
    rows = [["kept by", *map(str, args.budgets)]]
    for name in (*LOOKS, "uniform", *SCORES):
        shares = []
        for budget in args.budgets:
            given: dict[int, str] = {}

            def note(i: int, answer: object, given: dict[int, str] = given) -> None:
                given[i] = answer.text.strip()  # type: ignore[attr-defined]

            engine.ask(asked, Setting(name, budget), note)
            right = sum(given[i] == question.answer for i, _, question in asked)
            shares.append(f"{100 * right / len(asked):.1f}")
        rows.append([name, *shares])
    print(table(rows))


if __name__ == "__main__":
    main()
