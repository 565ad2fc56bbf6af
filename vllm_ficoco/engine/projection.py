# SPDX-License-Identifier: Apache-2.0
"""vLLM's linear area: queries, keys or values alone, of a projection that vLLM fuses.

A method that compares keys needs a third of what the fused projection makes of an image. Where the
layer is vLLM's plain unquantised one, its weight can be cut; quantised ones are asked for all
three. Which one it is, is known when the model is built; where the weight will be, only when it is
loaded: on CPUs vLLM packs it then for its kernels and throws it away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.linear import QKVParallelLinear, UnquantizedLinearMethod


class InParts(UnquantizedLinearMethod):
    """An unquantised layer, and parts of its output for themselves.

    On GPUs a part is a view of the layer's weight. On CPUs the weight is packed as a whole, so that
    the layer computes what it always does, to the bit, and every part once more: that is as much
    memory again as one layer's projection takes.

    Args:
        sizes: outputs of every part, in their order.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes = list(sizes)
        self.parts: list[nn.Module] = []

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.parts = []
        for weight in layer.weight.data.split(self.sizes):
            part = nn.Module()
            part.weight = nn.Parameter(weight, requires_grad=False)
            super().process_weights_after_loading(part)
            self.parts.append(part)
        super().process_weights_after_loading(layer)

    def project(self, layer: nn.Module, which: int, x: Tensor) -> Tensor:
        """One part of the output of rows x: (rows, its size)."""
        bias = None if layer.bias is None else layer.bias.split(self.sizes)[which]
        return self.apply(self.parts[which], x, bias)


def cut(attention: Any) -> None:
    """Prepares a layer's attention for :func:`parts_of`, before its weights are loaded."""
    linear = attention.qkv_proj
    if type(linear) is QKVParallelLinear and type(linear.quant_method) is UnquantizedLinearMethod:
        linear.quant_method = InParts(sizes_of(attention))


def sizes_of(attention: Any) -> list[int]:
    """Queries, keys and values of this rank."""
    return [attention.q_size, attention.kv_size, attention.kv_size]


def parts_of(attention: Any, x: Tensor) -> Callable[[int], Tensor]:
    """Queries (0), keys (1) or values (2) of rows x (rows, D), as the projection leaves them.

    Where they cannot be had alone, all three are computed when the first is asked for.
    """
    linear = attention.qkv_proj
    if isinstance(linear.quant_method, InParts):
        return lambda which: linear.quant_method.project(linear, which, x)
    found: list[Tensor] = []

    def part(which: int) -> Tensor:
        if not found:
            found.extend(linear(x)[0].split(sizes_of(attention), dim=-1))
        return found[which]

    return part
