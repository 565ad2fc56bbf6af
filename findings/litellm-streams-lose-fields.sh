#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Package:   litellm 1.108.7 (the library; its proxy does the same)
# Date:      2026-11-28, Python 3.11
# Source:    litellm/litellm_core_utils/streaming_handler.py builds each chunk anew from choices and usage
# Behaviour: what a server adds to a chat completion at the top level reaches the client, beside `choices` and `usage`. Of the same
#            answer as a stream, it is dropped from every chunk. What it adds inside `usage` stays in both.
# Expected:  the same in both.
# Means:     our report (`reduction`) does not get through in streams; its four most wanted figures stand in
#            `usage.prompt_tokens_details` as well for that reason.
# Seen:
#   whole answer: report {'kept': 48}, usage kept 48
#   stream: report None, usage kept 48
set -euo pipefail
folder=$(mktemp -d); trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install --quiet litellm==1.108.7 || exit 2
cat > "$folder/show.py" <<'PY'
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
import litellm

USAGE = {"prompt_tokens": 50, "completion_tokens": 1, "total_tokens": 51, "prompt_tokens_details": {"cached_tokens": 0, "kept": 48}}
REPORT = {"kept": 48}
HEAD = {"id": "chat-1", "created": 1, "model": "m"}


def choice(**more):
    return {"choices": [{"index": 0, "finish_reason": "stop", **more}]}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        said = {"role": "assistant", "content": "yes"}
        if asked.get("stream"):
            head = {**HEAD, "object": "chat.completion.chunk"}
            chunks = [head | choice(delta=said) | {"report": REPORT}, head | {"choices": [], "usage": USAGE, "report": REPORT}]
            answer = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
        else:
            answer = json.dumps({**HEAD, "object": "chat.completion"} | choice(message=said) | {"usage": USAGE, "report": REPORT})
        self.send_response(200)
        self.send_header("content-type", "text/event-stream" if asked.get("stream") else "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer.encode())

    def log_message(self, *args):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
say = {
    "model": "hosted_vllm/m", "api_base": f"http://127.0.0.1:{server.server_port}/v1", "api_key": "none",
    "messages": [{"role": "user", "content": "so?"}],
}
whole = litellm.completion(**say).model_dump()
chunks = [chunk.model_dump() for chunk in litellm.completion(**say, stream=True, stream_options={"include_usage": True})]
seen = []
for name, parts in (("whole answer", [whole]), ("stream", chunks)):
    report = next((part["report"] for part in parts if part.get("report")), None)
    usage = next(part["usage"] for part in parts if part.get("usage"))
    seen.append((report, (usage["prompt_tokens_details"] or {}).get("kept")))
    print(f"{name}: report {report}, usage kept {seen[-1][1]}")
sys.exit(seen != [(REPORT, 48), (None, 48)])
PY
"$folder/venv/bin/python" "$folder/show.py" 2> "$folder/log" || { code=$?; tail -n 5 "$folder/log"; exit $code; }
