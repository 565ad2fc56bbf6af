# SPDX-License-Identifier: Apache-2.0
"""A guard against code for which the host would wait for a GPU, that needs no GPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class NoWaiting(TorchDispatchMode):
    """Refuses the operators for which the host has to wait for the device.

    Args:
        on_device: of code that also computes on the host: the tensors that are taken to lie on a
            device, and with them all that is made of them. None: all tensors do.
    """

    def __init__(self, on_device: Iterable[torch.Tensor] | None = None) -> None:
        super().__init__()
        self.kept: list[torch.Tensor] | None = None if on_device is None else [*on_device]
        self.there = {x.untyped_storage()._cdata for x in self.kept or ()}

    def on_device(self, values: Iterable[Any]) -> bool:
        """Whether one of these is a tensor on the device."""
        if self.kept is None:
            return True
        flat = tree_leaves(values)
        tensors = (x for x in flat if isinstance(x, torch.Tensor))
        return any(x.untyped_storage()._cdata in self.there for x in tensors)

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
            self.patch.setattr(torch.Tensor, name, self._refuse(name))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.patch.undo()
        super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        there = self.on_device((args, kwargs))
        if name in self.WAITS and there:
            raise AssertionError(f"the host waits for {func.name()}")
        if name in ("index", "index_put", "index_put_") and there:
            for index in args[1]:
                assert index is None or index.dtype not in (torch.bool, torch.uint8), func.name()
        made = func(*args, **(kwargs or {}))
        if there and self.kept is not None:
            for x in tree_leaves(made):
                if isinstance(x, torch.Tensor):
                    self.kept.append(x)  # or another could get its storage
                    self.there.add(x.untyped_storage()._cdata)
        return made

    def _refuse(self, name: str) -> Any:
        original = getattr(torch.Tensor, name)

        def waits(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.on_device([tensor]):
                raise AssertionError(f"the host waits for Tensor.{name}")
            return original(tensor, *args, **kwargs)

        return waits


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
