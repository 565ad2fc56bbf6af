# SPDX-License-Identifier: Apache-2.0
"""The tower in vLLM's CUDA graphs of the encoder gives what it gives without them.

vLLM's own manager packs, captures and replays; the graphs are recordings.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.config import set_current_vllm_config

from tests.checkpoints import random_llava
from tests.engine.conftest import Ask, Engine, make_engine
from tests.engine.recorded_graphs import recorded_graphs
from vllm_ficoco.engine.checks import SCHEDULER
from vllm_ficoco.engine.visual import VisualTokens
from vllm_ficoco.methods import METHODS, topk
from vllm_ficoco.methods.paradigm import highest
from vllm_ficoco.packed import PACKED_FIELD, pack
from vllm_ficoco.settings import Reduction
from vllm_ficoco.vision.timing import REDUCTION_SECONDS

pytestmark = pytest.mark.engine

DECLARED = ["ficoco-v@48", "tome@16", "score@1/9"]
ABLE = [name for name, method in METHODS.items() if method.fits_a_graph and name != "none"]
SIDE = 168


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """With stages, as those want to know of images what a graph does not say."""
    checkpoint: Path = random_llava(tmp_path_factory.mktemp("graphs"), decoder_layers=4)
    overrides = {"reduction_stages": [1, 2], "reduction_graphs": DECLARED}
    yield from make_engine(
        checkpoint, hf_overrides=overrides, scheduler_cls=SCHEDULER, max_num_batched_tokens=2048
    )


@pytest.fixture(scope="module")
def manager(engine: Engine) -> Any:
    return captured(engine)


def captured(engine: Engine, **options: Any) -> Any:
    """vLLM's graphs of the encoder for the engine's model, by options of its compilation."""
    from vllm.v1.worker.encoder_cudagraph import EncoderCudaGraphManager

    config = engine.llm.llm_engine.vllm_config
    with pytest.MonkeyPatch.context() as patch, recorded_graphs(), torch.inference_mode():
        for name, value in options.items():
            patch.setattr(config.compilation_config, name, value)
        with set_current_vllm_config(config):
            manager = EncoderCudaGraphManager(
                config, torch.device("cpu"), torch.float32, engine.model
            )
            manager.capture(graph_pool=object())
    return manager


def batch(*said: tuple[str, int] | None) -> dict[str, Any]:
    """Images with these settings, as vLLM's runner hands them to the tower."""
    settings = [s and Reduction(method=s[0], budget=s[1]) for s in said]
    pixels = torch.randn(len(said), 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, PACKED_FIELD: [pack(s) for s in settings]}


@torch.inference_mode()
def executed(engine: Engine, manager: Any, images: dict[str, Any]) -> list[Tensor]:
    """Visual tokens of images as vLLM's runner gets them where there are graphs."""
    with set_current_vllm_config(engine.llm.llm_engine.vllm_config):
        return manager.execute(dict(images))


def difference(engine: Engine, manager: Any, images: dict[str, Any]) -> float:
    """Largest one between visual tokens with and without graphs."""
    got = executed(engine, manager, images)
    with set_current_vllm_config(engine.llm.llm_engine.vllm_config), torch.inference_mode():
        want = engine.model.embed_multimodal(**images)
    assert len(got) == len(want)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.shape == theirs.shape and type(ours) is type(theirs)
        if isinstance(ours, VisualTokens):
            assert ours.leaving.reduction == theirs.leaving.reduction
            assert torch.equal(ours.leaving.places, theirs.leaving.places)
            assert torch.equal(ours.leaving.lot, theirs.leaving.lot)
    return max((plain(a) - plain(b)).abs().max().item() for a, b in zip(got, want, strict=True))


def plain(x: Tensor) -> Tensor:
    return x.as_subclass(Tensor)


MIXED = (
    None,
    ("ficoco-v", 48),
    ("tome", 16),
    ("ficoco-v", 48),
    ("evit", 30),
    None,
    ("topk", 20),
    ("tome", 16),
    ("ficoco-v", 48),
    ("score", 16),
    None,
    ("fastv", 60),
    ("random-decoder", 60),
    ("ficoco-vl", 60),
    ("cdpruner", 16),
    ("score", 144),
)
"""Unreduced, declared, and others; in the decoder alone, in both, by the question."""


def test_images_of_a_step_may_have_any_settings(engine: Engine, manager: Any) -> None:
    assert list(manager.path_token_budgets) == ["whole", "ficoco-v@48", "tome@16", "score@16"]
    assert manager.max_batch_size == 8
    for budgets in manager.path_token_budgets.values():
        assert budgets == [0, 144, 288, 576, 1152]
    assert difference(engine, manager, batch(*MIXED)) == 0.0
    assert manager.graph_hits > 0
    assert difference(engine, manager, batch(*MIXED[::-1])) == 0.0  # over what was there


def test_the_check_sees_a_buffer_that_does_not_persist(engine: Engine) -> None:
    manager = captured(engine)
    for graphs in manager.budget_graphs.values():
        for graph in graphs.values():
            graph.input_buffers = {k: v.clone() for k, v in graph.input_buffers.items()}
    assert difference(engine, manager, batch(("tome", 16), None)) > 0.1
    assert difference(engine, manager, batch(("evit", 30))) == 0.0  # without a graph


@contextmanager
def captured_for(engine: Engine, declared: str) -> Iterator[Any]:
    """Graphs of one other setting, for two images."""

    def declare(*names: str) -> None:
        engine.model.config.reduction_graphs = list(names)
        for name in ("_declared", "_known"):
            engine.model.__dict__.pop(name, None)

    declare(declared)
    yield captured(engine, encoder_cudagraph_token_budgets=[288])
    declare(*DECLARED)


@pytest.mark.parametrize("method", ABLE)
def test_methods(engine: Engine, method: str) -> None:
    """Nothing of a method is frozen at the capture, and who shares a graph changes nothing."""
    with captured_for(engine, f"{method}@40") as manager:
        assert difference(engine, manager, batch((method, 40), (method, 40))) == 0.0
        (graph,) = manager.budget_graphs[f"{method}@40"].values()
        assert graph.graph.replays == 1
        before = graph.output_buffer[:40].clone()
        with torch.inference_mode():
            graph.input_buffers["pixel_values"][1] = torch.nan
            graph.graph.replay()
        assert torch.equal(graph.output_buffer[:40], before)


def test_the_check_sees_what_the_host_has_said(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def by_the_host(score: Tensor, count: int) -> Tensor:
        return highest(torch.tensor(score.tolist()), count)

    monkeypatch.setattr(topk, "highest", by_the_host)
    with captured_for(engine, "topk@40") as manager:
        assert difference(engine, manager, batch(("topk", 40))) > 0.1


def test_answers_are_the_same(engine: Engine, manager: Any) -> None:
    """Through the engine's own steps, where graphs stand in the place that vLLM has for them."""
    asks = [
        Ask([1], [None]),
        Ask([2, 3], [{"method": "score", "budget": 16}, {"method": "tome", "budget": 16}]),
        Ask([4], [{"method": "ficoco-v", "budget": 48}]),
        Ask([5], [{"method": "evit", "budget": 30}]),
        Ask([6], [{"method": "fastv", "budget": 60}]),
        Ask([7], [{"method": "ficoco-vl", "budget": 60}]),
        Ask([8], [{"method": "cdpruner", "budget": 16}]),
    ]

    def answers() -> list[list[int]]:
        engine.llm.llm_engine.reset_encoder_cache()
        engine.llm.reset_prefix_cache()
        return [list(output.outputs[0].token_ids) for output in engine.generate(asks)]

    want, hits = answers(), manager.graph_hits
    runner = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "encoder_cudagraph_manager", manager)
        assert answers() == want
    assert manager.graph_hits >= hits + 4


def timed(method: str) -> float:
    """Stages of the method that were observed so far."""
    samples = (s for metric in REDUCTION_SECONDS.collect() for s in metric.samples)
    return sum(
        s.value for s in samples if s.name.endswith("_count") and s.labels["method"] == method
    )


def test_what_a_graph_does_is_not_timed(engine: Engine) -> None:
    """At the capture there would be a time, but of images of nothing."""
    before = timed("tome"), timed("evit")
    manager = captured(engine)
    executed(engine, manager, batch(("tome", 16), ("evit", 30)))
    assert manager.graph_hits == 2  # vLLM counts all images of a batch that has a graph
    assert (timed("tome"), timed("evit") > before[1]) == (before[0], True)


def test_image_embeddings_and_other_sizes_are_left_to_vllm(engine: Engine, manager: Any) -> None:
    embeds = torch.ones(2, 144, 128)
    assert torch.equal(torch.stack(executed(engine, manager, {"image_embeds": embeds})), embeds)
    small = batch(None) | {"pixel_values": torch.zeros(1, 3, 1, 1)}
    with pytest.raises(ValueError, match="pixel_values"):
        executed(engine, manager, small)


def test_a_graph_without_room_for_an_image_is_refused(engine: Engine) -> None:
    with pytest.raises(ValueError, match=r"encoder_cudagraph_token_budgets has 100.*144 or more"):
        captured(engine, encoder_cudagraph_token_budgets=[100, 288])
