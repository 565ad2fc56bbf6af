# SPDX-License-Identifier: Apache-2.0
"""A guard against code for which the host would wait for a GPU, that needs no GPU."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class NoWaiting(TorchDispatchMode):
    """Refuses the operators for which the host has to wait for the device."""

    WAITS = (
        "_local_scalar_dense",
        "item",
        "is_nonzero",
        "nonzero",
        "nonzero_numpy",
        "masked_select",
        "unique",
        "_unique",
        "_unique2",
        "unique_dim",
        "unique_consecutive",
        "equal",
        "bincount",
        "histc",
        "repeat_interleave",
        "lift_fresh",  # a tensor from Python numbers: a copy to the device, which waits
    )

    def __init__(self, but: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.refused = [name for name in self.WAITS if name not in but]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        if name in self.refused:
            raise AssertionError(f"the host waits for {func.name()}")
        if name in ("index", "index_put", "index_put_"):
            for index in args[1]:
                assert index is None or index.dtype not in (torch.bool, torch.uint8), func.name()
        return func(*args, **(kwargs or {}))
