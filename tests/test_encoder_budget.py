# SPDX-License-Identifier: Apache-2.0
"""What an image costs a step, and which encoder cache manager vLLM is told to use.

That engines run by it is in tests/engine/test_many_images.py.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

from tests.checkpoints import SHIPPED
from vllm_ficoco.engine.encoder import TowerBudget
from vllm_ficoco.models import config
from vllm_ficoco.models.config import ENCODER_CACHE_MANAGER

STOCK = "vllm.v1.core.encoder_cache_manager.EncoderCacheManager"


def manager_of(**options: Any) -> str | None:
    made = EngineArgs(model=str(SHIPPED), max_model_len=512, **options).create_engine_config()
    return made.ec_manager_config.encoder_cache_manager_cls


def test_ours_is_chosen_where_nothing_was_said() -> None:
    assert manager_of() == ENCODER_CACHE_MANAGER


def test_one_that_was_asked_for_stays_and_what_is_lost_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(config.logger, "warning_once", lambda text, *args: said.append(text % args))
    assert manager_of(ec_manager_config={"encoder_cache_manager_cls": STOCK}) == STOCK
    assert len(said) == 1 and STOCK in said[0] and "vision tower" in said[0]


def test_models_that_cannot_be_reduced_keep_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    other = {"vision_feature_select_strategy": "full"}
    assert manager_of(hf_overrides=other) is None


def request(*kept: int, field: str = "pixel_values") -> Any:
    """A request of images that keep so many tokens, out of 144."""
    features = [
        MultiModalFeatureSpec(
            data={field: None},
            modality="image",
            identifier=f"{field}{number}",
            mm_position=PlaceholderRange(offset=0, length=length),
        )
        for number, length in enumerate(kept)
    ]
    return SimpleNamespace(
        request_id=field,
        mm_features=features,
        get_num_encoder_embeds=lambda i: features[i].mm_position.get_num_embeds(),
    )


def encoded_in_a_step(manager: TowerBudget, *requests: Any, budget: int) -> list[int]:
    """Images of each request that vLLM's scheduler would have encoded in one step."""
    counts = []
    for one in requests:
        held: list[int] = []
        for number, feature in enumerate(one.mm_features):
            if not manager.can_allocate(one, number, budget, sum(held)):
                break
            held.append(feature.mm_position.length)
            budget -= held[-1]
        for number in range(len(held)):
            manager.allocate(one, number)
        counts.append(len(held))
    manager.get_freed_mm_hashes()
    return counts


@pytest.mark.parametrize(
    ("requests", "fit"),
    [
        ([[1] * 20], [4]),
        ([[144] * 20], [4]),
        ([[1, 144, 5, 100, 1]], [4]),
        ([[1, 1, 1]] * 2, [3, 1]),
        ([[144, 1]] * 3, [2, 2, 0]),
    ],
)
def test_an_image_costs_what_the_tower_makes(requests: list[list[int]], fit: list[int]) -> None:
    """Steps of 640 tokens, four images, and the next step starts anew."""
    for _ in range(2):
        manager = TowerBudget(640, 144)
        assert encoded_in_a_step(manager, *(request(*r) for r in requests), budget=640) == fit
        assert encoded_in_a_step(manager, request(*[2] * 9, field="pixels"), budget=640) == [4]


def test_embeddings_cost_what_they_are() -> None:
    embeddings = request(*[32] * 30, field="image_embeds")
    assert encoded_in_a_step(TowerBudget(640, 144), embeddings, budget=640) == [20]
