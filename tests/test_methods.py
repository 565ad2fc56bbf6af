# SPDX-License-Identifier: Apache-2.0
"""The methods that act before the decoder select and merge what their formulas say.

``MATRIX`` drives everything here: one row per method with its option variants. A new method is
one row (and its transcription in ``reference/methods.py``).
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.reference import methods as reference
from tests.waiting import NothingFromTheHost, NoWaiting
from vllm_ficoco.methods import METHODS, Evidence, Tokens, greedy, paradigm, random
from vllm_ficoco.methods.ficoco_v import local_penalty
from vllm_ficoco.methods.paradigm import quantile_of_blocks, quantile_per_row
from vllm_ficoco.vision.geometry import FAMILIES

HEADS, HEAD_SIZE, WIDTH, LAYERS = 2, 8, 12, 12
SPACE = 7
"""Channels of the language model."""
ONE_WORD = torch.eye(1, WIDTH)
SCALE = HEAD_SIZE**-0.5


@dataclass(frozen=True)
class Row:
    """What the tests need to know of a method."""

    method: str
    options: list[dict] = field(default_factory=lambda: [{}])
    """Variants of its options to test."""
    raster: bool = True
    """Tokens come out in raster order."""
    counts: bool = True
    """``size`` of a token is how many patches it stands for, or 1 as nothing is merged."""


MATRIX = [
    Row(
        "ficoco-v",
        [
            {},
            {"attention": "probabilities"},
            {"attention": "probabilities", "normalise": False, "epsilon": 0.6},
            {"normalise": False, "lambda": 0.9, "window": 3, "coefficient": 4.5},
            {"lambda": 1.0, "coefficient": 1.0, "epsilon": 1.0},
            {"lambda": 0.0, "window": 1, "epsilon": 0.0},
            {"receivers": 0},
            {"receivers": 1, "attention": "probabilities"},
            {"receivers": 2, "weighted": False},
            {"quantile": "matrix"},
            {"quantile": "matrix", "epsilon": 0.9, "attention": "probabilities"},
            {"quantile": "matrix", "epsilon": 0.0, "weighted": False},
        ],
        counts=False,
    ),
    Row("ficoco-k", [{}, {"protect": 0.0}, {"protect": 3.0}]),
    Row("tome"),
    Row("evit", raster=False),  # the extra token comes last
    Row("score", [{}, {"alpha": 0.0}, {"alpha": 0.2}, {"alpha": 0.8}]),
    Row("dpp", [{}, {"alpha": 0.5}]),
    Row("scope", [{}, {"alpha": 0.2}, {"alpha": 0.8}]),
    Row("apet", [{}, {"basis": 1}, {"basis": 200}], counts=False),
    Row("topk"),
    Row("visionzip", [{}, {"contextual": 0.0}, {"contextual": 0.5}], counts=False),
    Row("prumerge", [{}, {"neighbours": 1}, {"neighbours": 3}], counts=False),
    Row("globalcom2", [{}, {"attention": "probabilities"}]),
    Row("hired", [{}, {"alpha": 0.2}]),
    Row("pooling", counts=False),
    Row("uniform"),
    Row("random", [{}, {"seed": 7}]),
    Row("tops", [{}, {"diversity": 0.0, "coverage": 3.0}, {"diversity": 4.0, "coverage": 0.0}]),
    Row("mustdrop", counts=False),
    Row("cdpruner", [{}, {"alpha": 0.0}, {"alpha": 3.0}]),
    Row(
        "recoverable",
        [
            {},
            {"recovered": 0.4, "merged": 0.4, "neighbours": 2},
            {"recovered": 0.0, "merged": 0.3, "neighbours": 64},
            {"recovered": 0.49, "merged": 0.0},
        ],
        counts=False,
    ),
]
VARIANTS = [
    pytest.param(row, options, id=f"{row.method}-{i}" if len(row.options) > 1 else row.method)
    for row in MATRIX
    for i, options in enumerate(row.options)
]
ROWS = [pytest.param(row, id=row.method) for row in MATRIX]
AND_IN_THE_DECODER = {"tops", "mustdrop"}
"""Those of the methods in both places whose part before the decoder no other method has."""

BEFORE_THE_TOWER = {"resize"}
"""Methods that reduce no tokens, as there are only as many as wanted: not in the matrix."""

UNIT = 4
"""Patches of a token in a tower that merges them (Qwen-VL)."""
NATIVE = [row for row in MATRIX if METHODS[row.method].needs <= FAMILIES["qwen2_5_vl"]]
NATIVE_VARIANTS = [
    pytest.param(row, options, id=f"{row.method}-{i}")
    for row in NATIVE
    for i, options in enumerate(row.options)
]
TOWERS = [
    *(pytest.param(*p.values, True, 1, id=f"{p.id}-cls") for p in VARIANTS),
    *(pytest.param(*p.values, False, 1, id=f"{p.id}-nocls") for p in VARIANTS),
    *(pytest.param(*p.values, False, UNIT, id=f"{p.id}-units") for p in NATIVE_VARIANTS),
]
"""Every variant in every kind of tower: [CLS] or not, patches that are merged into tokens."""


class Setting(NamedTuple):
    """One way in which images come."""

    grid: tuple[int, int]
    budget: str
    dtype: torch.dtype
    has_cls: bool
    batch: int

    def __str__(self) -> str:
        rows, columns = self.grid
        cls = "cls" if self.has_cls else "nocls"
        return f"{rows}x{columns}-{self.budget}-{str(self.dtype)[6:]}-{cls}-{self.batch}"

    def count(self) -> int:
        n = self.grid[0] * self.grid[1]
        return {
            "1": 1,
            "2": 2,
            "n/9": n // 9,
            "n/3": n // 3,
            "n/2+1": n // 2 + 1,
            "n-1": n - 1,
        }[self.budget]


SETTINGS = [
    Setting((4, 4), "1", torch.float32, True, 3),
    Setting((4, 4), "n/3", torch.bfloat16, False, 3),
    Setting((4, 4), "n-1", torch.float32, False, 1),
    Setting((6, 6), "2", torch.bfloat16, True, 1),
    Setting((6, 6), "n/9", torch.float32, False, 3),
    Setting((6, 6), "n/2+1", torch.float32, True, 3),
    Setting((5, 7), "1", torch.float32, False, 1),
    Setting((5, 7), "2", torch.float32, False, 1),
    Setting((5, 7), "n/3", torch.float32, True, 3),
    Setting((5, 7), "n-1", torch.bfloat16, True, 3),
    Setting((5, 7), "n/2+1", torch.bfloat16, False, 1),
    Setting((12, 12), "n/9", torch.float32, True, 1),
]


def images(batch: int, n: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Hidden states of unrelated images, the same for a seed whatever the batch."""
    return random_rows(batch, (n, WIDTH), seed).to(dtype)


def random_rows(batch: int, shape: tuple[int, ...], seed: int) -> Tensor:
    """Normal numbers that depend on the place in the batch and not on the batch's size."""
    rows = []
    for i in range(batch):
        generator = torch.Generator().manual_seed(1000 * seed + i)
        rows.append(torch.randn(shape, generator=generator))
    return torch.stack(rows)


def evidence_at(
    layer: int,
    grid: tuple[int, int],
    n: int,
    batch: int = 1,
    has_cls: bool = True,
    dtype: torch.dtype = torch.float32,
    unit: int = 1,
) -> Evidence:
    """Random queries, keys and pixels of a layer that attends over the patches of n tokens."""
    shape = (HEADS, n * unit + has_cls, HEAD_SIZE)
    return Evidence(
        query=(1.5 * random_rows(batch, shape, 100 + layer)).to(dtype),
        key=(1.5 * random_rows(batch, shape, 200 + layer)).to(dtype),
        scale=SCALE,
        grid=grid,
        has_cls=has_cls,
        pixels=random_rows(batch, (3, 6, 5) if unit == 1 else (n * unit, 6), 300).to(dtype),
        unit=unit,
        question=unit_words(batch).mean(1),
        project=projected,
    )


def projected(hidden: Tensor) -> Tensor:
    """What stands in for a projector to a language model's space of fewer channels."""
    return hidden[..., :SPACE].tanh()


def unit_words(batch: int) -> Tensor:
    """(batch, 3, SPACE) the words of every image's question, each of length 1."""
    return torch.nn.functional.normalize(random_rows(batch, (3, SPACE), 500), dim=-1)


def relevance_of(hidden: Tensor, evidence: Evidence, image: int) -> list[float]:
    """Of an image's tokens (n, D), as the transcription wants it."""
    assert evidence.question is not None
    words = evidence.question[image].double()
    tokens = torch.nn.functional.normalize(evidence.project(hidden).double(), dim=-1)
    return [float(token @ words) for token in tokens]


def pick(evidence: Evidence, which: list[int]) -> Evidence:
    """The evidence of some images of a batch."""
    return replace(
        evidence,
        query=evidence.query[which],
        key=evidence.key[which],
        pixels=evidence.pixels[which],
        question=evidence.question[which],
    )


def reduce(row: Row, options: dict, tokens: Tokens, evidence: Evidence, keep: int) -> Tokens:
    """One stage of the package."""
    method = METHODS[row.method]
    return method.reduce(tokens, evidence, keep, method.options.model_validate(options))


def reduce_reference(
    row: Row, options: dict, tokens: Tokens, evidence: Evidence, keep: int, image: int
) -> tuple[Tensor, list[int], list[float]]:
    """The same stage by the transcription, from float64 copies of what the package gets."""
    return reference.reduce_one(
        row.method,
        options,
        tokens.hidden[image].double(),
        evidence.query[image],
        evidence.key[image],
        evidence.scale,
        evidence.has_cls,
        evidence.grid,
        tokens.position[image].tolist(),
        tokens.size[image].tolist(),
        keep,
        evidence.pixels[image],
        evidence.unit,
        relevance_of(tokens.hidden[image], evidence, image),
    )


def schedule(row: Row, tokens: int, budget: int, layers: int = LAYERS) -> list[tuple[int, int]]:
    """The stages of the package."""
    method = METHODS[row.method]
    return [tuple(s) for s in method.schedule(tokens, budget, layers, method.options())]


def test_every_method_is_in_the_matrix() -> None:
    """No method ships without these tests."""
    before_decoder = {m.name for m in METHODS.values() if m.name != "none" and not m.decoder}
    before_decoder -= {m.name for m in METHODS.values() if m.for_videos_alone}
    before_decoder |= AND_IN_THE_DECODER
    assert before_decoder == set(reference.PLACE)
    assert {row.method for row in MATRIX} == before_decoder - BEFORE_THE_TOWER
    for row in MATRIX:
        method = METHODS[row.method]
        assert method.name == row.method
        assert method.place == reference.PLACE[row.method]
        assert method.at_output == (row.method in reference.AT_OUTPUT)
        assert method.proportional_attention == (row.method in reference.PROPORTIONAL)
        assert method.asks_question == (row.method in reference.ASKING)
        defaults = method.options().model_dump()
        assert defaults == reference.DEFAULTS.get(row.method, {})


@pytest.mark.parametrize("name", sorted(BEFORE_THE_TOWER))
def test_what_is_scaled_down_before_the_tower_loses_no_token(name: str) -> None:
    """It has no stage, and all tokens of the smaller image stay as they are."""
    method, tokens = METHODS[name], Tokens.of(images(2, 12, 0))
    assert method.place == reference.PLACE[name] == "input"
    assert method.schedule(144, 9, LAYERS, method.options()) == []
    after = method.reduce(tokens, evidence_at(0, (3, 4), 12, 2), 12, method.options())
    for one, other in zip(after.tensors, tokens.tensors, strict=True):
        assert torch.equal(one, other)


# --- The formulas -------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize(("row", "options"), VARIANTS)
def test_matches_the_transcription(row: Row, options: dict, setting: Setting) -> None:
    """Through all stages of a tower: the same tokens stay, with the values of the formulas."""
    grid, _, dtype, has_cls, batch = setting
    n = grid[0] * grid[1]
    tokens = Tokens.of(images(batch, n, 0, dtype))
    literal = [
        (tokens.hidden[i].double(), tokens.position[i].tolist(), tokens.size[i].tolist())
        for i in range(batch)
    ]
    # A float32 and a float64 sum, or one rounding to bfloat16 per stage.
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    if dtype is torch.bfloat16:
        tolerance = {"rtol": 2e-2, "atol": 4e-2}
    for layer, keep in schedule(row, n, setting.count()):
        evidence = evidence_at(layer, grid, len(tokens), batch, has_cls, dtype)
        # What a layer does to its tokens, standing in for attention and MLP.
        update = images(batch, len(tokens), 400 + layer, dtype)
        before = replace(tokens, hidden=tokens.hidden * 0.5 + update)
        tokens = reduce(row, options, before, evidence, keep)
        assert tokens.hidden.dtype == dtype
        assert tokens.hidden.shape == (batch, keep, WIDTH)
        for i in range(batch):
            hidden, position, size = literal[i]
            hidden, position, size = reference.reduce_one(
                row.method,
                options,
                (hidden * 0.5 + update[i].double()).to(dtype).double(),
                evidence.query[i],
                evidence.key[i],
                SCALE,
                has_cls,
                grid,
                position,
                size,
                keep,
                evidence.pixels[i],
                1,
                relevance_of(before.hidden[i], evidence, i),
            )
            literal[i] = hidden, position, size
            assert tokens.position[i].tolist() == position
            torch.testing.assert_close(tokens.hidden[i].double(), hidden, **tolerance)
            if row.counts:
                assert tokens.size[i].tolist() == size
    assert len(tokens) == setting.count()


def test_the_default_epsilon_at_full_size() -> None:
    """0.998 means one receiver up to 500 targets and more beyond: 560 of 576 stay, then 48."""
    row, grid = MATRIX[0], (24, 24)
    tokens, evidence = Tokens.of(images(1, 576, 0)), evidence_at(0, grid, 576)
    for keep in (560, 48):
        mine = reduce(row, {}, tokens, evidence, keep)
        hidden, position, _ = reduce_reference(row, {}, tokens, evidence, keep, 0)
        assert mine.position[0].tolist() == position
        torch.testing.assert_close(mine.hidden[0].double(), hidden, rtol=1e-5, atol=1e-5)


def test_a_quantile_of_the_matrix_lets_the_number_of_receivers_differ() -> None:
    """Of 15 sources, as many as hold the 11 highest of 15 * 21 products are merged, and no more."""
    row, tokens, evidence = MATRIX[0], Tokens.of(images(1, 36, 0)), evidence_at(0, (6, 6), 36)
    kept = reduce(row, {"receivers": 0}, tokens, evidence, 21)
    options = {"quantile": "matrix", "epsilon": 1 - 10 / (15 * 21 - 1)}
    after = reduce(row, options, tokens, evidence, 21)
    assert torch.equal(after.position, kept.position)
    target = kept.position[0].tolist()
    source = [i for i in range(36) if i not in target]
    between = evidence.attention_between(
        torch.tensor([source]), kept.position, METHODS["ficoco-v"].options().attention
    )[0]
    highest = between.flatten().topk(11).indices.tolist()
    senders = {place // 21 for place in highest}
    receivers = {place % 21 for place in highest}
    changed = (after.hidden[0] != kept.hidden[0]).any(-1).nonzero()[:, 0].tolist()
    assert changed == sorted(receivers)
    assert len(senders) < 11, "one has several receivers"
    assert len(senders) < 15, "another has none"


@pytest.mark.parametrize(
    "row",
    [row for row in MATRIX if row.method in ("ficoco-v", "tome", "visionzip")],
    ids=lambda r: r.method,
)
def test_what_receives_nothing_keeps_its_bits(row: Row) -> None:
    """A token that nothing is merged into is passed on bit for bit, in bfloat16 as well."""
    tokens = Tokens.of(images(1, 36, 0, torch.bfloat16))
    evidence = evidence_at(0, (6, 6), 36, dtype=torch.bfloat16)
    after = reduce(row, {}, tokens, evidence, 33)
    before = tokens.hidden[0][after.position[0]]
    same = (after.hidden[0] == before).all(-1)
    literal = reduce_reference(row, {}, tokens, evidence, 33, 0)[0]
    assert torch.equal(same, (literal == before.double()).all(-1))
    assert 30 <= same.sum() < 33  # three leave, each to one that stays


@pytest.mark.parametrize("row", ROWS)
def test_tokens_stay_in_raster_order(row: Row) -> None:
    """Positions ascend, are places of the grid and none comes twice."""
    tokens, evidence = Tokens.of(images(2, 35, 0)), evidence_at(0, (5, 7), 35, 2)
    position = reduce(row, {}, tokens, evidence, 20).position
    kept = position if row.raster else position[:, :-1]
    assert (kept.diff(dim=1) > 0).all()
    assert position.min() >= 0
    assert position.max() < 35
    for places in position.tolist():
        assert len(set(places)) == 20


def test_local_penalty_by_hand() -> None:
    """The first highest score of every 2 x 2 window that is not empty, on a grid with gaps."""
    #  1  3 |  2        -1 -2 | -3
    #  3  . |  .        -1  . |  .       . has left before
    # ------+---
    #  .  . |  0         .  . |  0
    position = torch.tensor([[0, 1, 2, 3, 8]] * 2)
    score = torch.tensor([[1.0, 3.0, 2.0, 3.0, 0.0], [-1.0, -2.0, -3.0, -1.0, 0.0]])
    got = local_penalty(score, position, (3, 3), 2, 2.0)
    assert got.tolist() == [[1.0, 6.0, 4.0, 3.0, 0.0], [-0.5, -2.0, -1.5, -1.0, 0.0]]


# --- Evidence -----------------------------------------------------------------------------------


@pytest.mark.parametrize("has_cls", [True, False])
@pytest.mark.parametrize("kind", ["logits", "probabilities"])
def test_evidence_is_the_attention_of_the_formulas(kind: str, has_cls: bool) -> None:
    """a, mean_j A_ij, mean_i A_ij and A[S, T], entry by entry."""
    n, evidence = 12, evidence_at(0, (3, 4), 12, 2, has_cls)
    source = torch.tensor([[1, 5, 6], [0, 2, 11]])
    target = torch.tensor([[0, 2, 3, 4], [1, 5, 9, 10]])
    for i in range(2):
        attention = {}
        for head in range(HEADS):
            for a in range(n + has_cls):
                products = [
                    SCALE * float(evidence.query[i, head, a] @ evidence.key[i, head, b])
                    for b in range(n + has_cls)
                ]
                if kind == "probabilities":
                    whole = sum(math.exp(x) for x in products)
                    products = [math.exp(x) / whole for x in products]
                for b, value in enumerate(products):
                    attention[a, b] = attention.get((a, b), 0.0) + value / HEADS
        f = int(has_cls)
        patches = {(a, b): attention[a + f, b + f] for a in range(n) for b in range(n)}
        given = [sum(patches[a, b] for b in range(n)) / n for a in range(n)]
        received = [sum(patches[a, b] for a in range(n)) / n for b in range(n)]
        of_cls = [attention[0, b + 1] for b in range(n)] if has_cls else received
        between = [[patches[a, b] for b in target[i].tolist()] for a in source[i].tolist()]
        for got, want in (
            (evidence.attention_of_cls(kind), of_cls),
            (evidence.attention_given(kind), given),
            (evidence.attention_received(kind), received),
            (evidence.attention_between(source, target, kind), between),
        ):
            torch.testing.assert_close(got[i], torch.tensor(want), rtol=1e-5, atol=1e-6)


def test_relevance_is_the_mean_cosine_with_the_words() -> None:
    """Word by word, of every image by its own; of no words it is 0."""
    hidden, evidence = images(3, 12, 0), evidence_at(0, (3, 4), 12, 3)
    got = evidence.relevance(hidden)
    for i, words in enumerate(unit_words(3)):
        want = reference.relevances(projected(hidden[i]), words)
        torch.testing.assert_close(got[i].double(), torch.tensor(want).double())
    silent = replace(evidence, question=torch.zeros(3, SPACE))
    assert not silent.relevance(hidden).any()


@pytest.mark.parametrize("kind", ["logits", "probabilities"])
def test_without_cls_the_attention_received_takes_its_place(kind: str) -> None:
    """Of a tower without [CLS], Top-K keeps the patches that get most attention on average."""
    evidence = evidence_at(0, (4, 4), 16, has_cls=False)
    query, key = evidence.query[0], evidence.key[0]
    received = torch.zeros(16)
    for head in range(HEADS):
        scores = SCALE * query[head] @ key[head].T
        received += (scores.softmax(-1) if kind == "probabilities" else scores).sum(0)
    received /= 16 * HEADS
    got = evidence.attention_of_cls(kind)[0]
    torch.testing.assert_close(got, received, rtol=1e-5, atol=1e-6)
    if kind == "probabilities":
        assert float(got.sum()) == pytest.approx(1.0)
        after = reduce(Row("topk"), {}, Tokens.of(images(1, 16, 0)), evidence, 5)
        assert after.position[0].tolist() == sorted(received.topk(5).indices.tolist())


def test_heads_on_other_ranks_count() -> None:
    """Evidence of a rank that holds half of the heads, once summed, is that of all heads."""
    whole = evidence_at(0, (4, 4), 16, 2)
    source, target = torch.arange(5).expand(2, -1), torch.arange(5, 16).expand(2, -1)
    looks = {
        f"{name}-{kind}": partial(
            lambda e, name, kind: getattr(e, name)(kind), name=name, kind=kind
        )
        for name in ("attention_of_cls", "attention_given", "attention_received")
        for kind in ("logits", "probabilities")
    }
    for kind in ("logits", "probabilities"):
        looks[f"between-{kind}"] = partial(
            lambda e, kind: e.attention_between(source, target, kind), kind=kind
        )
    looks["keys"] = lambda e: e.mean_keys
    for name, look in looks.items():
        sent: list[Tensor] = []

        def send(x: Tensor, sent: list[Tensor] = sent) -> Tensor:
            sent.append(x)
            return x

        def receive(x: Tensor, sent: list[Tensor] = sent) -> Tensor:
            return x + sent.pop(0)

        halves = [
            replace(whole, query=q, key=k, heads=HEADS, sum_over_ranks=f)
            for q, k, f in zip(
                whole.query.split(1, 1), whole.key.split(1, 1), (send, receive), strict=True
            )
        ]
        look(halves[0])
        got = look(halves[1])
        torch.testing.assert_close(got, look(whole), rtol=1e-5, atol=1e-6, msg=name)


# --- Batches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [2**28, 2**15], ids=["at once", "in turns"])
@pytest.mark.parametrize(("row", "options", "has_cls", "unit"), TOWERS)
def test_an_image_does_not_depend_on_its_batch(
    row: Row,
    options: dict,
    has_cls: bool,
    unit: int,
    memory: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Alone, first or last of five, or in another order: the same tokens and the same values."""
    monkeypatch.setattr(paradigm, "EVIDENCE_BYTES", memory)
    tokens = Tokens.of(images(5, 35, 0))
    evidence = evidence_at(0, (5, 7), 35, 5, has_cls, unit=unit)
    together = reduce(row, options, tokens, evidence, 20)
    orders = [[i] for i in range(5)] + [[3, 0, 4, 2, 1]]
    for order in orders:
        part = Tokens(*(x[order] for x in tokens.tensors))
        got = reduce(row, options, part, pick(evidence, order), 20)
        assert torch.equal(got.position, together.position[order])
        assert torch.equal(got.hidden, together.hidden[order])
        assert torch.equal(got.size, together.size[order])


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("has_cls", [True, False], ids=["cls", "nocls"])
def test_repeats_itself(row: Row, has_cls: bool) -> None:
    """The same call gives the same bits."""
    tokens, evidence = Tokens.of(images(2, 36, 0)), evidence_at(0, (6, 6), 36, 2, has_cls)
    once, again = (reduce(row, {}, tokens, evidence, 20) for _ in range(2))
    assert torch.equal(once.position, again.position)
    assert torch.equal(once.hidden, again.hidden)


# --- Ties, extremes -----------------------------------------------------------------------------


def alike(grid: tuple[int, int], has_cls: bool) -> tuple[Tokens, Evidence]:
    """An image all of whose tokens, queries and keys are the same; products are exact."""
    n = grid[0] * grid[1]
    row = torch.zeros(HEADS, n + has_cls, HEAD_SIZE)
    row[:, :, 0] = 2.0
    hidden = torch.arange(WIDTH).float().expand(1, n, WIDTH)
    return Tokens.of(hidden), Evidence(
        row[None], row[None], 0.5, grid, has_cls, torch.ones(1, 3, 2, 2), question=ONE_WORD
    )


@pytest.mark.parametrize("keep", [1, 5, 9, 15])
@pytest.mark.parametrize("has_cls", [True, False], ids=["cls", "nocls"])
@pytest.mark.parametrize("row", [pytest.param(row, id=row.method) for row in MATRIX])
def test_in_a_tie_the_lower_index_wins(row: Row, has_cls: bool, keep: int) -> None:
    """Where all tokens are alike: the right count, finite, and the lower index leaves first."""
    if row.method in ("ficoco-k", "tome"):
        keep = max(keep, 8)
    tokens, evidence = alike((4, 4), has_cls)
    after = reduce(row, {}, tokens, evidence, keep)
    assert after.hidden.shape == (1, keep, WIDTH)
    torch.testing.assert_close(after.hidden, tokens.hidden[:, :keep])
    again = reduce(row, {}, tokens, evidence, keep)
    assert torch.equal(after.position, again.position)
    assert after.position[0].tolist() == reduce_reference(row, {}, tokens, evidence, keep, 0)[1]
    if row.method == "topk":
        assert after.position[0].tolist() == list(range(16 - keep, 16))


def sharp(grid: tuple[int, int], has_cls: bool) -> tuple[Tokens, Evidence]:
    """An image in which all look at the first token alone: other probabilities are exactly 0."""
    n = grid[0] * grid[1]
    query = torch.zeros(HEADS, n + has_cls, HEAD_SIZE)
    query[:, :, 0] = 100.0
    key = query.clone()
    key[:, 1:, 0] = -100.0
    return Tokens.of(images(1, n, 0)), Evidence(
        query[None], key[None], 1.0, grid, has_cls, torch.zeros(1, 3, 2, 2), question=ONE_WORD
    )


@pytest.mark.parametrize("keep", [1, 5, 15])
@pytest.mark.parametrize("has_cls", [True, False], ids=["cls", "nocls"])
@pytest.mark.parametrize(("row", "options"), VARIANTS)
def test_one_sided_attention_gives_finite_tokens(
    row: Row, options: dict, has_cls: bool, keep: int
) -> None:
    """Attention that is exactly 0 for most patches must not turn into NaN."""
    if row.method in ("ficoco-k", "tome"):
        keep = max(keep, 8)
    tokens, evidence = sharp((4, 4), has_cls)
    after = reduce(row, options, tokens, evidence, keep)
    assert after.hidden.shape == (1, keep, WIDTH)
    assert after.hidden.isfinite().all()
    assert len(set(after.position[0].tolist())) == keep


def test_a_token_that_attends_to_nobody_does_not_stop_the_others() -> None:
    """FiCoCo-V on probabilities: one leaving token gives nothing, the others still merge."""
    # With lambda = 0 only [CLS] decides who leaves, so the one below does so either way.
    row = Row("ficoco-v")
    options = {"attention": "probabilities", "lambda": 0.0, "coefficient": 1.0}
    tokens, evidence = Tokens.of(images(1, 16, 0)), evidence_at(0, (4, 4), 16)
    query, key = evidence.query.clone(), evidence.key.clone()
    query[..., -1], key[..., -1] = 0.0, 0.0
    usual = reduce(row, options, tokens, replace(evidence, query=query, key=key), 10)
    leaving = sorted(set(range(16)) - set(usual.position[0].tolist()))
    # One query meets one key in a direction of their own: [CLS] takes all of its attention.
    query[:, :, 1 + leaving[0], -1] = 1000.0
    key[:, :, 0, -1] = 1000.0
    evidence = replace(evidence, query=query, key=key)
    after = reduce(row, options, tokens, evidence, 10)
    hidden, position, _ = reduce_reference(row, options, tokens, evidence, 10, 0)
    assert leaving[0] not in position
    assert after.position[0].tolist() == position
    torch.testing.assert_close(after.hidden[0].double(), hidden, rtol=1e-5, atol=1e-5)


def test_zero_keys_are_finite() -> None:
    """A key of length 0 has cosine 0 with everything."""
    for row in MATRIX:
        tokens, evidence = Tokens.of(images(1, 16, 0)), evidence_at(0, (4, 4), 16)
        evidence = replace(evidence, key=torch.zeros_like(evidence.key))
        assert reduce(row, {}, tokens, evidence, 9).hidden.isfinite().all(), row.method


# --- Tokens of several patches ------------------------------------------------------------------


@pytest.fixture
def few_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of more than 6 tokens are large enough for samples."""
    monkeypatch.setattr(paradigm, "SAMPLED", 6)
    monkeypatch.setattr(reference, "SAMPLED", 6)
    monkeypatch.setattr(greedy, "COVERED", 20)
    monkeypatch.setattr(reference, "COVERED", 20)


def compare(
    row: Row, options: dict, tokens: Tokens, evidence: Evidence, keep: int, tolerance: float = 1e-5
) -> None:
    """Of every image the same tokens stay as by the transcription, with the same values."""
    mine = reduce(row, options, tokens, evidence, keep)
    for i in range(len(tokens.hidden)):
        hidden, position, _ = reduce_reference(row, options, tokens, evidence, keep, i)
        assert mine.position[i].tolist() == position
        got = mine.hidden[i].double()
        torch.testing.assert_close(got, hidden, rtol=tolerance, atol=2 * tolerance)


@pytest.mark.parametrize(("grid", "keep"), [((1, 7), 3), ((7, 1), 6), ((3, 5), 1), ((5, 6), 13)])
@pytest.mark.parametrize(("row", "options"), NATIVE_VARIANTS)
def test_tokens_of_several_patches_match_the_transcription(
    row: Row, options: dict, grid: tuple[int, int], keep: int
) -> None:
    """On odd grids, where every patch is asked."""
    n = grid[0] * grid[1]
    evidence = evidence_at(0, grid, n, 2, has_cls=False, unit=UNIT)
    compare(row, options, Tokens.of(images(2, n, 0)), evidence, keep)


@pytest.mark.usefixtures("few_sampled")
@pytest.mark.parametrize(("row", "options"), NATIVE_VARIANTS)
def test_a_sample_of_the_patches_is_asked(row: Row, options: dict) -> None:
    """Of an image of more tokens: in bfloat16, as the tower computes."""
    tokens = Tokens.of(images(2, 35, 0, torch.bfloat16))
    evidence = evidence_at(0, (5, 7), 35, 2, has_cls=False, dtype=torch.bfloat16, unit=UNIT)
    compare(row, options, tokens, evidence, 12, 2e-2)


def test_how_many_tokens_are_asked() -> None:
    """256 of 15 * 19; a tower that merges nothing asks all."""
    tokens = Tokens.of(images(1, 285, 0))
    for unit in (UNIT, 1):
        evidence = evidence_at(0, (15, 19), 285, has_cls=False, unit=unit)
        compare(Row("topk"), {}, tokens, evidence, 60)
        received = evidence.attention_received()
        assert float(received.sum()) == pytest.approx(1.0)
        query = evidence.query.clone()
        asked = reference.middles((15, 19), 256) if unit > 1 else range(285)
        query.unflatten(2, (285, unit))[:, :, sorted({*range(285)} - {*asked})] = 7.0
        assert torch.equal(replace(evidence, query=query).attention_received(), received)


@pytest.mark.parametrize("kind", ["logits", "probabilities"])
def test_what_tokens_of_several_patches_say(kind: str) -> None:
    """Given, received and A[S, T] of tokens, by the attention of their patches."""
    n, evidence = 12, evidence_at(0, (3, 4), 12, has_cls=False, unit=UNIT)
    products = SCALE * evidence.query[0].double() @ evidence.key[0].double().transpose(-1, -2)
    attention = (products.softmax(-1) if kind == "probabilities" else products).mean(0)
    received, given, between = torch.zeros(n), torch.zeros(n), torch.zeros(n, n)
    for i in range(n * UNIT):
        for j in range(n * UNIT):
            value, share = attention[i, j], UNIT if kind == "logits" else 1
            received[j // UNIT] += value / (n * UNIT) / share
            given[i // UNIT] += value / UNIT / (n * UNIT)
            between[i // UNIT, j // UNIT] += value / UNIT / share
    every = torch.arange(n)[None]
    for got, want in (
        (evidence.attention_of_cls(kind), received),
        (evidence.attention_given(kind), given),
        (evidence.attention_between(every, every, kind), between),
    ):
        torch.testing.assert_close(got[0], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("row", "options"), NATIVE_VARIANTS)
def test_every_count_of_an_odd_grid(row: Row, options: dict) -> None:
    """So many tokens stay, at places of the grid, ascending."""
    n, tokens = 35, Tokens.of(images(2, 35, 0))
    evidence = evidence_at(0, (5, 7), n, 2, has_cls=False, unit=UNIT)
    for keep in range(1, n):
        left = reduce(row, options, tokens, evidence, keep)
        assert left.hidden.shape == (2, keep, WIDTH)
        assert left.hidden.isfinite().all()
        assert left.position.shape == (2, keep)
        assert (left.position.diff(dim=1) > 0).all()
        assert left.position.min() >= 0
        assert left.position.max() < n


# --- Memory -------------------------------------------------------------------------------------


class Held(TorchDispatchMode):
    """Counts the bytes of all tensors that are made in it and are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.storages: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_leaves(args) if isinstance(x, Tensor)}
        made = func(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            storage = x.untyped_storage() if isinstance(x, Tensor) else None
            if storage is None or storage._cdata in given or storage._cdata in self.storages:
                continue
            self.storages[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._gone, storage._cdata)
        return made

    def _gone(self, storage: int) -> None:
        self.now -= self.storages.pop(storage)


def test_what_is_held_is_counted() -> None:
    """What the next test relies on."""
    x = torch.ones(1000)
    with Held() as held:
        y = x + 1
        del y
        y = x[:10] + x[None, 10:20]
    assert y.shape == (1, 10)
    assert held.most == 4000
    assert held.now == 40


@pytest.mark.parametrize(
    ("batch", "grid", "keep"), [(1, (13, 14), 91), (1, (13, 14), 1), (8, (9, 10), 40)], ids=str
)
@pytest.mark.parametrize(("row", "options"), NATIVE_VARIANTS)
def test_memory_does_not_grow_with_the_image(
    row: Row,
    options: dict,
    batch: int,
    grid: tuple[int, int],
    keep: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three times EVIDENCE_BYTES and what comes out, with the results of ample memory.

    All products of the 728 patches of the large image would be 16 times as much.
    """
    n = grid[0] * grid[1]
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator).bfloat16()

    evidence = Evidence(
        *(drawn(n * UNIT, HEADS, HEAD_SIZE).transpose(1, 2) for _ in range(2)),
        SCALE,
        grid,
        False,
        drawn(n * UNIT, 24),
        unit=UNIT,
        question=drawn(512).float(),
    )
    tokens = Tokens.of(drawn(n, 512))
    monkeypatch.setattr(greedy, "COVERED", 8)  # with memory to match
    ample = reduce(row, options, tokens, evidence, keep)
    memory = 2**17
    for module in (paradigm, random):
        monkeypatch.setattr(module, "EVIDENCE_BYTES", memory)
    with Held() as held:
        left = reduce(row, options, tokens, replace(evidence), keep)
    histograms = 2**21 if options.get("quantile") == "matrix" else 0  # however large the image is
    assert held.most < 3 * memory + histograms + sum(x.nbytes for x in left.tensors)
    assert torch.equal(left.position, ample.position)
    torch.testing.assert_close(left.hidden, ample.hidden, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", ["logits", "probabilities"])
@pytest.mark.parametrize(("has_cls", "unit"), [(True, 1), (False, 1), (False, UNIT)])
@pytest.mark.parametrize(("batch", "grid"), [(40, (5, 6)), (1, (14, 15))], ids=str)
def test_memory_of_evidence(
    batch: int,
    grid: tuple[int, int],
    has_cls: bool,
    unit: int,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every piece by itself, as methods ask for it that compare the tiles of an image."""
    n, memory = grid[0] * grid[1], 2**15
    evidence = evidence_at(0, grid, n, batch, has_cls, torch.bfloat16, unit)
    source, target = torch.arange(n).expand(batch, -1).split([n // 2, n - n // 2], 1)
    looks = {
        "of cls": lambda e: e.attention_of_cls(kind),
        "received": lambda e: e.attention_received(kind),
        "given": lambda e: e.attention_given(kind),
        "between": lambda e: e.attention_between(source, target, kind),
        "keys": lambda e: e.mean_keys,
    }
    ample = {name: look(replace(evidence)) for name, look in looks.items()}
    monkeypatch.setattr(paradigm, "EVIDENCE_BYTES", memory)
    for name, look in looks.items():
        with Held() as held:
            got = look(replace(evidence))
        # What comes out is put together of its blocks.
        assert held.most < 3 * memory + 3 * got.nbytes, name
        torch.testing.assert_close(got, ample[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("row", "options"), VARIANTS)
def test_what_takes_turns_matches_the_transcription(
    row: Row, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of a few entries: of queries, of C, of channels."""
    monkeypatch.setattr(paradigm, "EVIDENCE_BYTES", 2**11)
    tokens, evidence = Tokens.of(images(2, 35, 0)), evidence_at(0, (5, 7), 35, 2, has_cls=False)
    compare(row, options, tokens, evidence, 20)


@pytest.mark.parametrize("q", [0.0, 0.3, 0.5, 0.998, 1.0])
def test_a_quantile_in_blocks_is_the_quantile(q: float) -> None:
    """To the bit, with ties, zeros and numbers of all sizes."""
    x = torch.exp(20 * random_rows(3, (7, 41), 0))
    x[1] = 0.0
    x[2] = x[2].round()
    got = quantile_of_blocks(lambda: x.split(2, 1), 7 * 41, q)
    assert torch.equal(got[:, None], quantile_per_row(x.flatten(1), q))


# --- Random -------------------------------------------------------------------------------------


def test_random_depends_on_image_and_seed_alone() -> None:
    """Other hidden states, queries and keys change nothing; a pixel or the seed does."""
    row, tokens = Row("random"), Tokens.of(images(1, 144, 0))
    evidence = evidence_at(0, (12, 12), 144)
    first = reduce(row, {}, tokens, evidence, 30).position
    other = replace(evidence_at(5, (12, 12), 144), pixels=evidence.pixels)
    assert torch.equal(reduce(row, {}, Tokens.of(images(1, 144, 9)), other, 30).position, first)
    assert not torch.equal(reduce(row, {"seed": 1}, tokens, evidence, 30).position, first)
    pixels = evidence.pixels.clone()
    pixels[0, 2, 5, 4] += 1e-3
    changed = replace(evidence, pixels=pixels)
    assert not torch.equal(reduce(row, {}, tokens, changed, 30).position, first)


def test_random_sees_the_first_pixel() -> None:
    """The lot is a hash of all of the image's pixels."""
    tokens, evidence = Tokens.of(images(1, 144, 0)), evidence_at(0, (12, 12), 144)
    pixels = evidence.pixels.clone()
    pixels[0, 0, 0, 0] += 1.0
    one, other = (
        reduce(Row("random"), {}, tokens, e, 30).position
        for e in (evidence, replace(evidence, pixels=pixels))
    )
    assert not torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_random_hashes_large_images_in_blocks(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lot is that of the values, whatever their type and wherever blocks end."""
    pixels = (20 * random_rows(2, (5, 7), 0).abs()).to(dtype)
    want = reference.lots(pixels[1], range(9), 3)
    for memory in (2**28, 300):
        monkeypatch.setattr(random, "EVIDENCE_BYTES", memory)
        lots = random.draw(random.lot_of(pixels), torch.arange(9).expand(2, -1), 3)
        assert lots[1].tolist() == want


def test_random_is_even() -> None:
    """Over many images every place stays about as often: no place is preferred."""
    batch, n, keep = 2000, 16, 4
    evidence = replace(
        evidence_at(0, (4, 4), n), pixels=torch.arange(batch * 12.0).view(batch, 3, 2, 2)
    )
    tokens = Tokens.of(torch.zeros(batch, n, 1))
    often = (
        reduce(Row("random"), {}, tokens, evidence, keep).position.flatten().bincount(minlength=n)
    )
    # Mean 500, standard deviation 19: five of them.
    assert (often - batch * keep / n).abs().max() < 100


# --- Rows of a batch ----------------------------------------------------------------------------

WHOLE = torch.randn(3, 11, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "x",
    [
        WHOLE,
        WHOLE[:, 1:],
        WHOLE[:1, 1:],
        WHOLE[:, 4:5],
        WHOLE[..., :1],
        WHOLE[..., 2:6],
        WHOLE.chunk(2, -1)[1][:, 1:],
        WHOLE.unflatten(-1, (2, 4)).transpose(1, 2)[:, 1],
        WHOLE.transpose(0, 1),
        WHOLE.transpose(1, 2),
        WHOLE[:1].expand(3, -1, -1),
        WHOLE[:, :1].expand(-1, 11, -1),
        WHOLE[..., :1].expand(-1, -1, 5),
    ],
)
def test_rows_are_those_of_the_index_however_they_lie(x: Tensor) -> None:
    index = torch.randint(x.shape[1], (len(x), 7), generator=torch.Generator().manual_seed(1))
    want = torch.stack([of[rows] for of, rows in zip(x, index, strict=True)])
    for _ in range(2):
        assert torch.equal(paradigm.take(x, index), want)


def test_where_rows_lie_is_worked_out_once() -> None:
    index, seen = torch.tensor([[0, 2], [1, 2]]), []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name().removeprefix("aten::"))
            return func(*args, **(kwargs or {}))

    for part in WHOLE[:2, 1:], WHOLE[:2, :-1]:  # hidden states, queries and keys
        paradigm.take(part, index)
        with Seen():
            paradigm.take(part, index)
    assert {name.split(".")[0] for name in seen} == {"as_strided", "index_select", "view"}


# --- The host must not wait ---------------------------------------------------------------------


def test_the_guard_sees_waiting() -> None:
    """What the next tests rely on."""
    x = torch.arange(4.0)
    for wait in (
        lambda: x.sum().item(),
        lambda: bool(x[0] > 0),
        lambda: x.nonzero(),
        lambda: x[x > 1],
        lambda: x.masked_select(x > 1),
        lambda: x.unique(),
        lambda: torch.as_tensor(1.0, device=x.device),
        lambda: x.tolist(),
        lambda: x.cpu(),
        lambda: x.numpy(),
    ):
        with pytest.raises(AssertionError), NoWaiting():
            wait()


@pytest.mark.parametrize("memory", [2**28, 2**13], ids=["at once", "in turns"])
@pytest.mark.parametrize(("row", "options", "has_cls", "unit"), TOWERS)
def test_the_host_does_not_wait(
    row: Row,
    options: dict,
    has_cls: bool,
    unit: int,
    memory: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No result on the device decides what the host does next, and nothing is copied to it.

    A Python number that becomes a tensor is copied to the device, and the host waits for it.
    """
    monkeypatch.setattr(paradigm, "EVIDENCE_BYTES", memory)
    monkeypatch.setattr(paradigm, "SAMPLED", 10)
    tokens = Tokens.of(images(2, 36, 0))
    evidence = evidence_at(0, (6, 6), 36, 2, has_cls, unit=unit)
    with NoWaiting():
        reduce(row, options, tokens, evidence, 20)


def test_the_guard_sees_what_comes_from_the_host() -> None:
    there = torch.ones(3, device="meta")
    for bring in (
        lambda: there + torch.ones(()),
        lambda: there[torch.tensor([0, 1])],
        lambda: torch.ones(2).to("meta"),
        lambda: paradigm.on_device([1, 2], there.device),
    ):
        with pytest.raises((AssertionError, RuntimeError)), NothingFromTheHost():
            bring()


@pytest.mark.parametrize(
    ("row", "options"), [p for p in VARIANTS if METHODS[p.values[0].method].fits_a_graph]
)
def test_a_graph_holds_all_of_a_method(row: Row, options: dict) -> None:
    """Those of which the tower keeps CUDA graphs: from their input on, they stay on the device."""
    tokens, evidence = Tokens.of(images(2, 36, 0)), evidence_at(0, (6, 6), 36, 2)
    there = Tokens(*(x.to("meta") for x in tokens.tensors))
    proof = replace(
        evidence,
        query=evidence.query.to("meta"),
        key=evidence.key.to("meta"),
        pixels=evidence.pixels.to("meta"),
    )
    with NothingFromTheHost():
        reduce(row, options, there, proof, 20)


def test_which_methods_fit_a_graph() -> None:
    """What reads the question does not, and of what has a part in the decoder nothing does."""
    fit = {name for name, method in METHODS.items() if method.fits_a_graph}
    rows = {row.method for row in MATRIX}
    assert fit == rows - AND_IN_THE_DECODER - {"cdpruner", "recoverable"} | {"none"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("row", "options"), VARIANTS)
def test_a_gpu_agrees_and_is_not_waited_for(row: Row, options: dict) -> None:
    """On a GPU: no synchronisation, and the tokens that the CPU selects."""
    tokens, evidence = Tokens.of(images(3, 36, 0)), evidence_at(0, (6, 6), 36, 3)
    there = Tokens(tokens.hidden.cuda(), tokens.position.cuda(), tokens.size.cuda())
    proof = replace(
        evidence,
        query=evidence.query.cuda(),
        key=evidence.key.cuda(),
        pixels=evidence.pixels.cuda(),
        question=evidence.question.cuda(),
    )
    reduce(row, options, there, proof, 20)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = reduce(row, options, there, replace(proof), 20)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want = reduce(row, options, tokens, evidence, 20)
    assert torch.equal(got.position.cpu(), want.position)
    torch.testing.assert_close(got.hidden.cpu(), want.hidden, rtol=1e-4, atol=1e-4)
