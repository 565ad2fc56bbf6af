#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Package:   lmms-eval 0.7.3, the newest there is, with filelock 4.3.1, which pip pairs it with; some GB with torch
# Date:      2026-11-28, Python 3.11
# Source:    lmms_eval/evaluator.py: _enable_reentrant_filelocks patches the metaclass in filelock._api, a module of filelock's own
#            that its 4.3 has no longer. The package's requirements do not name filelock.
# Behaviour: `pip install lmms-eval` gives an environment in which every evaluation ends with ModuleNotFoundError before the
#            first question. With `filelock<4` it runs.
# Expected:  what pip installs together works together.
# Means:     tests/tools/lmms-eval.txt has the pin.
# Seen:
#   filelock 4.3.1: exit 1, ModuleNotFoundError: No module named 'filelock._api'
#   filelock 3.32.7: exit 0
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install --quiet lmms-eval==0.7.3 filelock==4.3.1 || exit 2
mkdir "$folder/task"
echo '{"question": "so?", "answer": "yes"}' > "$folder/questions.jsonl"
cat > "$folder/task/tiny.yaml" <<YAML
task: tiny
dataset_path: json
dataset_kwargs: {data_files: {test: $folder/questions.jsonl}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
process_results: !function utils.results
metric_list: [{metric: exact, aggregation: mean, higher_is_better: true}]
YAML
cat > "$folder/task/utils.py" <<'PY'
def visual(doc):
    return []


def results(doc, answers):
    return {"exact": float(answers[0] == doc["answer"])}
PY
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HOME="$folder/hub"
cd "$folder"
try() {
  code=0
  venv/bin/python -m lmms_eval --model dummy --tasks tiny --include_path task > log 2>&1 || code=$?
  said=$(grep -o "ModuleNotFoundError: .*" log | tail -n 1 || true)
  echo "filelock $(venv/bin/python -c 'from importlib.metadata import version as v; print(v("filelock"))'): exit $code${said:+, $said}"
}
try
[[ $code -ne 0 && $said == *filelock._api* ]] || { tail -n 5 log; exit 1; }
venv/bin/pip install --quiet filelock==3.32.7 || exit 2
try
[[ $code -eq 0 ]] || { tail -n 5 log; exit 1; }
