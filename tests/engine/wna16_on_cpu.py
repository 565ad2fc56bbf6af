# SPDX-License-Identifier: Apache-2.0
"""Lets vLLM run weights of 4 bits on a CPU for which it has no kernel (without AVX-512).

What vLLM makes of a checkpoint, its own packing included, goes to plain operators.
"""

from __future__ import annotations

import torch
from torch import Tensor

NAME = "cpu_gemm_wna16"
SCHEMA = (
    "(Tensor input, Tensor q_weight, Tensor(a!) output, Tensor scales, Tensor? zeros, "
    "Tensor? bias, int pack_factor, str isa_hint) -> ()"
)
BLOCK = 16
"""Outputs that lie together."""

_library: torch.library.Library | None = None


def stand_in() -> None:
    """Defines the operator, where vLLM has none."""
    global _library
    import vllm._custom_ops  # noqa: F401 - loads vLLM's

    if not hasattr(torch.ops._C, NAME):
        _library = torch.library.Library("_C", "FRAGMENT")
        _library.define(NAME + SCHEMA)
        _library.impl(NAME, multiply, "CPU")


def multiply(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    pack_factor: int,
    isa_hint: str,
) -> None:
    """x (rows, inputs) by weights of 4 bits, into ``out`` (rows, outputs).

    Args:
        x: the rows.
        weight: (outputs / 16, inputs * 16 / 8), of each block of outputs all inputs.
        out: for the result.
        scales: (groups of inputs, outputs).
        zeros: (groups, outputs / 8); None where 8 is zero.
        bias: (outputs,)
        pack_factor: numbers in a word, 8.
        isa_hint: the kernel's own.
    """
    (groups, outputs), inputs = scales.shape, x.shape[1]
    numbers = unpacked(weight).view(outputs // BLOCK, inputs, BLOCK).transpose(0, 1)
    by_group = numbers.reshape(groups, inputs // groups, outputs)
    zero = 8 if zeros is None else unpacked(zeros)[:, None]
    worth = (by_group - zero) * scales.float()[:, None]
    made = x.float() @ worth.view(inputs, outputs)
    out.copy_(made if bias is None else made + bias)


def unpacked(words: Tensor) -> Tensor:
    """(rows, n) words -> (rows, 8 n) numbers from 0 to 15, the lowest bits first."""
    return ((words[..., None] >> torch.arange(0, 32, 4)) & 15).flatten(1)
