# SPDX-License-Identifier: Apache-2.0
"""The shipped model with a quantised decoder, in the formats that the usual tools write.

Rounded to the nearest, without data: what is tested is how such weights run, not how good a tool
chooses them. Tower, projector and ``lm_head`` stay as they are, as in most that are published.

    python -m tests.quantised {w8a8,w8a8-64,fp8,w4a16,awq,gptq} FOLDER
    python -m tests.quantised w4a16 FOLDER --dequantised    # what its weights are worth, in float32
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vllm_ficoco.tiny_llava import CHECKPOINT as SHIPPED

GROUP = 128
"""Inputs that share a scale in 4 bit."""
PER_WORD = 8
"""Numbers of 4 bits in one of 32."""
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs is in a word's first four bits, in the next, ..."""
LINEAR = re.compile(r"language_model\.model\.(layers\.\d+\.\w+\.\w+_proj)\.weight")
"""A weight that is quantised, and the module's name in the language model."""
ELSEWHERE = ["vision_tower", "multi_modal_projector", "lm_head"]

Written = tuple[dict[str, Tensor], Tensor]
"""What goes into the file, by the end of its name, and what that is worth: (outputs, inputs)."""


def packed(numbers: Tensor) -> Tensor:
    """Eight numbers from 0 to 15 in a word, the first in its lowest bits: (rows, n) -> (rows, n/8).

    Args:
        numbers: integers.
    """
    eight = numbers.long().reshape(len(numbers), -1, PER_WORD)
    words = (eight << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def in_groups(weight: Tensor) -> Tensor:
    """(outputs, groups of inputs, inputs of one)."""
    return weight.unflatten(1, (-1, GROUP))


def int8(weight: Tensor, largest: int = 127) -> Written:
    scale = weight.abs().amax(1, keepdim=True) / largest
    numbers = (weight / scale).round().to(torch.int8)
    return {"weight": numbers, "weight_scale": scale}, numbers * scale


def fp8(weight: Tensor) -> Written:
    scale = weight.abs().amax(1, keepdim=True) / 448
    numbers = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": numbers, "weight_scale": scale}, numbers.float() * scale


def symmetric(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers from 0 to 15, of which 8 is zero, (outputs, inputs); scales, (outputs, groups)."""
    groups = in_groups(weight)
    scale = (groups.abs().amax(-1) / 7).half()
    numbers = (groups / scale[..., None]).round().clamp(-8, 7) + 8
    return numbers.flatten(1).int(), scale


def of_symmetric(numbers: Tensor, scale: Tensor) -> Tensor:
    return (in_groups(numbers - 8) * scale.float()[..., None]).flatten(1)


def w4a16(weight: Tensor) -> Written:
    numbers, scale = symmetric(weight)
    shape = torch.tensor(weight.shape)
    stored = {"weight_packed": packed(numbers), "weight_scale": scale, "weight_shape": shape}
    return stored, of_symmetric(numbers, scale)


def gptq(weight: Tensor) -> Written:
    """Words along the inputs; a zero is stored less one."""
    numbers, scale = symmetric(weight)
    outputs, inputs = weight.shape
    stored = {
        "qweight": packed(numbers).T,
        "qzeros": packed(torch.full((inputs // GROUP, outputs), 7)),
        "scales": scale.T,
        "g_idx": torch.arange(inputs).int() // GROUP,
    }
    return stored, of_symmetric(numbers, scale)


def awq(weight: Tensor) -> Written:
    """Words along the outputs, in an order of their own; every group has a zero of its own."""
    groups = in_groups(weight)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = ((high - low) / 15).half()
    zero = (-low / scale).round().clamp(0, 15)
    numbers = (groups / scale[..., None] + zero[..., None]).round().clamp(0, 15)

    def by_outputs(numbers: Tensor) -> Tensor:
        """(outputs, n) -> (n, outputs / 8)"""
        eight = numbers.T.unflatten(1, (-1, PER_WORD))[..., list(AWQ_ORDER)]
        return packed(eight.flatten(1))

    stored = {
        "qweight": by_outputs(numbers.flatten(1)),
        "qzeros": by_outputs(zero),
        "scales": scale.T,
    }
    return stored, ((numbers - zero[..., None]) * scale.float()[..., None]).flatten(1)


def as_int8(x: Tensor) -> Tensor:
    """Activations as their row's 8-bit integers are worth."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round() * scale


def as_fp8(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 448
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


class Format(NamedTuple):
    """How a decoder's projections are stored, and what they are fed."""

    write: Callable[[Tensor], Written]
    config: dict[str, Any]
    """``quantization_config`` of the model."""
    activations: Callable[[Tensor], Tensor] | None = None
    """What becomes of a projection's input; None: nothing."""
    dtype: str = "float16"
    """What vLLM runs it in, as exact as it lets: 4 bit in none of 32 bits."""


def compressed(format: str, weights: dict[str, Any], tokens: bool) -> dict[str, Any]:
    """The configuration of compressed-tensors, llmcompressor's format.

    Args:
        format: its name.
        weights: number format.
        tokens: whether inputs are quantised, token by token, to the same.
    """
    fed = {**weights, "strategy": "token", "dynamic": True, "symmetric": True} if tokens else None
    group = {
        "targets": ["Linear"],
        "weights": {"strategy": "channel", "dynamic": False, "symmetric": True, **weights},
        "input_activations": fed,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [f"re:.*{name}.*" for name in ELSEWHERE],
    }


FOUR_BITS = {"bits": 4, "group_size": GROUP}

W8A8 = Format(
    int8,
    compressed("int-quantized", {"num_bits": 8, "type": "int"}, tokens=True),
    as_int8,
    "float32",
)

FORMATS = {
    "w8a8": W8A8,
    # On CPUs without VNNI vLLM adds products in pairs, in 16 bits, and cuts off what is more. With
    # weights up to 64 nothing is: the product is exact on every CPU.
    "w8a8-64": W8A8._replace(write=partial(int8, largest=64)),
    "fp8": Format(
        fp8,
        compressed("float-quantized", {"num_bits": 8, "type": "float"}, tokens=True),
        as_fp8,
        "float32",
    ),
    "w4a16": Format(
        w4a16,
        compressed(
            "pack-quantized",
            {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP},
            tokens=False,
        ),
    ),
    "awq": Format(
        awq,
        {
            "quant_method": "awq",
            "version": "gemm",
            "zero_point": True,
            "modules_to_not_convert": ELSEWHERE,
            **FOUR_BITS,
        },
    ),
    "gptq": Format(
        gptq,
        {
            "quant_method": "gptq",
            "sym": True,
            "desc_act": False,
            "lm_head": False,
            "dynamic": {f"-:.*{name}.*": {} for name in ELSEWHERE},
            **FOUR_BITS,
        },
    ),
}


def quantise(path: Path, name: str, dequantised: bool = False) -> Path:
    """The shipped model with its decoder in a format.

    Args:
        path: folder to make it in.
        name: one of ``FORMATS``.
        dequantised: an ordinary checkpoint in float32, with what the weights are worth.
    """
    form, weights = FORMATS[name], {}
    for weight, value in load_file(SHIPPED / "model.safetensors").items():
        if LINEAR.fullmatch(weight):
            stored, worth = form.write(value.float())
            stored = {"weight": worth} if dequantised else stored
            base = weight.removesuffix("weight")
            weights |= {base + end: tensor.contiguous() for end, tensor in stored.items()}
        else:
            weights[weight] = value.float() if dequantised else value
    path.mkdir(parents=True, exist_ok=True)
    for file in (*SHIPPED.glob("*.json"), *SHIPPED.glob("*.jinja")):
        shutil.copy(file, path)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    if not dequantised:
        config = json.loads((path / "config.json").read_text())
        config["quantization_config"] = form.config
        (path / "config.json").write_text(json.dumps(config, indent=2))
    return path


def compute_as(model: nn.Module, name: str) -> None:
    """Has Hugging Face's shipped model, in float32, compute what a format's numbers are worth."""
    form, decoder = FORMATS[name], model.model.language_model
    for weight, value in load_file(SHIPPED / "model.safetensors").items():
        if found := LINEAR.fullmatch(weight):
            linear = decoder.get_submodule(found[1])
            linear.weight.data = form.write(value.float())[1]
            if form.activations:
                linear.register_forward_pre_hook(lambda _, fed: form.activations(fed[0]))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.quantised", description=__doc__)
    parser.add_argument("format", choices=FORMATS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dequantised", action="store_true", help="an ordinary checkpoint of it")
    given = parser.parse_args(arguments)
    print(quantise(given.folder, given.format, given.dequantised))


if __name__ == "__main__":
    main()
