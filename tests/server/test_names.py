# SPDX-License-Identifier: Apache-2.0
"""Names of the model that stand for a budget, over HTTP: ``--reduction-alias`` of ``server``."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.conftest import MODEL, TOKENS, Server, image, input_image, turn, user, value

pytestmark = pytest.mark.server

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
NAMES = ["fast", "merged", "by-content", "whole"]


def ask(server: Server, name: str, *parts: Any, path: str = CHAT, **said: Any) -> Any:
    """The answer to a question under a name of the model."""
    if path == CHAT:
        body = {"messages": user(*parts), "max_tokens": 4}
    else:
        body = {"input": turn(*parts), "max_output_tokens": 4}
    answer = server.http.post(path, json={"model": name, "temperature": 0, **body, **said})
    assert answer.status_code == 200, answer.text
    return answer.json()


def kept(answer: Any) -> list[tuple[str, int]]:
    """Method and visual tokens of every image."""
    return [(one["method"], one["visual_tokens_kept"]) for one in answer["reduction"]["images"]]


@pytest.mark.parametrize(("path", "part"), [(CHAT, image), (RESPONSES, input_image)])
def test_a_name_is_the_model_with_that_default(server: Server, path: str, part: Any) -> None:
    named = ask(server, "fast", part(), part(1), path=path)
    said = ask(server, MODEL, part(), part(1), path=path, visual_token_budget=48)
    assert kept(named) == [("score", 48)] * 2
    for field in ("choices", "usage", "reduction", "model"):
        assert named.get(field) == said.get(field)
    assert named["model"] == MODEL
    assert kept(ask(server, "merged", part(), path=path)) == [("tome", 36)]
    assert kept(ask(server, "whole", part(), path=path)) == [("none", TOKENS)]
    chosen = ask(server, "by-content", part(), path=path)["reduction"]["images"]
    assert [one["requested"] for one in chosen] == ["auto"]
    assert "reduction" not in ask(server, "fast", path=path), "a text has no images"


def test_streams_too(server: Server) -> None:
    chunks = list(
        server.openai.chat.completions.create(
            model="merged", messages=user(image()), max_tokens=4, stream=True
        )
    )
    assert kept({"reduction": chunks[-1].reduction}) == [("tome", 36)]
    assert {chunk.model for chunk in chunks} == {MODEL}


@pytest.mark.parametrize(
    ("parts", "said", "due"),
    [
        ([image()], {"visual_token_budget": 16}, [("score", 16)]),
        ([image()], {"visual_token_budget": None}, [("tome", 36)]),
        ([image()], {"reduction": {"method": "topk", "budget": 20}}, [("topk", 20)]),
        ([image()], {"reduction": {"method": "none"}}, [("none", TOKENS)]),
        ([image(detail="auto")], {}, [("tome", 36)]),
        ([image(detail="low")], {}, [("score", 16)]),
        ([image(detail="high"), image()], {}, [("none", TOKENS), ("tome", 36)]),
        ([image(visual_token_budget=20), image()], {}, [("score", 20), ("tome", 36)]),
    ],
)
def test_what_a_request_says_wins_whole(
    server: Server, parts: list[Any], said: dict[str, Any], due: list[Any]
) -> None:
    """Not the method of the name with the budget of the request."""
    assert kept(ask(server, "merged", *parts, **said)) == due


def test_half_of_a_setting_is_not_made_whole_by_a_name(server: Server) -> None:
    body = {"model": "fast", "messages": user(image()), "reduction": {"method": "topk"}}
    refused = server.http.post(CHAT, json=body)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "reduction.budget"


def test_where_names_are_listed(server: Server) -> None:
    models = server.http.get("/v1/models").json()["data"]
    assert [model["id"] for model in models] == [MODEL, *NAMES]
    for model in models[1:]:
        assert (model["root"], model["parent"]) == (MODEL, MODEL)
        assert model["max_model_len"] == models[0]["max_model_len"]
    about = server.http.get("/v1/reduction").json()
    assert [*about["aliases"]] == NAMES
    assert about["aliases"]["merged"] == {"method": "tome", "budget": 36, "options": {}}
    assert (about["aliases"]["fast"]["method"], about["aliases"]["fast"]["budget"]) == ("score", 48)
    assert about["aliases"]["by-content"]["budget"] == "auto"
    assert about["aliases"]["whole"]["method"] == "none"


def test_metrics_know_the_model_by_its_own_name(server: Server) -> None:
    def counted() -> float:
        of_us = {"stage": "kept", "method": "tome"}
        return value(server.metrics(), "vllm_ficoco_visual_tokens_total", **of_us)

    before = counted()
    ask(server, "merged", image(31))
    assert counted() == before + 36
    names = {dict(labels).get("model_name", MODEL) for _, labels in server.metrics("vllm:")}
    assert names == {MODEL}


def test_routes_that_know_no_budget_do_not_take_a_name(server: Server) -> None:
    messages = user(image())
    for path, body in (
        ("/v1/completions", {"prompt": "what ?"}),
        ("/v1/messages", {"messages": messages, "max_tokens": 2}),
        ("/v1/chat/completions/batch", {"messages": [messages]}),
        ("/v1/completions/render", {"prompt": "what ?"}),
        ("/inference/v1/generate", {"token_ids": [1], "sampling_params": {}}),
    ):
        refused = server.http.post(path, json={"model": "fast", **body})
        assert refused.status_code == 400, refused.text
        error = refused.json()["error"]
        assert error["param"] == "model" and "'fast'" in error["message"]
        assert CHAT in error["message"]
    unknown = server.http.post(CHAT, json={"model": "faster", "messages": messages})
    assert unknown.status_code == 404
