# SPDX-License-Identifier: Apache-2.0
"""vllm-router before two of our servers, as deploy/README.md starts it: what is said of images gets
through, so do reports and refusals, and a session stays where its images are cached.

Skipped where it is not installed (`make tools`).
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
import pytest

from tests.server.conftest import (
    API_KEY,
    MODEL,
    POLICY,
    TOKENS,
    Server,
    eventually,
    free_port,
    image,
    input_image,
    running,
    turn,
    user,
    value,
)

ROOT = Path(__file__).parents[2]
ROUTER = ROOT / ".tools/vllm-router/bin/vllm-router"

pytestmark = pytest.mark.server


class Routed(NamedTuple):
    """Two servers and what stands before them."""

    openai: openai.OpenAI
    http: httpx.Client
    servers: tuple[Server, Server]

    def counted(self, name: str, **labels: str) -> list[float]:
        """A series of each server."""
        return [value(server.metrics(), name, **labels) for server in self.servers]


@pytest.fixture(scope="module")
def routed(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Routed]:
    """The command of deploy/README.md, with other addresses and a key."""
    if shutil.which(ROUTER) is None:
        pytest.skip("needs vllm-router: make tools")
    text = (ROOT / "deploy/README.md").read_text()
    [said] = re.findall(r"```bash\n(vllm-router .*?)```", text, re.DOTALL)
    folder, port = tmp_path_factory.mktemp("routed"), free_port()
    command = ["ficoco_server.cli", "serve", MODEL, *POLICY]
    with running(command, folder / "server") as other, (folder / "router").open("w") as log:
        for example, here in (("8000", server.url), ("8001", other.url)):
            assert f"http://127.0.0.1:{example}" in said
            said = said.replace(f"http://127.0.0.1:{example}", here)
        _, *arguments = shlex.split(said)
        arguments[arguments.index("--port") + 1] = str(port)
        process = subprocess.Popen(
            [ROUTER, *arguments, f"--prometheus-port={free_port()}", f"--api-key={API_KEY}"],
            stdout=log,
            stderr=log,
        )
        url = f"http://127.0.0.1:{port}"
        try:
            assert eventually(lambda: ready(process, url), 60), (folder / "router").read_text()
            headers = {"Authorization": f"Bearer {API_KEY}"}
            with httpx.Client(base_url=url, headers=headers, timeout=120) as http:
                client = openai.OpenAI(base_url=f"{url}/v1", api_key=API_KEY, max_retries=0)
                yield Routed(client, http, (server, other))
        finally:
            process.terminate()
            process.wait(30)


def ready(process: subprocess.Popen[bytes], url: str) -> bool:
    assert process.poll() is None, "the router has stopped"
    try:
        return httpx.get(f"{url}/readiness").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize(
    ("said", "part", "kept"),
    [
        ({}, {}, TOKENS),
        ({"visual_token_budget": 48}, {}, 48),
        ({"reduction": {"method": "tome", "budget": 32}}, {}, 32),
        ({}, {"visual_token_budget": 24}, 24),
        ({}, {"detail": "low"}, 16),
    ],
)
def test_what_a_request_says_and_what_the_answer_reports(
    routed: Routed, said: dict[str, Any], part: dict[str, Any], kept: int
) -> None:
    ask = routed.openai.chat.completions.create
    messages = user(image(**part))
    answer = ask(model=MODEL, messages=messages, max_tokens=4, extra_body=said)
    assert answer.usage.prompt_tokens_details.image_tokens == kept
    if said or part:
        assert answer.reduction["visual_tokens_kept"] == kept
    *_, last = ask(model=MODEL, messages=messages, max_tokens=4, extra_body=said, stream=True)
    if said or part:
        assert last.reduction["visual_tokens_kept"] == kept


def test_the_responses_api(routed: Routed) -> None:
    answer = routed.openai.responses.create(
        model=MODEL,
        input=turn(input_image()),
        max_output_tokens=4,
        extra_body={"visual_token_budget": 48},
    )
    assert answer.reduction["visual_tokens_kept"] == 48


def test_a_refusal_is_the_servers_own_and_not_tried_again(routed: Routed) -> None:
    body = {"model": MODEL, "messages": user(image()), "visual_token_budget": 0}
    direct = routed.servers[0].http.post("/v1/chat/completions", json=body)
    before = sum(routed.counted("vllm_ficoco_requests_total", outcome="refused"))
    refused = routed.http.post("/v1/chat/completions", json=body)
    assert refused.status_code == 400 and refused.json() == direct.json()
    assert sum(routed.counted("vllm_ficoco_requests_total", outcome="refused")) == before + 1


def test_what_servers_can_do_is_told(routed: Routed) -> None:
    told = routed.http.get("/v1/reduction")
    assert told.status_code == 200
    direct = [server.http.get("/v1/reduction").json()["methods"] for server in routed.servers]
    assert told.json()["methods"] in direct


def test_a_session_stays_where_its_image_is_cached(routed: Routed) -> None:
    """And sessions are spread over the servers."""
    homes = set()
    for session in range(8):
        before = routed.counted("vllm_ficoco_requests_total", outcome="success")
        hits = sum(routed.counted("vllm:mm_cache_hits_total"))
        for _ in range(3):
            routed.openai.chat.completions.create(
                model=MODEL,
                messages=user(image(9000 + session)),
                max_tokens=1,
                extra_body={"visual_token_budget": 48},
                extra_headers={"X-Session-ID": f"session-{session}"},
            )
        after = routed.counted("vllm_ficoco_requests_total", outcome="success")
        new = [b - a for a, b in zip(before, after, strict=True)]
        assert sorted(new) == [0, 3]
        assert sum(routed.counted("vllm:mm_cache_hits_total")) == hits + 2
        homes.add(new.index(3))
    assert homes == {0, 1}
