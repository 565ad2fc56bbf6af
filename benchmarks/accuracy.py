# SPDX-License-Identifier: Apache-2.0
"""Accuracy of every method at every budget, asked of a server or of an engine in this process.

    python benchmarks/accuracy.py --serve tiny-llava --ablations         # RESULTS.md's tables
    python benchmarks/accuracy.py --base-url http://127.0.0.1:8000/v1    # a server that runs
    python benchmarks/accuracy.py --in-process tiny-llava                # no HTTP, as the tests do
    python benchmarks/accuracy.py --in-process tiny-llava --world printed    # another world
    python benchmarks/accuracy.py --compare reports/accuracy*            # all worlds, all budgets

Questions to generated scenes (:mod:`vllm_ficoco.tiny_llava.scenes` and ``worlds``), drawn from a
fixed seed, greedy answers, exact match; existence tasks also as F1 of "yes", as POPE counts. Every
answer is written to ``answers.jsonl`` as it comes, so a run that was stopped goes on where it was,
and a run with other settings adds to it; what other weights or other questions have left is
refused. From all settings that were asked as many questions, ``results.json``, ``table.md``,
``ablations.md``, ``decoder.md``, ``decoder-ablations.md`` and plots are made. What is asked the
same can be compared question by question: every table has a column against one method
(``--against``) at the same budget, and ``--compare`` makes one table of the answers in several
folders.

Needs the package's extra ``eval``.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import io
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from vllm_ficoco.engine.checks import SCHEDULER
from vllm_ficoco.engine.gaps import Run, held_of
from vllm_ficoco.methods import METHODS
from vllm_ficoco.schedule import average_over_layers
from vllm_ficoco.settings import DEFAULT_METHOD, Reduction
from vllm_ficoco.tiny_llava import CHECKPOINT
from vllm_ficoco.tiny_llava.scenes import TASKS, Question, Scene
from vllm_ficoco.tiny_llava.worlds import WORLDS
from vllm_ficoco.vision.geometry import STAGES_KEY, geometry_of

SEED = 20_000
"""Of the held-out scenes of the first world, of the next one more; training draws from seeds beyond
a million."""

PLAIN = next(iter(WORLDS))

ABLATIONS: tuple[dict[str, Any], ...] = (
    {"lambda": 0.0},  # without local redundancy
    {"lambda": 1.0},  # without task redundancy
    {"lambda": 0.65},  # as in the authors' code
    {"coefficient": 1.0},  # without the penalty for neighbours
    {"coefficient": 4.0},
    {"receivers": 0},  # pruning alone
    {"receivers": 1},
    {"receivers": 2},
    {"weighted": False, "epsilon": 0.95},  # averaged; several receivers, or there is no weight
    {"epsilon": 0.95},
    {"epsilon": 0.99},
    {"quantile": "matrix"},  # the paper's epsilon, of all of C: most sources have no receiver
    {"normalise": False},
    {"attention": "probabilities"},
    {"attention": "probabilities", "normalise": False},
)
"""FiCoCo-V taken apart, as in its paper's tables 2, 6 and 7."""

STAGES = (1, 2, 4)
"""First layers of the decoder stages that ``--decoder`` needs: three, for SparseVLM and
PyramidDrop. The shipped model has 6 layers."""

AT_ONCE = {32: (112, 80, 48), 16: (32, 16)}
BY_STEPS = {32: ((112, 80, 48), (80, 48, 48)), 16: ((48, 32, 16),)}
"""Tokens from the first stage on, and at each stage, by the size of a KV block: 144 less whole
blocks, so that all methods hold as much as each other. (48, 32, 16) is a third of 144 on average.
With one layer that holds all and 16 in the other five it is 38, which is as low as it gets."""

SMALL_BLOCK = 16
"""Tokens of a KV block where no stage depends on it. vLLM's 128 on a CPU would hold no image of 48
tokens whole, and compute it anew for every question to it."""

L_ABLATIONS: tuple[dict[str, Any], ...] = (
    {"beta": 0.0},  # without local redundancy
    {"beta": 1.0},  # without task redundancy
    {"penalty": 2.0},  # with the penalty for neighbours
    {"gamma": 1.0},  # without indirect correlation
    {"gamma": 0.0},  # without direct correlation
    {"receivers": 0},
    {"beta": 0.0, "receivers": 0},
    {"receivers": 1},
    {"receivers": 2},
    {"weighted": False, "epsilon": 0.95},
    {"normalise": False},
    {"attention": "probabilities"},
    {"causal": True},
    {"attention": "probabilities", "causal": True},
    {"text": "is looked at"},
    {"attention": "probabilities", "text": "is looked at"},
    {"text": "is looked at", "causal": True},
)
"""FiCoCo-L taken apart, as in the paper's table 4, and read in every way that it can be."""


class Setting(NamedTuple):
    """One row of the table."""

    method: str
    budget: int
    """0 where the options have the tokens of every stage."""
    options: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """Key of the row in the results."""
        extra = json.dumps(self.options, sort_keys=True) if self.options else ""
        return f"{self.method}@{self.budget}{extra}"

    @property
    def variant(self) -> str:
        """The options that do not say how many tokens stay; to sort by."""
        rest = {key: value for key, value in self.options.items() if key != "tokens"}
        return json.dumps(rest, sort_keys=True) if rest else ""

    @classmethod
    def of(cls, name: str) -> Setting:
        """The setting whose name that is."""
        method, rest = name.split("@")
        budget, brace, options = rest.partition("{")
        return cls(method, int(budget), json.loads(brace + options) if brace else {})

    @property
    def plain(self) -> Setting:
        """The same method at the same tokens with the defaults of all other options."""
        return self._replace(options={k: v for k, v in self.options.items() if k == "tokens"})

    @property
    def reduction(self) -> dict[str, Any]:
        """The request's field."""
        if self.method == "none":
            return {"method": "none"}
        if "tokens" in self.options:
            return {"method": self.method, "options": self.options}
        return {"method": self.method, "budget": self.budget, "options": self.options}


Asked = Sequence[tuple[Scene, Question]]
"""Questions, in the order of their indices."""


class Answer(NamedTuple):
    """What came back."""

    text: str
    kept: int
    """Visual tokens that the server says, or the engine's prompt shows, it held."""
    kv_bytes: int | None = None
    flops_ratio: float | None = None


def decoder_settings(block: int) -> list[Setting]:
    """Methods inside the decoder, at equal KV cache: one place, three, and the tower as well.

    Args:
        block: tokens of a KV block, 32 or 16. All ablations are made with 32 alone.
    """
    at_once, by_steps = AT_ONCE[block], BY_STEPS[block]

    def at(method: str, *tokens: int, **options: Any) -> Setting:
        return Setting(method, 0, {"tokens": list(tokens), **options})

    inside = [n for n, m in METHODS.items() if m.decoder and m.place == "nowhere"]
    both = [n for n, m in METHODS.items() if m.decoder and m.place != "nowhere"]
    one_place = [n for n in inside if n in ("fastv", "dart")]
    any_place = [n for n in inside if n not in (*one_place, "sparsevlm", "pyramiddrop")]
    many_places = [n for n in inside if n not in one_place]
    telling = [o for o in L_ABLATIONS if {*o} <= {"beta", "receivers"} and {*o.values()} == {0}]
    l_ablations = L_ABLATIONS if block == 32 else telling  # no local term, no merging, neither
    return [
        *(at(name, tokens) for name in one_place for tokens in at_once),
        *(at(name, tokens, tokens, tokens) for name in any_place for tokens in at_once),
        *(at(name, *tokens) for name in many_places for tokens in by_steps),
        *(Setting(name, budget) for name in both for budget in (48, 32, 16)),
        *(at("ficoco-l", *[n] * 3, **options) for options in l_ablations for n in at_once[-2:]),
        *(at("ficoco-l", *by_steps[0], **options) for options in telling),
    ]


def held_out(questions: int, world: str = PLAIN) -> list[tuple[Scene, Question]]:
    """The first so many questions to the test scenes of a world, always the same."""
    maker = WORLDS[world](SEED + [*WORLDS].index(world), test=True)
    asked: list[tuple[Scene, Question]] = []
    while len(asked) < questions:
        scene = maker.scene()
        asked += [(scene, question) for question in maker.questions(scene)]
    return asked[:questions]


def path_of(model: str) -> str:
    """What vLLM loads: the shipped model may be called by its name."""
    return str(CHECKPOINT) if model == "tiny-llava" else model


# --- Asking -------------------------------------------------------------------------------------


@cache  # a scene is asked about many times, and encoding takes longer than the answer
def data_url(scene: Scene) -> str:
    """The image as a PNG in a URL."""
    png = io.BytesIO()
    scene.image.save(png, "PNG")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


Done = Callable[[int, Answer], None]
"""Called with the index of a question and its answer."""


async def ask_server(
    base_url: str,
    model: str,
    asked: Sequence[tuple[int, Scene, Question]],
    setting: Setting,
    concurrency: int,
    done: Done,
) -> None:
    """Put questions to an OpenAI-compatible server, several at a time.

    The client retries what a busy server refuses (429, 503) and what gets lost on the way, each
    time after a longer wait.
    """
    from openai import AsyncOpenAI

    places = asyncio.Semaphore(concurrency)
    async with AsyncOpenAI(
        base_url=base_url, api_key=os.environ.get("OPENAI_API_KEY", "none"), max_retries=8
    ) as client:

        async def one(index: int, scene: Scene, question: Question) -> None:
            url = data_url(scene)
            async with places:
                response = await client.chat.completions.create(
                    model=model,
                    messages=[
                        {
                            "role": "user",
                            "content": [
                                {"type": "image_url", "image_url": {"url": url}},
                                {"type": "text", "text": question.text},
                            ],
                        }
                    ],
                    temperature=0,
                    max_tokens=8,
                    extra_body={"reduction": setting.reduction},
                )
            report = (response.model_extra or {})["reduction"]
            done(
                index,
                Answer(
                    response.choices[0].message.content or "",
                    report["visual_tokens_kept"],
                    report["kv_cache_bytes_held"],
                    report["estimated_prefill_flops_ratio"],
                ),
            )

        await asyncio.gather(*(one(*question) for question in asked))


@contextmanager
def serving(model: str, arguments: Sequence[str]) -> Iterator[str]:
    """A server of ours for a while; its base URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "ficoco_server.cli", "serve", model, "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--uvicorn-log-level", "warning", *arguments],
        start_new_session=True,  # with all its workers, to be stopped together
    )
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                if process.poll() is not None:
                    raise SystemExit("the server did not start") from None
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


class Engine:
    """The same questions to an engine in this process.

    Args:
        llm: vLLM's ``LLM``.
    """

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.block: int = llm.llm_engine.vllm_config.cache_config.block_size

    @classmethod
    def start(cls, model: str, starts: Sequence[int] = (), block: int = SMALL_BLOCK) -> Engine:
        """With a new engine, in float32, which CPUs are quickest at.

        Args:
            model: its name.
            starts: first layers of the decoder's stages.
            block: tokens of a KV block.
        """
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # there is no HTTP to hide
        from vllm import LLM

        staged: dict[str, Any] = {}
        if starts:
            overrides = {STAGES_KEY: list(starts)}
            staged = {"scheduler_cls": SCHEDULER, "hf_overrides": overrides}
        if block % 32:
            # GPUs' blocks of 16: vLLM's CPU kernels compute them rightly, as tests show
            # (test_stage_variants.py), but vLLM does not offer them.
            from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

            CPUAttentionBackend.get_supported_kernel_block_sizes = lambda *_: [block]
        llm = LLM(
            model=path_of(model),
            max_model_len=512,
            dtype="float32",
            enforce_eager=True,
            limit_mm_per_prompt={"image": 1},
            block_size=block,
            **staged,
        )
        return cls(llm)

    def ask(
        self, asked: Sequence[tuple[int, Scene, Question]], setting: Setting, done: Done
    ) -> None:
        """Put all questions as one batch."""
        from vllm import SamplingParams

        image_token = self.llm.model_config.hf_config.image_token_index
        prompts = [
            {
                "prompt": f"USER: <image> {question.text} ASSISTANT:",
                "multi_modal_data": {"image": scene.image},
                "mm_processor_kwargs": {"reduction": setting.reduction},
            }
            for _, scene, question in asked
        ]
        outputs = self.llm.generate(
            prompts, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False
        )
        for (index, *_), output in zip(asked, outputs, strict=True):
            done(index, Answer(output.outputs[0].text, self._held(output, setting, image_token)))

    def _held(self, output: Any, setting: Setting, image_token: int) -> int:
        """Visual tokens that a decoder layer held on average."""
        prompt = list(output.prompt_token_ids)
        start, entered = prompt.index(image_token), prompt.count(image_token)
        geometry = geometry_of(self.llm.model_config.hf_config)
        reduction = Reduction.parse(setting.reduction)
        if reduction.spec.decoder is None:
            return entered
        run = Run(start, start + entered)
        held = [held_of(run, n, self.block, len(prompt)) for n in geometry.held(reduction)[1:]]
        return math.ceil(average_over_layers([entered, *held], geometry.spans))


# --- Summing up ---------------------------------------------------------------------------------


def interval(right: int, of: int) -> tuple[float, float]:
    """95 % Wilson interval of a share."""
    if not of:
        return 0.0, 1.0
    z, share = 1.96, right / of
    centre = (share + z * z / (2 * of)) / (1 + z * z / of)
    reach = z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of)) / (1 + z * z / of)
    return centre - reach, centre + reach


def f1_of_yes(pairs: Iterable[tuple[str, str]]) -> float:
    """POPE's F1: "yes" is the positive class.

    Args:
        pairs: (what was answered, what is right).
    """
    both = answered = right = 0
    for given, truth in pairs:
        answered += given == "yes"
        right += truth == "yes"
        both += given == truth == "yes"
    return 2 * both / (answered + right) if answered + right else 0.0


class Paired(NamedTuple):
    """How much better one setting answers than another that was asked the same questions."""

    sigma: float
    """The difference in units of what chance would make of it; beyond 2 or -2 it is hardly chance.
    """
    points: float
    """The difference, in percent points of the questions."""
    reach: float
    """From there to either end of its 95 % interval."""

    @classmethod
    def of(cls, gains: Sequence[float], questions: float) -> Paired:
        """From what was won, net, on every independent draw.

        Args:
            gains: of a question 1 if it was won, -1 if lost, 0 if both settings answer it rightly
                or wrongly; of several that hang together the sum. For single questions sigma is
                (won - lost) / sqrt(won + lost), the square root of McNemar's statistic.
            questions: how many they are in all.
        """
        net, squares = sum(gains), sum(gain * gain for gain in gains)
        if not squares:
            return cls(0.0, 0.0, 0.0)
        variance = max(0.0, squares - net * net / len(gains))
        return cls(
            net / math.sqrt(squares), 100 * net / questions, 196 * math.sqrt(variance) / questions
        )

    def __str__(self) -> str:
        return f"{self.points:+.1f} ± {self.reach:.1f} ({self.sigma:+.1f} σ)"


def gains(one: dict[int, Answer], other: dict[int, Answer], asked: Asked) -> dict[int, int]:
    """Of every question that both were asked: 1 if only one is right, -1 if only the other."""

    def right(given: dict[int, Answer], index: int) -> bool:
        return given[index].text.strip() == asked[index][1].answer

    return {i: right(one, i) - right(other, i) for i in sorted(one.keys() & other.keys())}


def by_scene(
    answers: Iterable[tuple[str, Asked, dict[int, Answer], dict[int, Answer]]],
) -> Paired:
    """One setting against another over several worlds and budgets.

    All questions to one scene count as one draw, since they see the same tokens or some of them.

    Args:
        answers: a world's name, its questions, the answers of the one and of the other.
    """
    scenes: dict[tuple[str, Scene], int] = {}
    questions = 0
    for world, asked, one, other in answers:
        for index, gain in gains(one, other, asked).items():
            at = world, asked[index][0]
            scenes[at] = scenes.get(at, 0) + gain
            questions += 1
    return Paired.of([*scenes.values()], questions)


def paired(one: dict[int, Answer], other: dict[int, Answer], asked: Asked) -> Paired:
    """One setting against another, question by question."""
    found = gains(one, other, asked)
    return Paired.of([*found.values()], len(found))


def summarise(
    answers: dict[str, dict[int, Answer]], asked: Asked, against: str = DEFAULT_METHOD
) -> dict[str, dict[str, Any]]:
    """Accuracy per task and on average over the tasks, for every setting.

    Args:
        answers: by the settings' names.
        asked: the questions.
        against: the method with which every other is compared, with its defaults at as many tokens.
    """
    results: dict[str, dict[str, Any]] = {}
    for name, given in answers.items():
        by_task: dict[str, list[tuple[str, str]]] = {}
        for index, answer in given.items():
            question = asked[index][1]
            by_task.setdefault(question.task, []).append((answer.text.strip(), question.answer))
        tasks = {
            task: sum(a == b for a, b in by_task[task]) / len(by_task[task])
            for task in TASKS
            if task in by_task
        }
        average = sum(tasks.values()) / len(tasks)
        total = len(given)
        low, high = interval(round(average * total), total)
        plain = Setting.of(name).plain

        def pair(other: str, name: str = name) -> Paired | None:
            known = name != other and other in answers
            return paired(answers[name], answers[other], asked) if known else None

        own = pair(plain.name)
        baseline = pair(plain._replace(method=against).name)
        results[name] = {
            "questions": total,
            "tasks": tasks,
            "average": average,
            "interval": [low, high],
            "f1": {
                task: f1_of_yes(pairs)
                for task, pairs in by_task.items()
                if task.startswith("existence")
            },
            "visual_tokens_kept": sorted({a.kept for a in given.values()}),
            # Questions differ in length, and with them what a budget saves of a prefill.
            "kv_cache_bytes": _mean(a.kv_bytes for a in given.values()),
            "flops_ratio": _mean(a.flops_ratio for a in given.values()),
            "paired": own and own.sigma,
            "against": baseline and {"method": against, **baseline._asdict()},
        }
    return results


def _mean(values: Iterable[float | None]) -> float | None:
    """Of those that are known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def table(results: dict[str, dict[str, Any]], settings: Sequence[Setting]) -> str:
    """The results as markdown, in the style of the FiCoCo paper's table 3."""
    rows = [s for s in settings if s.name in results]
    full = next((r["average"] for name, r in results.items() if name.startswith("none@")), None)
    tasks = list(results[rows[0].name]["tasks"])
    options = any(s.options for s in rows)
    flops = any(results[s.name]["flops_ratio"] is not None for s in rows)
    pairs = any(results[s.name]["paired"] is not None for s in rows)
    against = next((r["against"]["method"] for r in results.values() if r["against"]), None)
    heads = [
        "method",
        *(["options"] if options else []),
        "visual tokens of KV",
        *(["prefill FLOPs"] if flops else []),
        *tasks,
        "existence F1",
        "average (95 %)",
        "of full",
        *(["paired"] if pairs else []),
        *([f"against {against}"] if against else []),
    ]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for setting in rows:
        result = results[setting.name]
        low, high = (100 * edge for edge in result["interval"])
        f1 = result["f1"].values()
        cells = [
            setting.method,
            *([f"`{json.dumps(setting.options)}`" if setting.options else ""] if options else []),
            ", ".join(map(str, result["visual_tokens_kept"])),
            *([_number(result["flops_ratio"], ".2f")] if flops else []),
            *(f"{100 * result['tasks'].get(task, 0):.1f}" for task in tasks),
            f"{100 * sum(f1) / len(f1):.1f}" if f1 else "",
            f"{100 * result['average']:.1f} ({low:.1f} to {high:.1f})",
            f"{100 * result['average'] / full:.1f}" if full else "",
            *([_number(result["paired"], "+.1f")] if pairs else []),
            *([_against(result["against"])] if against else []),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _against(found: dict[str, Any] | None) -> str:
    return str(Paired(*(found[field] for field in Paired._fields))) if found else ""


def comparison(
    worlds: dict[str, tuple[Asked, dict[str, dict[int, Answer]]]], against: str = DEFAULT_METHOD
) -> str:
    """All methods in all worlds at all budgets, the best first, as markdown.

    The last column takes all worlds and budgets together, see :func:`by_scene`.

    Args:
        worlds: of each, the questions and the answers by the settings' names. Settings that have no
            budget, since their options have the tokens of every stage, are left out.
        against: the method with which every other is compared, with its defaults.
    """
    cells: dict[tuple[str, str], dict[tuple[str, int], float]] = {}
    for world, (asked, answers) in worlds.items():
        for name, result in summarise(answers, asked).items():
            setting = Setting.of(name)
            if setting.budget and setting.method != "none":
                row = cells.setdefault((setting.method, setting.variant), {})
                row[world, setting.budget] = 100 * result["average"]
    columns = sorted(
        {column for row in cells.values() for column in row},
        key=lambda column: ([*worlds].index(column[0]), -column[1]),
    )

    def total(method: str, variant: str) -> str:
        options = json.loads(variant) if variant else {}
        both = []
        for world, budget in columns:
            asked, answers = worlds[world]
            one = answers.get(Setting(method, budget, options).name)
            other = answers.get(Setting(against, budget).name)
            if one is not None and other is not None:
                both.append((world, asked, one, other))
        return "" if not both or (method, variant) == (against, "") else str(by_scene(both))

    def mean(row: dict[tuple[str, int], float]) -> float | None:
        return sum(row.values()) / len(row) if len(row) == len(columns) else None

    heads = ["method", "options", *(f"{world} {budget}" for world, budget in columns)]
    heads += ["mean", f"against {against}"]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for (method, variant), row in sorted(cells.items(), key=lambda cell: -(mean(cell[1]) or 0)):
        shown = [method, f"`{variant}`" if variant else ""]
        shown += [_number(row.get(column), ".1f") for column in columns]
        shown += [_number(mean(row), ".2f"), total(method, variant)]
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def compare(folders: Sequence[Path], questions: int, against: str) -> str:
    """The comparison of what earlier runs have left.

    Raises:
        SystemExit: they are not of the same weights.
    """
    worlds: dict[str, tuple[Asked, dict[str, dict[int, Answer]]]] = {}
    weights = set()
    for folder in folders:
        conditions = json.loads((folder / "conditions.json").read_text())
        world = conditions.get("world", PLAIN)
        weights.add(str(conditions["weights"]))
        asked = worlds[world][0] if world in worlds else held_out(questions, world)
        answers = whole(load(folder / "answers.jsonl"), asked)
        worlds[world] = asked, {**worlds.get(world, (asked, {}))[1], **answers}
    if len(weights) > 1:
        raise SystemExit(f"{', '.join(map(str, folders))} have answers of different weights")
    return comparison({world: worlds[world] for world in WORLDS if world in worlds}, against)


def plot(
    results: dict[str, dict[str, Any]], settings: Sequence[Setting], kv_bytes: int, file: Path
) -> None:
    """Accuracy against visual tokens, or against KV bytes; one line a method.

    Args:
        results: of :func:`summarise`.
        settings: the rows.
        kv_bytes: bytes of KV cache a token; 0 for tokens on the axis.
        file: where the picture goes.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    axes.set_prop_cycle(color=(*pyplot.get_cmap("tab20").colors[::2], "black", "teal", "gold"))
    unit = kv_bytes / 2**20 if kv_bytes else 1
    for method in dict.fromkeys(s.method for s in settings):
        rows = sorted(
            (s for s in settings if s.method == method and s.name in results),
            key=lambda s: float(results[s.name]["visual_tokens_kept"][0]),
        )
        x = [results[s.name]["visual_tokens_kept"][0] * unit for s in rows]
        y = [100 * results[s.name]["average"] for s in rows]
        if method == "none":
            axes.axhline(y[0], color="grey", linestyle=":", label="all tokens")
            continue
        edges = [results[s.name]["interval"] for s in rows]
        below = [value - 100 * low for value, (low, _) in zip(y, edges, strict=True)]
        above = [100 * high - value for value, (_, high) in zip(y, edges, strict=True)]
        axes.errorbar(x, y, (below, above), marker="o", capsize=2, label=method)
    of_a_token = f"{kv_bytes:,} bytes a token"
    axes.set_xlabel(
        f"KV cache of the image, MiB ({of_a_token})" if kv_bytes else "visual tokens kept"
    )
    axes.set_ylabel("accuracy, %, mean over tasks")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


# --- The command --------------------------------------------------------------------------------


def load(file: Path) -> dict[str, dict[int, Answer]]:
    """The answers that an earlier run has left."""
    answers: dict[str, dict[int, Answer]] = {}
    if file.exists():
        for line in file.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue  # cut off as the machine went down; it is asked again
            answers.setdefault(row["setting"], {})[row["index"]] = Answer(*row["answer"])
    return answers


def whole(answers: dict[str, dict[int, Answer]], asked: Asked) -> dict[str, dict[int, Answer]]:
    """The answers to these questions alone, of the settings that were asked all of them.

    An earlier run may have asked more, or fewer; all rows of a table are of the same questions.
    """
    answers = {
        name: {i: answer for i, answer in given.items() if i < len(asked)}
        for name, given in answers.items()
    }
    fewer = [name for name, given in answers.items() if len(given) < len(asked)]
    if fewer:
        print(f"{len(fewer)} settings left out, which were asked fewer questions than {len(asked)}")
    return {name: given for name, given in answers.items() if name not in fewer}


def conditions_of(model: str, block: int, asked: Asked, world: str) -> dict[str, Any]:
    """What answers in one folder must have in common, but for the setting."""
    folder = Path(path_of(model))
    weights = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    drawn = hashlib.sha256()
    scene, first = asked[0]
    drawn.update(scene.image.tobytes())
    drawn.update(first.text.encode())
    return {
        "model": model,
        "world": world,
        "weights": [hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in weights],
        "first_question": drawn.hexdigest()[:16],
        "block_size": block,
    }


def same_conditions(out: Path, conditions: dict[str, Any]) -> None:
    """Refuse a folder with answers of another kind; otherwise note ours there.

    Raises:
        SystemExit: answers of other weights, of another model, or to other questions are there.
    """
    file = out / "conditions.json"
    # Folders of before there were worlds are of the plain one.
    before = {"world": PLAIN, **json.loads(file.read_text())} if file.exists() else None
    if before != conditions and (out / "answers.jsonl").exists():
        raise SystemExit(
            f"{out} has answers under other conditions ({before}, now {conditions}): "
            "choose another --out, or delete it"
        )
    file.write_text(json.dumps(conditions, indent=1) + "\n")


def settings_of(methods: Sequence[str], budgets: Sequence[int], full: int) -> list[Setting]:
    """All tokens first, then every method at every budget below that."""
    return [
        Setting("none", full),
        *(
            Setting(method, budget)
            for method in methods
            if method != "none"
            for budget in sorted(budgets, reverse=True)
            if budget < full
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    of_images = [n for n, m in METHODS.items() if not m.for_videos_alone]
    every = [n for n in of_images if n != "none" and METHODS[n].place != "input"]
    before_decoder = [n for n in every if not METHODS[n].decoder]
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--base-url", help="an OpenAI-compatible server, with /v1")
    where.add_argument("--serve", metavar="MODEL", help="start a server for it, and stop it")
    where.add_argument("--in-process", metavar="MODEL", help="an engine without HTTP")
    where.add_argument(
        "--compare", metavar="FOLDER", nargs="+", type=Path, help="ask nothing; a table of all"
    )
    parser.add_argument("--world", default=PLAIN, choices=WORLDS, help="of the scenes")
    parser.add_argument(
        "--against", default=DEFAULT_METHOD, choices=METHODS, help="what is compared with"
    )
    parser.add_argument("--serve-args", default="--dtype float32", help="more flags of the server")
    parser.add_argument("--model", default="tiny-llava", help="name of the model on the server")
    parser.add_argument("--methods", help="only these; else all, before or in the decoder")
    parser.add_argument("--budgets", default="48,32,16,8")
    parser.add_argument("--tokens", type=int, default=144, help="of an unreduced image")
    parser.add_argument("--options", help="JSON; for every method named with --methods")
    parser.add_argument("--ablations", action="store_true", help="FiCoCo-V taken apart, too")
    parser.add_argument("--decoder", action="store_true", help="methods in the decoder instead")
    parser.add_argument(
        "--block-size", type=int, default=32, choices=AT_ONCE, help="with --decoder"
    )
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--out", type=Path, help="default: reports/accuracy, or accuracy-WORLD")
    parser.add_argument(
        "--kv-bytes", type=int, default=6144, help="of a token in bf16, for the plots"
    )
    parser.add_argument("--record", type=Path, help="write the averages here, for the tests")
    args = parser.parse_args()
    if args.compare:
        print(compare(args.compare, args.questions, args.against), end="")
        return
    if args.out is None:
        args.out = Path(
            "reports/accuracy" if args.world == PLAIN else f"reports/accuracy-{args.world}"
        )
    only = args.methods.split(",") if args.methods else []
    settings = settings_of(
        only or before_decoder, [int(b) for b in args.budgets.split(",")], args.tokens
    )
    if args.options:
        options = json.loads(args.options)
        settings = [s._replace(options=options) if s.method != "none" else s for s in settings]
    thirds = (args.tokens // 3, args.tokens // 9)
    if args.ablations:
        settings += [Setting("ficoco-v", b, o) for o in ABLATIONS for b in thirds]
    if args.decoder:
        inside = decoder_settings(args.block_size)
        settings = [settings[0], *(s for s in inside if not only or s.method in only)]
        args.serve_args += f" --reduction-stages {','.join(map(str, STAGES))}"
        args.serve_args += f" --block-size {args.block_size}"
    for setting in settings:
        Reduction.parse(setting.reduction)
    asked = held_out(args.questions, args.world)
    args.out.mkdir(parents=True, exist_ok=True)
    model = args.serve or args.in_process or args.model
    same_conditions(args.out, conditions_of(model, args.block_size, asked, args.world))
    log = args.out / "answers.jsonl"
    answers = load(log)
    missing = [
        (s, [(i, *a) for i, a in enumerate(asked) if i not in answers.get(s.name, {})])
        for s in settings
    ]
    total = sum(len(questions) for _, questions in missing)
    engine = (
        Engine.start(args.in_process, *((STAGES, args.block_size) if args.decoder else ()))
        if args.in_process and total
        else None
    )
    server = (
        serving(args.serve, args.serve_args.split())
        if args.serve and total
        else nullcontext(args.base_url)
    )
    if log.exists() and not log.read_bytes().endswith(b"\n"):
        with log.open("a") as out:
            out.write("\n")  # ends a line that was cut off
    with server as url, log.open("a") as out, tqdm(total=total, unit="question") as bar:
        for setting, questions in missing:
            bar.set_description(setting.name)

            def done(index: int, answer: Answer, setting: Setting = setting) -> None:
                answers.setdefault(setting.name, {})[index] = answer
                row = {"setting": setting.name, "index": index, "answer": answer}
                out.write(json.dumps(row) + "\n")
                out.flush()
                bar.update()

            if not questions:
                continue
            if engine is not None:
                for start in range(0, len(questions), 128):
                    engine.ask(questions[start : start + 128], setting, done)
            else:
                asyncio.run(ask_server(url, args.model, questions, setting, args.concurrency, done))
    answers = whole(answers, asked)
    results = summarise(answers, asked, args.against)
    found = [Setting.of(name) for name in answers]
    order = ["none", *METHODS]
    held = {s.name: results[s.name]["visual_tokens_kept"] for s in found}
    found.sort(key=lambda s: (order.index(s.method), s.variant, -held[s.name][0]))
    inside = [s for s in found if s.method != "none" and METHODS[s.method].decoder]
    plain = [s for s in found if not s.options and s not in inside]
    parts = [s for s in found if s.method == "ficoco-v" and s.budget in thirds]
    before = [s for s in found if s not in inside]  # the others hold whole blocks
    wrong = [(s.name, held[s.name]) for s in before if held[s.name] != [s.budget]]
    (args.out / "results.json").write_text(json.dumps(results, indent=1))
    full = [s for s in plain if s.method == "none"]
    l_parts = [s for s in inside if s.method == "ficoco-l"]
    tables = {
        "table": plain,
        "ablations": parts,
        "decoder": full + [s for s in inside if not s.variant],
        "decoder-ablations": l_parts,
    }
    for name, rows in tables.items():
        if rows:
            (args.out / f"{name}.md").write_text(table(results, rows))
    plot(results, plain, 0, args.out / "accuracy-by-tokens.png")
    plot(results, plain, args.kv_bytes, args.out / "accuracy-by-kv.png")
    if inside:
        best = [s for s in plain if s.method in ("none", "score", "ficoco-k")]
        at_once = [s for s in inside if len({*s.options.get("tokens", ())}) < 2]
        rows = best + [s for s in at_once if not s.variant]
        plot(results, rows, args.kv_bytes, args.out / "decoder-by-kv.png")
    print(table(results, settings))
    if args.record is not None:
        averages = {s.name: results[s.name]["average"] for s in settings}
        recorded = {"questions": args.questions, "averages": averages}
        args.record.write_text(json.dumps(recorded, indent=1) + "\n")
    if wrong:
        raise SystemExit(f"other visual tokens were held than asked for: {wrong}")


if __name__ == "__main__":
    main()
