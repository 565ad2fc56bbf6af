#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Package:   lmms-eval 0.7.3 (with filelock 3.32.7, see lmms-eval-filelock.sh); some GB with torch
# Date:      2026-11-28, Python 3.11
# Source:    lmms_eval/models/chat/openai.py: process_single_request returns "[LMMS_EVAL_REQUEST_FAILED ...]" as the text of the answer
# Behaviour: a server that refuses every request (here with a 400) gets an accuracy of 0, in the table and in results.json, and the
#            command ends with 0. One that refuses half of them gets the accuracy of the other half, halved.
# Expected:  an error, or at least a number of requests that have failed.
# Means:     a budget that a server's policy refuses looks like a budget that ruins the accuracy; README says where to look.
# Seen:
#   the server has refused 4 of 4 requests; lmms-eval: exit 0, accuracy 0.0
#   the server has refused 2 of 4 requests; lmms-eval: exit 0, accuracy 0.5
set -euo pipefail
folder=$(mktemp -d); trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install --quiet lmms-eval==0.7.3 filelock==3.32.7 || exit 2
mkdir "$folder/task"
for number in 0 1 2 3; do echo "{\"question\": \"$number?\", \"answer\": \"yes\"}"; done > "$folder/questions.jsonl"
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
cat > "$folder/show.py" <<'PY'
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

REFUSED = {"error": {"message": "no", "type": "BadRequestError", "param": None, "code": 400}}
ANSWER = {
    "id": "chat-1", "object": "chat.completion", "created": 1, "model": "m",
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}],
}


def evaluate(of_which):
    """Serves those questions right answers and refuses the others; what lmms-eval makes of it."""
    refused = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = self.rfile.read(int(self.headers["content-length"])).decode()
            good = any(f"{number}?" in asked for number in of_which)
            if not good:
                refused.append(asked)
            body = json.dumps(ANSWER if good else REFUSED).encode()
            self.send_response(200 if good else 400)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    out = f"out{len(of_which)}"
    arguments = f"model_version=m,base_url=http://127.0.0.1:{server.server_port}/v1,api_key=none,max_retries=1"
    command = [sys.executable, "-m", "lmms_eval", "--model", "openai", "--model_args", arguments, "--tasks", "tiny"]
    done = subprocess.run([*command, "--include_path", "task", "--output_path", out], capture_output=True, text=True)
    found = list(Path(out).rglob("*_results.json"))
    if not found:
        print(done.stdout[-1000:], done.stderr[-1000:])
        sys.exit(1 if done.returncode else 2)
    accuracy = json.loads(found[0].read_text())["results"]["tiny"]["exact,none"]
    print(f"the server has refused {len(refused)} of 4 requests; lmms-eval: exit {done.returncode}, accuracy {accuracy}")
    return len(refused), done.returncode, accuracy


sys.exit([evaluate([]), evaluate([0, 1])] != [(4, 0, 0.0), (2, 0, 0.5)])
PY
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HOME="$folder/hub"
cd "$folder"
venv/bin/python show.py
