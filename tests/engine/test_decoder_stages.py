# SPDX-License-Identifier: Apache-2.0
"""Reduction inside the decoder: the tokens, logits and blocks are those of the reference.

One engine with three stages; requests of every method, several images and budgets, text and
unreduced images all in one continuous batch.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import random_llava
from tests.engine.conftest import (
    BLOCK,
    NEW_TOKENS,
    Ask,
    Engine,
    check_samples,
    make_engine,
)
from tests.engine.following import follow
from tests.reference.decoder import CHOOSE, Answer, Choose, answer
from tests.reference.llava import ReferenceLlava
from tests.waiting import NoWaiting
from vllm_ficoco.engine import attention, decoder
from vllm_ficoco.engine.checks import SCHEDULER
from vllm_ficoco.engine.decoder import StagedDecoder
from vllm_ficoco.engine.gaps import Run, held_of
from vllm_ficoco.methods import METHODS
from vllm_ficoco.methods.paradigm import Tokens, reduce

pytestmark = pytest.mark.engine

STAGES = [1, 3, 4]
VOCABULARY = 108
STAGED = {
    "hf_overrides": {"reduction_stages": STAGES},
    "scheduler_cls": SCHEDULER,
    "max_num_batched_tokens": 2048,
    "max_logprobs": VOCABULARY,
    "logprobs_mode": "raw_logits",
}
FIRST_LOGITS = {"logprobs": VOCABULARY}
PLACES = {"fastv": 1, "dart": 1}
"""How many stages a method uses where that is not all."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_llava(tmp_path_factory.mktemp("staged"), decoder_layers=6)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> ReferenceLlava:
    return ReferenceLlava(str(checkpoint))


@pytest.fixture(scope="module")
def staged(checkpoint: Path) -> Iterator[Engine]:
    yield from make_engine(checkpoint, **STAGED)


def wish(method: str, *tokens: int, **options: object) -> dict[str, object]:
    """Settings that say how many tokens each stage keeps."""
    kept = list(tokens[: PLACES.get(method)])
    return {"method": method, "options": {"tokens": kept, **options}}


def asks_of_every_kind() -> list[Ask]:
    sampling = FIRST_LOGITS
    asks = [Ask(question="how many are there ?"), Ask([1], [None])]
    for seed, method in enumerate(m for m in CHOOSE if m not in VISION):
        asks += [
            Ask([seed], [wish(method, 80, 48, 16)]),
            Ask([seed, 9], [wish(method, 100, 50, 0), wish(method, 40, 20, 10)]),
        ]
    asks += [
        Ask([2, 3], [wish("k-norm", 60, 60, 60), None]),
        Ask([4, 4], [wish("fastv", 30), wish("ficoco-l", 70, 30, 0)]),
        Ask([5, 6], [{"method": "ficoco-v", "budget": 20}, wish("dart", 50)]),
        Ask([5], [wish("random-decoder", 80, 40, 0, seed=7)]),
        Ask([3], [wish("ficoco-vl", 110, 80, 40, 20)]),
        Ask([3, 4], [wish("vitcop", 130, 60, 20), wish("vitcop", 100, 70, 0)]),
        Ask([4], [wish("tops", 130, 60, 20)]),
        Ask([5, 3], [wish("tops", 90, 50, 0), wish("mustdrop", 110, 80, 40, 20)]),
        Ask([6], [wish("mustdrop", 50, 40, 40, 0)]),
        Ask([7], [wish("ficoco-l", 80, 40, 20, text="is looked at")]),
        Ask([7], [wish("ficoco-l", 80, 40, 20, causal=True)]),
        Ask([7], [wish("ficoco-l", 80, 40, 20, penalty=2.0, beta=0.3, gamma=0.9)]),
        Ask([7], [wish("ficoco-l", 80, 40, 20, attention="probabilities", causal=True)]),
        Ask([8], [{"method": "fastv", "budget": 100}]),
        Ask([8], [{"method": "k-norm", "budget": 60}], question="what word is printed ?"),
    ]
    return [Ask(a.images, a.settings, a.question, sampling) for a in asks]


VISION = {"ficoco-vl": "ficoco-v", "vitcop": "topk", "tops": "tops", "mustdrop": "mustdrop"}
"""What methods in both places do in the tower."""


def expected(
    reference: ReferenceLlava, ask: Ask, block: int = BLOCK, stages: Sequence[int] = STAGES
) -> Answer:
    """What the reference says to a request, with so many tokens to a KV block."""
    visual, choose, kept, grid = [], [], [], []
    reference.ask(ask.behind)
    for image, settings in zip(ask.pictures, ask.settings, strict=True):
        settings = settings or {"method": "none"}
        method, options = settings["method"], dict(settings.get("options", {}))
        tokens = options.pop("tokens", None) or BUDGETS.get((method, settings.get("budget")), [])
        in_tower = VISION.get(method, "none") if method in CHOOSE else method
        budget = tokens[0] if method in VISION else settings.get("budget", 0)
        before = ("newlines", "frames")
        of_vision = {k: options.pop(k) for k in [*options] if k in before or not tokens}
        visual.append(reference.visual_tokens(image, in_tower, budget, of_vision))
        grid.append(reference.place)
        choose.append(None)
        kept.append([len(visual[-1])] * len(stages))
        if method in CHOOSE:
            if method == "random-decoder":
                options["pixels"] = reference.pixels
            if method == "ficoco-l" and "penalty" in options:
                options["side"] = getattr(reference, "columns", 12)
            if method == "vitcop":
                options["spots"] = dict(zip(reference.place, reference.spots, strict=True))
            in_decoder = tokens[1:] if method in VISION else tokens
            kept[-1] = in_decoder + in_decoder[-1:] * (len(stages) - len(in_decoder))
            choose[-1] = partial(chosen_at, method, options)
        if method == "vitcop":  # published at layers 2 and 22 of 32: stages 1 and 3 here
            kept[-1] = [tokens[1], tokens[1], tokens[2]]
        if method == "tops":  # at 12 and 24: of 6 layers, before layer 2 (or else 3), and layer 4
            kept[-1] = [tokens[int(2 in stages)], tokens[1], tokens[2]]
    embeds, places = reference.embed(ask.prompt, visual)
    keep = {
        layer: [
            held_of(Run(*place), tokens[stage], block, len(embeds)) if method else place[1]
            for place, tokens, method in zip(places, kept, choose, strict=True)
        ]
        for stage, layer in enumerate(stages)
    }
    length = ask.sampling.get("max_tokens", NEW_TOKENS)
    return answer(reference.model, embeds, places, keep, choose, grid, length, **reference.beside)


def chosen_at(method: str, options: dict[str, object], layer: int) -> Choose:
    """What a method does at a layer."""
    if method == "vitcop" and layer == STAGES[-1]:
        return CHOOSE["k-norm"]
    return partial(CHOOSE[method], **options)


BUDGETS = {
    # (144 + 5 * 91) / 6 is the most that is not above 100.
    ("fastv", 100): [91],
    # Halved at every stage: (144 + 2 * 72 + 36 + 2 * 18) / 6 = 60.
    ("k-norm", 60): [72, 36, 18],
}


Kept = list[tuple[int, list[int]]]
"""Each choice of a method: the layer, and the places of what it kept."""


def test_a_mixed_batch_says_what_the_reference_does(
    staged: Engine, reference: ReferenceLlava, monkeypatch: pytest.MonkeyPatch
) -> None:
    v2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"  # see test_stage_variants.py
    assert staged.asynchronous == v2
    kept: list[tuple[int, torch.Tensor]] = []  # read later: here the host must not wait
    original = StagedDecoder._reduce

    def watched(self: StagedDecoder, number: int, *args: Any) -> Any:
        images = args[-1]
        before = [image.places for image in images]
        result = original(self, number, *args)
        for image, had in zip(images, before, strict=True):
            if image.places is not had:
                kept.append((STAGES[number - 1], image.places))
        return result

    monkeypatch.setattr(StagedDecoder, "_reduce", watched)
    if v2:  # the worker knows the plans of its requests, and reads no block table
        monkeypatch.setattr(attention, "left_by_table", None)
    due = check(staged, reference, asks_of_every_kind())
    assert sorted((layer, places.tolist()) for layer, places in kept) == sorted(due)
    assert len(due) > 60


def test_who_follows_an_image_sees_what_the_reference_keeps(
    staged: Engine, reference: ReferenceLlava
) -> None:
    """Of every method, stage by stage, beside others that are alike and followed, too."""
    asks = [
        Ask([seed], [wish(method, 80, 48, 16)], sampling=FIRST_LOGITS)
        for seed, method in enumerate(m for m in CHOOSE if m not in VISION)
    ]
    asks += [
        Ask([3], [wish("ficoco-vl", 110, 80, 40, 20)], sampling=FIRST_LOGITS),
        Ask([4], [wish("vitcop", 130, 60, 20)], sampling=FIRST_LOGITS),
    ]
    for ask in asks:
        truth = expected(reference, ask, staged.block)
        for seen in follow(staged, [ask, ask]):
            check_output(truth, ask, seen.output)
            assert seen.at("decoder") == {layer: kept for (layer, _), kept in truth.kept.items()}
    (merged,) = follow(staged, [Ask([7], [wish("ficoco-l", 80, 40, 20)])])
    for step in merged.steps:
        for place, index in zip(step.before, step.into, strict=True):
            assert place not in step.after or step.after[index] == place
        assert sum(place not in step.after and index >= 0 for place, index in
                   zip(step.before, step.into, strict=True)) > 20  # fmt: skip


def test_the_host_never_waits_in_a_prefill(staged: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside the decoder; what finds the rows that are left is in tests/test_plans.py."""
    original, rows = StagedDecoder.__call__, []

    def watched(self: StagedDecoder, ids: Any, positions: Any, embeds: Any, *args: Any) -> Any:
        tensors = [x for x in (ids, positions, embeds) if x is not None]
        rows.append(len(tensors[-1]))
        with NoWaiting(tensors):
            return original(self, ids, positions, embeds, *args)

    monkeypatch.setattr(StagedDecoder, "__call__", watched)
    staged.generate(asks_of_every_kind())
    assert max(rows) > 1000


def test_alike_images_are_reduced_together_as_if_alone(
    staged: Engine, reference: ReferenceLlava, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three images alike of every method: two at once and the third, as memory allows.

    Questions of different lengths keep them apart only where the method looks at the question.
    """
    monkeypatch.setattr(decoder, "EVIDENCE_BYTES", 2 * 4 * 4 * 144**2)  # float32, four heads
    at_once: list[int] = []

    def watched(steps: Any, tokens: Tokens, *args: Any) -> Tokens:
        at_once.append(len(tokens.hidden))
        return reduce(steps, tokens, *args)

    monkeypatch.setattr(decoder, "reduce", watched)
    methods = [m for m in CHOOSE if m not in VISION]
    for method in methods:
        part = METHODS[method].decoder
        assert part is not None
        words = ["what shape is the red object ?"] * 3
        if not part.looks_at_question:
            words = [" ".join(words[:count]) for count in (1, 2, 3)]
        asks = [
            Ask([20 + i], [wish(method, 80, 48, 16)], question, FIRST_LOGITS)
            for i, question in enumerate(words)
        ]
        at_once.clear()
        check(staged, reference, asks)
        assert at_once[:2] == [2, 1], method
        assert {*at_once[2:]} <= {3}, f"{method}: fewer tokens, for which there is room"


def check(
    engine: Engine,
    reference: ReferenceLlava,
    asks: Sequence[Ask],
    stages: Sequence[int] = STAGES,
) -> Kept:
    """All in one batch: tokens, first logits, and every block back; what the reference kept."""
    free = engine.free_blocks
    kept: Kept = []
    for ask, output in zip(asks, engine.generate(asks), strict=True):
        truth = expected(reference, ask, engine.block, stages)
        kept += [(layer, places) for (layer, _), places in truth.kept.items()]
        check_output(truth, ask, output)
    assert engine.free_blocks == free
    return kept


def check_output(truth: Answer, ask: Ask, output: Any) -> None:
    """The tokens and first logits of the reference."""
    assert list(output.outputs[0].token_ids) == truth.tokens, ask
    given = output.outputs[0].logprobs[0]
    logits = torch.tensor([given[word].logprob for word in range(VOCABULARY)])
    torch.testing.assert_close(logits, truth.first_logits, atol=1e-3, rtol=1e-3)


# --- The KV cache -------------------------------------------------------------------------------


def held_by_stage(engine: Engine, name: str) -> dict[int, set[int]]:
    """Blocks that each group of a stage holds of a running request."""
    request = next(r for key, r in engine.scheduler.requests.items() if key.split("-")[0] == name)
    held: dict[int, set[int]] = {}
    for manager in engine.scheduler.managers:
        blocks = manager.req_to_blocks[request.request_id]
        held.setdefault(manager.stage, set()).add(sum(not block.is_null for block in blocks))
    return held


def run_to_the_end(engine: Engine) -> None:
    while engine.llm.llm_engine.has_unfinished_requests():
        engine.llm.llm_engine.step()


def test_blocks_held_are_those_of_the_arithmetic(staged: Engine) -> None:
    free = staged.free_blocks
    # 8 words and 144 visual tokens are 152, that is 5 blocks; the image is in blocks 0 to 4.
    asks = {
        "whole": (Ask([11], [None]), {0: {5}, 1: {5}, 2: {5}, 3: {5}}),
        "text": (Ask(question="how many are there ?"), {0: {1}, 1: {1}, 2: {1}, 3: {1}}),
        "knorm": (Ask([11], [wish("k-norm", 112, 60, 0)]), {0: {5}, 1: {4}, 2: {3}, 3: {2}}),
        "fastv": (Ask([11], [wish("fastv", 48)]), {0: {5}, 1: {2}, 2: {2}, 3: {2}}),
        # 144 and 144 tokens, 297 with 9 words: 10 blocks.
        "two": (
            Ask([12, 13], [wish("k-norm", 144, 80, 0), wish("k-norm", 80, 80, 0)]),
            {0: {10}, 1: {8}, 2: {6}, 3: {3}},
        ),
        "vl": (Ask([14], [wish("ficoco-vl", 100, 60, 30, 0)]), {0: {4}, 1: {3}, 2: {2}, 3: {2}}),
    }
    for name, (ask, _) in asks.items():
        staged.add(ask, name)
    staged.llm.llm_engine.step()
    for name, (_, blocks) in asks.items():
        assert held_by_stage(staged, name) == blocks, name
    groups = {stage: 0 for stage in range(4)}
    for manager in staged.scheduler.managers:
        groups[manager.stage] += 1
    total = sum(groups[stage] * count for _, by in asks.values() for stage, (count,) in by.items())
    assert free - staged.free_blocks == total
    run_to_the_end(staged)
    assert staged.free_blocks == free
    assert not staged.scheduler.plans and not any(m.plans for m in staged.scheduler.managers)


def test_blocks_come_back_after_an_abort(staged: Engine) -> None:
    free = staged.free_blocks
    for i in range(4):
        staged.add(Ask([20 + i], [wish("fastv", 48)]), f"abort{i}", max_tokens=200)
    for _ in range(3):
        staged.llm.llm_engine.step()
    assert staged.free_blocks < free
    staged.llm.llm_engine.abort_request([f"abort{i}" for i in range(4)])
    run_to_the_end(staged)
    assert staged.free_blocks == free and not staged.scheduler.plans


def cached(engine: Engine, ask: Ask) -> int:
    (output,) = engine.generate([ask])
    return output.num_cached_tokens


def test_reduced_prefixes_are_found_by_equal_requests_alone(staged: Engine) -> None:
    """152 tokens, of which 128 are whole blocks: inside the image, so nothing of it is reused
    unless the question is longer."""
    question = "what color is the circle ? " * 4 + "what digit is written ?"

    def ask(settings: dict | None, question: str = question) -> Ask:
        return Ask([30], [settings], question)

    reduced = wish("k-norm", 80, 48, 16)
    assert cached(staged, ask(reduced)) == 0
    again = cached(staged, ask(reduced))
    assert again == 160, "text and image, up to the last whole block"
    assert cached(staged, ask(reduced, question + " is there a star ?")) == again
    assert cached(staged, ask(wish("k-norm", 80, 48, 15))) == 0
    assert cached(staged, ask(wish("v-norm", 80, 48, 16))) == 0
    assert cached(staged, ask(None)) == 0
    # What a method reads, it must have read alike.
    looks = wish("fastv", 48)
    assert cached(staged, ask(looks)) == 0
    assert cached(staged, ask(looks)) == 160
    assert cached(staged, ask(looks, question + " is there a star ?")) == 0


LONG = "what color is the circle ? " * 5 + "what digit is written ?"


class TwoTurns(Ask):
    """A question to one image, then another to a second one."""

    @property
    def prompt(self) -> str:
        return f"USER: <image> {LONG} ASSISTANT: USER: <image> {self.question} ASSISTANT:"


def test_what_is_reused_says_the_same(staged: Engine, reference: ReferenceLlava) -> None:
    for method, looks in (("k-norm", False), ("ficoco-l", True)):
        settings = wish(method, 80, 48, 0)
        again = Ask([31], [settings], LONG)
        asks = [
            (again, False),
            (again, True),
            (Ask([31], [settings], f"{LONG} star ?"), not looks),
            (TwoTurns([31, 32], [settings, settings]), not looks),
        ]
        for ask, reused in asks:
            (output,) = staged.generate([ask])
            assert (output.num_cached_tokens > 0) == reused, ask
            assert list(output.outputs[0].token_ids) == expected(reference, ask).tokens


def test_a_later_image_is_part_of_what_an_earlier_one_keeps(
    staged: Engine, reference: ReferenceLlava
) -> None:
    """The question has seen both images, and chooses by it what stays of the first."""
    settings = [wish("ficoco-l", 80, 48, 16)] * 2
    first, second = (Ask([33, other], settings, LONG, FIRST_LOGITS) for other in (34, 35))
    for ask in (first, second, second):
        check(staged, reference, [ask])
    assert cached(staged, second) > 0, "the last check was of what is reused"


def test_samples_of_a_reduced_prompt_are_those_of_single_requests(staged: Engine) -> None:
    check_samples(staged, wish("ficoco-l", 70, 40, 20))


@pytest.mark.parametrize("tokens", [1, NEW_TOKENS])
def test_prompt_logprobs_end_in_an_error_not_in_nonsense(staged: Engine, tokens: int) -> None:
    """Also where the first step is the last one."""
    free = staged.free_blocks
    sampling = {"prompt_logprobs": 1, "max_tokens": tokens}
    ask = Ask([6], [wish("fastv", 48)], sampling=sampling)
    (output,) = staged.generate([ask])
    assert output.outputs[0].finish_reason == "error"
    assert not output.outputs[0].token_ids
    assert staged.free_blocks == free and not staged.scheduler.plans


# --- Under pressure -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tight(checkpoint: Path) -> Iterator[Engine]:
    """A pool for a few requests; steps for one prompt and a part of another."""
    yield from make_engine(
        checkpoint,
        **{
            **STAGED,
            "max_model_len": 480,
            "max_num_batched_tokens": 480,
            "num_gpu_blocks_override": 120,
        },
    )


def random_ask(lot: random.Random) -> Ask:
    """A request of any kind, from a few images and words."""
    looking = ["a-score", "fastv", "dart", "sparsevlm", "pyramiddrop", "ficoco-l"]
    methods = ["k-norm", "v-norm", *looking]
    settings: list[dict | None] = []
    for _ in range(lot.choice((0, 1, 1, 1, 2))):
        one = lot.choice((None, "before", "decoder", "decoder", "decoder"))
        if one == "before":
            settings.append(
                {"method": lot.choice(("topk", "tome")), "budget": lot.randint(20, 144)}
            )
        elif one == "decoder":
            tokens = sorted((lot.randrange(0, 145) for _ in range(3)), reverse=True)
            settings.append(wish(lot.choice(methods), *tokens))
        else:
            settings.append(None)
    words = " ".join(lot.choices(("red", "star", "is", "there", "what", "?"), k=lot.randint(1, 60)))
    length = lot.randint(1, 12)
    return Ask([lot.randrange(4) for _ in settings], settings, words, {"max_tokens": length})


def test_a_soak_of_mixed_requests_leaks_nothing_and_changes_nothing(
    tight: Engine, staged: Engine
) -> None:
    """Duplicates, aborts, refusals, preemption, chunks and reused prefixes: every output is the
    one that the request gets alone."""
    lot = random.Random(0)
    asks = [random_ask(lot) for _ in range(60)]
    alone = [list(staged.generate([ask])[0].outputs[0].token_ids) for ask in asks]
    free = tight.free_blocks
    engine = tight.llm.llm_engine
    waiting = {f"soak{i}": lot.randrange(len(asks)) for i in range(SOAK)}
    asked = dict(waiting)
    aborted: set[str] = set()
    refused: set[str] = set()
    preempted = ended = 0
    while waiting or engine.has_unfinished_requests():
        while waiting and len(tight.scheduler.requests) < 24:
            name = next(iter(waiting))
            ask = asks[waiting.pop(name)]
            if lot.random() < 0.1 and any(s and METHODS[s["method"]].decoder for s in ask.settings):
                refused.add(name)
                tight.add(ask, name, prompt_logprobs=1)
                continue
            tight.add(ask, name)
            if lot.random() < 0.1:
                aborted.add(name)
        for output in engine.step():
            if output.request_id in refused:
                assert output.finished and output.outputs[0].finish_reason == "error"
                asked.pop(output.request_id)
                ended += 1
            elif output.finished and output.request_id not in aborted:
                made = list(output.outputs[0].token_ids)
                assert made == alone[asked.pop(output.request_id)], output.request_id
        if aborted and lot.random() < 0.2:
            engine.abort_request([aborted_now := lot.choice(sorted(aborted))])
            asked.pop(aborted_now, None)
            aborted.discard(aborted_now)
        preempted += sum(r.num_preemptions for r in tight.scheduler.requests.values())
    assert set(asked) <= aborted, "a request was lost"
    assert preempted > 0, "the pool was not small enough to test anything"
    assert ended == len(refused) > 20
    assert tight.free_blocks == free and not tight.scheduler.plans


SOAK = 2000


def test_more_requests_fit_a_pool(tight: Engine) -> None:
    def at_once(settings: dict | None) -> int:
        for i in range(16):
            tight.add(Ask([i], [settings]), f"fit{settings and 1}x{i}", max_tokens=24)
        most = 0
        while tight.llm.llm_engine.has_unfinished_requests():
            tight.llm.llm_engine.step()
            running = tight.scheduler.running
            most = max(most, sum(r.num_output_tokens > 0 for r in running))
        return most

    assert at_once(wish("fastv", 48)) >= 1.5 * at_once(None)
