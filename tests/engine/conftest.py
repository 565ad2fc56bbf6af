# SPDX-License-Identifier: Apache-2.0
"""Engines in this process, one a configuration, and the requests to put to them."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.checkpoints import random_llava

BLOCK = 32
NEW_TOKENS = 16


def picture(seed: int, size: tuple[int, int] = (168, 168)) -> Image.Image:
    """Random colours in 12 x 12 squares, one a patch of LLaVA-1.5's; size is width and height."""
    squares = np.random.default_rng(seed).integers(0, 255, (12, 12, 3), dtype=np.uint8)
    return Image.fromarray(squares).resize(size, Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class Ask:
    """A request: images by seed, a question, and the settings of every image."""

    images: Sequence[int] = ()
    settings: Sequence[dict[str, Any] | None] = ()
    question: str = "what color is the circle ?"
    sampling: dict[str, Any] = field(default_factory=dict)
    sizes: Sequence[tuple[int, int]] = ()
    """Width and height of the images, where they are not LLaVA-1.5's."""

    @property
    def pictures(self) -> list[Image.Image]:
        if not self.sizes:
            return [picture(seed) for seed in self.images]
        return [picture(*image) for image in zip(self.images, self.sizes, strict=True)]

    @property
    def prompt(self) -> str:
        return f"USER: {'<image> ' * len(self.images)}{self.question} ASSISTANT:"

    @property
    def behind(self) -> str:
        """What the prompt says behind its images."""
        return f"{self.question} ASSISTANT:"

    @property
    def for_vllm(self) -> dict[str, Any]:
        request: dict[str, Any] = {"prompt": self.prompt}
        if self.images:
            request["multi_modal_data"] = {"image": self.pictures}
        if any(self.settings):
            request["mm_processor_kwargs"] = {"reduction": list(self.settings)}
        return request


class Engine:
    """A vLLM engine in this process, with its scheduler open to view."""

    def __init__(self, model: Path, **options: Any) -> None:
        from vllm import LLM

        self.llm = LLM(
            model=str(model),
            **{
                "dtype": "float32",
                "max_model_len": 1024,
                "max_num_seqs": 32,
                "block_size": BLOCK,
                "enforce_eager": True,
                "limit_mm_per_prompt": {"image": 3},
                "disable_log_stats": False,
                "seed": 0,
                **({"gpu_memory_utilization": 0.2} if torch.cuda.is_available() else {}),
                **options,
            },
        )

    @property
    def scheduler(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def free_blocks(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    @property
    def block(self) -> int:
        """Tokens of a KV block."""
        return self.llm.llm_engine.vllm_config.cache_config.block_size

    @property
    def asynchronous(self) -> bool:
        """Whether vLLM's scheduler is the asynchronous one, on Model Runner V2."""
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler

        runner = self.llm.llm_engine.model_executor.driver_worker.worker.model_runner
        v2 = type(runner).__module__.startswith(("vllm.v1.worker.cpu.", "vllm.v1.worker.gpu."))
        return v2 and isinstance(self.scheduler, AsyncScheduler)

    @property
    def interpreted(self) -> bool:
        """Whether Triton's kernels run in its interpreter, where all takes long."""
        return self.asynchronous and not torch.cuda.is_available()

    @property
    def model(self) -> Any:
        return self.llm.llm_engine.model_executor.driver_worker.worker.model_runner.model

    def params(self, **more: Any) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            **{"max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True, **more}
        )

    def generate(self, asks: Sequence[Ask]) -> list[Any]:
        """All requests in one continuous batch."""
        return self.llm.generate(
            [ask.for_vllm for ask in asks],
            [self.params(**ask.sampling) for ask in asks],
            use_tqdm=False,
        )

    def add(self, ask: Ask, name: str, rendered: Any = None, **sampling: Any) -> None:
        """Queue a request without running it."""
        params = self.params(**ask.sampling, **sampling)
        self.llm.llm_engine.add_request(name, rendered or ask.for_vllm, params)

    def rendered(self, ask: Ask) -> Any:
        """What the multimodal processor makes of a request for the engine."""
        return self.llm._preprocess_cmpl_one(ask.for_vllm)

    def finished(self) -> dict[str, Any]:
        """Runs all that was added to the end: the outputs by name."""
        outputs = {}
        while self.llm.llm_engine.has_unfinished_requests():
            outputs |= {o.request_id: o for o in self.llm.llm_engine.step() if o.finished}
        return outputs

    def watch_preemptions(self) -> list[int]:
        """A list to which every step from now on adds how often those that wait were preempted."""
        seen: list[int] = []
        record = self.scheduler.make_stats

        def watched(*args: object, **kwargs: object) -> object:
            seen.append(sum(request.num_preemptions for request in self.scheduler.waiting))
            return record(*args, **kwargs)

        self.scheduler.make_stats = watched
        return seen

    def held(self, name: str) -> tuple[int, int]:
        """(tokens, blocks) of KV cache that a running request holds now."""
        request = next(r for key, r in self.scheduler.requests.items() if key.split("-")[0] == name)
        blocks = self.scheduler.kv_cache_manager.get_block_ids(request.request_id)
        return request.num_computed_tokens, len(blocks[0])


def check_answers(
    engine: Engine,
    asks: Sequence[Any],
    truths: Sequence[Any],
    check_counts: Callable[[int, Any], None],
    times: int = 1,
) -> list[tuple[Any, Any]]:
    """All in one batch, perhaps again: logits and tokens are the reference's, and no block leaks.

    Args:
        engine: that is asked.
        asks: the requests.
        truths: what the reference says to each: ``first_logits`` and ``tokens``.
        check_counts: of a request's number and what the processor makes of it.
        times: how often.

    Returns:
        What the processor made of each the last time, and what came out.
    """
    for _ in range(times):
        free, everything = engine.free_blocks, []
        for number, ask in enumerate(asks):
            everything.append(engine.rendered(ask))
            check_counts(number, everything[number])
            engine.add(ask, str(number), everything[number])
        outputs = engine.finished()
        assert engine.free_blocks == free
        for number, (ask, truth) in enumerate(zip(asks, truths, strict=True)):
            made, words = outputs[str(number)].outputs[0], len(truth.first_logits)
            logits = torch.tensor([made.logprobs[0][word].logprob for word in range(words)])
            far = float((logits - truth.first_logits).abs().max())
            assert far < 1e-3, f"{far} apart: {ask}"
            assert list(made.token_ids) == truth.tokens, ask
    return [(everything[number], outputs[str(number)]) for number in range(len(asks))]


def check_samples(engine: Engine, settings: dict[str, Any]) -> None:
    """Samples of a reduced prompt are those of single requests: vLLM counts the seed up."""

    def ask(**sampling: Any) -> Ask:
        return Ask([6], [settings], sampling={"temperature": 0.8, **sampling})

    (several,) = engine.generate([ask(n=3, seed=5)])
    alone = engine.generate([ask(seed=seed) for seed in (5, 6, 7)])
    made = [list(output.token_ids) for output in several.outputs]
    assert made == [list(output.outputs[0].token_ids) for output in alone]
    assert made[0] != made[1]


@pytest.fixture(scope="session")
def clip_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_llava(tmp_path_factory.mktemp("clip"), "clip")


@pytest.fixture(scope="session")
def siglip_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_llava(tmp_path_factory.mktemp("siglip"), "siglip")


FROM_OUTSIDE = "FICOCO_TEST_ENGINE"
"""A variable of the environment with options of ``vllm.LLM`` in JSON, which hold for every engine
of the tests, whatever they ask for: ``{"attention_config": {"backend": "TRITON_ATTN"}}``."""


def make_engine(model: Path, **options: Any) -> Iterator[Engine]:
    """An engine for the time of a fixture."""
    options |= json.loads(os.environ.get(FROM_OUTSIDE, "{}"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the scheduler must be in reach
        engine = Engine(model, **options)
        yield engine
    from vllm.distributed import cleanup_dist_env_and_memory

    del engine
    gc.collect()
    cleanup_dist_env_and_memory()


@pytest.fixture(scope="module")
def engine(clip_checkpoint: Path) -> Iterator[Engine]:
    """Room for everything; prefix caching on."""
    yield from make_engine(clip_checkpoint)


@pytest.fixture(scope="module")
def tight_engine(clip_checkpoint: Path) -> Iterator[Engine]:
    """A KV pool for a few requests and steps smaller than a prompt: preemption and chunks."""
    yield from make_engine(
        clip_checkpoint,
        max_model_len=640,
        num_gpu_blocks_override=24,
        max_num_batched_tokens=100,
        enable_prefix_caching=False,
    )


@pytest.fixture(scope="module")
def two_rank_engine(siglip_checkpoint: Path) -> Iterator[Engine]:
    """A SigLIP tower whose heads are split over two ranks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # one NUMA node serves both ranks
        yield from make_engine(siglip_checkpoint, tensor_parallel_size=2)
