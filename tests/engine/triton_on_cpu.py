# SPDX-License-Identifier: Apache-2.0
"""Lets vLLM's Model Runner V2 and asynchronous scheduling run without a GPU; a pytest plugin.

The runner's Triton kernels run in Triton's interpreter (``TRITON_INTERPRET=1``), once vLLM takes
Triton for one that has a CPU backend. Asynchronous scheduling vLLM switches off on CPUs, because
V1's runner cannot do it there.
"""

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
