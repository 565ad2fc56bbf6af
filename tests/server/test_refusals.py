# SPDX-License-Identifier: Apache-2.0
"""What a request that ends badly leaves behind: nothing, for the next one with the same image."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from ficoco_server.metrics import VISUAL_TOKENS, Observation, Prefilled
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

pytestmark = pytest.mark.server

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
LONG = {"type": "text", "text": "what " * 2030}
"""As text it fits, with an image it does not."""


def post(server: Server, path: str, body: dict[str, Any]) -> httpx.Response:
    length = "max_output_tokens" if path == RESPONSES else "max_tokens"
    text = json.dumps({"model": MODEL, length: 2, "temperature": 0, **body})  # with escapes
    return server.http.post(path, content=text, headers={"Content-Type": "application/json"})


# --- Refused when the image was already processed ---------------------------------------------

CAUSES: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": -1},
    "top_p": {"top_p": 2},
    "top_k": {"top_k": -2},
    "min_p": {"min_p": 3},
    "penalty": {"repetition_penalty": -1},
    "min_tokens": {"min_tokens": 9},
    "stop": {"stop": [""]},
    "logit_bias": {"logit_bias": {"9999999": 1}},
    "allowed_token_ids": {"allowed_token_ids": [9999999]},
    "bad_words": {"bad_words": ["\ud7ff" * 9]},
    "top_logprobs": {"logprobs": True, "top_logprobs": 999},
    "prompt_logprobs": {"prompt_logprobs": 999},
    "schema": {"structured_outputs": {"json": {"type": "no such type"}}},
    "regex": {"structured_outputs": {"regex": "("}},
    "grammar": {"structured_outputs": {"grammar": "no grammar"}},
    "truncation": {"truncate_prompt_tokens": 40},
    "truncation of the placeholder": {"truncate_prompt_tokens": 3},
    "n with greedy sampling": {"n": 2},
    "half a surrogate pair": {"stop": ["\ud800"]},
    "a number of 80 bits": {"top_k": 2**80, "temperature": 1},
    "many": {"n": 99999999},
    "priority": {"priority": 9},
    "another model": {"model": "another"},
    "adapter": {"cache_salt": ""},
}


@pytest.mark.parametrize("cause", [*CAUSES, "length"])
def test_a_refusal_leaves_nothing_behind(server: Server, cause: str) -> None:
    seed = 700 + [*CAUSES, "length"].index(cause)
    good = {"messages": user(image(seed)), "visual_token_budget": 48}
    bad = good | CAUSES.get(cause, {"messages": user(image(seed), LONG)})
    refused = post(server, CHAT, bad)
    if cause not in ("bad_words", "priority", "stop"):  # which vLLM may take, in the end
        assert 400 <= refused.status_code < 500, refused.text
    for _ in range(2):
        answer = post(server, CHAT, good)
        assert answer.status_code == 200, answer.text
        assert answer.json()["reduction"]["visual_tokens_kept"] == 48


@pytest.mark.parametrize(
    "cause",
    [
        {"temperature": -1},
        {"top_p": 2},
        {"logit_bias": {"9999999": 1}},
        {"top_logprobs": 999, "include": ["message.output_text.logprobs"]},
        {"input": None},
    ],
)
def test_a_refused_response_leaves_nothing_behind(server: Server, cause: dict[str, Any]) -> None:
    part = input_image(740 + len(next(iter(cause))))
    good = {"input": turn(part), "visual_token_budget": 48}
    if "input" in cause:
        cause = {"input": turn(part, {"type": "input_text", "text": LONG["text"]})}
    refused = post(server, RESPONSES, good | cause)
    assert refused.status_code == 400, refused.text
    for _ in range(2):
        answer = post(server, RESPONSES, good)
        assert answer.status_code == 200, answer.text


def test_a_storm_of_refusals_and_clients_that_leave(server: Server) -> None:
    """300 requests over few images; each is right, refused, or given up at a random moment."""
    choose = random.Random(0)
    pictures = [picture(760 + seed) for seed in range(12)]

    async def ask(client: httpx.AsyncClient) -> int | None:
        part = {"type": "image_url", "image_url": {"url": choose.choice(pictures)}}
        body: dict[str, Any] = {
            "model": MODEL,
            "messages": user(part),
            "max_tokens": 2,
            "visual_token_budget": choose.choice([16, 48, TOKENS]),
            "stream": choose.random() < 0.3,
        }
        kind = choose.choice(["right", "refused", "long", "leaves"])
        if kind == "refused":
            body["temperature"] = -1
        if kind == "long":
            body["messages"] = user(part, LONG)
        patience = choose.uniform(0, 0.6) if kind == "leaves" else 100
        try:
            answer = await client.post(CHAT, json=body, timeout=patience)
        except httpx.TimeoutException:
            assert kind == "leaves"
            return None
        wrong = kind in ("refused", "long")
        assert answer.status_code == (400 if wrong else 200), answer.text
        if body["stream"] and not wrong:
            assert '"error"' not in answer.text
        return answer.status_code

    async def storm() -> list[int | None]:
        at_once = asyncio.Semaphore(24)
        headers = {"Authorization": f"Bearer {API_KEY}"}
        async with httpx.AsyncClient(base_url=server.url, headers=headers) as client:

            async def one() -> int | None:
                async with at_once:
                    return await ask(client)

            return await asyncio.gather(*(one() for _ in range(300)))

    ended = asyncio.run(storm())
    assert min(ended.count(end) for end in (200, 400, None)) > 10
    assert eventually(lambda: value(server.metrics(), "vllm:num_requests_running") == 0)
    assert eventually(lambda: value(server.metrics(), "vllm:kv_cache_usage_perc") == 0)
    for url in pictures:
        for budget in (16, 48, TOKENS):
            part = {"type": "image_url", "image_url": {"url": url}}
            answer = post(server, CHAT, {"messages": user(part), "visual_token_budget": budget})
            assert answer.status_code == 200, answer.text


def test_an_image_by_its_uuid(server: Server) -> None:
    def ask(budget: int, **part: Any) -> httpx.Response:
        content = {"type": "image_url", "uuid": "one of ours", **part}
        return post(server, CHAT, {"messages": user(content), "visual_token_budget": budget})

    url = {"image_url": {"url": picture(780)}}
    assert ask(48, **url).status_code == 200
    assert ask(48, image_url=None).status_code == 200
    unknown = ask(16, image_url=None)
    assert unknown.status_code == 400
    for word in ("Image 0 ", "uuid", "budget", "Send"):
        assert word in unknown.json()["error"]["message"]
    assert ask(16, **url).status_code == 200
    assert ask(16, image_url=None).status_code == 200


# --- Too long ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
def test_too_long_names_the_budget_that_fits(server: Server, path: str) -> None:
    def ask(images: int, **fields: Any) -> httpx.Response:
        if path == CHAT:
            body = {"messages": user(*(image(n) for n in range(images)))}
        else:
            body = {"input": turn(*(input_image(n) for n in range(images)))}
        return post(server, path, body | fields)

    for fields in ({}, {"visual_token_budget": 140}):
        refused = ask(16, **fields)
        error = refused.json()["error"]
        assert refused.status_code == 400
        assert error["param"] == ("messages" if path == CHAT else "input")
        held = fields.get("visual_token_budget", TOKENS)
        assert f"{16 * held} of them visual tokens of 16 images" in error["message"]
        assert "visual_token_budget 127 or less" in error["message"]
    assert ask(16, visual_token_budget=127).status_code == 200
    assert ask(16, visual_token_budget=128).status_code == 400, "127 is the largest"


# --- Images that cannot be loaded, and grey ones ----------------------------------------------


def data_url(picture: Image.Image, form: str = "PNG") -> str:
    file = io.BytesIO()
    picture.save(file, form)
    return f"data:image/{form.lower()};base64," + base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("file:///etc/hostname", "local files"),
        ("http://127.0.0.1:9/a.png", "connect"),
        ("data:image/svg+xml;utf8,<svg/>", "base64"),
        ("data:image/png;base64,AAAA", "identify"),
        ("ftp://127.0.0.1/a.png", "HTTP"),
        (data_url(Image.new("1", (14000, 14000))), "Image size"),
        (data_url(Image.fromarray(np.full((9, 9), -5, np.int32)), "TIFF"), "no known range"),
        (data_url(Image.fromarray(np.full((9, 9), 0.5, np.float32)), "TIFF"), "no known range"),
    ],
)
def test_images_that_cannot_be_loaded(server: Server, url: str, reason: str) -> None:
    answer = post(
        server, CHAT, {"messages": user({"type": "image_url", "image_url": {"url": url}})}
    )
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == "image_url"
    assert reason in answer.json()["error"]["message"]


def test_local_images_on_other_routes(server: Server) -> None:
    url = "file:///etc/hostname"
    for path, body in (
        (RESPONSES, {"input": turn({"type": "input_image", "image_url": url, "detail": "auto"})}),
        ("/v1/messages", {"messages": user(image()), "max_tokens": 2}),
        ("/v1/chat/completions/batch", {"messages": [user(image())]}),
    ):
        text = json.dumps(body).replace(picture(), url)
        answer = server.http.post(path, json={"model": MODEL, **json.loads(text)})
        assert answer.status_code == 400, answer.text


def test_an_earlier_answer_that_says_nothing(server: Server) -> None:
    said = {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed"}
    for content in ([], [{"type": "refusal", "refusal": "no"}]):
        answer = post(server, RESPONSES, {"input": [said | {"content": content}, *turn()]})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == "input[0].content"


def grey(bits: int, form: str) -> str:
    """A cross, in so many bits."""
    lines = np.abs(np.indices((168, 168)) - 84)
    shape = (np.abs(lines[0] - lines[1]) < 20).astype(np.uint8) * 200 + 30
    if form == "ASCII":
        text = f"P2 168 168 65535\n{' '.join(map(str, shape.astype(int).flatten() * 257))}\n"
        return "data:image/x-portable-graymap;base64," + base64.b64encode(text.encode()).decode()
    if bits == 16:
        return data_url(Image.fromarray(shape.astype(np.uint16) * 257), form)
    return data_url(Image.fromarray(shape), form)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM", "ASCII"])
@pytest.mark.parametrize("budget", [TOKENS, 48])
def test_grey_in_16_bits_is_grey_in_8(server: Server, form: str, budget: int) -> None:
    """The logits of the same picture in 8 bits; Pillow alone makes all of it white."""

    def ask(url: str) -> Any:
        part = {"type": "image_url", "image_url": {"url": url}}
        answer = post(
            server,
            CHAT,
            {
                "messages": user(part),
                "visual_token_budget": budget,
                "logprobs": True,
                "top_logprobs": 5,
            },
        )
        assert answer.status_code == 200, answer.text
        return json.dumps(answer.json()["choices"][0]["logprobs"])

    assert ask(grey(16, form)) == ask(grey(8, "PNG"))
    assert ask(grey(16, form)) != ask(data_url(Image.new("L", (168, 168), 255)))


def test_colour_in_16_bits_stays_as_it_is(server: Server) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint16)
    text = b"P6 40 40 65535\n" + (pixels * 257).astype(">u2").tobytes()
    url = "data:image/x-portable-pixmap;base64," + base64.b64encode(text).decode()
    eight = data_url(Image.fromarray(pixels.astype(np.uint8)))
    answers = [
        post(server, CHAT, {"messages": user({"type": "image_url", "image_url": {"url": one}})})
        for one in (url, eight)
    ]
    assert {answer.status_code for answer in answers} == {200}
    first, second = (answer.json()["choices"][0]["message"]["content"] for answer in answers)
    assert first == second


async def test_a_request_that_fails_at_once_has_prefilled_nothing() -> None:
    def counted() -> float:
        return VISUAL_TOKENS.labels("kept", "topk", "image")._value.get()

    async def engine(token_ids: list[int]) -> AsyncIterator[Any]:
        output = SimpleNamespace(index=0, token_ids=token_ids, finish_reason="error")
        yield SimpleNamespace(metrics=None, outputs=[output])

    async def context(token_ids: list[int]) -> AsyncIterator[Any]:  # of the responses API
        async for result in engine(token_ids):
            yield SimpleNamespace(last_output=result)

    for results in (engine, context):
        for token_ids, prefilled in (([], 0), ([1], 7)):
            before, seen = counted(), Observation()
            seen.describe([Prefilled("topk", {"kept": 7}, 1, 1)])
            async for _ in seen.results(results(token_ids), streaming=True):
                pass
            assert counted() == before + prefilled
