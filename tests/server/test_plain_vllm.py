# SPDX-License-Identifier: Apache-2.0
"""The same routes under vLLM's own server command, set up by the environment alone."""

from __future__ import annotations

import contextlib
import os
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from deploy.cpu_vllm import write
from tests.server.conftest import TOKENS, image, running, user, value
from vllm_ficoco.tiny_llava import CHECKPOINT

pytestmark = pytest.mark.server


def test_plain_vllm_with_a_default_policy(tmp_path: Path) -> None:
    environment = {
        "VLLM_PLUGINS": "vllm_ficoco,ficoco_server",
        "FICOCO_DEFAULT_METHOD": "tome",
        "FICOCO_MAX_BUDGET": "48",
        "FICOCO_ALIAS": 'fast=20; best={"method": "score", "budget": 48}',
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
    }
    with contextlib.suppress(PackageNotFoundError):  # vLLM for GPUs: its command starts by itself
        write(tmp_path)
    command = ["vllm.entrypoints.cli.main", "serve", str(CHECKPOINT)]
    with running(
        [*command, "--served-model-name=plain"], tmp_path / "log", **environment
    ) as server:
        ask = server.openai.chat.completions.create
        answer = ask(model="plain", messages=user(image()), max_tokens=4)
        assert answer.reduction["images"] == [
            {
                "method": "tome",
                "budget": 48,
                "visual_tokens_before": TOKENS,
                "visual_tokens_kept": 48,
            }
        ]
        # Also without --enable-prompt-tokens-details, which only our command sets.
        assert answer.usage.prompt_tokens_details.image_tokens == 48
        for name, due in (("fast", ("tome", 20)), ("best", ("score", 48))):
            answer = ask(model=name, messages=user(image()), max_tokens=4)
            [said] = answer.reduction["images"]
            assert (said["method"], said["visual_tokens_kept"], answer.model) == (*due, "plain")
        assert server.http.get("/v1/reduction").json()["defaults"]["budget"] == 48
        assert "<title>Visual token budgets</title>" in server.http.get("/").text
        for field, given in (("visual_token_budget", 49), ("reduction", {"method": "none"})):
            body = {"model": "plain", "messages": user(image()), field: given}
            refused = server.http.post("/v1/chat/completions", json=body)
            assert refused.status_code == 400 and "from 1 to 48, by this server" in refused.text
        # Routes that know no budget would pass by the largest one.
        for path, content in (
            ("/v1/messages", [{"type": "image", "source": {"type": "base64", "data": "AAAA"}}]),
            ("/v1/chat/completions/batch", [image()]),
        ):
            said = [{"role": "user", "content": content}]
            messages = [said] if path.endswith("batch") else said
            refused = server.http.post(path, json={"model": "plain", "messages": messages})
            assert refused.status_code == 400 and "largest visual token budget, 48" in refused.text
        kept = {"stage": "kept", "method": "tome"}
        assert value(server.metrics(), "vllm_ficoco_visual_tokens_total", **kept) == 48 + 20
