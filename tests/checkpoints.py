# SPDX-License-Identifier: Apache-2.0
"""Small LLaVA and Qwen-VL checkpoints with random weights, made on the fly.

The shipped model ends its answers after a word or two. These go on for ever and let every visual
token matter, so that sixteen equal greedy tokens say that sixteen steps were equal.

    python -m tests.checkpoints {llava,llava-next,qwen2.5-vl,...} FOLDER
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from functools import partial
from itertools import count
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
    LlavaNextVideoConfig,
    LlavaOnevisionConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
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
PATCH = 14
"""Pixels of a side of a patch."""
VIDEO_TOKEN = 113
"""``<video>``, behind the shipped model's words."""
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


def random_llava_onevision(
    path: Path, seed: int = 0, decoder_layers: int = 3, side: int = 4
) -> Path:
    """A LLaVA-OneVision whose thumbnail and tiles have 4 x 4 grids: up to 4 x 4 of them.

    Args:
        path: folder to make it in.
        seed: of the weights.
        decoder_layers: of the language model.
        side: of the grids. Of a frame of a video half as many rows and columns are left; published
            sides are odd.
    """
    pinpoints = [[pixels * side // 4 for pixels in size] for size in MANY_PINPOINTS]
    config = LlavaOnevisionConfig(
        vision_config=_tower("siglip", side * PATCH, 6),
        text_config=_text("qwen2", 114, decoder_layers),
        image_token_index=4,
        video_token_index=VIDEO_TOKEN,
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        tie_word_embeddings=False,
    )
    describe(path, config, onevision_processor(config))
    return _with_weights(path, config, seed)


def random_llava_next_video(
    path: Path, tower: str = "clip", seed: int = 0, decoder_layers: int = 3
) -> Path:
    """A LLaVA-NeXT-Video whose frames have 8 x 8 grids, of which 4 x 4 tokens are left.

    Arguments as :func:`random_llava`'s.
    """
    vision = _tower(tower, 56, 7)
    vision.patch_size = 7  # vLLM divides by image_size // patch_size**2
    config = LlavaNextVideoConfig(
        vision_config=vision,
        text_config=_text("llama", 114, decoder_layers),
        image_token_index=4,
        video_token_index=VIDEO_TOKEN,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
        vision_feature_select_strategy=STRATEGY[tower],
        spatial_pool_mode="average",
        spatial_pool_stride=2,
        tie_word_embeddings=False,
    )
    describe(path, config, next_video_processor(config))
    return _with_weights(path, config, seed)


VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
"""Of Qwen-VL, behind the shipped model's words."""
_FIRST_OF_THEM = 113

NATIVE: dict[str, tuple[type[PretrainedConfig], dict[str, Any], dict[str, Any]]] = {
    "qwen2-vl": (Qwen2VLConfig, {"embed_dim": 64, "hidden_size": 128, "mlp_ratio": 2}, {}),
    "qwen2.5-vl": (
        Qwen2_5_VLConfig,
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "out_hidden_size": 128,
            "tokens_per_second": 2,
            "window_size": 56,
            "fullatt_block_indexes": [1, 3],
        },
        {},
    ),
    "qwen3-vl": (
        Qwen3VLConfig,
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "out_hidden_size": 128,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 2],
        },
        {"head_dim": 32},
    ),
    "qwen3-vl-moe": (
        Qwen3VLMoeConfig,
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "out_hidden_size": 128,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 2],
        },
        {
            "head_dim": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,
            "decoder_sparse_step": 1,
            "norm_topk_prob": True,
        },
    ),
}
"""Configuration, and what of its tower and of its language model is its own."""


def random_qwen(path: Path, family: str, seed: int = 3, decoder_layers: int = 3) -> Path:
    """A Qwen-VL that makes 4 to 80 visual tokens of an image, each of 2 x 2 patches.

    Windows of Qwen2.5-VL's tower are 2 x 2 tokens; Qwen3-VL's has two levels of deepstack.

    Args:
        path: folder to make it in.
        family: one of ``NATIVE``.
        seed: of the weights.
        decoder_layers: of the language model.
    """
    config_class, of_tower, of_text = NATIVE[family]
    of_3, tokens = family.startswith("qwen3"), dict(zip(VISION_TOKENS, count(_FIRST_OF_THEM)))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
    if of_3:
        rope |= {"mrope_section": [6, 5, 5], "mrope_interleaved": True}
    else:
        rope |= {"mrope_section": [4, 6, 6]}
    config = config_class(
        vision_config={
            "depth": 4,
            "num_heads": 2,
            "patch_size": 16 if of_3 else 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            **of_tower,
        },
        text_config={
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": decoder_layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": _FIRST_OF_THEM + len(VISION_TOKENS),
            "max_position_embeddings": 2048,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "rope_parameters": rope,
            **of_text,
        },
        image_token_id=tokens["<|image_pad|>"],
        video_token_id=tokens["<|video_pad|>"],
        vision_start_token_id=tokens["<|vision_start|>"],
        vision_end_token_id=tokens["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    describe(path, config, qwen_processor(config))
    return _with_weights(path, config, seed)


def _tower(tower: str, image_size: int, layers: int) -> PretrainedConfig:
    return (CLIPVisionConfig if tower == "clip" else SiglipVisionConfig)(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=PATCH,
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


def next_processor(config: LlavaNextConfig | LlavaNextVideoConfig) -> dict[str, Any]:
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


def next_video_processor(config: LlavaNextVideoConfig) -> dict[str, Any]:
    """``processor_config.json`` of a LLaVA-NeXT-Video."""
    side = config.vision_config.image_size
    return {
        **next_processor(config),
        "processor_class": "LlavaNextVideoProcessor",
        "video_processor": {
            "video_processor_type": "LlavaNextVideoVideoProcessor",
            "size": {"shortest_edge": side},
            "crop_size": {"height": side, "width": side},
        },
        "video_token": "<video>",
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


def qwen_processor(config: PretrainedConfig) -> dict[str, Any]:
    """``processor_config.json`` of a Qwen-VL: 4 to 80 tokens an image, to 200 a video."""
    vision, of_3 = config.vision_config, config.model_type.startswith("qwen3")
    token = (vision.patch_size * vision.spatial_merge_size) ** 2
    kind = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL"}.get(config.model_type, "Qwen3VL")
    shared = {
        **_image_processor("Qwen2VLImageProcessor"),
        "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
    }
    video = {name: value for name, value in shared.items() if name != "image_processor_type"}
    return {
        "processor_class": f"{kind}Processor",
        "image_processor": {
            **shared,
            "size": {"shortest_edge": 4 * token, "longest_edge": 80 * token},
        },
        "video_processor": {
            **video,
            "video_processor_type": "Qwen3VLVideoProcessor" if of_3 else "Qwen2VLVideoProcessor",
            "size": {"shortest_edge": 4 * token, "longest_edge": 200 * token},
        },
    }


def _image_processor(kind: str, side: int = 0) -> dict[str, Any]:
    """What of the shipped model's holds for other families too; a side where they cut squares."""
    shipped = json.loads((SHIPPED / "processor_config.json").read_text())["image_processor"]
    of_squares = {"do_center_crop", "crop_size"}
    return {
        **{name: value for name, value in shipped.items() if name not in of_squares},
        "image_processor_type": kind,
        **({"crop_size": {"height": side, "width": side}} if side else {}),
    }


def describe(path: Path, config: PretrainedConfig, processor: dict[str, Any]) -> Path:
    """A checkpoint without weights: configuration, processor, tokenizer and chat template.

    The words are the shipped model's, and ``<video>`` where the model has a token for it.
    """
    path.mkdir(parents=True, exist_ok=True)
    kind = type(config).__name__.removesuffix("Config")
    config.architectures = [f"{kind}ForConditionalGeneration"]
    config.save_pretrained(path)
    (path / "processor_config.json").write_text(json.dumps(processor, indent=2))
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(SHIPPED / file, path)
    more = {}
    if video := getattr(config, "video_token_index", None):
        more = {"<video>": video}
        template = (path / "chat_template.jinja").read_text()
        shown = "{% elif c['type']=='video' %}<video> {% else %}{{ c['text'] }}"
        template = template.replace("{% else %}{{ c['text'] }}", shown)
        (path / "chat_template.jinja").write_text(template)
    if config.model_type.startswith("qwen"):
        more = dict(zip(VISION_TOKENS, count(_FIRST_OF_THEM)))
        template = (path / "chat_template.jinja").read_text()
        shows = "<|vision_start|> <|image_pad|> <|vision_end|>"
        plays = f"{{% elif c['type']=='video' %}}{shows.replace('image', 'video')} {{% else %}}"
        template = template.replace("<image>", shows).replace("{% else %}{{ c", f"{plays}{{{{ c")
        (path / "chat_template.jinja").write_text(template)
    if more:
        tokenizer = json.loads((path / "tokenizer.json").read_text())
        image = next(t for t in tokenizer["added_tokens"] if t["content"] == "<image>")
        for token, number in more.items():
            tokenizer["added_tokens"].append({**image, "content": token, "id": number})
            tokenizer["model"]["vocab"][token] = number
        (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    return path


def _with_weights(path: Path, config: PretrainedConfig, seed: int) -> Path:
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Larger than usual: attention is peaked and the argmax is clear.
            table = "position" in name or "pos_embed" in name
            if weight.dim() > 1 and not table:
                width = weight[0].numel() if "patch_embed." in name else weight.shape[-1]
                weight.normal_(0, (1.5 if "lm_head" in name else 1.2) * width**-0.5)
            elif "class_embedding" in name or table or "newline" in name:
                weight.normal_(0, 0.5)
            elif "q_norm" in name or "k_norm" in name:
                weight.uniform_(0.5, 1.5)
        model.model.language_model.norm.weight.uniform_(0.5, 1.5)  # DART compares behind it
    # As most are published; the others as transformers saves them.
    named = published_name if config.model_type in ("llava", "llava_next") else str
    save_file(
        {
            # Experts are published the other way round, (experts, inputs, outputs).
            named(k): (v.mT if ".experts." in k else v).contiguous()
            for k, v in model.state_dict().items()
        },
        path / "model.safetensors",
        metadata={"format": "pt"},
    )
    return path


FAMILIES = {
    "llava": random_llava,
    "llava-next": random_llava_next,
    "llava-onevision": random_llava_onevision,
    "llava-next-video": random_llava_next_video,
    **{family: partial(random_qwen, family=family) for family in NATIVE},
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
