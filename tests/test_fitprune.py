# SPDX-License-Identifier: Apache-2.0
"""The command that fits how many tokens each stage of a decoder can spare."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlavaConfig

from vllm_ficoco import fitprune
from vllm_ficoco.schedule import average_over_layers, spans
from vllm_ficoco.settings import Reduction
from vllm_ficoco.tiny_llava import CHECKPOINT
from vllm_ficoco.vision.geometry import geometry_of

STARTS, LAYERS = (1, 3, 4), 6


def drawn(images: int, tokens: int = 20) -> list[Tensor]:
    lot = torch.Generator().manual_seed(0)
    return [torch.rand(3, 2, tokens, generator=lot) ** 4 for _ in range(images)]


def literal(statistics: list[Tensor], alpha: Fraction) -> list[int]:
    """Of each image token by token, from the least looked at on."""
    totals = [0, 0, 0]
    for image in statistics:
        left = set(range(image.shape[-1]))
        for stage in range(3):
            spared = []
            for received in image[stage].tolist():
                whole = sum(map(Fraction, received))
                gone = whole - sum(Fraction(received[i]) for i in left)
                may_go = set()
                for i in sorted(left, key=lambda i: (received[i], i)):
                    gone += Fraction(received[i])
                    if gone > alpha * whole:
                        break
                    may_go.add(i)
                spared.append(may_go)
            left -= spared[0] & spared[1]
            totals[stage] += len(left)
    return [-(-total // len(statistics)) for total in totals]


def test_a_recipe_is_that_of_the_paper() -> None:
    statistics = drawn(3)
    found = [fitprune.recipe(statistics, share / 16) for share in range(17)]
    assert found[:-1] == [literal(statistics, Fraction(share, 16)) for share in range(16)]
    assert found[0] == [20, 20, 20]
    assert len({*map(tuple, found)}) > 8


@pytest.mark.parametrize("budget", [8, 15])
def test_no_recipe_within_the_budget_is_fuller_than_the_fitted_one(budget: int) -> None:
    statistics, by_stage = drawn(2), spans(STARTS, LAYERS)
    tokens = fitprune.fit(statistics, STARTS, LAYERS, budget)
    others = [fitprune.recipe(statistics, share / 128) for share in range(129)]
    held = [average_over_layers([20, *kept], by_stage) for kept in (tokens, *others)]
    assert budget - 1 < held[0] <= budget
    assert held[0] == max(average for average in held if average <= budget)
    assert tokens == sorted(tokens, reverse=True)


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 3"):
        fitprune.fit(drawn(2), STARTS, LAYERS, 3)  # the first layer alone holds 20 / 6 on average
    with pytest.raises(ValueError, match="equally many"):
        fitprune.fit([*drawn(1), *drawn(1, tokens=9)], STARTS, LAYERS, 10)


def test_the_command_prints_a_reduction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the shipped model; and its own scenes, given as files, fit the same."""
    fitted = []
    scenes = fitprune.examples("", 3)
    lines = []
    for number, (image, text) in enumerate(scenes):
        image.save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "text": text}))
    (tmp_path / "asked.jsonl").write_text("\n".join(lines))
    for more in (["--images", "3"], ["--questions", str(tmp_path / "asked.jsonl")]):
        fitprune.main(["tiny-llava", "--stages", "1,3,4", "--budget", "60", *more])
        fitted.append(json.loads(capsys.readouterr().out))
    assert fitted[0] == fitted[1]
    config = LlavaConfig.from_pretrained(CHECKPOINT)
    config.reduction_stages = list(STARTS)
    held = geometry_of(config).held(Reduction.parse(fitted[0]))
    assert 57 <= average_over_layers(held, spans(STARTS, LAYERS)) <= 60
    with pytest.raises(SystemExit):
        fitprune.main(["tiny-llava", "--stages", "3", "--budget", "60", "--images", "1"])
    assert "more than 60" in capsys.readouterr().err
