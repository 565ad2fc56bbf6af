# SPDX-License-Identifier: Apache-2.0
"""Lets vLLM's Model Runner V2 and asynchronous scheduling run without a GPU; a pytest plugin.

The runner's Triton kernels run in Triton's interpreter (``TRITON_INTERPRET=1``), once vLLM takes
Triton for one that has a CPU backend. Asynchronous scheduling vLLM switches off on CPUs, because
V1's runner cannot do it there.

Run as a program, vLLM's Triton attention runs there as well, as on a GPU with ``--attention-backend
TRITON_ATTN``: requests of several kinds to decoder stages must say what the reference does.
"""

import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton.backends

driver = SimpleNamespace(is_active=lambda: True)
triton.backends.backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)

from vllm.platforms.cpu import CpuPlatform  # noqa: E402 - looks for Triton's backends

original = CpuPlatform.check_and_update_config.__func__  # type: ignore[attr-defined]


def keep_async(cls: type[CpuPlatform], config: Any) -> None:
    """vLLM's, and asynchronous all the same."""
    original(cls, config)
    config.scheduler_config.async_scheduling = True


CpuPlatform.check_and_update_config = classmethod(keep_async)  # type: ignore[assignment,method-assign]


def attend_with_triton() -> None:
    """Makes vLLM's Triton attention the one of this platform."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    path = AttentionBackendEnum.TRITON_ATTN.get_path()
    CpuPlatform.get_attn_backend_cls = classmethod(lambda *_, **__: path)  # type: ignore[assignment,method-assign]
    torch.cuda.get_device_capability = lambda *_: (9, 0)  # type: ignore[assignment]  # of a tile's size


STARTS = [1, 5]
"""Of seven layers: stages of one, four and two."""


def main(folder: Path) -> None:
    """Prefill, decode and both in a step, unreduced, pruned and merged, with GPUs' small blocks.

    In few KV cache groups, as on GPUs: blocks of 32 tokens of the first layer, and of 16 tokens of
    two layers each of the others.
    """
    from tests.checkpoints import random_llava
    from tests.engine.conftest import Ask, make_engine
    from tests.engine.test_decoder_stages import (
        FIRST_LOGITS,
        LONG,
        STAGED,
        check_output,
        expected,
        held_by_stage,
        wish,
    )
    from tests.reference.llava import ReferenceLlava

    class NextTurn(Ask):
        """Goes on where an earlier request and its answer end."""

        @property
        def prompt(self) -> str:
            return f"{super().prompt} red USER: star ? ASSISTANT:"

    def ask(cls: type[Ask], tokens: int, *args: Any) -> Ask:
        return cls(*args, {**FIRST_LOGITS, "max_tokens": tokens})

    attend_with_triton()
    checkpoint = random_llava(folder, decoder_layers=7)
    reference = ReferenceLlava(str(checkpoint))
    pruned = ([3], [wish("k-norm", 50, 0)], LONG + 11 * " red")
    asks = {
        "text": ask(Ask, 2, [], [], "what color is the circle ?"),
        "merged": ask(Ask, 3, [2], [wish("ficoco-l", 80, 16)], "what color is the circle ?"),
        "pruned": ask(Ask, 5, *pruned),
    }
    options = {
        **STAGED,
        "hf_overrides": {"reduction_stages": STARTS},
        "block_size": 16,
        "max_num_seqs": 4,
        "max_model_len": 224,
        "num_gpu_blocks_override": 50,  # all prompts, but not all answers
    }
    with contextmanager(make_engine)(checkpoint, **options) as engine:
        layer = engine.model.language_model.model.layers[-1].self_attn.attn
        assert layer.impl.__class__.__name__ == "TritonAttentionImpl"
        parts = [(0, 1, 32), (1, 2, 16), (1, 2, 16), (2, 2, 16)]
        assert engine.scheduler.parts == parts
        check_report(engine)
        free, preempted = engine.free_blocks, engine.watch_preemptions()
        for name, request in asks.items():
            engine.add(request, name)
        engine.llm.llm_engine.step()
        # 8, 152 and 192 tokens, the image at 2 to 146: of 80, 16, 50 and 0 tokens of it, those in
        # blocks that text has a part in stay in any case.
        held = {
            "text": {0: {1}, 1: {1}, 2: {1}},
            "merged": {0: {5}, 1: {6}, 2: {2}},
            "pruned": {0: {6}, 1: {7}, 2: {4}},
        }
        for name, blocks in held.items():
            assert held_by_stage(engine, name) == blocks, name
        assert free - engine.free_blocks == 4 + 19 + 24
        outputs = engine.finished()
        for name, request in asks.items():
            truth = expected(reference, request, engine.block, STARTS)
            check_output(truth, request, outputs[name])
        assert any(preempted), "the first block behind the longest prompt did not fit"
        assert engine.free_blocks == free and not engine.scheduler.plans
        again = ask(NextTurn, 2, *pruned)
        (output,) = engine.generate([again])
        assert output.num_cached_tokens == 192, "whole blocks of 32, of a prompt of 197"
        check_output(expected(reference, again, engine.block, STARTS), again, output)


def check_report(engine: Any) -> None:
    """The front end reports the groups that the engine has."""
    from ficoco_server.policy import Policy
    from ficoco_server.reducer import Reducer

    llm = engine.llm.llm_engine
    reducer = Reducer(llm.vllm_config, Policy(), llm.renderer.mm_processor, 0)
    assert reducer.parts == engine.scheduler.parts
    about = reducer.describe()["model"]
    assert about["kv_block_sizes"] == [32, 16, 16] and about["kv_cache_groups"] == [1, 2, 1]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
