#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Package:   litellm 1.108.7 (its proxy)
# Date:      2026-11-28, Python 3.11
# Source:    litellm/responses/utils.py: get_requested_response_api_optional_param keeps the keys of OpenAI's own parameters
# Behaviour: before a vLLM server (`hosted_vllm/`), the proxy passes fields that OpenAI does not have on from
#            /v1/chat/completions. From /v1/responses it drops them without a word, status 200; only what is inside an object
#            `extra_body` gets through. vLLM takes `top_k` and `repetition_penalty` in both.
# Expected:  the same in both, or a 400 as for parameters that a provider does not have.
# Means:     a budget in a responses request is lost on the way. README's table says where to put it.
# Seen:
#   chat/completions passes on: ['repetition_penalty', 'top_k']
#   responses passes on: []
#   responses, inside extra_body, passes on: ['repetition_penalty', 'top_k']
set -euo pipefail
folder=$(mktemp -d); trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install --quiet 'litellm[proxy]==1.108.7' || exit 2
read -r upstream port < <(python3 - <<'PY'
import socket

probes = [socket.socket(), socket.socket()]
for probe in probes:
    probe.bind(("127.0.0.1", 0))
print(*(probe.getsockname()[1] for probe in probes))
PY
)
cat > "$folder/upstream.py" <<'PY'
"""What a vLLM server answers, and a file of what it was asked."""
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

USAGE = {"total_tokens": 2}
CHAT = {
    "id": "chat-1", "object": "chat.completion", "created": 1, "model": "m", "usage": USAGE | {"prompt_tokens": 1, "completion_tokens": 1},
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}],
}
RESPONSE = {
    "id": "resp_1", "object": "response", "created_at": 1, "model": "m", "status": "completed", "parallel_tool_calls": True,
    "tool_choice": "auto", "tools": [], "usage": USAGE | {"input_tokens": 1, "output_tokens": 1},
    "output": [{"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
                "content": [{"type": "output_text", "text": "yes", "annotations": []}]}],
}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with open(sys.argv[2], "a") as log:
            log.write(json.dumps({"path": self.path, **asked}) + "\n")
        answer = json.dumps(RESPONSE if self.path.endswith("/responses") else CHAT).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args):
        pass


ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
PY
cat > "$folder/litellm.yaml" <<YAML
model_list:
  - model_name: m
    litellm_params: {model: hosted_vllm/m, api_base: http://127.0.0.1:$upstream/v1, api_key: none}
YAML
python3 "$folder/upstream.py" "$upstream" "$folder/asked" &
LITELLM_MASTER_KEY=sk-any LITELLM_LOCAL_MODEL_COST_MAP=True "$folder/venv/bin/litellm" --config "$folder/litellm.yaml" --host 127.0.0.1 --port "$port" > "$folder/log" 2>&1 &
for _ in $(seq 120); do
  curl --silent --fail --output /dev/null "http://127.0.0.1:$port/health/liveliness" && break
  sleep 1
done
python3 - "$port" "$folder/asked" <<'PY' || { code=$?; tail -n 5 "$folder/log"; exit $code; }
import json
import sys
import urllib.request

port, asked = sys.argv[1:]
ours = {"repetition_penalty": 1.1, "top_k": 5}


def passed_on(name, path, body):
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/{path}",
        json.dumps({"model": "m", **body}).encode(),
        {"content-type": "application/json", "authorization": "Bearer sk-any"},
    )
    try:
        urllib.request.urlopen(request, timeout=60).read()
        last = json.loads(open(asked).read().splitlines()[-1])
    except OSError as error:
        print(error)
        sys.exit(2)
    there = sorted(ours.keys() & last.keys())
    print(f"{name}: {there}")
    return there


chat = {"messages": [{"role": "user", "content": "so?"}]}
seen = (
    passed_on("chat/completions passes on", "chat/completions", chat | ours),
    passed_on("responses passes on", "responses", {"input": "so?"} | ours),
    passed_on("responses, inside extra_body, passes on", "responses", {"input": "so?", "extra_body": ours}),
)
sys.exit(seen != (sorted(ours), [], sorted(ours)))
PY
