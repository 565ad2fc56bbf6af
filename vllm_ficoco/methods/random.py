# SPDX-License-Identifier: Apache-2.0
"""Random: keep tokens drawn by lot, the same ones whenever the same image comes.

The baseline "Random Sampling" of the FiCoCo paper's tables (arXiv 2411.17686). The lot is a hash
of the image's pixels (as the model gets them: Qwen-VL's are bytes), the option ``seed`` and the
token's place, computed in integers on the device: the same on every machine, in every batch, and no
generator state is shared by requests.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vllm_ficoco import schedule
from vllm_ficoco.methods.paradigm import (
    EVIDENCE_BYTES,
    Evidence,
    Method,
    Options,
    Tokens,
    VisionOptions,
    highest,
)

# Odd 64-bit constants of the splitmix64 generator, written as signed integers.
_STEP = -7046029254386353131
_MIX_1 = -4658895280553007687
_MIX_2 = -7723592293110705685


class Seeded(Options):
    """Options of methods that draw lots."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Another seed draws other tokens of the same image."""


class RandomOptions(Seeded, VisionOptions):
    """Options of random."""


def mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 on int64, which wraps around like the unsigned original."""

    def shift(x: Tensor, bits: int) -> Tensor:
        return (x >> bits) & ((1 << (64 - bits)) - 1)  # logical, not arithmetic

    x = (x ^ shift(x, 30)) * _MIX_1
    x = (x ^ shift(x, 27)) * _MIX_2
    return x ^ shift(x, 31)


def lot_of(pixels: Tensor) -> Tensor:
    """(B, 1) int64: a number drawn by each image of (B, 3, height, width) or any other shape."""
    values = pixels.flatten(1)
    total = torch.zeros(len(values), 1, dtype=torch.int64, device=values.device)
    at_once = max(1, EVIDENCE_BYTES // (48 + 24 * len(values)))
    # Whole numbers, which wrap around: in any order their sum is the same.
    for first in range(0, values.shape[1], at_once):
        bits = values[:, first : first + at_once].float().contiguous().view(torch.int32).long()
        place = torch.arange(first, first + bits.shape[1], device=bits.device)
        total = total + (bits * mix((place + 1) * _STEP)).sum(1, keepdim=True)
    return total


def draw(lot: Tensor, position: Tensor, seed: int) -> Tensor:
    """(B, n) int64: a number for every token, from its image's lot and its place."""
    return mix(mix(lot + seed) + (position + 1) * _STEP)


def filter(tokens: Tokens, evidence: Evidence, leave: int, options: RandomOptions) -> Tensor:
    return highest(draw(lot_of(evidence.pixels), tokens.position, options.seed), leave)


RANDOM = Method(
    name="random",
    idea="keeps tokens drawn by lot, seeded by the image",
    paper="",
    place="output",
    needs=frozenset(),
    schedule=lambda _, budget, layers, __: schedule.at_output(budget, layers),
    filter=filter,
    options=RandomOptions,
)
