# SPDX-License-Identifier: Apache-2.0
"""deploy/ray/cpu.yaml, as it stands: two replicas under Ray Serve's direct streaming.

Skipped where Ray is not installed (`make tools`).
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.server.conftest import MODEL, eventually, free_port, image, input_image, turn, user

ROOT = Path(__file__).parents[2]
RAY = ROOT / "deploy/ray"
COMMANDS = ROOT / ".tools/ray/bin"

pytestmark = pytest.mark.server


@contextlib.contextmanager
def process(command: list[str | Path], log: Path, environment: dict[str, str]) -> Iterator[Any]:
    """One that is interrupted at the end, and ended with its children where that does not do."""
    with log.open("w") as file:
        started = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
        )
        try:
            yield started
        finally:
            started.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                started.wait(60)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
            started.wait()


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """What the configuration serves, on another port; Ray's own processes stay on this machine."""
    if shutil.which(COMMANDS / "serve") is None:
        pytest.skip("needs Ray: make tools")
    folder, port, head = tmp_path_factory.mktemp("ray"), free_port(), f"127.0.0.1:{free_port()}"
    config = yaml.safe_load((RAY / "cpu.yaml").read_text())
    config["http_options"]["port"] = port
    [server] = config["applications"][0]["args"]["llm_configs"]
    where = server["model_loading_config"]
    where["model_source"] = str(ROOT / where["model_source"])  # of a checkout, but of any folder
    (folder / "config.yaml").write_text(yaml.safe_dump(config))

    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("FICOCO_", "VLLM_P"))}
    [export] = re.findall(r"#   export (.*)", (RAY / "serve.yaml").read_text())
    environment = inherited | dict(word.split("=") for word in export.split())
    environment["PATH"] = f"{COMMANDS}:{environment['PATH']}"
    environment["RAY_USAGE_STATS_ENABLED"] = "0"
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(prefix="ray-") as short:  # names of sockets have a limit
        flags = ["--head", "--block", "--num-cpus=4", "--include-dashboard=false"]
        flags += ["--node-ip-address=127.0.0.1", f"--port={head.split(':')[1]}"]
        flags += [f"--temp-dir={short}", f"--object-store-memory={200 * 2**20}"]
        serve = [COMMANDS / "serve", "run", f"--address={head}", folder / "config.yaml"]
        with process([COMMANDS / "ray", "start", *flags], folder / "ray", environment) as ray:
            assert eventually(lambda: "started" in (folder / "ray").read_text(), 60)
            with process(serve, folder / "serve", environment) as serving:

                def up() -> bool:
                    if ray.poll() is not None or serving.poll() is not None:
                        pytest.fail((folder / "serve").read_text()[-5000:])
                    try:
                        return httpx.get(f"{url}/v1/models").status_code == 200
                    except httpx.TransportError:
                        return False

                assert eventually(up, 400), (folder / "serve").read_text()[-5000:]
                with httpx.Client(base_url=url, timeout=120) as http:
                    yield http


def client(front: httpx.Client) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{front.base_url}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize(
    ("said", "part", "kept"),
    [
        ({}, {}, 96),  # FICOCO_DEFAULT_BUDGET
        ({"visual_token_budget": 48}, {}, 48),
        ({"reduction": {"method": "tome", "budget": 32}}, {}, 32),
        ({}, {"visual_token_budget": 24}, 24),
        ({}, {"detail": "low"}, 16),
        ({"reduction": {"method": "none"}}, {}, 144),
    ],
)
def test_what_a_request_says_holds(
    front: httpx.Client, said: dict[str, Any], part: dict[str, Any], kept: int
) -> None:
    ask = client(front).chat.completions.create
    messages = user(image(**part))
    answer = ask(model=MODEL, messages=messages, max_tokens=4, extra_body=said)
    assert answer.usage.prompt_tokens_details.image_tokens == kept
    assert answer.reduction["visual_tokens_kept"] == kept
    *_, last = ask(model=MODEL, messages=messages, max_tokens=4, extra_body=said, stream=True)
    assert last.reduction["visual_tokens_kept"] == kept


def test_decoder_stages(front: httpx.Client) -> None:
    answer = client(front).chat.completions.create(
        model=MODEL,
        messages=user(image(1)),
        max_tokens=4,
        extra_body={"reduction": {"method": "fastv", "budget": 64}},
    )
    assert answer.reduction["images"][0]["visual_tokens_by_stage"] == [144, 48]


def test_refusals_responses_and_what_there_is(front: httpx.Client) -> None:
    body = {"model": MODEL, "messages": user(image()), "visual_token_budget": 0}
    refused = front.post("/v1/chat/completions", json=body)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "visual_token_budget"
    answer = client(front).responses.create(
        model=MODEL,
        input=turn(input_image()),
        max_output_tokens=4,
        extra_body={"visual_token_budget": 48},
    )
    assert answer.reduction["visual_tokens_kept"] == 48
    assert front.get("/v1/reduction").json()["defaults"]["budget"] == 96


def test_both_replicas_answer(front: httpx.Client) -> None:
    """Each counts what it does itself, and through the front one of them tells."""

    def ask(seed: int) -> None:
        client(front).chat.completions.create(
            model=MODEL, messages=user(image(100 + seed)), max_tokens=16
        )

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(24)))
    seen: dict[float, float] = {}
    for _ in range(20):
        families = text_string_to_metric_families(front.get("/metrics").text)
        samples = [s for f in families for s in f.samples if s.name.startswith("vllm_ficoco_req")]
        began = min(s.value for s in samples if s.name.endswith("_created"))
        seen[began] = sum(s.value for s in samples if s.name.endswith("_total"))
    assert len(seen) == 2 and min(seen.values()) > 0
    assert sum(seen.values()) >= 24
