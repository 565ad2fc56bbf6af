# SPDX-License-Identifier: Apache-2.0
"""Methods inside the decoder against their transcription, on random evidence and at any count."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference.decoder import CHOOSE, Look
from tests.waiting import NoWaiting
from vllm_ficoco.methods import METHODS, decoding, vitcop
from vllm_ficoco.methods.decoding import DecoderEvidence
from vllm_ficoco.methods.k_norm import K_NORM
from vllm_ficoco.methods.paradigm import AttentionKind, Tokens, reduce
from vllm_ficoco.methods.random import lot_of
from vllm_ficoco.methods.sparsevlm import raters

ELSEWHERE = ("before", "entered", "final_norm")
SIDE, HEADS, GROUPS, SIZE, WIDTH = 6, 4, 2, 8, 16
NOTHING, QUERIES, KEYS, VALUES = set[int](), {0}, {1}, {2}
DECODER = [name for name, method in METHODS.items() if method.decoder]
CASES = {
    **{name: (name, {}) for name in DECODER},
    "ficoco-l, as the decoder attends": ("ficoco-l", {"causal": True}),
    "ficoco-l, by the letter": ("ficoco-l", {"text": "is looked at"}),
    "ficoco-l, probabilities": ("ficoco-l", {"attention": "probabilities"}),
    "ficoco-l, penalty": ("ficoco-l", {"penalty": 2.0, "beta": 0.3, "gamma": 0.9}),
    "tops, other weights": ("tops", {"diversity": 3.0, "coverage": 0.1}),
    "random, another seed": ("random-decoder", {"seed": 3}),
}


class Seen:
    """What a method sees of ``images`` images: some of the grid's tokens, and text behind them."""

    def __init__(self, images: int, tokens: int, text: int, seed: int = 0) -> None:
        lot = torch.Generator().manual_seed(seed)
        rows = tokens + text

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=lot)

        self.hidden = draw(images, rows, WIDTH) * 4  # far apart enough for ViTCoP's clusters
        self.query, self.key, self.value = (
            draw(images, heads, rows, SIZE) for heads in (HEADS, GROUPS, GROUPS)
        )
        self.pixels = draw(images, 3, 4, 4)
        self.before = draw(images, GROUPS, rows, SIZE)
        self.entered = draw(images, SIDE**2 + text, WIDTH)
        self.final_norm = draw(WIDTH)
        self.place = torch.stack(
            [torch.randperm(SIDE**2, generator=lot)[:tokens].sort().values for _ in range(images)]
        )
        self.tokens, self.text = tokens, text

    def tokens_of(self, image: slice) -> Tokens:
        hidden = self.hidden[image, : self.tokens]
        return Tokens(hidden, self.place[image], hidden.new_ones(hidden.shape[:2]))

    def evidence(self, image: slice) -> DecoderEvidence:
        def look(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
            query, key, value = (
                x[image, :, rows] for x in (self.query, self.key, self.value)
            )  # fmt: skip
            return query, key, value

        lengths = self.before[image].abs().sum((1, 3), dtype=torch.float32)
        return DecoderEvidence(
            look_at_image=lambda: look(slice(0, self.tokens)),
            look_at_text=lambda: look(slice(self.tokens, None)),
            read_text=lambda: self.hidden[image, self.tokens :],
            final_norm=self.final_norm,
            lot=lot_of(self.pixels[image]),
            grid=(SIDE, SIDE),
            scale=SIZE**-0.5,
            heads=HEADS,
            noted=raters(self.entered[image, : SIDE**2], self.entered[image, SIDE**2 :]),
            before=(lengths[:, : self.tokens], lengths[:, self.tokens :]),
        )

    def look(self, image: int) -> Look:
        query, key, value, before = (
            x[image].transpose(0, 1) for x in (self.query, self.key, self.value, self.before)
        )
        entered = self.entered[image, : SIDE**2], self.entered[image, SIDE**2 :]
        rows = list(range(self.tokens + self.text))
        return Look(
            query, key, value, self.hidden[image],
            rows[: self.tokens], rows[self.tokens :], self.place[image].tolist(),
            before, entered, self.final_norm,
        )  # fmt: skip


@pytest.mark.parametrize("kind", ["probabilities", "logits"])
def test_heads_that_take_turns_have_the_same_mean(
    monkeypatch: pytest.MonkeyPatch, kind: AttentionKind
) -> None:
    """As they do where a prompt is so long that all at once would take too much memory."""

    def seen() -> list[Tensor]:
        evidence = Seen(2, 30, 5).evidence(slice(None))
        return [
            evidence.attention_from_text(kind),
            evidence.attention_from_last(),
            evidence.attention_to_text(kind),
            evidence.attention_among(kind, True),
            evidence.attention_among(kind, False),
        ]

    at_once = seen()
    monkeypatch.setattr(decoding, "EVIDENCE_BYTES", 1)
    for one, other in zip(at_once, seen(), strict=True):
        torch.testing.assert_close(one, other)


def reduced(seen: Seen, name: str, options: dict[str, Any], keep: int, image: slice) -> Tokens:
    method = METHODS[name]
    assert method.decoder is not None
    parsed = method.options.model_validate(options)
    steps = method.decoder.steps[0]
    return reduce(steps, seen.tokens_of(image), seen.evidence(image), keep, parsed)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("tokens", "text"), [(30, 5), (36, 1), (7, 3)])
def test_matches_the_transcription(case: str, tokens: int, text: int) -> None:
    """At every count, each image of a batch as if it were alone."""
    name, options = CASES[case]
    seen = Seen(3, tokens, text)
    for keep in range(1, tokens):
        got = reduced(seen, name, options, keep, slice(None))
        for image in range(3):
            more: dict[str, Any] = {}
            if name == "random-decoder":
                more = {"pixels": seen.pixels[image]}
            elif name in ("ficoco-l", "ficoco-vl", "vitcop"):
                more = {"side": SIDE}
            truth = CHOOSE[name](seen.look(image), keep, **options, **more)
            rows = sorted(truth)
            assert got.position[image].tolist() == seen.place[image][rows].tolist(), keep
            wanted = torch.stack([truth[row] for row in rows])
            torch.testing.assert_close(got.hidden[image], wanted, atol=1e-4, rtol=1e-4)


def test_vitcop_finds_clusters_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of its time; filter and correlate need the same."""
    found: list[int] = []
    original = vitcop.clusters

    def watched(tokens: Tokens, evidence: DecoderEvidence, count: int, options: Any) -> Tensor:
        found.append(count)
        return original(tokens, evidence, count, options)

    monkeypatch.setattr(vitcop, "clusters", watched)
    reduced(Seen(2, 30, 4), "vitcop", {}, 20, slice(None))
    assert found == [2]


READS: dict[str, tuple[set[int], set[int]]] = {
    "k-norm": (KEYS, NOTHING),
    "v-norm": (VALUES, NOTHING),
    "vitcop": (KEYS, NOTHING),
    "dart": (NOTHING, NOTHING),
    "random-decoder": (NOTHING, NOTHING),
    "fitprune": (QUERIES | KEYS, QUERIES),
    "ficoco-l": (QUERIES | KEYS, QUERIES),
    "ficoco-vl": (QUERIES | KEYS, QUERIES),
}
"""Of the image and of the text; of all others the image's keys and the text's queries."""


@pytest.mark.parametrize("name", DECODER)
def test_a_method_asks_for_no_more_than_it_reads(name: str) -> None:
    """A projection of all the image's tokens is most of what a stage costs."""

    class Asked(tuple[Tensor, ...]):
        def __iter__(self) -> Any:
            raise AssertionError("all three at once")

        def __getitem__(self, which: Any) -> Any:
            asked.add(which)
            return super().__getitem__(which)

    seen, method, read = Seen(2, 30, 4), METHODS[name], list[set[int]]()
    assert method.decoder is not None
    evidence = seen.evidence(slice(None))
    looks = evidence.look_at_image, evidence.look_at_text
    for place, field in enumerate(("look_at_image", "look_at_text")):
        asked = set[int]()
        spied = replace(evidence, **{field: lambda: Asked(looks[place]())})  # noqa: B023
        steps = method.decoder.steps[0]
        reduce(steps, seen.tokens_of(slice(None)), spied, 9, method.options())
        read.append(asked)
    assert tuple(read) == READS.get(name, (KEYS, QUERIES))


@pytest.mark.parametrize("name", DECODER)
def test_low_precision_stays_what_it_is(name: str) -> None:
    seen = Seen(2, 30, 4)
    for field in ("hidden", "query", "key", "value", *ELSEWHERE):
        setattr(seen, field, getattr(seen, field).bfloat16())
    tokens = reduced(seen, name, {}, 9, slice(None))
    assert tokens.hidden.dtype == torch.bfloat16 and tokens.hidden.isfinite().all()
    assert (tokens.position.diff() > 0).all()


@pytest.mark.parametrize("case", CASES)
def test_the_host_does_not_wait(case: str) -> None:
    name, options = CASES[case]
    seen = Seen(2, 30, 4)
    reduced(seen, name, options, 9, slice(None))  # windows of a grid are made once
    with NoWaiting():
        reduced(seen, name, options, 9, slice(None))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", DECODER)
def test_gpu_agrees_and_never_waits(name: str) -> None:
    seen, there = Seen(2, 30, 4), Seen(2, 30, 4)
    for field in ("hidden", "query", "key", "value", "place", "pixels", *ELSEWHERE):
        setattr(there, field, getattr(there, field).cuda())
    reduced(there, name, {}, 9, slice(None))  # CUDA's libraries start up with synchronisations
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = reduced(there, name, {}, 9, slice(None))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    truth = reduced(seen, name, {}, 9, slice(None))
    assert got.position.tolist() == truth.position.tolist()
    torch.testing.assert_close(got.hidden.cpu(), truth.hidden, atol=1e-3, rtol=1e-3)


def test_heads_of_several_ranks_count_as_one_models() -> None:
    """Each rank has one key-value head and its query heads; together they are the whole."""
    seen = Seen(1, 30, 4)
    whole = seen.evidence(slice(None))
    for read in (
        lambda e: e.attention_from_text(),
        lambda e: e.attention_among("logits"),
        lambda e: e.key_norms**2,
        lambda e: e.value_norms**2,
    ):
        parts = []
        for rank in range(GROUPS):
            part = Seen(1, 30, 4)
            share = HEADS // GROUPS
            part.query = part.query[:, rank * share : (rank + 1) * share]
            part.key, part.value = part.key[:, rank : rank + 1], part.value[:, rank : rank + 1]
            parts.append(read(part.evidence(slice(None))))
        torch.testing.assert_close(sum(parts), read(whole))


def test_a_method_sees_sums_over_ranks_alone() -> None:
    """Ranks whose heads differ keep the same, as what they compare is the sum of all."""
    seen = Seen(1, 30, 4)
    whole = seen.evidence(slice(None)).key_norms ** 2
    assert K_NORM.decoder is not None
    evidence = replace(seen.evidence(slice(None)), sum_over_ranks=lambda _: whole.flip(-1))
    tokens = seen.tokens_of(slice(None))
    kept = reduce(K_NORM.decoder.steps[0], tokens, evidence, 5, K_NORM.options())
    shortest = whole.flip(-1)[0].topk(5, largest=False).indices.sort().values
    assert kept.position[0].tolist() == seen.place[0][shortest].tolist()
