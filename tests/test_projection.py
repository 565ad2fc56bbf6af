# SPDX-License-Identifier: Apache-2.0
"""Queries, keys and values of an image one by one are those of vLLM's fused projection."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("vllm")

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.platforms import current_platform

from vllm_ficoco.engine.decoder import Heads
from vllm_ficoco.engine.projection import InParts, cut

HEADS, GROUPS, SIZE, WIDTH = 4, 2, 16, 32
SIZES = [HEADS * SIZE, GROUPS * SIZE, GROUPS * SIZE]
ROPES: dict[str, Any] = {
    "one row": {"rope_type": "default", "rope_theta": 1e4},
    "three rows": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
}


class Fused(nn.Module):
    """A fused projection, as vLLM's layers call theirs, whose weight may not be cut."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        lot = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(sum(SIZES), WIDTH, generator=lot))
        self.bias = nn.Parameter(torch.randn(sum(SIZES), generator=lot)) if bias else None
        self.quant_method: Any = None
        self.calls = 0

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        self.calls += 1
        return nn.functional.linear(x, self.weight, self.bias), None


def attention_of(linear: Fused, rope: str, normed: bool) -> Any:
    norms = {}
    if normed:
        norms = {name: RMSNorm(SIZE) for name in ("q_norm", "k_norm")}
        for number, norm in enumerate(norms.values()):
            norm.weight.data = torch.linspace(0.5, 2 + number, SIZE)
    return SimpleNamespace(
        qkv_proj=linear,
        q_size=SIZES[0],
        kv_size=SIZES[1],
        head_dim=SIZE,
        rotary_emb=get_rope(SIZE, 64, True, rope_parameters=ROPES[rope], dtype=torch.float32),
        **norms,
    )


def as_the_layer_does(attention: Any, x: Tensor, positions: Tensor) -> list[Tensor]:
    """vLLM's own steps: project, normalise by head, rotate queries and keys together."""
    query, key, value = attention.qkv_proj(x)[0].split(SIZES, -1)
    if hasattr(attention, "q_norm"):
        query = attention.q_norm(query.reshape(-1, SIZE)).view(query.shape)
        key = attention.k_norm(key.reshape(-1, SIZE)).view(key.shape)
    query, key = attention.rotary_emb(positions, query.contiguous(), key.contiguous())
    return [query, key, value]


@pytest.fixture(autouse=True)
def within_vllm() -> Any:
    current_platform.import_kernels()
    with set_current_vllm_config(VllmConfig()):
        yield


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize(("bias", "normed"), [(False, False), (True, False), (False, True)])
def test_parts_are_those_of_the_whole(rope: str, bias: bool, normed: bool) -> None:
    """Where the weight is cut, and where the layer can only be asked for all three."""
    lot = torch.Generator().manual_seed(1)
    x = torch.randn(10, WIDTH, generator=lot)
    positions = torch.randint(0, 64, (3, 10), generator=lot)
    positions = positions if rope == "three rows" else positions[0]
    attention = attention_of(Fused(bias), rope, normed)
    wanted = as_the_layer_does(attention, x, positions)

    whole = Heads(attention, x, positions, (2, 5))
    plain, attention.qkv_proj.calls = attention.qkv_proj, 0
    for which in (1, 2, 0, 1):
        _check(whole[which], wanted[which])
    assert plain.calls == 1  # for all three

    plain.quant_method = InParts(SIZES)
    plain.quant_method.process_weights_after_loading(plain)  # on a CPU the weight is gone now
    parts = Heads(attention, x, positions, (2, 5))
    for which in (1, 2, 0):
        _check(parts[which], wanted[which])
    assert plain.calls == 1


def _check(heads: Tensor, wanted: Tensor) -> None:
    assert heads.shape[0] == 2 and heads.shape[2:] == (5, SIZE)
    torch.testing.assert_close(heads.transpose(1, 2).flatten(2).flatten(0, 1), wanted)


class Adapted(QKVParallelLinear):
    """Adds something to what the weight makes."""


class Packed(UnquantizedLinearMethod):
    """Keeps the weight in a form of its own."""


@pytest.mark.parametrize(
    ("layer", "method", "is_cut"),
    [
        (QKVParallelLinear, UnquantizedLinearMethod, True),
        (QKVParallelLinear, Packed, False),
        (Adapted, UnquantizedLinearMethod, False),
    ],
)
def test_only_a_plain_layer_is_cut(
    layer: type[nn.Module], method: Callable[[], Any], is_cut: bool
) -> None:
    linear = layer.__new__(layer)
    nn.Module.__init__(linear)
    linear.quant_method = method()
    cut(SimpleNamespace(qkv_proj=linear, q_size=1, kv_size=1))
    assert isinstance(linear.quant_method, InParts) == is_cut
