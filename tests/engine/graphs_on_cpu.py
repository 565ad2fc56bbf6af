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
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.engine import triton_on_cpu  # isort: skip - before vLLM looks for Triton's backends

from vllm.config import CUDAGraphMode
from vllm.platforms.cpu import CpuPlatform

from vllm_ficoco.engine.attention import pattern_of

SIZES = [1, 2, 4]
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


def main(folder: Path) -> None:
    """Requests that end one after another, so that graphs of all sizes run."""
    from vllm.v1.worker.gpu import cudagraph_utils

    from tests.checkpoints import random_llava
    from tests.engine.conftest import Ask, make_engine
    from tests.engine.test_decoder_stages import FIRST_LOGITS, STAGED, check, wish
    from tests.reference.llava import ReferenceLlava
    from vllm_ficoco.engine import attention

    cudagraph_utils.CudaGraphManager.capture = capture  # type: ignore[method-assign]
    triton_on_cpu.attend_with_triton()
    checkpoint = random_llava(folder, decoder_layers=6)
    asks = [
        Ask(),
        Ask([2], [wish("ficoco-l", 80, 48, 16)]),
        Ask([3], [wish("k-norm", 50, 20, 0)]),
    ]
    asks = [
        Ask(a.images, a.settings, a.question, {**FIRST_LOGITS, "max_tokens": 3 + 2 * number})
        for number, a in enumerate(asks)
    ]
    options = {**STAGED, "block_size": 16, "max_num_seqs": 4, "enforce_eager": False}
    options["num_gpu_blocks_override"] = 400  # the interpreter copies the cache at each launch
    options["compilation_config"] = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    with contextmanager(make_engine)(checkpoint, **options) as engine:
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
        layer = engine.model.language_model.model.layers[-1].self_attn.attn
        assert layer.impl.__class__.__name__ == "TritonAttentionImpl"
        reference = ReferenceLlava(str(checkpoint))
        check(engine, reference, asks)
        assert set(REPLAYS) == set(SIZES), REPLAYS
        attention.pattern_of = pattern_elsewhere
        try:
            check(engine, reference, asks[1:2])
        except AssertionError:
            return
    raise AssertionError("a graph that reads what is stale says what the reference does")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
