# SPDX-License-Identifier: Apache-2.0
"""Which settings an engine keeps CUDA graphs of the tower for, and where it has none.

That graphs give what the tower gives is in tests/engine/test_encoder_graphs.py.
"""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from tests.checkpoints import SHIPPED, random_llava_next
from tests.test_stage_checks import put
from vllm_ficoco.models import config as ours
from vllm_ficoco.models.config import settle_graphs
from vllm_ficoco.settings import Reduction
from vllm_ficoco.vision.geometry import Geometry, geometry_of, graphed

LLAVA = Geometry((24, 24), 23, True)


def of(*said: str, geometry: Geometry = LLAVA) -> dict[str, Reduction]:
    return graphed(SimpleNamespace(reduction_graphs=list(said)), geometry)


def test_settings_by_number_and_share() -> None:
    assert graphed(SimpleNamespace(), LLAVA) == {}
    assert of("score@192", "tome@1/9", "score@1/3") == {
        "score@192": Reduction(method="score", budget=192),
        "tome@64": Reduction(method="tome", budget=64),
    }


def test_what_reduces_nothing_and_what_cannot_be_is_left_out() -> None:
    assert of("score@576", "score@1000", "tome@1") == {"tome@1": Reduction(method="tome", budget=1)}
    assert of("tome@1", "tome@1/3", geometry=Geometry((24, 24), 2, True)) == {
        "tome@192": Reduction(method="tome", budget=192)
    }


@pytest.mark.parametrize(
    ("said", "fragments"),
    [
        ("score", ["'score'", "whole number from 1 to 1000000 or a share such as 1/9"]),
        ("score@0", ["'score@0'", "whole number from 1"]),
        ("score@many", ["a share such as 1/9"]),
        ("fastest@64", ["'fastest@64'", "METHOD@TOKENS, as in score@64", "tome", "random"]),
        ("cdpruner@64", ["read the question"]),
        ("fastv@64", ["a part in the decoder"]),
        ("none@64", ["METHOD@TOKENS"]),
    ],
)
def test_what_is_wrong_is_named_with_what_is_allowed(said: str, fragments: list[str]) -> None:
    with pytest.raises(ValueError, match="reduction_graphs is not valid") as caught:
        of("score@64", said)
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert "cdpruner," not in str(caught.value)


@pytest.fixture(scope="module")
def engine_config() -> Any:
    args = EngineArgs(model=str(SHIPPED), max_model_len=512)
    return args.create_engine_config()


def settled(config: Any, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Any:
    """What becomes of an engine's configuration on a GPU."""
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda _: True)
    changed = copy.deepcopy(config)
    for path, value in changes.items():
        put(path.replace("__", "."), value)(changed)
    settle_graphs(changed, geometry_of(changed.model_config.hf_config))
    return changed.compilation_config.cudagraph_mm_encoder


NAMED = {
    "model_config__hf_config__reduction_graphs": ["score@16"],
    "model_config__enforce_eager": 0,
}


def test_who_names_settings_has_graphs_and_is_told(
    engine_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(ours.logger, "info_once", lambda text, *args: said.append(text % args))
    eager = {"model_config__enforce_eager": False}
    assert not settled(engine_config, monkeypatch, **eager)
    assert not said
    assert settled(engine_config, monkeypatch, **NAMED)
    assert settled(
        engine_config, monkeypatch, compilation_config__cudagraph_mm_encoder=True, **eager
    )
    assert "not reduced, score@16;" in said[0] and "not reduced;" in said[1]


def test_where_there_are_none_it_is_said(
    engine_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(ours.logger, "warning_once", lambda text, *args: said.append(text % args))
    eager = {**NAMED, "model_config__enforce_eager": True}
    assert not settled(engine_config, monkeypatch, **eager)
    text_alone = {"model_config__multimodal_config__language_model_only": True}
    assert not settled(engine_config, monkeypatch, **NAMED, **text_alone)
    assert len(said) == 2 and all("--enforce-eager" in text for text in said)


def test_an_engine_reads_them_and_none_starts_with_wrong_ones() -> None:
    def start(said: list[str]) -> Any:
        overrides = {"reduction_graphs": said}
        args = EngineArgs(model=str(SHIPPED), max_model_len=512, hf_overrides=overrides)
        return args.create_engine_config()

    config = start(["score@1/9"]).model_config.hf_config
    assert [*graphed(config, geometry_of(config))] == ["score@16"]
    with pytest.raises(ValueError, match=r"'score@' in reduction_graphs is not valid.*1/9"):
        start(["score@"])


def test_other_models_refuse_them(tmp_path: Path) -> None:
    model = random_llava_next(tmp_path / "next")
    config = EngineArgs(model=str(model), max_model_len=512).create_engine_config()
    for geometry in (geometry_of(config.model_config.hf_config), None):
        settle_graphs(config, geometry)
        assert not config.compilation_config.cudagraph_mm_encoder
    config.model_config.hf_config.reduction_graphs = ["score@16"]
    for geometry in (geometry_of(config.model_config.hf_config), None):
        with pytest.raises(ValueError, match=r"--reduction-graphs.*LLaVA-1.5.*not for llava_next"):
            settle_graphs(config, geometry)


def test_vllms_flag_alone_is_for_nothing_where_nothing_can_be_reduced() -> None:
    """vLLM's own LLaVA has no such graphs."""
    args = EngineArgs(
        model=str(SHIPPED),
        max_model_len=512,
        hf_overrides={"vision_feature_select_strategy": "full"},
        compilation_config={"cudagraph_mm_encoder": True},
    )
    assert not args.create_engine_config().compilation_config.cudagraph_mm_encoder
