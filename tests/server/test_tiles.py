# SPDX-License-Identifier: Apache-2.0
"""The front end over HTTP where an image's tokens depend on its size: a LLaVA-NeXT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from vllm.entrypoints.scale_out.token_in_token_out.mm_serde import (
    decode_mm_kwargs_item,
    encode_mm_kwargs_item,
)

from tests.server.conftest import (
    API_KEY,
    MODEL,
    Server,
    eventually,
    image,
    input_image,
    turn,
    user,
    value,
)
from tests.server.test_http import chat, kept, respond
from tests.server.test_loadtest import load
from tests.server.test_refusals import post
from vllm_ficoco.packed import PACKED_FIELD, Packed, pack, unpack
from vllm_ficoco.settings import Reduction
from vllm_ficoco.vision.layout import Layout, Window

pytestmark = pytest.mark.server

CHAT, RESPONSES, GENERATE = "/v1/chat/completions", "/v1/responses", "/inference/v1/generate"
SQUARE, WIDE, TALL, TINY = (100, 100), (200, 50), (50, 200), (10, 10)
"""Width and height of images."""
TOKENS = {SQUARE: 16 + 8 * 9, WIDE: 16 + 4 * 13, TALL: 16 + 12 * 5, TINY: 16 + 4 * 5}
"""A thumbnail of 4 x 4 patches; rows of patches that are not padding, each with a newline."""


def reported(answer: Any) -> list[tuple[Any, ...]]:
    """Of every image what an answer's report says."""
    names = ("method", "budget", "visual_tokens_before", "visual_tokens_kept")
    return [tuple(one[name] for name in names) for one in answer.reduction["images"]]


def check_refused(
    server: Server, path: str, body: dict[str, Any], param: str, fragment: str
) -> None:
    """A 400 that names the field and says what is allowed; the metrics count it."""
    name, labels = "vllm_ficoco_requests_total", {"method": "invalid", "outcome": "refused"}
    before = value(server.metrics(name), name, **labels)
    answer = post(server, path, body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and error["message"].startswith(f"{param} = ")
    assert fragment in error["message"]
    assert value(server.metrics(name), name, **labels) == before + 1


# --- Budgets ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", TOKENS)
def test_a_budget_is_held_exactly(tiled: Server, size: tuple[int, int]) -> None:
    """Sent twice: what the report says survives the processor's cache."""
    tokens, text = TOKENS[size], chat(tiled).usage.prompt_tokens
    for budget in (2, 20, tokens - 1, tokens, 1000):
        held = min(budget, tokens)
        reduced = held < tokens
        said = ("score", budget) if reduced else ("none", None)
        answers = [chat(tiled, image(1, size), visual_token_budget=budget) for _ in range(2)]
        for answer in answers:
            assert answer.usage.prompt_tokens == text + held
            assert answer.usage.prompt_tokens_details.image_tokens == held
            assert reported(answer) == [(*said, tokens, held)]
            assert answer.reduction["visual_tokens_before"] == tokens
        assert len({answer.choices[0].message.content for answer in answers}) == 1


def test_an_image_scaled_down(tiled: Server) -> None:
    """The one smaller grid that a square fits has a tile, of which half is padding. Sent twice."""
    for budget in (36, 50, 87):
        reduction = {"method": "resize", "budget": budget}
        for _ in range(2):
            answer = chat(tiled, image(1, SQUARE), reduction=reduction)
            assert reported(answer) == [("resize", budget, 88, 36)]
            assert answer.usage.prompt_tokens_details.image_tokens == 36
    body = {"messages": user(image(1, SQUARE)), "reduction": {"method": "resize", "budget": 35}}
    error = post(tiled, CHAT, body).json()["error"]
    assert error["param"] == "reduction.budget"
    assert "at least 36, for an image of 100 x 100 pixels by resize" in error["message"]


def test_every_image_its_own_settings(tiled: Server) -> None:
    said: list[tuple[tuple[int, int], dict[str, Any]]] = [
        (SQUARE, {"visual_token_budget": 32}),
        (WIDE, {}),
        (TINY, {}),
        (TALL, {"reduction": {"method": "topk", "budget": 30, "options": {"newlines": "all"}}}),
        (SQUARE, {"detail": "low"}),
        (TINY, {"detail": "low"}),
        (WIDE, {"detail": "high"}),
    ]
    due = [
        ("score", 32, 88, 32),
        ("score", 48, 68, 48),
        ("none", None, 36, 36),
        ("topk", 30, 76, 30),
        ("score", 88 // 9, 88, 88 // 9),
        ("score", 36 // 9, 36, 36 // 9),
        ("none", None, 68, 68),
    ]
    parts = [image(seed, size, **settings) for seed, (size, settings) in enumerate(said)]
    inputs = [
        input_image(seed, size, **{"detail": "auto", **settings})
        for seed, (size, settings) in enumerate(said)
    ]
    whole = chat(tiled, *parts, visual_token_budget=48)
    assert reported(whole) == due and whole.reduction["method"] == "mixed"
    chunks = list(chat(tiled, *parts, visual_token_budget=48, stream=True))
    assert reported(chunks[-1]) == due
    answer = respond(tiled, *inputs, visual_token_budget=48)
    assert reported(answer) == due
    assert answer.usage.input_tokens_details.image_tokens == sum(row[-1] for row in due)
    events = list(respond(tiled, *inputs, visual_token_budget=48, stream=True))
    assert reported(events[-1].response) == due


def test_every_allowed_method(tiled: Server) -> None:
    for method in tiled.http.get("/v1/reduction").json()["policy"]["methods"]:
        budget = 40 if method == "resize" else 21
        answer = chat(tiled, image(0, TALL), reduction={"method": method, "budget": budget})
        assert kept(answer) == [{"none": 76, "resize": 40}.get(method, 21)]


def test_images_of_earlier_turns_follow_the_request(tiled: Server) -> None:
    first = respond(tiled, input_image(0, WIDE, visual_token_budget=16))
    second = respond(
        tiled,
        input_image(1, SQUARE, visual_token_budget=32),
        visual_token_budget=60,
        previous_response_id=first.id,
    )
    assert [row[2:] for row in reported(second)] == [(68, 60), (88, 32)]


def test_metrics_count_what_each_image_has(tiled: Server) -> None:
    name, topk = "vllm_ficoco_visual_tokens_total", {"method": "topk"}
    before = tiled.metrics(name)
    settings = {"method": "topk", "budget": 25}
    chat(tiled, image(40, SQUARE), image(41, TINY), reduction=settings)

    def change(stage: str) -> float:
        now = tiled.metrics(name)
        return value(now, name, stage=stage, **topk) - value(before, name, stage=stage, **topk)

    assert (change("input"), change("kept")) == (88 + 36, 50)


def test_about_reduction(tiled: Server) -> None:
    about = tiled.http.get("/v1/reduction").json()
    assert about["model"]["layout"] == "by image"
    assert about["model"]["visual_tokens"] == max(TOKENS.values())
    assert about["model"]["grid"] == [4, 4]
    assert about["defaults"]["detail"] == {"low": "N / 9", "high": None}


# --- Refusals ---------------------------------------------------------------------------------

NEWLINES = {"method": "topk", "budget": 8, "options": {"newlines": "all"}}
"""An image with 8 rows has so many newlines, and nothing else then stays."""
TOO_FEW = "at least 9 for an image of 88 visual tokens"


@pytest.mark.parametrize(
    ("path", "body", "param", "fragment"),
    [
        (
            CHAT,
            {"messages": user(image(0, WIDE), image(1, SQUARE, reduction=NEWLINES))},
            "messages[0].content[1].image_url.reduction.budget",
            TOO_FEW,
        ),
        (
            CHAT,
            {"messages": user(image(0, WIDE), image(1, SQUARE)), "reduction": NEWLINES},
            "reduction.budget",
            TOO_FEW,
        ),
        (
            CHAT,
            {
                "messages": user(image(1, SQUARE, visual_token_budget=7)),
                "reduction": NEWLINES | {"budget": 60},
            },
            "messages[0].content[0].image_url.visual_token_budget",
            TOO_FEW,
        ),
        (
            CHAT,
            {
                "messages": user(image(1, TALL, detail="low")),
                "reduction": NEWLINES | {"budget": 60},
            },
            "messages[0].content[0].image_url.detail",
            "at least 13 for an image of 76 visual tokens",
        ),
        (
            RESPONSES,
            {"input": turn(input_image(0, WIDE), input_image(1, SQUARE, reduction=NEWLINES))},
            "input[0].content[1].reduction.budget",
            TOO_FEW,
        ),
        (
            RESPONSES,
            {"input": turn(input_image(0, SQUARE)), "stream": True, "reduction": NEWLINES},
            "reduction.budget",
            TOO_FEW,
        ),
        (
            CHAT,
            {"messages": user(image(0, SQUARE)), "visual_token_budget": 1},
            "visual_token_budget",
            "from 2",
        ),
        (
            CHAT,
            {"messages": user(image(0, SQUARE)), "reduction": {"method": "fastv", "budget": 900}},
            "reduction.method",
            "--reduction-stages",
        ),
        (
            CHAT,
            {
                "messages": user(image(0, SQUARE)),
                "reduction": {"method": "topk", "budget": 1, "share": 9, "least": 1},
            },
            "reduction.share",
            "known here: method, budget, options",
        ),
    ],
)
def test_refused(tiled: Server, path: str, body: dict[str, Any], param: str, fragment: str) -> None:
    check_refused(tiled, path, body, param, fragment)


def test_a_refusal_leaves_nothing_behind(tiled: Server) -> None:
    """The budget of one image cannot be reached; the other has been processed by then, or not."""
    for parts in ((0, 1), (1, 0)):
        images = [image(90, WIDE), image(91, SQUARE, reduction=NEWLINES)]
        bad = {"messages": user(*(images[i] for i in parts)), "visual_token_budget": 20}
        assert post(tiled, CHAT, bad).status_code == 400
        for _ in range(2):
            assert kept(chat(tiled, images[0], visual_token_budget=20)) == [20]


def test_an_image_by_its_uuid(tiled: Server) -> None:
    """What its size was is remembered with it."""

    def ask(data: bool, size: tuple[int, int] = WIDE, **said: Any) -> httpx.Response:
        url = image(80, size)["image_url"] if data else None
        part = {"type": "image_url", "uuid": "an image of ours", "image_url": url}
        return post(tiled, CHAT, {"messages": user(part), **said})

    for said, held in (
        ({"visual_token_budget": 30}, 30),
        ({}, 68),
        ({"visual_token_budget": 500}, 68),
    ):
        unknown = ask(False, **said)
        assert unknown.status_code == 400 and unknown.json()["error"]["param"] == "uuid"
        for data in (True, False, False):
            answer = ask(data, **said)
            assert answer.status_code == 200, answer.text
            [report] = answer.json()["reduction"]["images"]
            assert (report["visual_tokens_before"], report["visual_tokens_kept"]) == (68, held)
    # Under the same name, the image that is known is meant.
    [report] = ask(True, SQUARE, visual_token_budget=30).json()["reduction"]["images"]
    assert report["visual_tokens_before"] == 68


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
def test_too_long_names_the_budget_that_fits(tiled: Server, path: str) -> None:
    """Small images leave room to the large ones."""
    sizes = [SQUARE] * 20 + [TINY] * 10 + [WIDE] * 4

    def ask(**fields: Any) -> httpx.Response:
        if path == CHAT:
            body = {"messages": user(*(image(n, size) for n, size in enumerate(sizes)))}
        else:
            body = {"input": turn(*(input_image(n, size) for n, size in enumerate(sizes)))}
        return post(tiled, path, body | fields)

    text = chat(tiled).usage.prompt_tokens
    room = 2048 - 1 - text - 10 * 36 - 4 * 68  # at budgets above 68 the others are whole
    fits = room // 20
    assert 68 < fits < 88
    refused = ask()
    error = refused.json()["error"]
    assert refused.status_code == 400
    assert error["param"] == ("messages" if path == CHAT else "input")
    assert f"{20 * 88 + 10 * 36 + 4 * 68} of them visual tokens of 34 images" in error["message"]
    assert f"visual_token_budget {fits} or less" in error["message"]
    assert ask(visual_token_budget=fits).status_code == 200
    assert ask(visual_token_budget=fits + 1).status_code == 400, "it is the largest"


# --- Rendered elsewhere -----------------------------------------------------------------------


def rendered(server: Server, size: tuple[int, int], seed: int = 0) -> Any:
    """A prompt with an image, as /render makes it."""
    body = {"model": MODEL, "messages": user(image(seed, size)), "max_tokens": 2, "temperature": 0}
    return server.http.post(f"{CHAT}/render", json=body).json()


def change(prompt: Any, field: str, changed: Callable[[Any], Any]) -> Any:
    """The prompt with another field of its image."""
    features = prompt["features"]
    item = decode_mm_kwargs_item(features["kwargs_data"]["image"][0])
    element = changed(item[field].data)
    if element is None:
        del item[field]
    else:
        item[field].data = element
    features["kwargs_data"]["image"] = [encode_mm_kwargs_item(item)]
    features["mm_metadata"] = None
    return prompt


def place(prompt: Any, length: int) -> Any:
    """The prompt with another number of tokens for its image."""
    [at], ids = prompt["features"]["mm_placeholders"]["image"], prompt["token_ids"]
    start, end = at["offset"], at["offset"] + at["length"]
    prompt["token_ids"] = ids[:start] + ids[start:end][:1] * length + ids[end:]
    at["length"] = length
    return prompt


def reduce(prompt: Any, **settings: Any) -> Any:
    """The prompt with settings for its image."""
    reduction = Reduction.parse(settings)
    return change(prompt, PACKED_FIELD, lambda data: pack(reduction, unpack(data).layout))


def test_a_rendered_image(tiled: Server) -> None:
    """Unreduced and reduced, it is answered as on the chat route; twice."""
    for settings, length in ({}, 68), ({"method": "topk", "budget": 20}, 20):
        prompt = rendered(tiled, WIDE)
        if settings:
            prompt = place(reduce(prompt, **settings), length)
        said = {"reduction": settings} if settings else {}
        asked = chat(tiled, image(0, WIDE), max_tokens=2, **said)
        answers = [tiled.http.post(GENERATE, json=prompt) for _ in range(2)]
        for answer in answers:
            assert answer.status_code == 200, answer.text
            tokens = answer.json()["choices"][0]["token_ids"]
            text = tiled.http.post("/detokenize", json={"model": MODEL, "tokens": tokens}).json()
            assert text["prompt"].strip() == asked.choices[0].message.content.strip()


OTHER = Layout((4, 4), (2, 2), Window(0, 0, 8, 8))
BROKEN: dict[str, tuple[Callable[[Any], Any], str]] = {
    "longer": (lambda p: place(p, 69), "mm_placeholders.image[0].length"),
    "shorter": (lambda p: place(p, 20), "mm_placeholders.image[0].length"),
    "reduced": (lambda p: reduce(p, budget=20), "mm_placeholders.image[0].length"),
    "by its policy": (
        lambda p: place(reduce(p, budget=1), 1),
        "kwargs_data.image[0].reduction.budget",
    ),
    "too few": (
        lambda p: place(reduce(p, method="topk", budget=3, options={"newlines": "all"}), 3),
        "kwargs_data.image[0].reduction.budget",
    ),
    "not scaled down": (
        lambda p: reduce(p, method="resize", budget=20),
        "kwargs_data.image[0].packed_reduction",
    ),
    "another layout": (
        lambda p: place(change(p, PACKED_FIELD, lambda _: pack(None, OTHER)), 88),
        "kwargs_data.image[0].packed_reduction",
    ),
    "no layout": (
        lambda p: change(p, PACKED_FIELD, lambda _: pack(None)),
        "kwargs_data.image[0].packed_reduction",
    ),
    "no settings": (
        lambda p: change(p, PACKED_FIELD, lambda _: None),
        "kwargs_data.image[0].packed_reduction",
    ),
    "another size": (
        lambda p: change(p, "image_sizes", lambda size: size.flip(0)),
        "kwargs_data.image[0].packed_reduction",
    ),
    "size of zero": (
        lambda p: change(p, "image_sizes", lambda size: size * 0),
        "kwargs_data.image[0].image_sizes",
    ),
    "size with fractions": (
        lambda p: change(p, "image_sizes", lambda size: size / 1.0),
        "kwargs_data.image[0].image_sizes",
    ),
    "no size": (
        lambda p: change(p, "image_sizes", lambda _: None),
        "kwargs_data.image[0].image_sizes",
    ),
    "tiles missing": (
        lambda p: change(p, "pixel_values", lambda pixels: pixels[:2]),
        "kwargs_data.image[0].pixel_values",
    ),
    "too many tiles": (
        lambda p: change(p, "pixel_values", lambda pixels: pixels.repeat(9, 1, 1, 1)),
        "kwargs_data.image[0].pixel_values",
    ),
    "small tiles": (
        lambda p: change(p, "pixel_values", lambda pixels: pixels[..., :4, :4]),
        "kwargs_data.image[0].pixel_values",
    ),
    "no pixels": (
        lambda p: change(p, "pixel_values", lambda _: None),
        "kwargs_data.image[0]",
    ),
    "no data": (
        lambda p: p | {"features": p["features"] | {"kwargs_data": None, "mm_metadata": None}},
        "kwargs_data.image[0]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN)
def test_a_rendered_image_must_agree_with_its_place(tiled: Server, broken: str) -> None:
    """One with fewer rows than its place in the prompt would end the engine."""
    spoil, param = BROKEN[broken]
    answer = tiled.http.post(GENERATE, json=spoil(rendered(tiled, WIDE, seed=3)))
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == f"features.{param}"
    assert tiled.http.get("/health").status_code == 200


def test_a_batchs_padding_is_no_tile(tiled: Server) -> None:
    """Of two images that are processed together the smaller one has more inputs than it needs."""
    body = {"model": MODEL, "messages": user(image(11, SQUARE), image(12, TINY)), "max_tokens": 2}
    prompt = tiled.http.post(f"{CHAT}/render", json=body).json()
    items = [decode_mm_kwargs_item(i) for i in prompt["features"]["kwargs_data"]["image"]]
    assert [len(item["pixel_values"].data) for item in items] == [5, 5]
    assert [unpack(item[PACKED_FIELD].data) for item in items] == [
        Packed(None, OTHER),
        Packed(None, Layout((4, 4), (1, 2), Window(0, 2, 4, 4))),
    ]
    assert tiled.http.post(GENERATE, json=prompt).status_code == 200


def test_a_clients_hash_names_its_own_images_only(tiled: Server) -> None:
    """Two rendered images and one of the chat route, all of another size, say they are one."""
    part = image(20, SQUARE) | {"uuid": "one"}
    assert kept(chat(tiled, part)) == [88]
    for size in (WIDE, TALL, WIDE):
        prompt = rendered(tiled, size, seed=21)
        prompt["features"]["mm_hashes"]["image"] = ["one"]
        answer = tiled.http.post(GENERATE, json=prompt)
        assert answer.status_code == 200, answer.text
    assert kept(chat(tiled, {"type": "image_url", "uuid": "one", "image_url": None})) == [88]


# --- The load test ----------------------------------------------------------------------------


def test_the_load_test_asks_how_many_tokens_its_images_have(
    tiled: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", API_KEY)
    assert eventually(lambda: value(tiled.metrics(), "vllm:num_requests_running") == 0)
    lines = load(tiled, tmp_path, "--image-size=50", "--budgets=80,20")
    assert [line["setting"] for line in lines] == ["none", "score@20"]
    for line in lines:
        assert line["conditions"]["visual_tokens"] == TOKENS[TINY], "fewer than the largest has"
