# SPDX-License-Identifier: Apache-2.0
"""Small LLaVA checkpoints with random weights, made on the fly.

The shipped model ends its answers after a word or two. These go on for ever and let every visual
token matter, so that sixteen equal greedy tokens say that sixteen steps were equal.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from vllm_ficoco.tiny_llava import CHECKPOINT as SHIPPED
from vllm_ficoco.tiny_llava.train import published_name

TEXT = {
    "llama": (LlamaConfig, {"head_dim": 32}),
    "mistral": (MistralConfig, {"head_dim": 32, "sliding_window": None}),
    "qwen2": (Qwen2Config, {}),
}


def random_llava(
    path: Path, tower: str = "clip", seed: int = 0, decoder_layers: int = 3, text: str = "llama"
) -> Path:
    """A LLaVA with a 12 x 12 grid, 8 tower layers that run and 4 heads everywhere.

    Args:
        path: folder to make it in.
        tower: ``clip`` or ``siglip``.
        seed: of the weights.
        decoder_layers: of the language model.
        text: its kind, one of ``TEXT``.
    """
    torch.manual_seed(seed)
    common = dict(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=9,
        num_attention_heads=4,
        image_size=168,
        patch_size=14,
    )
    vision = (CLIPVisionConfig if tower == "clip" else SiglipVisionConfig)(**common)
    text_class, more = TEXT[text]
    text_config = text_class(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=decoder_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=108,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **more,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text_config,
        image_token_index=4,
        image_seq_length=144,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    model = LlavaForConditionalGeneration(config).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Larger than usual: attention is peaked and the argmax is clear.
            if weight.dim() > 1 and "position" not in name:
                weight.normal_(0, (1.5 if "lm_head" in name else 1.2) * weight.shape[-1] ** -0.5)
            elif "class_embedding" in name or "position" in name:
                weight.normal_(0, 0.5)
        model.model.language_model.norm.weight.uniform_(0.5, 1.5)  # DART compares behind it
    path.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(path)
    save_file(
        {published_name(k): v.contiguous() for k, v in model.state_dict().items()},
        path / "model.safetensors",
    )
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(SHIPPED / file, path)
    processor = (SHIPPED / "processor_config.json").read_text()
    if tower == "siglip":
        processor = processor.replace('"default"', '"full"')
        processor = processor.replace(
            '"num_additional_image_tokens": 1', '"num_additional_image_tokens": 0'
        )
    (path / "processor_config.json").write_text(processor)
    return path
