#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Package:   vllm-router 0.1.17 from PyPI
# Date:      2026-11-28, Python 3.11
# Source:    a compiled Rust extension; seen from outside
# Behaviour: the router passes a client's headers on to a server for /v1/chat/completions, /v1/completions and
#            /v1/embeddings. For routes that it only passes through (/v1/responses, /v1/messages, any other) it sends
#            the body alone: no Authorization, no X-Session-ID.
# Expected:  the same headers on every route that is passed through.
# Means:     behind it, a server with an API key answers the responses API with 401, and a session's requests to the
#            responses API are not kept together. deploy/README.md says what to do.
# Seen:
#   /v1/chat/completions: authorization Bearer key, x-session-id one
#   /v1/completions: authorization Bearer key, x-session-id one
#   /v1/responses: authorization None, x-session-id None
#   /v1/messages: authorization None, x-session-id None
set -euo pipefail
folder=$(mktemp -d); trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install --quiet vllm-router==0.1.17 || exit 2
read -r worker port metrics < <(python3 -c '
import socket
free = [socket.socket() for _ in range(3)]
for one in free: one.bind(("127.0.0.1", 0))
print(*(one.getsockname()[1] for one in free))')
# Stands for a server: answers with the headers that it got.
python3 - "$worker" <<'PY' &
import http.server, json, sys
class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.rfile.read(int(self.headers.get("content-length", 0)))
        got = {name: self.headers.get(name) for name in ("authorization", "x-session-id")}
        said = json.dumps({"got": got, "data": [{"id": "m", "object": "model"}]}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)
    do_POST = do_GET
    def log_message(self, *said): pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Server).serve_forever()
PY
"$folder/venv/bin/vllm-router" --worker-urls "http://127.0.0.1:$worker" --policy consistent_hash \
  --port "$port" --prometheus-port "$metrics" >"$folder/log" 2>&1 &
python3 - "$port" <<'PY'
import json, sys, time, urllib.request
base = f"http://127.0.0.1:{sys.argv[1]}"
for _ in range(120):
    try:
        urllib.request.urlopen(f"{base}/readiness")
        break
    except OSError:
        time.sleep(0.5)
else:
    sys.exit(2)
message = [{"role": "user", "content": "hello"}]
got = {}
for path, body in {
    "/v1/chat/completions": {"messages": message},
    "/v1/completions": {"prompt": "hello"},
    "/v1/responses": {"input": "hello"},
    "/v1/messages": {"messages": message, "max_tokens": 1},
}.items():
    headers = {"Authorization": "Bearer key", "X-Session-ID": "one", "Content-Type": "application/json"}
    request = urllib.request.Request(base + path, json.dumps({"model": "m", **body}).encode(), headers)
    got[path] = list(json.load(urllib.request.urlopen(request))["got"].values())
    print(f"{path}: authorization {got[path][0]}, x-session-id {got[path][1]}")
kept, dropped = ["Bearer key", "one"], [None, None]
sys.exit(list(got.values()) != [kept, kept, dropped, dropped])
PY
