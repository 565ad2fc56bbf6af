# SPDX-License-Identifier: Apache-2.0
"""Greedy choices, each step against brute force over all tokens that are left."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from tests.waiting import NoWaiting
from vllm_ficoco.methods import apet, greedy, paradigm
from vllm_ficoco.methods.greedy import Likeness, coverage, k_centres, log_det
from vllm_ficoco.methods.score import weight

Worth = Callable[[Tensor, list[int], int], float]
"""(cosines (n, n) of an image in float64, who is chosen, a candidate) -> what it adds."""


def vectors(images: int, n: int, width: int, seed: int = 0) -> Tensor:
    """Neighbours alike, and all of them somewhat: as a tower's outputs are."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(images, n, width, generator=generator)
    return 0.5 * steps.cumsum(1) + 2 * torch.randn(1, 1, width, generator=generator)


def weights(images: int, n: int) -> Tensor:
    return torch.rand(images, n, generator=torch.Generator().manual_seed(7)) + 0.1


def cosines(x: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    return unit @ unit.T


def brute(alike: Tensor, factor: Sequence[float], count: int, worth: Worth) -> list[int]:
    """The best one after another, everything worked out anew for every candidate."""
    chosen: list[int] = []
    for _ in range(count):
        values = {
            i: worth(alike, chosen, i) * factor[i] for i in range(len(alike)) if i not in chosen
        }
        chosen.append(max(values, key=lambda i: (values[i], -i)))
    return chosen


def unlike(alike: Tensor, chosen: list[int], i: int) -> float:
    return 1 - float(alike[i, chosen].max()) if chosen else 1.0


def volume(alike: Tensor, chosen: list[int], i: int) -> float:
    both = [*chosen, i]
    before = alike[chosen][:, chosen].logdet() if chosen else torch.zeros(())
    return float((alike[both][:, both].logdet() - before).exp())


def gained(alike: Tensor, chosen: list[int], i: int, seen: Sequence[int] | None = None) -> float:
    total = 0.0
    for j in range(len(alike)) if seen is None else seen:
        before = max([0.0, *alike[chosen, j].tolist()])
        total += max(float(alike[i, j]) - before, 0.0)
    return total


@pytest.fixture(params=["the whole matrix", "rows", "blocks of channels"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """27 tokens of 64 channels: 2,916 bytes of cosines, 6,912 of a copy in float32."""
    sizes = {"the whole matrix": 2**28, "rows": 7000, "blocks of channels": 2000}
    monkeypatch.setattr(paradigm, "EVIDENCE_BYTES", sizes[request.param])
    if request.param == "rows":
        monkeypatch.setattr(Likeness, "_all", None)


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("count", [1, 26])
def test_every_choice_is_the_best(count: int, dtype: torch.dtype) -> None:
    """Of two images at once, one token, and all but one."""
    x, factor = vectors(2, 27, 64).to(dtype), weights(2, 27)
    likeness = Likeness(x)
    first = factor.argmax(1, keepdim=True)
    got = {
        "k_centres": k_centres(likeness, factor, first, count),
        "log_det": log_det(likeness, factor, count),
        "coverage": coverage(likeness, factor, None, count),
    }
    for image in range(2):
        alike, by = cosines(x[image]), factor[image].double().tolist()
        assert got["k_centres"][image].tolist() == brute(alike, by, count, unlike)
        assert got["coverage"][image].tolist() == brute(alike, by, count, gained)
        assert got["log_det"][image].tolist() == brute(alike, by, count, volume)


def test_the_volume_is_that_of_the_kernel() -> None:
    """The determinant of quality * cosine * quality, and not of something like it."""
    x, quality = vectors(1, 20, 32), weights(1, 20).sqrt()
    chosen = log_det(Likeness(x), quality.square(), 8)[0].tolist()
    kernel = quality[0, :, None].double() * cosines(x[0]) * quality[0]
    for step in range(8):
        before = chosen[:step]
        grown = {
            i: float(kernel[[*before, i]][:, [*before, i]].logdet())
            for i in range(20)
            if i not in before
        }
        assert chosen[step] == max(grown, key=lambda i: grown[i])


def test_a_second_round_starts_anew() -> None:
    """Of 10 channels, 5 a round: what the first has chosen does not count for the second."""
    x = torch.randn(2, 23, 10, generator=torch.Generator().manual_seed(3))
    chosen = log_det(Likeness(x), None, 12)
    for image, places in zip(x, chosen.tolist(), strict=True):
        alike, left = cosines(image), list(range(23))
        alike.fill_diagonal_(1.0)
        for start, size in ((0, 5), (5, 5), (10, 2)):
            here = brute(alike[left][:, left], [1.0] * len(left), size, volume)
            due = [left[i] for i in here]
            assert places[start : start + size] == due
            left = [i for i in left if i not in due]


@pytest.mark.parametrize("count", [1, 6, 15])
def test_nobody_is_chosen_twice(count: int) -> None:
    """Where all are alike, have no length, or weigh next to nothing: the lower index."""
    for x in (
        torch.full((2, 16, 8), 0.3),
        torch.zeros(2, 16, 8),
        vectors(1, 1, 8).expand(2, 16, 8),
    ):
        likeness, same = Likeness(x), torch.full((2, 16), 1e-30)
        first = torch.zeros(2, 1, dtype=torch.int64)
        for chosen in (
            k_centres(likeness, same, first, count),
            log_det(likeness, same, count),
            log_det(likeness, None, count),
            coverage(likeness, same, None, count),
        ):
            assert chosen.tolist() == [list(range(count))] * 2


def test_of_equal_tokens_the_lower_index_is_chosen() -> None:
    """Every token is there three times, at any place: the first of the three comes first."""
    order = torch.randperm(48, generator=torch.Generator().manual_seed(1)) % 16
    x = vectors(1, 16, 64)[:, order]
    same = torch.ones(1, 48)
    likeness = Likeness(x)
    first = torch.zeros(1, 1, dtype=torch.int64)
    earliest = [order.tolist().index(i) for i in range(16)]
    for chosen in (
        k_centres(likeness, same, first, 16),
        log_det(likeness, None, 16),
        coverage(likeness, same, None, 8),
    ):
        assert set(chosen[0].tolist()) <= set(earliest)
    left = set(range(48)) - set(earliest)
    beyond = log_det(likeness, None, 20)[0, 16:].tolist()
    assert beyond == sorted(left)[:4], "what adds nothing comes in its order"


def test_some_tokens_stand_for_all_that_are_covered() -> None:
    x, factor, seen = vectors(2, 30, 16), weights(2, 30), torch.tensor([2, 3, 11, 19, 20, 28])
    chosen = coverage(Likeness(x), factor, seen, 4)
    for image in range(2):
        due = brute(
            cosines(x[image]),
            factor[image].double().tolist(),
            4,
            lambda alike, chosen, i: gained(alike, chosen, i, seen.tolist()),
        )
        assert chosen[image].tolist() == due


def test_tokens_of_no_length_are_alike_with_nobody() -> None:
    """And finite; of a volume they add nothing, so they are the last."""
    x = vectors(1, 12, 16)
    x[:, [0, 5]] = 0.0
    likeness = Likeness(x)
    assert likeness.row(torch.tensor([[5]])).tolist() == [[0.0] * 12]
    assert likeness.columns(None).isfinite().all()
    assert log_det(likeness, None, 12)[0, 8:].tolist()[-2:] == [0, 5]
    assert apet.errors(x, 3)[0, [0, 5]].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("basis", [1, 4, 9, 40])
def test_errors_are_distances_from_the_span(basis: int) -> None:
    """Of the farthest points, in float64; a basis that spans everything leaves none."""
    x = vectors(2, 30, 24)
    got = apet.errors(x, basis)
    for image, mine in zip(x.double(), got, strict=True):
        chosen = [int((image - image.mean(0)).square().sum(1).argmax())]
        while len(chosen) < min(basis, 30):
            apart = torch.stack([(image - image[i]).square().sum(1) for i in chosen]).amin(0)
            chosen.append(int(apart.argmax()))
        directions, _ = torch.linalg.qr(image[chosen].T)
        left = (image - image @ directions @ directions.T).square().sum(1)
        torch.testing.assert_close(mine.double(), left, rtol=1e-3, atol=1e-4)
        assert mine[chosen].tolist() == [0.0] * len(chosen)
        if basis == 40:
            assert not mine.any()


def test_a_weight_is_never_nothing() -> None:
    """Where nobody is looked at, and where a power is smaller than float32 can say."""
    for saliency in (torch.zeros(1, 4), torch.tensor([[0.0, 1e-38, 1e-6, 1.0]])):
        for alpha in (0.0, 0.2, 1.0, 8.0):
            got = weight(saliency, alpha)
            assert got.isfinite().all()
            assert (got * greedy.SMALLEST > 0).all()
            assert float(got.max()) <= 1.0


def test_choices_wait_for_nobody() -> None:
    x, factor = vectors(2, 20, 8), weights(2, 20)
    with NoWaiting():
        likeness = Likeness(x)
        k_centres(likeness, factor, factor.argmax(1, keepdim=True), 10)
        log_det(likeness, factor, 10)
        coverage(likeness, factor, None, 10)
