# SPDX-License-Identifier: Apache-2.0
"""The scenes, their questions, and how answers are summed up. No engine."""

from __future__ import annotations

import hashlib
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
from vllm_ficoco.tiny_llava.scenes import FONTS, TASKS, Scene, SceneMaker, Thing
from vllm_ficoco.tiny_llava.worlds import WORLDS, Cluttered, Printed
from vllm_ficoco.vision.geometry import geometry_of

ROOT = Path(__file__).parents[1]


def test_the_same_seed_draws_the_same(accuracy: ModuleType) -> None:
    one, other = accuracy.held_out(60), accuracy.held_out(60)
    for (a, question), (b, again) in zip(one, other, strict=True):
        assert question == again
        assert np.array_equal(np.asarray(a.image), np.asarray(b.image))


def test_the_plain_world_stays_what_the_recorded_numbers_are_of(accuracy: ModuleType) -> None:
    """What is drawn shows in the questions of all scenes behind it."""
    drawn = " ".join(f"{q.text} {q.answer}" for _, q in accuracy.held_out(2000))
    assert hashlib.sha256(drawn.encode()).hexdigest()[:16] == "21fbbd4efc460e3f"


@pytest.mark.parametrize("world", WORLDS)
def test_every_word_is_in_the_models_vocabulary(accuracy: ModuleType, world: str) -> None:
    tokenizer = json.loads((CHECKPOINT / "tokenizer.json").read_text())
    vocabulary = set(tokenizer["model"]["vocab"])
    for _, question in accuracy.held_out(400, world):
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


@pytest.mark.parametrize("world", ["cluttered", "printed"])
def test_a_held_out_world_has_other_scenes_and_the_same_tasks(
    accuracy: ModuleType, world: str
) -> None:
    asked, again = accuracy.held_out(900, world), accuracy.held_out(60, world)
    assert [question for _, question in again] == [question for _, question in asked[:60]]
    for (one, _), (other, _) in zip(again, asked, strict=False):
        assert one.image.tobytes() == other.image.tobytes()
    assert {question.task for _, question in asked} == set(TASKS)
    # Other scenes, not the plain ones before another background.
    first = {scene.things[0][:5] for scene, _ in accuracy.held_out(900)}
    assert first.isdisjoint({scene.things[0][:5] for scene, _ in asked})


def test_the_held_out_worlds_have_more_clutter_and_fonts_that_were_never_trained_on() -> None:
    assert Cluttered.clutter[0] > SceneMaker.clutter[1]
    assert not {*Printed.fonts} & {*FONTS} and len(Printed.fonts) > 5
    shown = [maker(0)._background() for maker in WORLDS.values()]
    assert {image.shape for image in shown} == {(168, 168, 3)}


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
    found = accuracy.paired(one, other, asked)
    assert found.sigma == pytest.approx((5 - 1) / math.sqrt(5 + 1))
    assert found.points == pytest.approx(100 * (5 - 1) / 12)
    deviation = np.std([1] * 5 + [-1] + [0] * 6)  # of one question's gain
    assert found.reach == pytest.approx(100 * 1.96 * deviation / math.sqrt(12))
    assert str(found) == "+33.3 ± 35.3 (+1.6 σ)"
    assert accuracy.paired(one, one, asked) == (0, 0, 0)


def test_every_setting_is_compared_with_one_method_at_the_same_budget(
    accuracy: ModuleType,
) -> None:
    asked = accuracy.held_out(40)

    def answers(wrong: int) -> dict[int, Any]:
        """Wrong to so many of the first questions."""
        return {
            i: accuracy.Answer("?" if i < wrong else q.answer, 1) for i, (_, q) in enumerate(asked)
        }

    wrong = [
        (accuracy.Setting("none", 144), 0),
        (accuracy.Setting("topk", 48), 4),
        (accuracy.Setting("topk", 16), 9),
        (accuracy.Setting("tome", 48), 8),
        (accuracy.Setting("tome", 16), 0),
        (accuracy.Setting("tome", 16, {"proportional": False}), 8),
        (accuracy.Setting("tome", 8), 20),  # with which nothing can be compared
        (accuracy.Setting("dart", 0, {"tokens": [48]}), 8),
        (accuracy.Setting("fastv", 0, {"tokens": [48]}), 10),
    ]
    given = {setting.name: answers(count) for setting, count in wrong}
    rows = [setting for setting, _ in wrong]
    results = accuracy.summarise(given, asked, "topk")
    won = {
        name: round(result["against"]["points"] * 40 / 100)
        for name, result in results.items()
        if result["against"]
    }
    assert won == {rows[3].name: 4 - 8, rows[4].name: 9, rows[5].name: 9 - 8}
    assert results[rows[3].name]["against"]["sigma"] == pytest.approx(-4 / math.sqrt(4))
    lines = accuracy.table(results, rows).splitlines()
    assert lines[0].endswith("| against topk |") and "| -10.0 ± 9.3 (-2.0 σ) |" in lines[5]
    results = accuracy.summarise(given, asked, "dart")
    assert [name for name, result in results.items() if result["against"]] == [rows[-1].name]


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
    # A folder is of one world,
    with pytest.raises(SystemExit, match="other conditions"):
        run("--questions=40", "--world=printed")
    # and of one model.
    with pytest.raises(SystemExit, match="other conditions"):
        run("--questions=30", model="another")


def test_one_table_of_all_worlds_and_budgets(
    accuracy: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Fake:
        """Wrong to the more questions, the fewer tokens; dart's are others, and fewer."""

        @classmethod
        def start(cls, *_: Any) -> Fake:
            return cls()

        def ask(self, asked: Any, setting: Any, done: Any) -> None:
            for index, _, question in asked:
                wrong = index % 100 < (24 if setting.method == "topk" else 12) * (
                    2 if setting.budget < 48 else 1
                )
                answer = "?" if wrong and setting.method != "none" else question.answer
                done(index, accuracy.Answer(answer, setting.budget))

    monkeypatch.setattr(accuracy, "Engine", Fake)
    folders = [tmp_path / world for world in WORLDS]
    for world, folder in zip(WORLDS, folders, strict=True):
        # Not all methods everywhere.
        methods = "topk,tome" if world != "printed" else "topk,tome,random"
        options = ["--in-process=tiny-llava", f"--methods={methods}", "--budgets=48,16"]
        more = [f"--world={world}", f"--out={folder}", "--questions=100"]
        monkeypatch.setattr("sys.argv", ["accuracy.py", *options, *more])
        accuracy.main()
    capsys.readouterr()
    options = ["--compare", *map(str, reversed(folders)), "--against=topk", "--questions=100"]
    monkeypatch.setattr("sys.argv", ["accuracy.py", *options])
    accuracy.main()
    lines = capsys.readouterr().out.splitlines()
    columns = " | ".join(f"{world} {budget}" for world in WORLDS for budget in (48, 16))
    assert lines[0] == f"| method | options | {columns} | mean | against topk |"
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert [row[0] for row in cells] == ["tome", "topk", "random"]  # the last one was not asked all
    # 12 of 100 at 48 tokens, 24 at 16; the interval is wider than that of questions on their own.
    assert cells[0][-1].startswith("+18.0 ± ") and cells[1][-1] == cells[2][-2] == ""
    one = accuracy.Paired.of([1] * 108 + [0] * 492, 600)
    reach, sigma = (float(part.strip("()σ ")) for part in cells[0][-1].split("± ")[1].split(" ", 1))
    assert reach > one.reach and sigma < one.sigma
    (tmp_path / "printed/conditions.json").write_text('{"weights": ["other"], "world": "printed"}')
    with pytest.raises(SystemExit, match="different weights"):
        accuracy.main()


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
