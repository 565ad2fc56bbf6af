# SPDX-License-Identifier: Apache-2.0
"""``vllm-ficoco run-batch``: a line is what a request to the server is; vLLM's own refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import MODEL, TOKENS, image, user
from vllm_ficoco.tiny_llava import CHECKPOINT

pytestmark = pytest.mark.server

CHAT = "/v1/chat/completions"


def line(name: Any, *parts: Any, url: str = CHAT, **body: Any) -> str:
    """A line of an input file, with a question at the end."""
    said = {"model": MODEL, "max_tokens": 4, "messages": user(*parts), **body}
    return json.dumps({"custom_id": name, "method": "POST", "url": url, "body": said})


def run(command: list[str], lines: list[str], folder: Path, **environment: str) -> Any:
    """A finished batch runner; its output file is ``out`` in the folder."""
    (folder / "in").write_text("\n".join(lines))
    ours = ("FICOCO_", "VLLM_PLUGINS", "PROMETHEUS_")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    files = ["-i", str(folder / "in"), "-o", str(folder / "out"), "--enforce-eager"]
    return subprocess.run(
        [sys.executable, "-m", *command, *files],
        env=inherited | environment,
        capture_output=True,
        text=True,
    )


def test_lines_are_requests_to_the_server(tmp_path: Path) -> None:
    lines = [
        line("text"),
        line("budget", image(1), visual_token_budget=48),
        line("images", image(2, visual_token_budget=16), image(3), reduction={"method": "tome"}),
        line("default", image(4)),
        line("low", image(5, detail="low")),
        line("by name", image(4), model="small"),
        "",
        line("none", image(1), reduction={"method": "none"}),
        line("zero", image(1), visual_token_budget=0),
        line("misplaced", image(1), {"type": "text", "text": "?", "visual_token_budget": 3}),
        line("forbidden", image(1), reduction={"method": "evit", "budget": 9}),
        line("schema", image(1), temperature="hot"),
        line("stream", image(6), stream=True, visual_token_budget=48),
        line("the same image", image(6), visual_token_budget=48),
        line("responses", url="/v1/responses"),
        json.dumps({"custom_id": "e", "method": "POST", "url": "/v1/embeddings", "body": {}}),
        line(7),
        '{"custom_id": "half',
    ]
    flags = [
        "--reduction-default-budget=72",
        "--reduction-low-budget=24",
        "--reduction-alias=small=20",
        "--reduction-methods=score,tome",
    ]
    command = ["ficoco_server.cli", "run-batch", f"--model={MODEL}", *flags]
    done = run(command, lines, tmp_path)
    assert done.returncode == 0, done.stderr[-5000:]
    out = [json.loads(text) for text in (tmp_path / "out").read_text().splitlines()]
    assert [answer["custom_id"] for answer in out] == [
        str(json.loads(text)["custom_id"]) if text.endswith("}") else "" for text in lines if text
    ]
    answers = {answer["custom_id"]: answer for answer in out}

    kept = {
        name: [
            (each["method"], each["visual_tokens_kept"])
            for each in answer["response"]["body"]["reduction"]["images"]
        ]
        for name, answer in answers.items()
        if (answer["response"]["body"] or {}).get("reduction")
    }
    assert kept == {
        "budget": [("score", 48)],
        "images": [("tome", 16), ("tome", 72)],
        "default": [("score", 72)],
        "low": [("score", 24)],
        "by name": [("score", 20)],
        "none": [("none", TOKENS)],
        "the same image": [("score", 48)],
    }
    for name, images in kept.items():
        usage = answers[name]["response"]["body"]["usage"]
        assert usage["prompt_tokens_details"]["image_tokens"] == sum(n for _, n in images)
    assert answers["text"]["response"]["status_code"] == 200

    for name, message in {
        "zero": "visual_token_budget",
        "misplaced": "messages[0].content[1].visual_token_budget",
        "forbidden": "score, tome",
        "schema": "temperature",
        "stream": "stream mode",
        "responses": "URL /v1/responses was used",
        "e": "",
        "": "Invalid JSON",
    }.items():
        answer = answers[name]
        assert answer["response"]["status_code"] == 400 and answer["response"]["body"] is None
        assert message in json.dumps(answer["error"])


def test_vllms_own_runner_does_not_drop_budgets_without_a_word(tmp_path: Path) -> None:
    lines = [line("budget", image(1), visual_token_budget=48)]
    command = ["vllm.entrypoints.openai.run_batch", f"--model={CHECKPOINT}"]
    done = run(command, lines, tmp_path, VLLM_PLUGINS="vllm_ficoco,ficoco_server")
    assert done.returncode != 0 and "Use `vllm-ficoco run-batch`" in done.stderr
    assert not (tmp_path / "out").exists()
