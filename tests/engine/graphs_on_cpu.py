# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of decode steps with decoder stages, without a GPU; run as a program.

A graph is simulated: what is captured is the forward pass with the tensors that it was given, its
attention metadata and slots among them, and a replay runs it again on whatever those tensors hold
by then. What does not lie where it lay at the capture is stale, as in a graph. What this does not
show is a kernel that is chosen by numbers of the host at capture.

Model Runner V2, Triton attention in the interpreter: prefill, decode and both in a step, unreduced,
pruned and merged, with GPUs' small blocks.
"""

import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.engine import triton_on_cpu  # isort: skip - before vLLM looks for Triton's backends

from vllm.config import CUDAGraphMode
from vllm.platforms.cpu import CpuPlatform

from vllm_ficoco.engine.attention import pattern_of

SIZES = [1, 4]
"""Rows of graphs: two requests run in one that is padded."""
REPLAYS: list[int] = []
"""Rows of every replay."""

as_on_a_cpu = CpuPlatform.check_and_update_config.__func__  # type: ignore[attr-defined]


def with_graphs(cls: type[CpuPlatform], config: Any) -> None:
    """vLLM's, which turns graphs off on CPUs, and they are on all the same."""
    as_on_a_cpu(cls, config)
    compilation = config.compilation_config
    compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
    compilation.cudagraph_capture_sizes = SIZES
    compilation.max_cudagraph_capture_size = SIZES[-1]


CpuPlatform.check_and_update_config = classmethod(with_graphs)  # type: ignore[assignment,method-assign]
CpuPlatform.get_global_graph_pool = lambda _: None  # type: ignore[method-assign,assignment]


def capture(self: Any, create_forward_fn: Any, progress_bar_desc: str = "") -> None:
    """In place of vLLM's: notes the forward pass of every size, having run it twice."""
    for size in self._capture_descs.get(CUDAGraphMode.FULL, []):
        create_forward_fn(size, warmup=True)(CUDAGraphMode.NONE)
        forward = create_forward_fn(size, warmup=False)
        forward(CUDAGraphMode.NONE)

        def replay(forward: Any = forward, rows: int = size.num_tokens) -> None:
            REPLAYS.append(rows)
            forward(CUDAGraphMode.NONE)

        self.graphs[size] = SimpleNamespace(replay=replay)
    self._graphs_captured = True


def pattern_elsewhere(*args: Any) -> Any:
    """The control: lengths are made anew in every step, and where a graph looks are a capture's."""
    lengths = args[3]
    pattern = pattern_of(*args[:3], lengths.clone(), *args[4:])
    lengths.fill_(1)
    return pattern


STARTS = [1, 5]
"""Of seven layers: stages of one, four and two."""


def main(folder: Path) -> None:
    """Prefill, decode and both in a step, unreduced, pruned and merged, with GPUs' small blocks.

    In few KV cache groups, as on GPUs: blocks of 32 tokens of the first layer, and of 16 tokens of
    two layers each of the others. Requests end one after another, so graphs of all sizes run.
    """
    from vllm.v1.worker.gpu import cudagraph_utils

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
    from vllm_ficoco.engine import attention

    class NextTurn(Ask):
        """Goes on where an earlier request and its answer end."""

        @property
        def prompt(self) -> str:
            return f"{super().prompt} red USER: star ? ASSISTANT:"

    def ask(cls: type[Ask], tokens: int, *args: Any) -> Ask:
        return cls(*args, {**FIRST_LOGITS, "max_tokens": tokens})

    cudagraph_utils.CudaGraphManager.capture = capture  # type: ignore[method-assign]
    triton_on_cpu.attend_with_triton()
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
        "enforce_eager": False,
        "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
    }
    with contextmanager(make_engine)(checkpoint, **options) as engine:
        layer = engine.model.language_model.model.layers[-1].self_attn.attn
        assert layer.impl.__class__.__name__ == "TritonAttentionImpl"
        parts = [(0, 1, 32), (1, 2, 16), (1, 2, 16), (2, 2, 16)]
        assert engine.scheduler.parts == parts
        check_report(engine)
        runner = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner
        graphs = runner.cudagraph_manager
        assert graphs.cudagraph_mode == CUDAGraphMode.FULL_DECODE_ONLY
        graphs.capture(  # a CPU's worker captures none
            runner.model,
            runner.model_state,
            runner.input_buffers,
            runner.intermediate_tensors,
            runner.block_tables,
            runner.attn_groups,
            runner.kv_cache_config,
        )
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
        assert set(REPLAYS) == set(SIZES), REPLAYS
        attention.pattern_of = pattern_elsewhere
        request = asks["merged"]
        (output,) = engine.generate([request])
        with suppress(AssertionError):
            truth = expected(reference, request, engine.block, STARTS)
            check_output(truth, request, output)
            sys.exit("a graph that reads what is stale says what the reference does")


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
