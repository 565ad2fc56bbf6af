# SPDX-License-Identifier: Apache-2.0
"""The cost model gives the paper's numbers (arXiv 2411.17686, tables 3 and 8)."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import MixtralConfig, Qwen2_5_VLTextConfig, Qwen3VLMoeTextConfig

from benchmarks.quantised import WEIGHTS, arithmetic
from vllm_ficoco.cost import Decoder, layer_flops, mlp_width, prefill_flops, prefill_flops_ratio

LLAVA_7B = Decoder(
    layers=32, hidden_size=4096, intermediate_size=11008, heads=32, kv_heads=32, head_size=128
)
TEXT = 60
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("visual", "tflops", "error"),
    [(576, 8.5, 0.06), (192, 3.3, 0.05), (128, 2.4, 0.06), (64, 1.6, 0.05)],
)
def test_tflops_of_the_paper(visual: int, tflops: float, error: float) -> None:
    """LLaVA-1.5-7B with 60 text tokens, to about the digit that the paper prints."""
    flops = prefill_flops([TEXT + visual] * 32, LLAVA_7B)
    assert flops / 1e12 == pytest.approx(tflops, abs=error)


@pytest.mark.parametrize(("visual", "megabytes"), [(576, 333), (64, 65.0)])
def test_kv_cache_of_the_paper(visual: int, megabytes: float) -> None:
    """Decimal megabytes of an fp16 cache."""
    held = (TEXT + visual) * LLAVA_7B.kv_bytes_per_token / 1e6
    assert held == pytest.approx(megabytes, abs=0.5 if megabytes == 333 else 0.05)


def test_quantised_weights_in_results() -> None:
    """The table after the paper's table 8 is what its command prints."""
    results = (ROOT / "benchmarks/RESULTS.md").read_text()
    assert f"\n\n{arithmetic()}\n" in results


def test_bytes_of_a_model() -> None:
    """7.06 B weights, 6.48 B of them in the decoder's projections."""
    gigabytes = [weights.bytes / 1e9 for weights in WEIGHTS]
    assert gigabytes == pytest.approx([14.1, 7.65, 4.5], abs=0.05)


def test_bytes_of_a_token() -> None:
    """Keys and values, every layer, every key-value head."""
    assert LLAVA_7B.kv_bytes_per_token == 2 * 32 * 32 * 128 * 2
    assert LLAVA_7B._replace(kv_bytes_per_element=1).kv_bytes_per_token == 2 * 32 * 32 * 128
    assert LLAVA_7B._replace(kv_heads=8).kv_bytes_per_token * 4 == LLAVA_7B.kv_bytes_per_token


def test_a_layer_by_hand() -> None:
    """4 P D^2 + 2 P^2 D + 3 P D H multiply-adds, two FLOPs each, in whole numbers."""
    p, d, h = 7, 4096, 11008
    flops = layer_flops(p, LLAVA_7B)
    assert flops == 2 * (4 * p * d * d + 2 * p * p * d + 3 * p * d * h)
    assert isinstance(flops, int)
    assert layer_flops(0, LLAVA_7B) == 0


def test_grouped_query_attention() -> None:
    """Fewer key-value heads save of the key and value projections, of nothing else."""
    p, d = 100, 4096
    saved = layer_flops(p, LLAVA_7B) - layer_flops(p, LLAVA_7B._replace(kv_heads=8))
    assert saved == 2 * p * 2 * d * (32 - 8) * 128


def test_heads_need_not_fill_the_hidden_size() -> None:
    """Query and output projections and the products go by heads times head size."""
    p, d, h = 10, 4096, 11008
    small = LLAVA_7B._replace(heads=16, kv_heads=16)
    q = 16 * 128
    assert layer_flops(p, small) == 2 * (4 * p * d * q + 2 * p * p * q + 3 * p * d * h)


def test_layers_may_see_different_counts() -> None:
    """A prefill is the sum of its layers."""
    parts = [636] * 2 + [100] * 30
    assert prefill_flops(parts, LLAVA_7B) == 2 * layer_flops(636, LLAVA_7B) + 30 * layer_flops(
        100, LLAVA_7B
    )
    assert prefill_flops([], LLAVA_7B) == 0


def test_ratio() -> None:
    """One when nothing leaves, the quotient of the prefills otherwise, always falling."""
    assert prefill_flops_ratio([636] * 32, 636, LLAVA_7B) == 1.0
    got = prefill_flops_ratio([124] * 32, 636, LLAVA_7B)
    want = prefill_flops([124] * 32, LLAVA_7B) / prefill_flops([636] * 32, LLAVA_7B)
    assert got == pytest.approx(want)
    assert got == pytest.approx(1.6 / 8.5, abs=0.01)
    ratios = [prefill_flops_ratio([TEXT + kept] * 32, 636, LLAVA_7B) for kept in range(1, 577)]
    assert ratios == sorted(ratios)


def test_the_formula_of_the_paper() -> None:
    """Eq. 17 as printed, 4 P D^2 + 2 P^2 D + 2 P D H, where an MLP has two matrices."""
    p, d, h = 577, 1024, 4096
    tower = Decoder(23, d, h, 16, 16, 64, mlp_matrices=2)
    assert layer_flops(p, tower) == 2 * (4 * p * d * d + 2 * p * p * d + 2 * p * d * h)


def test_a_token_goes_through_the_experts_it_is_sent_to() -> None:
    """Of Qwen3-VL-30B-A3B, 8 of 128 experts in every layer; of Mixtral-8x7B, 2 of 8."""
    assert mlp_width(Qwen2_5_VLTextConfig(intermediate_size=18944)) == 18944
    of_30b = {"num_hidden_layers": 48, "intermediate_size": 6144, "moe_intermediate_size": 768}
    experts = {"num_experts": 128, "num_experts_per_tok": 8}
    assert mlp_width(Qwen3VLMoeTextConfig(**of_30b, **experts)) == 8 * 768
    assert mlp_width(MixtralConfig(intermediate_size=14336, num_experts_per_tok=2)) == 2 * 14336


def test_layers_without_experts_count_as_they_are() -> None:
    """Every second layer has experts, and of these the one that is named has none."""
    config = Qwen3VLMoeTextConfig(
        num_hidden_layers=4,
        intermediate_size=1000,
        moe_intermediate_size=100,
        num_experts=8,
        num_experts_per_tok=2,
        decoder_sparse_step=2,
    )
    assert mlp_width(config) == (1000 + 200 + 1000 + 200) // 4
    config.mlp_only_layers = [3]
    assert mlp_width(config) == (1000 + 200 + 1000 + 1000) // 4
