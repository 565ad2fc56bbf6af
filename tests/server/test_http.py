# SPDX-License-Identifier: Apache-2.0
"""The front end over HTTP: the ``openai`` client and a real server with the shipped model."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from vllm.entrypoints.scale_out.token_in_token_out.mm_serde import (
    decode_mm_kwargs_item,
    encode_mm_kwargs_item,
)

from tests.server.conftest import (
    API_KEY,
    MODEL,
    TOKENS,
    Server,
    eventually,
    image,
    input_image,
    picture,
    turn,
    user,
    value,
)
from vllm_ficoco.methods import METHODS
from vllm_ficoco.packed import PACKED_FIELD, pack
from vllm_ficoco.settings import Reduction

pytestmark = pytest.mark.server

KV_BYTES = 6144
"""Of one token: keys and values, 6 layers of 4 heads of 64, two bytes each."""


def chat(server: Server, *parts: dict[str, Any], **options: Any) -> Any:
    """A chat completion; options that OpenAI does not know go through ``extra_body``."""
    extra = {k: options.pop(k) for k in ("visual_token_budget", "reduction") if k in options}
    return server.openai.chat.completions.create(
        model=MODEL,
        messages=user(*parts),
        **{"max_tokens": 4, "temperature": 0, "extra_body": extra, **options},
    )


def kept(answer: Any) -> list[int]:
    """Visual tokens that an answer says its images kept."""
    return [one["visual_tokens_kept"] for one in answer.reduction["images"]]


# --- Chat completions -----------------------------------------------------------------------


def test_a_budget_is_held_exactly(server: Server) -> None:
    full, reduced = chat(server, image()), chat(server, image(), visual_token_budget=64)
    assert full.usage.prompt_tokens - reduced.usage.prompt_tokens == TOKENS - 64
    assert reduced.usage.prompt_tokens_details.multimodal_tokens == {"image": 64}
    assert reduced.usage.prompt_tokens_details.image_tokens == 64
    assert full.usage.prompt_tokens_details.image_tokens == TOKENS
    assert reduced.reduction.pop("estimated_prefill_flops_ratio") < 0.6
    image_report = {
        "method": "score",
        "budget": 64,
        "visual_tokens_before": TOKENS,
        "visual_tokens_kept": 64,
    }
    assert reduced.reduction == {
        **image_report,
        "kv_cache_bytes_held": 64 * KV_BYTES,
        "kv_cache_bytes_saved": (TOKENS - 64) * KV_BYTES,
        "images": [image_report],
    }
    assert (full.reduction["method"], kept(full)) == ("none", [TOKENS])
    assert full.reduction["kv_cache_bytes_saved"] == 0
    assert full.reduction["estimated_prefill_flops_ratio"] == 1


@pytest.mark.parametrize("include_usage", [True, False])
@pytest.mark.parametrize("n", [1, 2])
def test_streams_end_with_the_report(server: Server, include_usage: bool, n: int) -> None:
    options: dict[str, Any] = {"n": n, "temperature": n - 1}  # vLLM wants n = 1 where it is greedy
    if include_usage:
        options["stream_options"] = {"include_usage": True}
    once = chat(server, image(), visual_token_budget=64)
    chunks = list(chat(server, image(), visual_token_budget=64, stream=True, **options))
    assert kept(chunks[-1]) == [64]
    for chunk in chunks[:-1]:  # clients keep more of a chunk with a choice
        ends = any(choice.finish_reason for choice in chunk.choices)
        assert hasattr(chunk, "reduction") == ends and (not ends or kept(chunk) == [64])
    if include_usage:
        assert chunks[-1].choices == []
        assert chunks[-1].usage.prompt_tokens_details.image_tokens == 64
        assert chunks[-1].usage.prompt_tokens == once.usage.prompt_tokens
    for index in range(n):
        text = [c.delta.content or "" for k in chunks for c in k.choices if c.index == index]
        assert n > 1 or "".join(text) == once.choices[0].message.content
        assert "".join(text).strip()


FIGURES = ("reduction_method", "visual_tokens_before", "visual_tokens_kept", "kv_cache_bytes_saved")


def test_the_usage_has_the_figures(server: Server) -> None:
    """What gateways and the client's own helper keep of an answer, in a stream above all."""

    def figures(details: Any) -> list[Any]:
        return [getattr(details, name) for name in FIGURES]

    expected = ["tome", TOKENS, 60, (TOKENS - 60) * KV_BYTES]
    tome = {"method": "tome", "budget": 60}
    answer = chat(server, image(), reduction=tome)
    assert figures(answer.usage.prompt_tokens_details) == expected
    with server.openai.chat.completions.stream(
        model=MODEL,
        messages=user(image()),
        max_tokens=4,
        stream_options={"include_usage": True},
        extra_body={"reduction": tome},
    ) as stream:
        ends = [e.chunk for e in stream if e.type == "chunk" and e.chunk.choices][-1]
        whole = stream.get_final_completion()
    assert kept(ends) == [60] and ends.choices[0].finish_reason
    assert figures(whole.usage.prompt_tokens_details) == expected
    answer = respond(server, input_image(), reduction=tome)
    assert figures(answer.usage.input_tokens_details) == expected
    last = list(respond(server, input_image(), reduction=tome, stream=True))[-1]
    assert figures(last.response.usage.input_tokens_details) == expected
    for untouched in (chat(server).usage, respond(server).usage):
        assert "visual_tokens_kept" not in untouched.model_dump_json()


def test_text_requests_are_untouched(server: Server) -> None:
    answer = chat(server)
    assert not hasattr(answer, "reduction")
    assert getattr(answer.usage.prompt_tokens_details, "image_tokens", None) is None
    chunks = list(chat(server, stream=True))
    assert not any(hasattr(chunk, "reduction") for chunk in chunks)


def test_every_image_its_own_budget(server: Server) -> None:
    answer = chat(
        server,
        image(0, visual_token_budget=32),
        image(1),
        image(2, reduction={"method": "tome", "budget": 70}),
        image(3, reduction={"method": "none"}),
        visual_token_budget=48,
    )
    assert kept(answer) == [32, 48, 70, TOKENS]
    assert answer.reduction["method"] == "mixed"
    assert [i["method"] for i in answer.reduction["images"]] == [
        *("score", "score", "tome", "none")
    ]
    assert answer.usage.prompt_tokens_details.image_tokens == 32 + 48 + 70 + TOKENS


def test_detail(server: Server) -> None:
    parts = [image(0, detail="low"), image(1, detail="high"), image(2, detail="auto")]
    assert kept(chat(server, *parts)) == [16, TOKENS, TOKENS]
    assert kept(chat(server, *parts, visual_token_budget=48)) == [16, TOKENS, 48]
    said = ("original", "LOW", "", None)
    parts = [image(i, detail=detail) for i, detail in enumerate(said)]
    assert kept(chat(server, *parts, visual_token_budget=48)) == [TOKENS, 16, 48, 48]
    parts = [input_image(i, detail=detail) for i, detail in enumerate(said)]
    assert kept(respond(server, *parts, visual_token_budget=48)) == [TOKENS, 16, 48, 48]


def test_every_allowed_method(server: Server) -> None:
    about = server.http.get("/v1/reduction").json()
    for method in about["policy"]["methods"]:
        answer = chat(server, image(), reduction={"method": method, "budget": 48})
        assert kept(answer) == [TOKENS if method == "none" else 48]
        assert answer.reduction["method"] == method


def test_options(server: Server) -> None:
    for given in (
        {"budget": 48, "options": {"alpha": 1}},
        {"method": "ficoco-v", "budget": 48, "options": {"lambda": 0.5, "window": 4}},
    ):
        assert kept(chat(server, image(), reduction=given)) == [48]


def test_a_budget_above_the_image_is_no_reduction(server: Server) -> None:
    full, above = chat(server, image()), chat(server, image(), visual_token_budget=TOKENS + 1)
    assert above.reduction == full.reduction
    assert above.choices[0].message.content == full.choices[0].message.content


def test_n_logprobs_and_structured_output(server: Server) -> None:
    answer = chat(
        server, image(), visual_token_budget=64, n=2, logprobs=True, top_logprobs=2, temperature=1
    )
    assert len(answer.choices) == 2 and kept(answer) == [64]
    assert all(len(c.logprobs.content[0].top_logprobs) == 2 for c in answer.choices)
    extra = {"visual_token_budget": 64, "structured_outputs": {"choice": ["red", "blue"]}}
    answer = chat(server, image(), extra_body=extra)
    assert answer.choices[0].message.content.strip() in ("red", "blue") and kept(answer) == [64]


def test_tools_are_as_in_vllm(server: Server) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    answer = chat(server, image(), visual_token_budget=64, tools=tools, tool_choice="none")
    assert kept(answer) == [64]
    with pytest.raises(openai.BadRequestError, match="--enable-auto-tool-choice"):
        chat(server, image(), visual_token_budget=64, tools=tools)


def test_the_same_image_at_two_budgets_shares_nothing_wrongly(server: Server) -> None:
    first = {b: chat(server, image(7), visual_token_budget=b) for b in (16, 64, TOKENS)}
    for budget, answer in first.items():
        again = chat(server, image(7), visual_token_budget=budget)
        assert kept(again) == [budget]
        assert again.choices[0].message.content == answer.choices[0].message.content


# --- Responses ------------------------------------------------------------------------------


def respond(server: Server, *parts: dict[str, Any], **options: Any) -> Any:
    extra = {k: options.pop(k) for k in ("visual_token_budget", "reduction") if k in options}
    return server.openai.responses.create(
        model=MODEL, input=turn(*parts), max_output_tokens=4, extra_body=extra, **options
    )


def test_responses(server: Server) -> None:
    parts = (
        input_image(0, detail="low"),
        input_image(1, detail="auto"),
        input_image(2, visual_token_budget=32),
    )
    answer = respond(server, *parts, visual_token_budget=64)
    assert kept(answer) == [16, 64, 32]
    assert answer.usage.input_tokens_details.image_tokens == 112
    events = list(respond(server, *parts, visual_token_budget=64, stream=True))
    assert events[-1].type == "response.completed"
    assert kept(events[-1].response) == [16, 64, 32]
    assert not hasattr(respond(server), "reduction")


def test_images_of_earlier_turns_follow_the_request(server: Server) -> None:
    first = respond(server, input_image(0, visual_token_budget=16))
    second = respond(
        server,
        input_image(1, visual_token_budget=32),
        visual_token_budget=64,
        previous_response_id=first.id,
    )
    assert kept(first) == [16] and kept(second) == [64, 32]


# --- Errors ---------------------------------------------------------------------------------

CHAT, PART = "/v1/chat/completions", "messages[0].content[0].image_url"
BUDGETS = [64.0, 0, -1, "64", True, 10**30, [64], [None], {"budget": 64}]


def on_request(**fields: Any) -> dict[str, Any]:
    return {"messages": user(image()), **fields}


def on_image(**said: Any) -> dict[str, Any]:
    return {"messages": user(image(**said))}


@pytest.mark.parametrize(
    ("body", "param", "fragments"),
    [
        *(
            (on_request(visual_token_budget=b), "visual_token_budget", ["whole number from 1"])
            for b in BUDGETS
        ),
        *(
            (on_image(visual_token_budget=b), f"{PART}.visual_token_budget", ["whole number"])
            for b in BUDGETS
        ),
        *(
            (on_request(reduction=r), "reduction", ["an object with method, budget and options"])
            for r in (64, "tome", [{"budget": 64}], True)
        ),
        (on_request(reduction={}), "reduction.budget", ["no default budget"]),
        (on_request(reduction={"method": "tome"}), "reduction.budget", ["no default budget"]),
        (on_request(reduction={"budget": 6.4}), "reduction.budget", ["6.4", "whole number"]),
        (on_request(reduction={"budget": 9, "method": "best"}), "reduction.method", ["'best'"]),
        (on_request(reduction={"budget": 9, "keep": 1}), "reduction.keep", ["known here"]),
        (
            on_request(reduction={"budget": 9, "options": {"lambada": 1}}),
            "reduction.options.lambada",
            ["alpha"],
        ),
        (
            on_request(reduction={"budget": 9, "method": "ficoco-v", "options": {"lambda": 2}}),
            "reduction.options.lambda",
            ["less than or equal to 1"],
        ),
        (
            on_request(reduction={"budget": 9, "method": "random"}),
            "reduction.method",
            ["one of score, ficoco-v, tome", "this server's policy"],
        ),
        (on_request(visual_token_budget=1), "visual_token_budget", ["from 2", "policy"]),
        (on_image(reduction={"budget": 1}), f"{PART}.reduction.budget", ["from 2", "policy"]),
        (
            on_request(visual_token_budget=9, reduction={"budget": 9}),
            "visual_token_budget",
            ["left out where reduction is given"],
        ),
        (on_image(detail="medium"), f"{PART}.detail", ["'low', 'high', 'original' or 'auto'"]),
        (on_image(detail="low", visual_token_budget=9), f"{PART}.detail", ["'auto' where"]),
        (
            {"messages": user(), "visual_token_budget": 64},
            "visual_token_budget",
            ["the request has no images"],
        ),
        (
            {"messages": user(), "reduction": {"method": "tome", "budget": 64}},
            "reduction",
            ["the request has no images"],
        ),
        (
            on_request(mm_processor_kwargs={"visual_token_budget": 64}),
            "mm_processor_kwargs.visual_token_budget",
            ["the request's own field visual_token_budget"],
        ),
        (
            on_request(vllm_xargs={"visual_token_budget": 64}),
            "vllm_xargs.visual_token_budget",
            ["the request's own field visual_token_budget"],
        ),
        (
            on_request(extra_body={"reduction": {"budget": 64}}),
            "extra_body.reduction",
            ["the request's own field reduction", "as clients send"],
        ),
        (on_request(budget=64), "budget", ["visual_token_budget, if visual tokens are meant"]),
        (on_image(visualTokenBudget=64), f"{PART}.visualTokenBudget", ["visual_token_budget"]),
        (on_request(reduction=[0] * 100_000), "reduction", ["[0, 0, 0", "...", "an object"]),
        (
            on_request(reduction={"budget": 9, "options": {str(i): i for i in range(100_000)}}),
            "reduction",
            ["no more than 1000 entries"],
        ),
        (on_request(reduction={"a" * 10_000: 1}), f"reduction.{'a' * 187}...", ["known here"]),
        (
            on_request(mm_processor_kwargs={"size": 1}, visual_token_budget=64),
            "mm_processor_kwargs",
            ["--trust-request-mm-kwargs"],
        ),
        (
            {"messages": user({"type": "text", "text": "a", "visual_token_budget": 64})},
            "messages[0].content[0].visual_token_budget",
            ["on an image, on a video or on the request"],
        ),
        (on_request(visual_token_budget=64, max_tokens=99999), "max_tokens", ["max_model_len"]),
    ],
)
def test_refused(server: Server, body: dict[str, Any], param: str, fragments: list[str]) -> None:
    answer = server.http.post(CHAT, json={"model": MODEL, "max_tokens": 4, **body})
    error = answer.json()["error"]
    assert answer.status_code == 400, error
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"], error["code"]) == ("BadRequestError", param, 400)
    for fragment in fragments:
        assert fragment in error["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a", "visual_token_budget": 64}),
        ("/v1/completions", {"prompt": "a", "reduction": {"budget": 64}}),
        ("/v1/messages", {**on_request(), "max_tokens": 4, "visual_token_budget": 64}),
        ("/v1/chat/completions/batch", {"messages": [user(image(visual_token_budget=64))]}),
        ("/v1/messages/render", {**on_request(), "max_tokens": 4, "visual_token_budget": 64}),
        ("/v1/completions/render", {"prompt": "a", "visual_token_budget": 64}),
        ("/invocations", on_request(visual_token_budget=64)),
        ("/v1/messages", {"max_tokens": 4, "extra_body": {"visual_token_budget": 64}}),
        ("/v1/responses", {"input": "a", "metadata": {"reduction": "64"}}),
        ("/v1/responses", {"input": "a", "visual_token_budget": 64}),
        ("/v1/responses", {"input": turn(input_image(visual_token_budget=64.5))}),
        ("/v1/responses", {"input": turn(input_image(detail="medium"))}),
    ],
)
def test_refused_elsewhere(server: Server, path: str, body: dict[str, Any]) -> None:
    answer = server.http.post(path, json={"model": MODEL, **body})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "BadRequestError" and "is not valid" in error["message"]
    assert error["param"].endswith(("visual_token_budget", "reduction", "detail"))


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": picture()},
        {"type": "image", "source": {"type": "base64", "data": "AAAA"}},
        {"type": "IMAGE_URL", "image_url": {"url": picture()}},
        {"type": "image_url"},
        {"type": "image_url", "uuid": "a"},
        {"type": "image_url", "image_url": picture()},
        {"type": "input_image", "image_url": picture()},
        {"type": "video_url", "video_url": {"url": picture()}},
        {"type": 3},
        {},
        None,
    ],
    ids=lambda part: str(part)[:40],
)
def test_a_part_that_vllm_does_not_take_is_refused_by_vllm(server: Server, part: Any) -> None:
    """With vLLM's own message, whatever is said of it; not with ours, that it is no image."""

    def refusal(*parts: Any, **said: Any) -> Any:
        answer = server.http.post(CHAT, json={"model": MODEL, "messages": user(*parts), **said})
        assert answer.status_code == 400, answer.text
        return answer.json()["error"]

    theirs = refusal(part)
    assert "visual" not in theirs["message"]
    assert refusal(part, visual_token_budget=64) == theirs
    assert refusal(image(), part, visual_token_budget=64) == refusal(image(), part)
    if part is not None:
        on_part = refusal({**part, "visual_token_budget": 64})
        assert on_part["param"] == theirs["param"]
        assert on_part["message"].splitlines()[0] == theirs["message"].splitlines()[0]


def rendered(server: Server, reduction: Any, length: int, mm_hash: str | None) -> Any:
    """A prompt with an image as /render makes it, with other settings and another place."""
    body = {"model": MODEL, "messages": user(image(70)), "max_tokens": 2, "temperature": 0}
    prompt = server.http.post("/v1/chat/completions/render", json=body).json()
    features, ids = prompt["features"], prompt["token_ids"]
    [place], [data] = features["mm_placeholders"]["image"], features["kwargs_data"]["image"]
    item = decode_mm_kwargs_item(data)
    item[PACKED_FIELD].data = pack(reduction and Reduction.parse(reduction))
    features["kwargs_data"]["image"] = [encode_mm_kwargs_item(item)]
    features["mm_metadata"] = None
    start, end = place["offset"], place["offset"] + place["length"]
    prompt["token_ids"] = ids[:start] + ids[start:end][:1] * length + ids[end:]
    place["length"] = length
    if mm_hash:
        features["mm_hashes"]["image"] = [mm_hash]
    return prompt


@pytest.mark.parametrize(
    ("reduction", "length", "mm_hash", "param"),
    [
        (None, TOKENS, None, None),
        ({"budget": 48}, 48, "one-kept48", None),
        ({"budget": 48}, TOKENS, "two-kept48", "features.mm_placeholders.image[0].length"),
        (None, TOKENS + 1, None, "features.mm_placeholders.image[0].length"),
        (None, 48, None, "features.mm_placeholders.image[0].length"),
        ({"budget": 48}, 48, None, "features.mm_hashes.image[0]"),
        (None, TOKENS, "one-kept48", "features.mm_hashes.image[0]"),
        ({"method": "fastv", "budget": 90}, TOKENS, None, "features.kwargs_data.image[0]"),
        ({"method": "random", "budget": 48}, 48, "three-kept48", "features.kwargs_data.image[0]"),
    ],
)
def test_rendered_images_must_agree_with_their_places(
    server: Server, reduction: Any, length: int, mm_hash: str | None, param: str | None
) -> None:
    """An image with fewer rows than its place in the prompt would end the engine."""
    prompt = rendered(server, reduction, length, mm_hash)
    answer = server.http.post("/inference/v1/generate", json=prompt)
    if param is None:
        assert answer.status_code == 200, answer.text
        # Without the data: the engine has them, and the hash says how many rows they make.
        prompt["features"]["kwargs_data"] = None
        again = server.http.post("/inference/v1/generate", json=prompt).json()
        assert again["choices"][0]["token_ids"] == answer.json()["choices"][0]["token_ids"]
        place = prompt["features"]["mm_placeholders"]["image"][0]
        prompt["token_ids"].insert(place["offset"], prompt["token_ids"][place["offset"]])
        place["length"] += 1
        param = "features.mm_placeholders.image[0].length"
        answer = server.http.post("/inference/v1/generate", json=prompt)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].startswith(param)
    assert server.http.get("/health").status_code == 200


def test_a_rendered_image_must_be_one(server: Server) -> None:
    """Fields that the tower could not take, or that make another number of tokens."""

    def changed(field: str, change: Any) -> dict[str, Any]:
        prompt = rendered(server, None, TOKENS, None)
        [data] = prompt["features"]["kwargs_data"]["image"]
        item = decode_mm_kwargs_item(data)
        element = item.pop("pixel_values")
        if change is not None:
            element.data = change(element.data)
            item[field] = element
        prompt["features"]["kwargs_data"]["image"] = [encode_mm_kwargs_item(item)]
        return prompt

    for field, change, param in (
        ("pixel_values", lambda pixels: pixels[:, :4, :4], "kwargs_data.image[0].pixel_values"),
        ("pixel_values", None, "kwargs_data.image[0]"),
        ("other", lambda pixels: pixels, "kwargs_data.image[0]"),
        ("image_embeds", lambda pixels: pixels, "kwargs_data.image[0].image_embeds"),
        ("image_embeds", lambda p: p.new_zeros(3, 256), "mm_placeholders.image[0].length"),
    ):
        answer = server.http.post("/inference/v1/generate", json=changed(field, change))
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == f"features.{param}"
    right = changed("pixel_values", lambda pixels: pixels)
    assert server.http.post("/inference/v1/generate", json=right).status_code == 200


def test_the_client_gets_its_own_exceptions(server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(server, image(), visual_token_budget=-1)
    assert caught.value.param == "visual_token_budget"
    with pytest.raises(openai.NotFoundError):
        server.openai.chat.completions.create(model="other", messages=user(image()))


def test_other_routes_still_work(server: Server) -> None:
    assert server.openai.completions.create(model=MODEL, prompt="reduction", max_tokens=2).choices
    batch = {"model": MODEL, "messages": [user(image())], "max_tokens": 2}
    assert server.http.post("/v1/chat/completions/batch", json=batch).status_code == 200


# --- What the server says about itself ------------------------------------------------------


def test_about_reduction(server: Server) -> None:
    about = server.http.get("/v1/reduction").json()
    assert about["model"] == {
        "id": MODEL,
        "supported": True,
        "layout": "fixed",
        "grid": [12, 12],
        "visual_tokens": TOKENS,
        "modalities": ["image"],
        "tower_layers": 9,
        "has_cls": True,
        "decoder_stages": [],
        "kv_block_size": 128,  # vLLM's choice for CPUs
        "kv_block_sizes": [128],
        "kv_cache_groups": [1],
        "kv_cache_bytes_per_token": KV_BYTES,
    }
    assert about["defaults"] == {
        "method": "score",
        "budget": None,
        "detail": {"low": 16, "high": None},
    }
    assert about["policy"]["min_budget"] == 2 and "random" not in about["policy"]["methods"]
    assert [method["name"] for method in about["methods"]] == list(METHODS)
    ficoco = next(method for method in about["methods"] if method["name"] == "ficoco-v")
    assert "2411.17686" in ficoco["paper"] and "lambda" in ficoco["options"]["properties"]


def test_the_api_key_guards_our_routes(server: Server) -> None:
    assert httpx.get(f"{server.url}/v1/reduction").status_code == 401
    body = on_request(visual_token_budget=64)
    assert httpx.post(f"{server.url}{CHAT}", json=body).status_code == 401
    wrong = {"Authorization": f"Bearer {API_KEY}s"}
    assert httpx.get(f"{server.url}/v1/reduction", headers=wrong).status_code == 401


def test_openapi_describes_the_fields(server: Server) -> None:
    schemas = server.http.get("/openapi.json").json()["components"]["schemas"]
    assert {"visual_token_budget", "reduction"} <= schemas["ChatRequest"]["properties"].keys()


# --- Metrics --------------------------------------------------------------------------------

BUDGETED = {"method": "topk", "budget": "<=64"}
"""Labels of requests that no other test makes."""
HISTOGRAMS = (
    "vllm_ficoco_time_to_first_token_seconds_count",
    "vllm_ficoco_inter_token_latency_seconds_count",
    "vllm_ficoco_e2e_request_latency_seconds_count",
)


def test_metrics_of_requests(server: Server) -> None:
    before = server.metrics("vllm_ficoco_")
    topk = {"method": "topk", "budget": 50}
    long = {"extra_body": {"reduction": topk, "ignore_eos": True}, "max_tokens": 6}
    chat(server, image(21), **long)
    chunks = list(chat(server, image(22), stream=True, **long))
    chat(server, image(23), n=2, temperature=1, reduction=topk)
    respond(server, input_image(24), reduction=topk)
    list(respond(server, input_image(25), reduction=topk, stream=True))

    def change(name: str, **labels: str) -> float:
        return value(server.metrics("vllm_ficoco_"), name, **labels) - value(before, name, **labels)

    counted = {"method": "topk", "outcome": "success"}
    assert eventually(lambda: change("vllm_ficoco_requests_total", **counted) == 5)
    tokens = "vllm_ficoco_visual_tokens_total"
    assert change(tokens, stage="input", method="topk") == 5 * TOKENS
    assert change(tokens, stage="kept", method="topk") == 5 * 50
    saved = 5 * (TOKENS - 50) * KV_BYTES
    assert change("vllm_ficoco_kv_cache_bytes_saved_total", method="topk") == saved
    assert change("vllm_ficoco_kv_blocks_saved_total", method="topk") > 0
    first, between, whole = (change(name, **BUDGETED) for name in HISTOGRAMS)
    assert (first, whole) == (5, 5)
    assert between >= 1 + 5  # the mean of the first request, the gaps of the second
    assert len(chunks) > 6
    assert change("vllm_ficoco_reduction_seconds_count", method="topk") >= 1


def test_metrics_of_text_and_of_unreduced_images(server: Server) -> None:
    name = "vllm_ficoco_e2e_request_latency_seconds_count"
    before = server.metrics("vllm_ficoco_")
    chat(server)
    chat(server, image())
    chat(server, image(visual_token_budget=9), image(1))
    after = server.metrics("vllm_ficoco_")
    for labels in (("none", "text"), ("none", "full"), ("mixed", "mixed")):
        has = dict(zip(("method", "budget"), labels, strict=True))
        assert value(after, name, **has) - value(before, name, **has) == 1, labels


def test_metrics_of_refusals(server: Server) -> None:
    before = server.metrics("vllm_ficoco_requests_total")
    for body in (on_request(visual_token_budget=0), on_request(reduction={"method": "x" * 99})):
        server.http.post(CHAT, json={"model": MODEL, **body})
    server.http.post("/v1/completions", json={"prompt": "a", "visual_token_budget": 1})
    after = server.metrics("vllm_ficoco_requests_total")
    labels = {"method": "invalid", "outcome": "refused"}
    name = "vllm_ficoco_requests_total"
    assert value(after, name, **labels) - value(before, name, **labels) == 3


def test_clients_cannot_make_series(server: Server) -> None:
    for budget in range(2, 14):
        reduction = {"method": "uniform", "budget": budget, "options": {}}
        chat(server, image(budget), reduction=reduction, max_tokens=1)
    chat(server, image(), extra_body={"reduction": {"method": "uniform", "budget": 700}})
    series = server.metrics("vllm_ficoco_")
    labels: dict[str, set[str]] = {}
    for _, have in series:
        for name, text in have:
            labels.setdefault(name, set()).add(text)
    assert labels.pop("le")
    assert labels.pop("method") <= {*METHODS, "mixed", "invalid"}
    assert labels.pop("outcome") <= {"success", "error", "refused", "cancelled"}
    assert labels.pop("stage") == {"input", "kept"}
    assert labels.pop("modality") == {"image"}
    edges = {"<=32", "<=64", "<=128", "<=192", "<=256", "<=576", ">576"}
    assert labels.pop("budget") <= {*edges, "full", "text", "mixed"}
    assert labels.pop("rung", set()) <= {"N", "N/3", "2N/9", "N/9"}  # the server's own
    assert not labels


@pytest.mark.parametrize("path", [CHAT, "/v1/responses"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away(server: Server, path: str, stream: bool) -> None:
    name, labels = "vllm_ficoco_requests_total", {"method": "evit", "outcome": "cancelled"}
    before = value(server.metrics(name), name, **labels)
    body = {
        "model": MODEL,
        "stream": stream,
        "ignore_eos": True,
        "reduction": {"method": "evit", "budget": 64},
    }
    if path == CHAT:
        body |= {"messages": user(image(31)), "max_tokens": 1500}
    else:
        body |= {"input": turn(input_image(31)), "max_output_tokens": 1500}
    running = "vllm:num_requests_running"
    try:
        with server.http.stream("POST", path, json=body, timeout=1.5) as answer:
            lines = answer.iter_lines()
            for _ in range(12):
                next(lines)
    except httpx.ReadTimeout:
        assert not stream
    assert eventually(lambda: value(server.metrics(name), name, **labels) == before + 1)
    assert eventually(lambda: value(server.metrics(), running) == 0)
    assert eventually(lambda: value(server.metrics(), "vllm:kv_cache_usage_perc") == 0)


def test_vllms_own_series_are_there(server: Server) -> None:
    before = server.metrics("vllm:")
    answer = chat(server, image(41), visual_token_budget=64)
    name = "vllm:prompt_tokens_total"
    assert eventually(
        lambda: (
            value(server.metrics("vllm:"), name) - value(before, name) == answer.usage.prompt_tokens
        )
    )
    assert value(server.metrics("http_requests_total"), "http_requests_total", handler=CHAT) > 0


def test_raw_stream_is_well_formed(server: Server) -> None:
    body = {
        "model": MODEL,
        "stream": True,
        "max_tokens": 4,
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {
            "url": picture(), "detail": "low"}}]}],
    }  # fmt: skip
    events = [e for e in server.http.post(CHAT, json=body).text.split("\n\n") if e]
    assert events[-1] == "data: [DONE]"
    assert all(json.loads(e.removeprefix("data: "))["id"] for e in events[:-1])
    assert "reduction" in json.loads(events[-2].removeprefix("data: "))


# --- What vLLM takes must still be taken -----------------------------------------------------


def test_input_image_parts_keep_working(server: Server) -> None:
    """vLLM's schema wants ``detail`` there, so it must not be dropped with our keys."""
    url = image()["image_url"]["url"]
    part = {"type": "input_image", "image_url": url, "detail": "low", "visual_token_budget": 20}
    chat = {"model": MODEL, "messages": [{"role": "user", "content": [part]}], "max_tokens": 2}
    answer = server.http.post("/v1/chat/completions", json=chat)
    assert answer.status_code == 400, "two budgets at once"
    for detail, kept in (("auto", 20), ("low", 16)):
        settings = {"visual_token_budget": 20} if detail == "auto" else {}
        part = {"type": "input_image", "image_url": url, "detail": detail, **settings}
        chat["messages"] = [{"role": "user", "content": [part]}]
        answer = server.http.post("/v1/chat/completions", json=chat)
        assert answer.status_code == 200, answer.text
        assert answer.json()["reduction"]["visual_tokens_kept"] == kept


def test_the_responses_api_drops_images_behind_an_assistants_text(server: Server) -> None:
    """As in vLLM; a setting on such an image would be lost, so it is refused."""

    def ask(**said: Any) -> httpx.Response:
        parts = [{"type": "input_text", "text": "a"}, input_image(60, **said)]
        body = {
            "model": MODEL,
            "max_output_tokens": 2,
            "visual_token_budget": 9,
            "input": [{"role": "assistant", "content": parts}, *turn(input_image(61))],
        }
        return server.http.post("/v1/responses", json=body)

    answer = ask()
    assert answer.status_code == 200, answer.text
    assert [i["visual_tokens_kept"] for i in answer.json()["reduction"]["images"]] == [9]
    refused = ask(visual_token_budget=20)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "input[0].content[1].visual_token_budget"


@pytest.mark.parametrize("role", ["system", "assistant", "user"])
def test_an_image_may_be_in_a_message_of_any_role(server: Server, role: str) -> None:
    messages = [{"role": role, "content": [image()]}, {"role": "user", "content": "what is it ?"}]
    body = {"model": MODEL, "messages": messages, "max_tokens": 2, "visual_token_budget": 9}
    answer = server.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["reduction"]["visual_tokens_kept"] == 9
