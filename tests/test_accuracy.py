# SPDX-License-Identifier: Apache-2.0
"""The scenes, their questions, and how answers are summed up. No engine."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from transformers import LlavaConfig

from vllm_ficoco.methods import METHODS
from vllm_ficoco.settings import Reduction
from vllm_ficoco.tiny_llava import CHECKPOINT
from vllm_ficoco.tiny_llava.scenes import TASKS, Scene, SceneMaker, Thing
from vllm_ficoco.vision.geometry import geometry_of

ROOT = Path(__file__).parents[1]


def test_the_same_seed_draws_the_same(accuracy: ModuleType) -> None:
    one, other = accuracy.held_out(60), accuracy.held_out(60)
    for (a, question), (b, again) in zip(one, other, strict=True):
        assert question == again
        assert np.array_equal(np.asarray(a.image), np.asarray(b.image))


def test_every_word_is_in_the_models_vocabulary(accuracy: ModuleType) -> None:
    tokenizer = json.loads((CHECKPOINT / "tokenizer.json").read_text())
    vocabulary = set(tokenizer["model"]["vocab"])
    for _, question in accuracy.held_out(400):
        assert set(f"{question.text} {question.answer}".split()) <= vocabulary, question


def test_every_task_is_asked_and_yes_is_as_frequent_as_no(accuracy: ModuleType) -> None:
    questions = [question for _, question in accuracy.held_out(2000)]
    assert {question.task for question in questions} == set(TASKS)
    for task in TASKS:
        answers = [q.answer for q in questions if q.task == task]
        assert len(answers) > 100, task
        if task.startswith("existence") or task == "relation":
            assert 0.35 < answers.count("yes") / len(answers) < 0.65, task


def test_test_digits_are_never_trained_on() -> None:
    test, train = SceneMaker(0, test=True), SceneMaker(0, test=False)
    held_out = {digit.tobytes() for digit in test.digits}
    assert len(test.digits) + len(train.digits) == 1797
    assert not held_out & {digit.tobytes() for digit in train.digits}


def test_answers_are_right() -> None:
    """Against a scene whose contents are plain to see."""
    scene = Scene(
        Image.new("RGB", (168, 168)),
        [
            Thing("word", "green", "owl", 100, 100),
            Thing("shape", "red", "star", 30, 40),
            Thing("shape", "blue", "star", 130, 40),
            Thing("digit", "white", "7", 100, 140),
            Thing("shape", "red", "ring", 30, 130),
        ],
    )
    right = {
        "is there a red star ?": "yes",
        "is there a blue star ?": "yes",
        "is there a red ring ?": "yes",
        "is there a blue ring ?": "no",
        "what color is the ring ?": "red",
        "what shape is the blue object ?": "star",
        "what word is printed ?": "owl",
        "what digit is written ?": "7",
        "how many stars are there ?": "2",
        "how many rings are there ?": "1",
        "how many red object are there ?": "2",
        "how many blue object are there ?": "1",
        "how many green object are there ?": "0",
        "is the red star left of the blue star ?": "yes",
        "is the blue star left of the red star ?": "no",
        "is the red ring above the red star ?": "no",
        "is the red ring below the red star ?": "yes",
        "what shape is in the top left ?": "star",
        "what shape is in the top right ?": "star",
        "what shape is in the bottom left ?": "ring",
    }
    mentioned = {
        "is there a red star ?": [("star", {1})],
        "is there a blue ring ?": [("ring", set())],
        "how many stars are there ?": [("stars", {1, 2})],
        "how many red object are there ?": [("object", {1, 4})],
        "what word is printed ?": [("printed", {0})],
        "what digit is written ?": [("written", {3})],
        "is the red ring above the red star ?": [("ring", {4}), ("star", {1})],
        "is the red star left of the blue star ?": [("star", {1}), ("star", {2})],
        "what shape is in the bottom left ?": [("left", {4})],
    }
    seen = set()
    for seed in range(300):
        for task, ask in TASKS.items():
            asked = ask(scene, random.Random(seed))
            if asked is None:
                continue
            question, answer, mentions = asked
            named = [(question.split()[m.word], set(m.things)) for m in mentions]
            assert named == mentioned.get(question, named), question
            if task == "choice":
                things = dict(zip("ABCD", (m.things for m in mentions), strict=True))
                assert [letter for letter, found in things.items() if found] == [answer]
            if question in right:
                assert answer == right[question], question
                seen.add(question)
            elif task.startswith("existence") or question.startswith("how many"):
                assert answer in ("no", "0"), question
    assert seen == set(right)
    ask = TASKS["existence-adversarial"]
    negatives = [asked for seed in range(300) if (asked := ask(scene, random.Random(seed)))]
    assert {q for q, a, _ in negatives if a == "no"} == {"is there a blue ring ?"}


def test_a_setting_is_found_by_its_name(accuracy: ModuleType) -> None:
    for setting in (
        accuracy.Setting("none", 144),
        accuracy.Setting("ficoco-v", 16, {"lambda": 0.0, "attention": "probabilities"}),
    ):
        assert accuracy.Setting.of(setting.name) == setting


def test_the_ablations_are_options_that_there_are(accuracy: ModuleType) -> None:
    for options in accuracy.ABLATIONS:
        Reduction.parse(accuracy.Setting("ficoco-v", 16, options).reduction)


@pytest.mark.parametrize("block", [32, 16])
def test_methods_inside_the_decoder_are_compared_at_equal_kv_cache(
    accuracy: ModuleType, block: int
) -> None:
    """All of them, on the shipped model's stages; those at one place and at all alike."""
    config = LlavaConfig.from_pretrained(CHECKPOINT)
    config.reduction_stages = list(accuracy.STAGES)
    geometry, settings = geometry_of(config), accuracy.decoder_settings(block)
    inside = {name for name, method in METHODS.items() if method.decoder}
    assert {setting.method for setting in settings} == inside
    held: dict[str, set[tuple[int, ...]]] = {}
    for setting in settings:
        reduction = Reduction.parse(setting.reduction)
        if not setting.variant:
            held.setdefault(setting.method, set()).add(tuple(geometry.held(reduction)))
    assert held["fastv"] == held["dart"] < held["ficoco-l"] == held["k-norm"]
    assert held["sparsevlm"] < held["ficoco-l"]


def test_lmms_eval_reads_the_configuration() -> None:
    """One run a document, with fields that its command line knows, and our own address."""
    runs = yaml.safe_load((ROOT / "benchmarks/lmms-eval.yaml").read_text())
    assert runs
    for run in runs:
        assert set(run) <= {"model", "model_args", "tasks", "log_samples", "output_path", "limit"}
        arguments = dict(part.split("=", 1) for part in run["model_args"].split(","))
        assert run["model"] == "openai"
        assert arguments["base_url"].endswith(":8000/v1")
        assert {"model_version", "api_key"} <= set(arguments)
        assert all(run["tasks"].split(","))


def test_interval_is_wilsons(accuracy: ModuleType) -> None:
    low, high = accuracy.interval(8, 10)
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)
    assert accuracy.interval(0, 50)[0] == pytest.approx(0, abs=1e-9)


def test_paired_counts_what_just_one_answers_rightly(accuracy: ModuleType) -> None:
    asked = accuracy.held_out(12)

    def answers(right: set[int]) -> dict[int, Any]:
        return {
            i: accuracy.Answer(q.answer if i in right else "?", 1) for i, (_, q) in enumerate(asked)
        }

    one, other = answers({0, 1, 2, 3, 4, 5, 6, 7, 8}), answers({0, 1, 2, 3, 9})
    assert accuracy.paired(one, other, asked) == pytest.approx((5 - 1) / math.sqrt(5 + 1))
    assert accuracy.paired(one, one, asked) == 0


def test_f1_counts_yes(accuracy: ModuleType) -> None:
    pairs = [("yes", "yes"), ("yes", "no"), ("no", "yes"), ("no", "no"), ("yes", "yes")]
    assert accuracy.f1_of_yes(pairs) == pytest.approx(2 / 3)
    assert accuracy.f1_of_yes([("no", "no")]) == 0


def answering(accuracy: ModuleType, asks: list[int]) -> type:
    """In place of an engine: right but for every third question, and notes how many it is asked."""

    class Fake:
        @classmethod
        def start(cls, *_: Any) -> Fake:
            return cls()

        def ask(self, asked: Any, setting: Any, done: Any) -> None:
            asks.append(len(asked))
            for index, _, question in asked:
                text = "?" if index % 3 == 0 else question.answer
                done(index, accuracy.Answer(text, setting.budget, None, 1 / (1 + index)))

    return Fake


def test_a_run_goes_on_and_does_not_mix_what_cannot_be_compared(
    accuracy: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asks: list[int] = []
    monkeypatch.setattr(accuracy, "Engine", answering(accuracy, asks))

    def run(*more: str, model: str = "tiny-llava") -> dict[str, Any]:
        options = ["--in-process", model, "--methods", "topk", "--budgets", "48", *more]
        monkeypatch.setattr("sys.argv", ["accuracy.py", *options, f"--out={tmp_path}"])
        accuracy.main()
        return dict(json.loads((tmp_path / "results.json").read_text()))

    results = run("--questions=30", f"--record={tmp_path}/recorded.json")
    assert asks == [30, 30] and set(results) == {"none@144", "topk@48"}
    recorded = json.loads((tmp_path / "recorded.json").read_text())
    assert recorded["questions"] == 30 and set(recorded["averages"]) == set(results)
    with (tmp_path / "answers.jsonl").open("a") as log:
        log.write('{"setting": "topk@48", "ind')  # the machine went down
    assert run("--questions=30") == results and asks == [30, 30]
    # More questions: a setting that was asked fewer is not in the table with the others.
    results = run("--questions=40", "--methods=tome")
    assert asks == [30, 30, 10, 40] and set(results) == {"none@144", "tome@48"}
    # Inside the decoder, of all settings those of the methods named.
    inside = set(run("--questions=40", "--decoder", "--methods=dart")) - set(results)
    assert asks[4:] == [40, 40, 40]
    assert inside == {f'dart@0{{"tokens": [{n}]}}' for n in (112, 80, 48)}
    # A folder is of one model.
    with pytest.raises(SystemExit, match="other conditions"):
        run("--questions=30", model="another")


def test_a_table_has_a_row_for_every_setting(accuracy: ModuleType, tmp_path: Path) -> None:
    asked = accuracy.held_out(30)
    settings = accuracy.settings_of(["topk", "none"], [16, 48, 144], 144)
    assert [s.name for s in settings] == ["none@144", "topk@48", "topk@16"]
    answers = {
        s.name: {
            i: accuracy.Answer(q.answer if i % (k + 1) == 0 else "?", s.budget, None, 1 / (1 + i))
            for i, (_, q) in enumerate(asked)
        }
        for k, s in enumerate(settings)
    }
    results = accuracy.summarise(answers, asked)
    assert results["none@144"]["average"] == 1
    assert results["topk@16"]["average"] < results["topk@48"]["average"] < 1
    rows = accuracy.table(results, settings).splitlines()
    assert len(rows) == 5
    flops = sum(1 / (1 + i) for i in range(30)) / 30  # questions differ in length
    assert rows[2].startswith(f"| none | 144 | {flops:.2f} | 100.0 |")
    assert rows[4].startswith(f"| topk | 16 | {flops:.2f} | ")
    accuracy.plot(results, settings, 6144, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000
