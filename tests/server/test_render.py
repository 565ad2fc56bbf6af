# SPDX-License-Identifier: Apache-2.0
"""Prompts that are only looked at: ``/tokenize``, and ``/render`` for another server. Their tokens
are those that the engine gets, whatever the budget."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.conftest import MODEL, TOKENS, Server, image, input_image, turn, user, value

pytestmark = pytest.mark.server

CHAT, RESPONSES, GENERATE = "/v1/chat/completions", "/v1/responses", "/inference/v1/generate"


def post(server: Server, path: str, body: Any) -> Any:
    answer = server.http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def asked(*parts: Any, **said: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": user(*parts), "max_tokens": 3, "temperature": 0, **said}


BODIES = [
    asked(image()),
    asked(image(), image(1), visual_token_budget=48),
    asked(image(visual_token_budget=20), image(1, detail="low")),
    asked(image(), reduction={"method": "tome", "budget": 36}),
    asked(image(2), visual_token_budget="auto"),
    asked(image(), model="merged"),
    asked(visual_token_budget=None),
]


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
def test_the_tokens_are_those_of_the_engine(server: Server, body: dict[str, Any]) -> None:
    answer = post(server, CHAT, body | {"return_token_ids": True})
    prompt = answer["prompt_token_ids"]
    counted = post(server, "/tokenize", body)
    assert (counted["tokens"], counted["count"]) == (prompt, len(prompt))
    rendered = post(server, f"{CHAT}/render", body)
    assert (rendered["token_ids"], rendered["model"]) == (prompt, MODEL)
    made = post(server, GENERATE, rendered)
    assert made["choices"][0]["token_ids"] == answer["choices"][0]["token_ids"]


@pytest.mark.parametrize("size", [(200, 50), (100, 100)])
@pytest.mark.parametrize("kind", ["tiled", "native"])
def test_of_images_of_any_size(
    request: pytest.FixtureRequest, kind: str, size: tuple[int, int]
) -> None:
    server: Server = request.getfixturevalue(kind)
    body = asked(image(5, size), visual_token_budget=9)
    answer = post(server, CHAT, body | {"return_token_ids": True})
    assert answer["reduction"]["visual_tokens_kept"] == 9
    assert post(server, "/tokenize", body)["tokens"] == answer["prompt_token_ids"]
    rendered = post(server, f"{CHAT}/render", body)
    assert rendered["token_ids"] == answer["prompt_token_ids"]
    made = post(server, GENERATE, rendered)
    assert made["choices"][0]["token_ids"] == answer["choices"][0]["token_ids"]


def test_of_the_responses_api(server: Server) -> None:
    body = {"model": MODEL, "input": turn(input_image()), "max_output_tokens": 3}
    whole = post(server, f"{RESPONSES}/render", body)["token_ids"]
    for said in ({"visual_token_budget": 48}, {"model": "fast"}):
        rendered = post(server, f"{RESPONSES}/render", body | said)
        assert len(rendered["token_ids"]) == len(whole) - TOKENS + 48
        answer = post(server, RESPONSES, body | said)
        assert answer["usage"]["input_tokens"] == len(rendered["token_ids"])


def test_more_than_the_model_takes_is_counted_and_not_rendered(server: Server) -> None:
    body = asked(*(image(n) for n in range(16)), visual_token_budget=140)
    assert post(server, "/tokenize", body)["count"] > 16 * 140
    refused = server.http.post(f"{CHAT}/render", json=body)
    assert refused.status_code == 400
    assert "visual_token_budget 127 or less" in refused.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/tokenize", f"{CHAT}/render"])
def test_settings_are_refused_as_they_are_of_chat(server: Server, path: str) -> None:
    def refusals() -> float:
        series = server.metrics("vllm_ficoco_requests")
        return value(series, "vllm_ficoco_requests_total", method="invalid", outcome="refused")

    for body in (
        asked(image(), visual_token_budget=0),
        asked(image(), reduction={"method": "random", "budget": 48}),
        asked(image(visual_token_budget=1)),
        asked(image(), extra_body={"visual_token_budget": 48}),
        asked({"type": "text", "text": "?", "visual_token_budget": 48}, image()),
    ):
        before = refusals()
        refused, due = (server.http.post(one, json=body) for one in (path, CHAT))
        assert refused.status_code == due.status_code == 400
        assert refused.json() == due.json()
        assert refusals() == before + 2


def test_a_text_has_no_images_to_set(server: Server) -> None:
    text = {"model": MODEL, "prompt": "what color ?"}
    assert post(server, "/tokenize", text)["count"] > 2
    assert post(server, "/tokenize", text | {"model": "fast"})["count"] > 2
    both = text | {"messages": user(image()), "visual_token_budget": 48}
    for body in (text | {"visual_token_budget": 48}, both):
        refused = server.http.post("/tokenize", json=body)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "visual_token_budget"
    words = post(server, "/detokenize", {"model": "fast", "tokens": [5, 6]})
    assert words == post(server, "/detokenize", {"model": MODEL, "tokens": [5, 6]})
