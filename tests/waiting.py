# SPDX-License-Identifier: Apache-2.0
"""A guard against code for which the host would wait for a GPU, that needs no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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

    def __enter__(self) -> NoWaiting:
        self.patch = pytest.MonkeyPatch()
        for name in ("tolist", "cpu", "numpy"):  # on a CPU, these run no operator
            self.patch.setattr(torch.Tensor, name, _refuse(name))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.patch.undo()
        super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        if name in self.WAITS:
            raise AssertionError(f"the host waits for {func.name()}")
        if name in ("index", "index_put", "index_put_"):
            for index in args[1]:
                assert index is None or index.dtype not in (torch.bool, torch.uint8), func.name()
        return func(*args, **(kwargs or {}))


class NothingFromTheHost(NoWaiting):
    """Refuses what a CUDA graph cannot hold, of code that is given tensors of the device "meta".

    The memory of the host from which something is copied may be gone when the graph is replayed.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for x in tree_leaves((args, kwargs, result)):
            if isinstance(x, torch.Tensor) and x.device.type == "cpu":
                raise AssertionError(f"{func.name()} has something from the host")
        return result


def _refuse(name: str) -> Any:
    def waits(*_: Any) -> None:
        raise AssertionError(f"the host waits for Tensor.{name}")

    return waits
