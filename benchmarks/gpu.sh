#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that is to be checked and measured on one GPU, in less than ten minutes and with nothing
# downloaded; weights are random. benchmarks/RESULTS.md says what each step is to show.
#
#   benchmarks/gpu.sh                        # all steps, into reports/gpu and reports/gpu.tar.gz
#   benchmarks/gpu.sh load budgets           # some steps
#   benchmarks/gpu.sh --decoder llava-1.5-13b
#   benchmarks/gpu.sh --decoder llava-next-7b load budgets      # or qwen2.5-vl-7b
#   benchmarks/gpu.sh largest server         # two more, which take minutes of their own
#   benchmarks/gpu.sh --dry-run              # on a CPU: the same commands, small
#   PYTHON=/opt/python/bin/python3 benchmarks/gpu.sh
#
# --out DIR        where results go (reports/gpu); each step leaves NAME.md, and NAME.log if it said more
# --decoder NAME   geometry of the model, of benchmarks/engines.py (llava-1.5-7b)
# --backend NAME   attention of all engines whose speed is compared (FLASH_ATTN)
# --slower N       N times the time for every step: a machine that others use, another GPU
# --dry-run        small sizes in float32; what needs a GPU says that it is skipped
#
# Steps, in order: device methods stages graphs agree load budgets tower native. Each has its own
# time, and what those before it have not used. Where there is no GPU, or vLLM's kernels do not run on
# it, or its plugins are not found, the first one is the last; graphs and agree are left out where stages
# fails, whose engine is theirs. Of the environment only PYTHON is read, and nothing need be on PATH.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

declare -A seconds=(
  [device]=30 [methods]=40 [stages]=65 [graphs]=55 [agree]=75 [load]=80 [budgets]=115 [tower]=45
  [native]=55 [largest]=60 [server]=240
)
declare -A needs=([graphs]=stages [agree]=stages)
plan=(device methods stages graphs agree load budgets tower native)

out=reports/gpu decoder=llava-1.5-7b backend=FLASH_ATTN slower='' dry='' steps=()
while (($#)); do
  case $1 in
    --out) out=$2 && shift ;;
    --decoder) decoder=$2 && shift ;;
    --backend) backend=$2 && shift ;;
    --slower) slower=$2 && shift ;;
    --dry-run) dry=yes ;;
    -h | --help) sed -n '3,/^set/s/^# \{0,1\}//p' "benchmarks/gpu.sh" && exit ;;
    *)
      [[ -n ${seconds[$1]:-} ]] || { echo "gpu.sh: no step or option $1" >&2 && exit 2; }
      steps+=("$1")
      ;;
  esac
  shift
done
((${#steps[@]})) || steps=("${plan[@]}")
[[ ${steps[0]} == device ]] || steps=(device "${steps[@]}")
slower=${slower:-${dry:+3}}

python=${PYTHON:-$(command -v python || command -v python3)}
export PYTHONPATH="$PWD:$PWD/server${PYTHONPATH:+:$PYTHONPATH}"
unset FICOCO_TEST_ENGINE
tests=("$python" -m pytest -p no:cacheprovider --disable-warnings)

# What is equal in all engines that are compared with each other.
dtype=bfloat16 flags=(--attention-backend "$backend")
case $decoder in
  llava-1.5-*) budget=64 full=576 ;;
  llava-next-*) budget=320 full=2928 ;;
  qwen2.5-vl-*) budget=113 full=1024 ;;
  *) budget=16 full=144 ;;
esac
before=score towers=score,ficoco-v,ficoco-k,tome,topk,dpp,scope
stages=2,22 batches=1,8,32 memory=()
# 13B takes 26 GB. Three engines of 7B with the cache of 32 requests take more than 80 GB.
[[ $decoder == *-13b ]] && memory=(--alone) batches=1,8
mib=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null | head -1)
((${mib:-0} < 100000)) && batches=1,8
if [[ $dry ]]; then
  decoder=shipped dtype=float32 budget=48 full=144 stages=1,3 batches=1,2
fi

graphs='"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}'
triton='"attention_config": {"backend": "TRITON_ATTN"}'
# In float32 Triton would round products to TF32.
exact=(env TRITON_F32_DEFAULT=ieee VLLM_USE_V2_MODEL_RUNNER=1)

command_of() { # sets `command`, or `reason` why there is none
  reason='' command=()
  case $1 in
    device) command=("$python" benchmarks/gpu.py device ${dry:+--small}) ;;
    methods) # tokens as on the CPU, and no wait
      command=("${tests[@]}" tests/test_methods.py tests/test_decoder_methods.py tests/test_videos.py
        -k "gpu or waits")
      ;;
    stages) # the engine against the reference
      command=("${exact[@]}" "FICOCO_TEST_ENGINE={$triton, \"enforce_eager\": true}" "${tests[@]}"
        -m engine -k "mixed_batch or alike" tests/engine/test_decoder_stages.py)
      [[ $dry ]] && command=(env 'FICOCO_TEST_ENGINE={"max_num_seqs": 16}' "${tests[@]}"
        -m engine -k blocks_held tests/engine/test_decoder_stages.py)
      ;;
    graphs) # the same in graphs, with vLLM's own guard against waits
      command=("${exact[@]}" VLLM_GPU_SYNC_CHECK=error
        "FICOCO_TEST_ENGINE={$triton, \"enforce_eager\": false, $graphs}" "${tests[@]}"
        -p tests.engine.replays -m engine -k "mixed_batch or blocks_held"
        tests/engine/test_decoder_stages.py)
      [[ $dry ]] && reason='needs a GPU; tests/engine/graphs_on_cpu.py simulates graphs'
      ;;
    agree) command=("$python" benchmarks/gpu.py agree ${dry:+--small}) ;;
    load)
      command=("$python" benchmarks/gpu.py load --decoder "$decoder" --dtype "$dtype" "${flags[@]}"
        --methods "$before" "${memory[@]}")
      [[ $dry ]] && command+=(--requests 8 --at-once 4 --rounds 1)
      ;;
    budgets)
      command=("$python" benchmarks/budgets.py --decoder "$decoder" --dtype "$dtype"
        --methods "$before,fastv" --budgets "$budget" --stages "$stages" --batch "$batches"
        --tokens 16 --rounds 1 --out "$out/budgets.json" "${flags[@]}"
        --compilation-mode 0 --cudagraph-mode FULL_DECODE_ONLY)
      [[ ${memory[*]} ]] && command+=(--no-stock)
      ;;
    tower)
      command=("$python" benchmarks/gpu.py tower --dtype "$dtype" --methods "$towers" --rounds 10)
      [[ $dry ]] && command+=(--small --budget 16 --rounds 1)
      ;;
    native) # positions are added to the buffer that graphs have taken down
      command=(env TRITON_F32_DEFAULT=ieee 'FICOCO_TEST_ENGINE={"enforce_eager": false}' "${tests[@]}"
        -p tests.engine.replays -m engine -k "compiled or (before and qwen2.5-vl)"
        tests/engine/test_native.py)
      [[ $dry ]] && command=("${tests[@]}" -m engine -k "before and qwen2.5-vl"
        tests/engine/test_native.py)
      ;;
    largest)
      command=("$python" benchmarks/largest.py)
      [[ $dry ]] && command+=(--tokens 1024 --dtype float32)
      ;;
    server)
      command=("$python" benchmarks/gpu.py server "$out/loadtest" --decoder "$decoder"
        --dtype "$dtype" --methods "$before" --budgets "$full,$budget" --requests 64)
      [[ $dry ]] && command+=(--requests 8 --concurrency 4)
      ;;
  esac
}

declare -A outcome=()
note() { # step, outcome
  outcome[$1]=$2
  printf '%-8s  %s\n' "$1" "$2" | tee -a "$out/summary.txt"
}

# shellcheck disable=SC2329 # at the end, whatever the end is
archive() {
  tar -czf "$out.tar.gz" -C "$(dirname "$out")" "$(basename "$out")"
  echo "results: $out.tar.gz"
}

mkdir -p "$out" || exit
{
  date -u +%FT%TZ
  git log -1 --format=%h 2>/dev/null
  echo "decoder $decoder, $dtype, $backend${dry:+, a dry run}"
} >"$out/summary.txt"
nvidia-smi >"$out/nvidia-smi.txt" 2>&1
trap archive EXIT
# It runs in a group of its own, which Ctrl-C does not reach.
trap 'kill "$running"; wait "$running"; exit 130' INT TERM

due=$SECONDS failed=0 running=''
for step in "${steps[@]}"; do
  command_of "$step"
  due=$((due + seconds[$step] * ${slower:-1}))
  given=$((due - SECONDS)) begun=$SECONDS
  if [[ $reason ]]; then
    note "$step" "skipped: $reason"
    continue
  elif [[ -n ${needs[$step]:-} && ${outcome[${needs[$step]}]:-ok} != ok* ]]; then
    note "$step" "skipped: ${needs[$step]} failed"
    continue
  elif ((given < 5)); then
    note "$step" "skipped: no time left" && failed=1
    continue
  fi
  echo "== $step, at most $given s"
  timeout --kill-after=5 "$given" "${command[@]}" </dev/null >"$out/$step.md" 2>"$out/$step.log" &
  running=$!
  wait $running
  code=$?
  cat "$out/$step.md"
  [[ -s $out/$step.log ]] || rm -f "$out/$step.log"
  case $code in
    0) note "$step" "ok, $((SECONDS - begun)) s" ;;
    124 | 137) note "$step" "FAILED: not done in $given s" && failed=1 ;;
    *) note "$step" "FAILED, $((SECONDS - begun)) s" && failed=1 ;;
  esac
  [[ $code != 0 && -s $out/$step.log ]] && tail -n 20 "$out/$step.log"
  [[ $step == device && $code != 0 ]] && exit 1
done
cat "$out/summary.txt"
exit $failed
