#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that is to be measured on a GPU, with random weights and nothing downloaded:
#
#   . .venv/bin/activate && benchmarks/gpu.sh     # into reports/gpu
#   DECODER=llava-1.5-13b benchmarks/gpu.sh
#   DECODER=llava-next-7b FULL=2928 BUDGETS=640,320,160 IMAGE_SIZE=672 CONTEXT=3072 \
#     METHODS=score,ficoco-v,topk,globalcom2,hired,fastv benchmarks/gpu.sh engine server
#   DECODER=qwen2.5-vl-7b FULL=1024 BUDGETS=512,256,128 IMAGE_SIZE=896 CONTEXT=1536 \
#     METHODS=score,ficoco-v,topk,visionzip,resize,fastv benchmarks/gpu.sh engine server
#   benchmarks/gpu.sh tests                       # or engine, or server: one part
#
# Leaves budgets.json (the engine), loadtest/runs.jsonl (the server under load), their tables, and
# the log of every part. A part that fails or takes too long does not stop the others; the last line
# says which did. Meant to take eight minutes on one H200; limits are twice that.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

OUT=${OUT:-reports/gpu}
DECODER=${DECODER:-llava-1.5-7b}
DTYPE=${DTYPE:-bfloat16}
BUDGETS=${BUDGETS:-192,128,64}
FULL=${FULL:-576}
IMAGE_SIZE=${IMAGE_SIZE:-336}
CONTEXT=${CONTEXT:-1024}
STAGES=${STAGES:-2,8,22}
METHODS=${METHODS:-score,ficoco-v,ficoco-k,tome,topk,fastv,ficoco-vl}
BATCHES=${BATCHES:-1,8}
CONCURRENCY=${CONCURRENCY:-1,32}
PORT=${PORT:-8123}
SERVER_FLAGS=${SERVER_FLAGS:-}

mkdir -p "$OUT"
failed=()
parts=" ${*:-tests engine server} "

part() { # name, seconds, command
  local name=$1 limit=$2
  shift 2
  echo "== $name"
  timeout "$limit" "$@" >"$OUT/$name.md" 2>"$OUT/$name.log" || failed+=("$name")
  cat "$OUT/$name.md"
}

nvidia-smi >"$OUT/nvidia-smi.txt" 2>&1 || echo "no GPU"

if [[ $parts == *" tests "* ]]; then
  part methods 120 python -m pytest tests/test_methods.py tests/test_decoder_methods.py -k "gpu or waits"
  # The engine against the reference. In float32 Triton would round products to TF32.
  TRITON_F32_DEFAULT=ieee part stages 180 python -m pytest -m engine -k "mixed_batch or alike" \
    tests/engine/test_decoder_stages.py
  # Qwen-VL under CUDA graphs: positions are added to the buffer that they have taken down.
  TRITON_F32_DEFAULT=ieee part native 240 python -m pytest -m engine -k "compiled or before" \
    tests/engine/test_native.py
fi

if [[ $parts == *" engine "* ]]; then
  part budgets 420 python benchmarks/budgets.py --decoder "$DECODER" --dtype "$DTYPE" \
    --methods "$METHODS" --budgets "$BUDGETS" --stages "$STAGES" --batch "$BATCHES" --rounds 2 \
    --out "$OUT/budgets.json"
fi

if [[ $parts == *" server "* ]]; then
  python benchmarks/engines.py "$DECODER" "$OUT/model" || failed+=(model)
  # shellcheck disable=SC2086  # flags are words
  vllm-ficoco serve "$OUT/model" --load-format dummy --dtype "$DTYPE" --port "$PORT" \
    --max-model-len "$CONTEXT" --no-enable-prefix-caching $SERVER_FLAGS >"$OUT/server.log" 2>&1 &
  server=$!
  for _ in $(seq 200); do
    curl --silent --fail "http://127.0.0.1:$PORT/health" >/dev/null && break
    kill -0 "$server" 2>/dev/null || break
    sleep 1
  done
  part loadtest 200 python -m loadtest --base-url "http://127.0.0.1:$PORT" --methods score \
    --budgets "$FULL,$BUDGETS" --image-size "$IMAGE_SIZE" --concurrency "$CONCURRENCY" \
    --requests 64 --repeat 1 --output-tokens 32 --out "$OUT/loadtest"
  kill "$server"
  wait "$server"
fi

echo "failed: ${failed[*]:-nothing}"
((${#failed[@]} == 0))
