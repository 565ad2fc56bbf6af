# SPDX-License-Identifier: Apache-2.0
"""Small LLaVA checkpoints with random weights, made on the fly.

The shipped model ends its answers after a word or two. These go on for ever and let every visual
token matter, so that sixteen equal greedy tokens say that sixteen steps were equal.

    python -m tests.checkpoints {llava,llava-next,llava-onevision} FOLDER
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    MistralConfig,
    PretrainedConfig,
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
STRATEGY = {"clip": "default", "siglip": "full"}
"""Which of a tower's tokens LLaVA takes: all patches, [CLS] never."""

PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
"""Height and width of LLaVA-NeXT's published grids of tiles, in tiles of 4 x 4 patches."""
MANY_PINPOINTS = [[rows * 56, columns * 56] for rows in (1, 2, 3, 4) for columns in (1, 2, 3, 4)]
"""As LLaVA-OneVision's, up to 4 x 4 tiles: more than the 9 that are not shrunk."""


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
    config = LlavaConfig(
        vision_config=_tower(tower, 168, 9),
        text_config=_text(text, 108, decoder_layers),
        image_token_index=4,
        image_seq_length=144,
        vision_feature_layer=-2,
        vision_feature_select_strategy=STRATEGY[tower],
    )
    processor = json.loads((SHIPPED / "processor_config.json").read_text())
    if tower == "siglip":
        processor |= {"vision_feature_select_strategy": "full", "num_additional_image_tokens": 0}
    describe(path, config, processor)
    return _with_weights(path, config, seed)


def random_llava_next(
    path: Path, tower: str = "clip", seed: int = 0, decoder_layers: int = 3, text: str = "llama"
) -> Path:
    """A LLaVA-NeXT whose thumbnail and tiles have 4 x 4 grids: up to 2 x 2 or 3 of them.

    Arguments as :func:`random_llava`'s.
    """
    config = LlavaNextConfig(
        vision_config=_tower(tower, 56, 7),
        text_config=_text(text, 108, decoder_layers),
        image_token_index=4,
        image_seq_length=16,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
        vision_feature_select_strategy=STRATEGY[tower],
        tie_word_embeddings=False,
    )
    describe(path, config, next_processor(config))
    return _with_weights(path, config, seed)


def random_llava_onevision(path: Path, seed: int = 0, decoder_layers: int = 3) -> Path:
    """A LLaVA-OneVision whose thumbnail and tiles have 4 x 4 grids: up to 4 x 4 of them.

    Args:
        path: folder to make it in.
        seed: of the weights.
        decoder_layers: of the language model.
    """
    config = LlavaOnevisionConfig(
        vision_config=_tower("siglip", 56, 6),
        text_config=_text("qwen2", 114, decoder_layers),
        image_token_index=4,
        video_token_index=113,
        image_grid_pinpoints=MANY_PINPOINTS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        tie_word_embeddings=False,
    )
    describe(path, config, onevision_processor(config))
    return _with_weights(path, config, seed)


def _tower(tower: str, image_size: int, layers: int) -> PretrainedConfig:
    return (CLIPVisionConfig if tower == "clip" else SiglipVisionConfig)(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=14,
    )


def _text(text: str, words: int, layers: int) -> PretrainedConfig:
    text_class, more = TEXT[text]
    return text_class(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=words,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **more,
    )


def next_processor(config: LlavaNextConfig) -> dict[str, Any]:
    """``processor_config.json`` of a LLaVA-NeXT."""
    side, has_cls = config.vision_config.image_size, config.vision_feature_select_strategy
    return {
        "processor_class": "LlavaNextProcessor",
        "image_processor": {
            **_image_processor("LlavaNextImageProcessor", side),
            "size": {"shortest_edge": side},
            "do_center_crop": True,
            "do_pad": True,
            "image_grid_pinpoints": config.image_grid_pinpoints,
        },
        "image_token": "<image>",
        "num_additional_image_tokens": int(has_cls == "default"),
        "patch_size": config.vision_config.patch_size,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
    }


def onevision_processor(config: LlavaOnevisionConfig) -> dict[str, Any]:
    """``processor_config.json`` of a LLaVA-OneVision."""
    side = config.vision_config.image_size
    square = {"height": side, "width": side}
    return {
        "processor_class": "LlavaOnevisionProcessor",
        "image_processor": {
            **_image_processor("LlavaOnevisionImageProcessor", side),
            "size": square,
            "do_pad": True,
            "image_grid_pinpoints": config.image_grid_pinpoints,
        },
        "video_processor": {
            "video_processor_type": "LlavaOnevisionVideoProcessor",
            "size": square,
        },
        "image_token": "<image>",
        "video_token": "<video>",
        "num_image_tokens": (side // config.vision_config.patch_size) ** 2,
        "vision_aspect_ratio": config.vision_aspect_ratio,
        "vision_feature_select_strategy": "full",
    }


def _image_processor(kind: str, side: int) -> dict[str, Any]:
    """What of the shipped model's holds for other families too."""
    shipped = json.loads((SHIPPED / "processor_config.json").read_text())["image_processor"]
    return {
        **{name: value for name, value in shipped.items() if name != "do_center_crop"},
        "image_processor_type": kind,
        "crop_size": {"height": side, "width": side},
    }


def describe(path: Path, config: PretrainedConfig, processor: dict[str, Any]) -> Path:
    """A checkpoint without weights: configuration, processor, tokenizer and chat template.

    The words are the shipped model's, and ``<video>`` where the model has a token for it.
    """
    path.mkdir(parents=True, exist_ok=True)
    kind = config.model_type.replace("_", " ").title().replace(" ", "")
    config.architectures = [f"{kind}ForConditionalGeneration"]
    config.save_pretrained(path)
    (path / "processor_config.json").write_text(json.dumps(processor, indent=2))
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(SHIPPED / file, path)
    if video := getattr(config, "video_token_index", None):
        tokenizer = json.loads((path / "tokenizer.json").read_text())
        image = next(t for t in tokenizer["added_tokens"] if t["content"] == "<image>")
        tokenizer["added_tokens"].append({**image, "content": "<video>", "id": video})
        tokenizer["model"]["vocab"]["<video>"] = video
        (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    return path


def _with_weights(path: Path, config: PretrainedConfig, seed: int) -> Path:
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Larger than usual: attention is peaked and the argmax is clear.
            if weight.dim() > 1 and "position" not in name:
                weight.normal_(0, (1.5 if "lm_head" in name else 1.2) * weight.shape[-1] ** -0.5)
            elif "class_embedding" in name or "position" in name or "newline" in name:
                weight.normal_(0, 0.5)
        model.model.language_model.norm.weight.uniform_(0.5, 1.5)  # DART compares behind it
    save_file(
        {published_name(k): v.contiguous() for k, v in model.state_dict().items()},
        path / "model.safetensors",
        metadata={"format": "pt"},
    )
    return path


FAMILIES = {
    "llava": random_llava,
    "llava-next": random_llava_next,
    "llava-onevision": random_llava_onevision,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.checkpoints", description=__doc__)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args(arguments)
    print(FAMILIES[given.family](given.folder))


if __name__ == "__main__":
    main()
