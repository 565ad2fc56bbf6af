# SPDX-License-Identifier: Apache-2.0
"""Decoder stages with other text models, compiled, over two ranks and on the other model runner.

Each says what the reference says, as in test_decoder_stages.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context

from tests.checkpoints import random_llava
from tests.engine.conftest import Ask, make_engine
from tests.engine.test_decoder_stages import FIRST_LOGITS, STAGED, asks_of_every_kind, check, wish
from tests.reference.llava import ReferenceLlava

pytestmark = pytest.mark.engine

VARIANTS = {
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "compiled": ("llama", {"enforce_eager": False}),
    "two ranks": ("llama", {"tensor_parallel_size": 2}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_say_what_the_reference_does(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, options = VARIANTS[variant]
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # one NUMA node serves both ranks
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))  # compile, do not load
    checkpoint = random_llava(tmp_path / "model", decoder_layers=6, text=text)
    asks = asks_of_every_kind() if variant == "two ranks" else some_asks()
    with contextmanager(make_engine)(checkpoint, **{**STAGED, **options}) as engine:
        check(engine, ReferenceLlava(str(checkpoint)), asks)
        if variant == "compiled":  # vLLM would run what it cannot compile, too
            for stage in engine.model.staged_decoder.stages:
                assert stage.compiled or getattr(stage, "aot_compiled_fn", None) is not None


SIZES = [1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 256]
"""Rows of piecewise graphs."""


class PiecewiseGraph:
    """In place of vLLM's wrapper of piecewise CUDA graphs, without a GPU.

    A replay runs what was captured on the tensors that it was captured with, whatever they hold by
    then. When a stage begins, the memory of what the stage before it has put out is gone, as its
    last graph has given it back.
    """

    replays = 0
    gone: tuple[torch.Tensor, ...] = ()

    def __init__(self, runnable: Any, cudagraph_options: Any, **_: Any) -> None:
        self.runnable, self.options = runnable, cudagraph_options
        self.captured: dict[Any, tuple[Any, Any]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runnable, name)

    def __call__(self, *args: Any) -> Any:
        context = get_forward_context()
        if context.cudagraph_runtime_mode != CUDAGraphMode.PIECEWISE:
            return self.runnable(*args)
        if not self.options.gc_disable:  # the first graph of a stage
            for output in PiecewiseGraph.gone:
                output.fill_(torch.nan)
            PiecewiseGraph.gone = ()
        rows = context.batch_descriptor
        if rows in self.captured:
            PiecewiseGraph.replays += 1
            seen, made = self.captured[rows]
            for old, new in zip(tree_leaves(made), tree_leaves(self.runnable(*seen)), strict=True):
                old.copy_(new)
        else:
            made = self.runnable(*args)
            self.captured[rows] = args, made
        if self.options.weak_ref_output:
            PiecewiseGraph.gone = tuple(tree_leaves(made))
        return made


def test_compiled_with_piecewise_graphs_as_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own compile mode keeps what it compiled: the next engine loads it, each stage its own.

    On CPUs vLLM takes another mode, and one pass of this mode names operators of GPUs. Graphs are
    simulated: see above.
    """
    from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    as_on_a_cpu = CpuPlatform.check_and_update_config

    def compiled(config: Any) -> None:
        as_on_a_cpu(config)
        compilation = config.compilation_config
        compilation.mode = CompilationMode.VLLM_COMPILE
        compilation.compile_sizes = []
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE
        compilation.cudagraph_capture_sizes = SIZES
        compilation.max_cudagraph_capture_size = SIZES[-1]

    wrapper = f"{__name__}.{PiecewiseGraph.__name__}"
    monkeypatch.setattr(CpuPlatform, "check_and_update_config", staticmethod(compiled))
    monkeypatch.setattr(CpuPlatform, "get_static_graph_wrapper_cls", lambda *_: wrapper)
    monkeypatch.setattr(FixFunctionalizationPass, "__call__", lambda *_: None)
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    checkpoint = random_llava(tmp_path / "model", decoder_layers=6)
    reference = ReferenceLlava(str(checkpoint))

    def run(warm: bool) -> None:
        options = {**STAGED, "enforce_eager": False}
        with contextmanager(make_engine)(checkpoint, **options) as engine:
            runner = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner
            runner.cudagraph_dispatcher.initialize_cudagraph_keys(CUDAGraphMode.PIECEWISE, 1)
            PiecewiseGraph.replays = 0
            check(engine, reference, some_asks())
            # Prefills of few rows: a text, an image, and one of which most leaves.
            for ask in (some_asks()[0], some_asks()[1], some_asks()[3]):
                check(engine, reference, [ask])
            assert PiecewiseGraph.replays > 300
            decoder = engine.model.staged_decoder
            for stage in decoder.stages:
                assert stage.aot_compiled_fn is not None
                assert stage.was_aot_compile_fn_loaded_from_disk == warm
            if warm:  # the control: a stage reads what the one before it put out
                decoder._where_graphs_look = lambda *both: both
                with pytest.raises(AssertionError):
                    check(engine, reference, some_asks()[:1])

    run(warm=False)
    run(warm=True)


def some_asks() -> list[Ask]:
    """Pruning and merging, whole images and text."""
    asks = [
        Ask(),
        Ask([1], [None]),
        Ask([1, 2], [wish("ficoco-l", 80, 48, 16), wish("fastv", 20)]),
        Ask([3], [wish("k-norm", 80, 40, 0)]),
        Ask([4], [wish("ficoco-vl", 110, 80, 40, 20)]),
        Ask([4, 6], [wish("sparsevlm", 80, 48, 16), wish("dart", 50)]),
        Ask([5], [{"method": "ficoco-v", "budget": 30}]),
    ]
    return [Ask(a.images, a.settings, a.question, FIRST_LOGITS) for a in asks]


def test_blocks_of_16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As GPUs have them. vLLM's CPU kernels can do that, though vLLM does not say so."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    monkeypatch.setattr(CPUAttentionBackend, "get_supported_kernel_block_sizes", lambda *_: [16])
    checkpoint = random_llava(tmp_path / "model", decoder_layers=6)
    with contextmanager(make_engine)(checkpoint, **{**STAGED, "block_size": 16}) as engine:
        check(engine, ReferenceLlava(str(checkpoint)), asks_of_every_kind())


def interpreted(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a module on Model Runner V2, with Triton's kernels in its interpreter."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=os.environ | {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )


def test_decode_graphs_with_triton_attention(tmp_path: Path) -> None:
    """vLLM's attention kernels for GPUs, through Triton's interpreter, in simulated graphs."""
    run = interpreted("tests.engine.graphs_on_cpu", str(tmp_path / "model"))
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]


def test_the_other_model_runner_with_asynchronous_scheduling() -> None:
    """vLLM's Model Runner V2 runs Triton kernels, here through Triton's interpreter."""
    tests = "mixed_batch or blocks_held or equal_requests_alone"
    file = str(Path(__file__).parent / "test_decoder_stages.py")
    run = interpreted("pytest", "-p", "tests.engine.triton_on_cpu", "-k", tests, file)
    assert run.returncode == 0 and "3 passed" in run.stdout, run.stdout[-4000:]
