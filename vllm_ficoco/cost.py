# SPDX-License-Identifier: Apache-2.0
"""What visual tokens cost: FLOPs of a prefill and bytes of KV cache, from counts alone.

After arXiv 2411.17686, section 9, eq. 17: a decoder layer over P tokens takes
``4 P D^2 + 2 P^2 D + 2 P D H`` multiply-adds, D the hidden size and H the width of the MLP. Two
deviations bring it to the TFLOPs that the paper reports (LLaVA-1.5-7B, 60 text tokens: 8.5 for 576
visual tokens, 3.3, 2.4 and 1.5 for 192, 128 and 64; here 8.4, 3.3, 2.5 and 1.6): a LLaMA MLP has
three matrices, not two, and a multiply-add counts as two FLOPs. Grouped-query attention is
counted as it is.

An estimate for comparing settings, not a measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Decoder(NamedTuple):
    """The dimensions of a language model that its cost depends on."""

    layers: int
    hidden_size: int
    intermediate_size: int
    """Width of the MLP that a token goes through, see :func:`mlp_width`."""
    heads: int
    kv_heads: int
    head_size: int
    kv_bytes_per_element: int = 2
    """2 for a cache in fp16 or bf16, 1 for fp8, 4 for fp32."""
    mlp_matrices: int = 3
    """3 for LLaMA's gated MLP, 2 for a vision tower's."""

    @property
    def projection_weights(self) -> int:
        """Weights of a layer's query, key, value and output projections."""
        return 2 * self.hidden_size * (self.heads + self.kv_heads) * self.head_size

    @property
    def mlp_weights(self) -> int:
        """Weights of a layer's MLP."""
        return self.mlp_matrices * self.hidden_size * self.intermediate_size

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token holds, all layers together."""
        return 2 * self.layers * self.kv_heads * self.head_size * self.kv_bytes_per_element


def mlp_width(text_config: Any) -> int:
    """Width of the MLPs that a token goes through in a layer of a Hugging Face text model.

    With experts (Qwen3-VL-MoE, Mixtral) that is the width of those that a token is sent to; their
    router, of one row an expert, is not counted. Where only some layers have experts, it is the
    mean over layers. 0: the model does not say.
    """

    def said(name: str) -> int:
        return getattr(text_config, name, None) or 0

    dense, active = said("intermediate_size"), said("num_experts_per_tok")
    if not active:
        return dense
    layers, step = said("num_hidden_layers"), said("decoder_sparse_step") or 1
    without = getattr(text_config, "mlp_only_layers", None) or ()
    sparse = sum(i not in without and (i + 1) % step == 0 for i in range(layers))
    of_experts = active * (said("moe_intermediate_size") or dense)
    return (sparse * of_experts + (layers - sparse) * dense) // max(layers, 1)


def attention_flops(tokens: int, decoder: Decoder) -> int:
    """FLOPs of a layer's attention over so many tokens, projections included."""
    width = decoder.heads * decoder.head_size
    return 2 * (tokens * decoder.projection_weights + 2 * tokens**2 * width)


def mlp_flops(tokens: int, decoder: Decoder) -> int:
    """FLOPs of a layer's MLP over so many tokens."""
    return 2 * tokens * decoder.mlp_weights


def layer_flops(tokens: int, decoder: Decoder) -> int:
    """FLOPs of one decoder layer over so many tokens."""
    return attention_flops(tokens, decoder) + mlp_flops(tokens, decoder)


def prefill_flops(tokens_per_layer: Sequence[int], decoder: Decoder) -> int:
    """FLOPs of a prefill whose layers see so many tokens, text and visual together."""
    return sum(layer_flops(tokens, decoder) for tokens in tokens_per_layer)


def prefill_flops_ratio(tokens_per_layer: Sequence[int], unreduced: int, decoder: Decoder) -> float:
    """FLOPs of that prefill over those with ``unreduced`` tokens in every layer."""
    whole = len(tokens_per_layer) * layer_flops(unreduced, decoder)
    return prefill_flops(tokens_per_layer, decoder) / whole
