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


def main(folder: Path) -> None:
    """Prefill, decode and both in a step, unreduced, pruned and merged, with GPUs' small blocks."""
    from tests.checkpoints import random_llava
    from tests.engine.conftest import Ask, make_engine
    from tests.engine.test_decoder_stages import FIRST_LOGITS, STAGED, check, wish
    from tests.reference.llava import ReferenceLlava

    attend_with_triton()
    checkpoint = random_llava(folder, decoder_layers=6)
    asks = [
        Ask(),
        Ask([2], [wish("ficoco-l", 80, 48, 16)]),
        Ask([3], [wish("k-norm", 50, 20, 0)]),
    ]
    asks = [
        Ask(a.images, a.settings, a.question, {**FIRST_LOGITS, "max_tokens": 2 + number})
        for number, a in enumerate(asks)
    ]
    options = {**STAGED, "block_size": 16, "max_num_seqs": 2}
    options["num_gpu_blocks_override"] = 400  # the interpreter copies the cache at each launch
    with contextmanager(make_engine)(checkpoint, **options) as engine:
        layer = engine.model.language_model.model.layers[-1].self_attn.attn
        assert layer.impl.__class__.__name__ == "TritonAttentionImpl"
        check(engine, ReferenceLlava(str(checkpoint)), asks)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
