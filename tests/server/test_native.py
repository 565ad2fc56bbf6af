# SPDX-License-Identifier: Apache-2.0
"""The front end over HTTP where images come at their own resolution: a Qwen2.5-VL."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from vllm.config import ModelConfig
from vllm.entrypoints.scale_out.token_in_token_out.mm_serde import (
    decode_mm_kwargs_item,
    encode_mm_kwargs_item,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.plugins import load_general_plugins

from tests.checkpoints import random_qwen
from tests.server.conftest import MODEL, Server, image, input_image, turn, user, value
from tests.server.test_http import chat, kept, respond
from tests.server.test_refusals import post
from tests.server.test_tiles import (
    CHAT,
    GENERATE,
    RESPONSES,
    change,
    check_refused,
    place,
    reported,
)
from vllm_ficoco.cost import Decoder, prefill_flops_ratio
from vllm_ficoco.packed import PACKED_FIELD, pack, unpack
from vllm_ficoco.settings import Reduction
from vllm_ficoco.vision.layout import Layout

pytestmark = pytest.mark.server

SQUARE, WIDE, TALL, TINY, LARGE = (100, 100), (200, 50), (50, 200), (10, 10), (400, 400)
"""Width and height of images."""
TOKENS = {SQUARE: 16, WIDE: 14, TALL: 14, TINY: 4, LARGE: 64}
"""Of 28 x 28 pixels each, 4 to 80 of them: 4 x 4, 2 x 7, 7 x 2, 2 x 2, 8 x 8."""
MOST = 80
RESIZED = {SQUARE: (4, 9, 9), WIDE: (5, 12, 10), TALL: (5, 12, 10), LARGE: (4, 49, 9)}
"""What is left of an image that is scaled to at most 5, to one token less than it has, to 10."""
DECODER = Decoder(3, 128, 256, 4, 2, 32, 4)


def of(answer: httpx.Response) -> Any:
    """An answer's report, where :func:`reported` looks for it."""
    return SimpleNamespace(reduction=answer.json()["reduction"])


# --- Budgets ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", TOKENS)
def test_a_budget_is_held_exactly(native: Server, size: tuple[int, int]) -> None:
    """Sent twice: what the report says survives the processor's cache."""
    tokens, text = TOKENS[size], chat(native).usage.prompt_tokens + 2  # an image's begin and end
    for budget in (2, 5, tokens - 1, tokens, 1000):
        held = min(budget, tokens)
        said = ("score", budget) if held < tokens else ("none", None)
        answers = [chat(native, image(1, size), visual_token_budget=budget) for _ in range(2)]
        for answer in answers:
            assert answer.usage.prompt_tokens == text + held
            assert answer.usage.prompt_tokens_details.image_tokens == held
            assert reported(answer) == [(*said, tokens, held)]
            report = answer.reduction
            assert report["visual_tokens_before"] == tokens
            assert report["kv_cache_bytes_saved"] == (tokens - held) * 3 * 2 * 2 * 32 * 4
            ratio = prefill_flops_ratio([text + held] * 3, text + tokens, DECODER)
            assert report["estimated_prefill_flops_ratio"] == round(ratio, 4)
        assert len({answer.choices[0].message.content for answer in answers}) == 1


@pytest.mark.parametrize("size", RESIZED)
def test_resize_holds_what_came_out(native: Server, size: tuple[int, int]) -> None:
    """Sent twice; the budget is what was asked for, and N that of the image as it was sent."""
    tokens = TOKENS[size]
    for budget, held in zip((5, tokens - 1, 10), RESIZED[size], strict=True):
        reduction = {"method": "resize", "budget": budget}
        plain = chat(native).usage.prompt_tokens + 2
        for _ in range(2):
            answer = chat(native, image(1, size), reduction=reduction)
            assert reported(answer) == [("resize", budget, tokens, held)]
            assert answer.usage.prompt_tokens == plain + held
            ratio = prefill_flops_ratio([plain + held] * 3, plain + tokens, DECODER)
            assert answer.reduction["estimated_prefill_flops_ratio"] == round(ratio, 4)
    whole = chat(native, image(1, size), reduction={"method": "resize", "budget": tokens})
    assert reported(whole) == [("none", None, tokens, tokens)]


def test_every_image_its_own_settings(native: Server) -> None:
    said: list[tuple[tuple[int, int], dict[str, Any]]] = [
        (SQUARE, {"visual_token_budget": 3}),
        (WIDE, {}),
        (TINY, {}),
        (TALL, {"reduction": {"method": "resize", "budget": 9}}),
        (LARGE, {"detail": "low"}),
        (WIDE, {"detail": "high"}),
        (LARGE, {"reduction": {"method": "pooling", "budget": 12}}),
    ]
    due = [
        ("score", 3, 16, 3),
        ("score", 8, 14, 8),
        ("none", None, 4, 4),
        ("resize", 9, 14, 8),
        ("score", 64 // 9, 64, 64 // 9),
        ("none", None, 14, 14),
        ("pooling", 12, 64, 12),
    ]
    parts = [image(seed, size, **settings) for seed, (size, settings) in enumerate(said)]
    inputs = [
        input_image(seed, size, **{"detail": "auto", **settings})
        for seed, (size, settings) in enumerate(said)
    ]
    whole = chat(native, *parts, visual_token_budget=8)
    assert reported(whole) == due and whole.reduction["method"] == "mixed"
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(chat(native, *parts, visual_token_budget=8, **options))
    assert reported(chunks[-1]) == due
    details = chunks[-1].usage.prompt_tokens_details
    assert details.image_tokens == details.visual_tokens_kept == sum(row[-1] for row in due)
    assert details.visual_tokens_before == sum(row[2] for row in due)
    answer = respond(native, *inputs, visual_token_budget=8)
    assert reported(answer) == due
    assert answer.usage.input_tokens_details.image_tokens == sum(row[-1] for row in due)
    several = chat(native, *parts, visual_token_budget=8, n=2, temperature=1)
    assert reported(several) == due and len(several.choices) == 2


def test_every_allowed_method(native: Server) -> None:
    """Those that need what the model lacks are not among them."""
    about = native.http.get("/v1/reduction").json()
    methods = about["policy"]["methods"]
    assert {"score", "ficoco-v", "topk", "resize", "uniform"} <= {*methods}
    assert not {"tome", "evit", "ficoco-k", "fastv"} & {*methods}
    for method in methods:
        answer = chat(native, image(0, TALL), reduction={"method": method, "budget": 5})
        assert kept(answer) == [14 if method == "none" else 5]
    places = {method["name"]: method["places"] for method in about["methods"]}
    assert (places["ficoco-v"], places["resize"]) == (["output"], ["input"])


def test_metrics_count_what_each_image_has(native: Server) -> None:
    name = "vllm_ficoco_visual_tokens_total"
    before = native.metrics(name)
    chat(native, image(40, SQUARE), image(41, LARGE), reduction={"method": "resize", "budget": 10})

    def change(stage: str) -> float:
        now, resize = native.metrics(name), {"method": "resize", "stage": stage}
        return value(now, name, **resize) - value(before, name, **resize)

    assert (change("input"), change("kept")) == (16 + 64, 9 + 9)


def test_about_reduction(native: Server) -> None:
    about = native.http.get("/v1/reduction").json()
    assert about["model"]["layout"] == about["model"]["grid"] == "by image"
    assert about["model"]["visual_tokens"] == MOST
    assert about["model"]["has_cls"] is False
    assert about["defaults"]["detail"] == {"low": "N / 9", "high": None}


def test_the_largest_image_follows_the_servers_own_options(tmp_path: Path) -> None:
    load_general_plugins()
    model = random_qwen(tmp_path / "model", "qwen2.5-vl")
    for kwargs, most in ({}, MOST), ({"max_pixels": 30 * 784}, 30):
        config = ModelConfig(model=str(model), mm_processor_kwargs=kwargs)
        processor: Any = MULTIMODAL_REGISTRY.create_processor(config)
        assert processor.largest_layout.tokens == most


def test_sizes_follow_the_servers_own_options(tmp_path: Path) -> None:
    """A long image is never scaled to a longer one than the processor takes (200 to 1), and what
    is left as it is has no limit."""
    load_general_plugins()
    model = random_qwen(tmp_path / "model", "qwen2.5-vl")

    def processor(**kwargs: Any) -> Any:
        config = ModelConfig(model=str(model), mm_processor_kwargs=kwargs)
        return MULTIMODAL_REGISTRY.create_processor(config)

    of_large_images = processor(max_pixels=1000 * 784)
    assert of_large_images.layout_of(240 * 28, 2 * 28).grid == (2, 240)
    for budget in (100, 230, 300, 450):
        size = of_large_images.scaled(240 * 28, 2 * 28, budget, {})
        tokens = of_large_images.layout_of(size.width, size.height).tokens
        assert budget // 2 <= tokens <= budget
    assert processor(do_resize=False).layout_of(280, 280).grid == (10, 10)


def test_an_image_by_its_uuid(native: Server) -> None:
    def ask(data: bool, **said: Any) -> Any:
        url = image(80, WIDE)["image_url"] if data else None
        part = {"type": "image_url", "uuid": "an image of ours", "image_url": url}
        return post(native, CHAT, {"messages": user(part), **said})

    for said, held in (
        ({"visual_token_budget": 6}, 6),
        ({"reduction": {"method": "resize", "budget": 6}}, 6),
        ({}, 14),
    ):
        unknown = ask(False, **said)
        assert unknown.status_code == 400 and unknown.json()["error"]["param"] == "uuid"
        for data in (True, False, False):
            answer = ask(data, **said)
            assert answer.status_code == 200, answer.text
            [report] = answer.json()["reduction"]["images"]
            assert (report["visual_tokens_before"], report["visual_tokens_kept"]) == (14, held)


def test_an_image_by_its_uuid_is_known_for_its_question(native: Server) -> None:
    """By a method that asks for it: with another question its data must come again."""

    def ask(question: str, data: bool) -> Any:
        url = image(81, WIDE)["image_url"] if data else None
        part = {"type": "image_url", "uuid": "asked", "image_url": url}
        messages = [{"role": "user", "content": [part, {"type": "text", "text": question}]}]
        said = {"messages": messages, "reduction": {"method": "recoverable", "budget": 6}}
        return post(native, CHAT, said)

    first = ask("what color ?", True)
    assert first.status_code == 200, first.text
    assert kept(SimpleNamespace(reduction=first.json()["reduction"])) == [6]
    assert ask("what color ?", False).json()["choices"] == first.json()["choices"]
    refused = ask("how many ?", False)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "uuid"
    assert "the question" in refused.json()["error"]["message"]
    assert ask("how many ?", True).status_code == 200
    assert ask("how many ?", False).status_code == 200


# --- What the client tells the processor --------------------------------------------------------

OF_LARGE: dict[str, tuple[dict[str, Any], int, int]] = {
    "max_pixels": ({"max_pixels": 20000}, 25, 4),
    "min_pixels": ({"min_pixels": 90 * 784, "max_pixels": 120 * 784}, 100, 0),
    "size": ({"size": {"shortest_edge": 3136, "longest_edge": 30 * 784}}, 25, 4),
    "nested": ({"images_kwargs": {"max_pixels": 40 * 784}}, 36, 4),
}
"""Options of the processor, how many tokens an image then has, and at most 6 by resize."""


@pytest.mark.parametrize("option", OF_LARGE)
def test_the_client_changes_how_many_tokens_an_image_has(native: Server, option: str) -> None:
    """The same image with and without: neither is taken for the other."""
    kwargs, tokens, resized = OF_LARGE[option]
    for _ in range(2):
        for said, held in (
            ({}, tokens),
            ({"visual_token_budget": 6}, 6),
            ({"visual_token_budget": tokens}, tokens),
            ({"reduction": {"method": "resize", "budget": 6}}, resized),
        ):
            body = {"messages": user(image(50, LARGE)), "mm_processor_kwargs": kwargs, **said}
            answer = post(native, CHAT, body)
            if not held:
                assert answer.status_code == 400
                assert "must be at least 100" in answer.json()["error"]["message"]
                continue
            assert answer.status_code == 200, answer.text
            [report] = answer.json()["reduction"]["images"]
            assert (report["visual_tokens_before"], report["visual_tokens_kept"]) == (tokens, held)
        assert reported(chat(native, image(50, LARGE), visual_token_budget=6)) == [
            ("score", 6, 64, 6)
        ]


@pytest.mark.parametrize(
    "kwargs",
    [
        {"do_resize": False},
        {"images_kwargs": {"do_resize": False}},
        {"return_tensors": "np"},
        {"max_pixels": -5},
        {"patch_size": 7},
        {"merge_size": 1},
        {"temporal_patch_size": 1},
        {"max_pixels": 0},
        {"max_pixels": "many"},
        {"size": 5},
        {"size": {"height": 56, "width": 56}},
    ],
    ids=str,
)
@pytest.mark.parametrize("budget", [None, 6])
def test_options_by_which_nobody_knows_how_many_there_are(
    native: Server, kwargs: dict[str, Any], budget: int | None
) -> None:
    body = {"messages": user(image(0, (281, 280))), "mm_processor_kwargs": kwargs}
    answer = post(native, CHAT, body | {"visual_token_budget": budget})
    assert answer.status_code == 400, answer.text


@pytest.mark.parametrize(
    "kwargs", [{"do_resize": False}, {"images_kwargs": {"do_resize": False}}], ids=str
)
def test_an_image_that_stays_as_it_is(native: Server, kwargs: dict[str, Any]) -> None:
    """Told not to scale it, the processor makes more tokens of it than the model's limit."""
    for said, held in (
        ({}, 100),
        ({"visual_token_budget": 6}, 6),
        ({"reduction": {"method": "resize", "budget": 6}}, 4),
    ):
        body = {"messages": user(image(0, (280, 280))), "mm_processor_kwargs": kwargs, **said}
        answer = post(native, CHAT, body)
        assert answer.status_code == 200, answer.text
        [report] = answer.json()["reduction"]["images"]
        assert (report["visual_tokens_before"], report["visual_tokens_kept"]) == (100, held)


def test_an_image_too_thin_for_the_processor(native: Server) -> None:
    """As vLLM says it, whatever its budget."""
    thin = {"messages": user(image(0, (900, 3)))}
    for said in (
        {},
        {"visual_token_budget": 5},
        {"reduction": {"method": "resize", "budget": 5}},
    ):
        answer = post(native, CHAT, thin | said)
        assert answer.status_code == 400
        assert "aspect ratio must be smaller than 200" in answer.json()["error"]["message"]


# --- Refusals ---------------------------------------------------------------------------------

RESIZE = {"method": "resize", "budget": 3}
TOO_FEW = "at least 4, for an image of 400 x 400 pixels by resize"
LAYERS = "tome needs layers of the vision tower between which tokens can leave, which this model"
TOME = {"method": "tome", "budget": 5}
NOWHERE = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/nothing.png"}}
"""Nobody gets as far as loading it."""


@pytest.mark.parametrize(
    ("path", "body", "param", "fragment"),
    [
        (CHAT, {"messages": user(NOWHERE), "reduction": TOME}, "reduction.method", LAYERS),
        (
            CHAT,
            {"messages": user(NOWHERE | {"reduction": TOME})},
            "messages[0].content[0].reduction.method",
            LAYERS,
        ),
        (
            RESPONSES,
            {"input": turn(input_image(0, LARGE, reduction=TOME)), "stream": True},
            "input[0].content[0].reduction.method",
            LAYERS,
        ),
        (
            CHAT,
            {"messages": user(NOWHERE), "reduction": {"method": "fastv", "budget": 5}},
            "reduction.method",
            "--reduction-stages",
        ),
        (
            CHAT,
            {"messages": user(image(0, WIDE), image(1, LARGE)), "reduction": RESIZE},
            "reduction.budget",
            "at least 4",
        ),
        (
            CHAT,
            {"messages": user(image(1, LARGE, reduction=RESIZE)), "stream": True},
            "messages[0].content[0].image_url.reduction.budget",
            TOO_FEW,
        ),
        (
            RESPONSES,
            {
                "input": turn(input_image(1, LARGE, visual_token_budget=3)),
                "reduction": RESIZE | {"budget": 9},
            },
            "input[0].content[0].visual_token_budget",
            TOO_FEW,
        ),
        (
            CHAT,
            {
                "messages": user(image(2, SQUARE, detail="low")),
                "reduction": RESIZE | {"budget": 9},
            },
            "messages[0].content[0].image_url.detail",
            "at least 4, for an image of 100 x 100 pixels by resize",
        ),
        (
            CHAT,
            {"messages": user(image(0, SQUARE)), "visual_token_budget": 1},
            "visual_token_budget",
            "from 2",
        ),
    ],
)
def test_refused(
    native: Server, path: str, body: dict[str, Any], param: str, fragment: str
) -> None:
    check_refused(native, path, body, param, fragment)


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
def test_too_long_names_the_budget_that_fits(native: Server, path: str) -> None:
    """Small images leave room to the large ones; what is scaled down counts as it was sent."""
    sizes = [LARGE] * 40 + [TINY] * 10

    def ask(**fields: Any) -> Any:
        if path == CHAT:
            body = {"messages": user(*(image(n, size) for n, size in enumerate(sizes)))}
        else:
            body = {"input": turn(*(input_image(n, size) for n, size in enumerate(sizes)))}
        return post(native, path, body | fields)

    room = 2048 - 1 - chat(native).usage.prompt_tokens - 2 * len(sizes) - 10 * 4
    fits = room // 40
    resize = {"method": "resize", "budget": 49}
    for said, tokens in ({}, 40 * 64), ({"reduction": resize}, 40 * 49):
        refused = ask(**said)
        error = refused.json()["error"]
        assert refused.status_code == 400
        assert error["param"] == ("messages" if path == CHAT else "input")
        assert f"{tokens + 10 * 4} of them visual tokens of 50 images" in error["message"]
        assert f"visual_token_budget {fits} or less" in error["message"]
    assert ask(visual_token_budget=fits).status_code == 200
    assert ask(visual_token_budget=fits + 1).status_code == 400, "it is the largest"


LONG = (MOST * 28, 28)
"""An image of one row takes as many positions as it has tokens, whatever is left of it."""


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
def test_images_that_take_more_positions_than_there_are(native: Server, path: str) -> None:
    """The table has 4 * 2048 of them, and the context may take 2048 behind the images'."""
    beyond = MOST - 2
    fits = (4 * 2048 - 2048) // beyond

    def ask(images: int, budget: int = 2) -> Any:
        if path == CHAT:
            body = {"messages": user(*[image(1, LONG)] * images)}
        else:
            body = {"input": turn(*[input_image(1, LONG)] * images)}
        return post(native, path, body | {"visual_token_budget": budget})

    answer = ask(fits)
    assert answer.status_code == 200, answer.text
    assert reported(of(answer)) == [("score", 2, MOST, 2)] * fits
    refused = ask(fits + 1)
    assert refused.status_code == 400, refused.text
    error = refused.json()["error"]
    assert error["param"] == ("messages" if path == CHAT else "input")
    for said in (f"{(fits + 1) * beyond} positions more", f"{4 * 2048 - 2048} to spare"):
        assert said in error["message"]
    assert ask(fits + 1, budget=4).status_code == 200


def test_an_image_that_the_tower_has_no_room_for(native: Server) -> None:
    """vLLM would see no more of it than its budget."""
    options = {"min_pixels": 2200 * 784}
    body = {"messages": user(image(0, SQUARE)), "mm_processor_kwargs": options}
    for said, param in ({}, "messages"), ({"visual_token_budget": 6}, "mm_processor_kwargs"):
        answer = post(native, CHAT, body | said)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["param"] == param
        assert "2209" in error["message"] and "2048" in error["message"]


def test_other_routes(native: Server) -> None:
    """They take images, and no budget."""
    one = {"model": MODEL, "messages": user(image(0, SQUARE)), "max_tokens": 2}
    whole = chat(native, image(0, SQUARE)).usage.prompt_tokens
    assert native.http.post("/tokenize", json=one).json()["count"] == whole
    assert len(rendered(native, SQUARE)["token_ids"]) == whole
    for path in ("/tokenize", f"{CHAT}/render", "/v1/messages"):
        refused = native.http.post(path, json=one | {"visual_token_budget": 5})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "visual_token_budget"


# --- Embeddings -------------------------------------------------------------------------------


def embedded(rows: int, grid: list[int], width: int = 128) -> dict[str, Any]:
    """An image as embeddings."""

    def saved(tensor: torch.Tensor) -> str:
        file = io.BytesIO()
        torch.save(tensor, file)
        return base64.b64encode(file.getvalue()).decode()

    fields = {"image_embeds": torch.ones(rows, width), "image_grid_thw": torch.tensor(grid)}
    return {"type": "image_embeds", "image_embeds": {k: saved(v) for k, v in fields.items()}}


def test_embeddings_of_an_image(native: Server) -> None:
    answer = chat(native, embedded(16, [1, 8, 8]))
    assert reported(answer) == [("none", None, 16, 16)]
    body = {"messages": user(embedded(16, [1, 8, 8])), "visual_token_budget": 5}
    refused = post(native, CHAT, body)
    assert refused.status_code == 400 and "left out for image_embeds" in refused.text
    grids = ([1, 8, 8], [1, 1, 4], [1, -6, -8], [-1, -6, 8], [3, 2, 8], [1, 48])
    for wrong in (*(embedded(12, grid) for grid in grids), embedded(12, [1, 6, 8], 64)):
        refused = post(native, CHAT, {"messages": user(wrong)})
        assert refused.status_code == 400, "it would end the engine"
        assert refused.json()["error"]["param"] == "image_embeds"


# --- Rendered elsewhere -----------------------------------------------------------------------


def rendered(server: Server, size: tuple[int, int], seed: int = 0) -> Any:
    """A prompt with an image, as /render makes it."""
    body = {"model": MODEL, "messages": user(image(seed, size)), "max_tokens": 2, "temperature": 0}
    return server.http.post(f"{CHAT}/render", json=body).json()


def reduce(prompt: Any, original: int = 0, **settings: Any) -> Any:
    """The prompt with settings for its image, which may have been scaled down for them."""
    reduction = Reduction.parse(settings)

    def packed(data: Any) -> Any:
        layout = unpack(data).layout
        assert layout is not None
        return pack(reduction, layout._replace(original=original))

    return change(prompt, PACKED_FIELD, packed)


def ask(prompt: Any, reduction: Reduction | None, *words: int) -> Any:
    """The prompt with settings for its image and its question."""
    return change(prompt, PACKED_FIELD, lambda data: pack(reduction, unpack(data).layout, words))


def test_a_rendered_image_of_a_method_that_asks(native: Server) -> None:
    """With the question of its prompt it is answered as on the chat route."""
    settings = {"method": "cdpruner", "budget": 5}
    asked = chat(native, image(0, WIDE), max_tokens=2, reduction=settings)
    prompt = rendered(native, WIDE)
    [at] = prompt["features"]["mm_placeholders"]["image"]
    behind = prompt["token_ids"][at["offset"] + at["length"] + 1 :]
    answer = native.http.post(GENERATE, json=place(ask(prompt, Reduction(**settings), *behind), 5))
    assert answer.status_code == 200, answer.text
    tokens = answer.json()["choices"][0]["token_ids"]
    text = native.http.post("/detokenize", json={"model": MODEL, "tokens": tokens}).json()
    assert text["prompt"].strip() == asked.choices[0].message.content.strip()


def test_a_rendered_image_is_not_followed(native: Server) -> None:
    """A mark is of previews alone."""
    topk = Reduction(method="topk", budget=5)

    def marked(data: Any) -> Any:
        return pack(topk, unpack(data).layout, (), "a mark")

    prompt = change(rendered(native, WIDE), PACKED_FIELD, marked)
    refused = native.http.post(GENERATE, json=place(prompt, 5))
    assert refused.status_code == 400 and "as a render writes them" in refused.text


def test_a_rendered_image(native: Server) -> None:
    """Unreduced and reduced, it is answered as on the chat route; twice."""
    for settings, length in ({}, 14), ({"method": "topk", "budget": 5}, 5):
        prompt = rendered(native, WIDE)
        if settings:
            prompt = place(reduce(prompt, **settings), length)
        said = {"reduction": settings} if settings else {}
        asked = chat(native, image(0, WIDE), max_tokens=2, **said)
        answers = [native.http.post(GENERATE, json=prompt) for _ in range(2)]
        for answer in answers:
            assert answer.status_code == 200, answer.text
            tokens = answer.json()["choices"][0]["token_ids"]
            text = native.http.post("/detokenize", json={"model": MODEL, "tokens": tokens}).json()
            assert text["prompt"].strip() == asked.choices[0].message.content.strip()
    scaled = reduce(rendered(native, WIDE), 64, method="resize", budget=15)
    assert native.http.post(GENERATE, json=scaled).status_code == 200


def embeds(prompt: Any, rows: int) -> Any:
    """The prompt with embeddings instead of pixels."""
    features = prompt["features"]
    item = decode_mm_kwargs_item(features["kwargs_data"]["image"][0])
    item["image_embeds"] = item.pop("pixel_values")
    item["image_embeds"].data = torch.ones(rows, 128)
    del item[PACKED_FIELD]
    features["kwargs_data"]["image"], features["mm_metadata"] = [encode_mm_kwargs_item(item)], None
    return prompt


def grid(*numbers: int) -> Callable[[Any], Any]:
    """Exchanges an image's grid."""
    return lambda p: change(p, "image_grid_thw", lambda _: torch.tensor(numbers))


BROKEN: dict[str, tuple[Callable[[Any], Any], str]] = {
    "longer": (lambda p: place(p, 15), "mm_placeholders.image[0].length"),
    "reduced": (lambda p: reduce(p, budget=5), "mm_placeholders.image[0].length"),
    "by its policy": (
        lambda p: place(reduce(p, budget=1), 1),
        "kwargs_data.image[0].reduction.budget",
    ),
    "by the model": (
        lambda p: place(reduce(p, method="tome", budget=5), 5),
        "kwargs_data.image[0].reduction.method",
    ),
    "not scaled down": (
        lambda p: reduce(p, method="resize", budget=5),
        "kwargs_data.image[0].packed_reduction",
    ),
    "scaled down too little": (
        lambda p: reduce(p, 64, method="resize", budget=5),
        "kwargs_data.image[0].packed_reduction",
    ),
    "scaled down for another method": (
        lambda p: place(reduce(p, 64, method="topk", budget=5), 5),
        "kwargs_data.image[0].packed_reduction",
    ),
    "another layout": (
        lambda p: change(p, PACKED_FIELD, lambda _: pack(None, Layout((7, 2)))),
        "kwargs_data.image[0].packed_reduction",
    ),
    "a question that its method does not ask": (
        lambda p: place(ask(p, Reduction(method="topk", budget=5), 7), 5),
        "kwargs_data.image[0].packed_reduction",
    ),
    "a question of an image that stays whole": (
        lambda p: ask(p, None, 7),
        "kwargs_data.image[0].packed_reduction",
    ),
    "a word that the model has not": (
        lambda p: place(ask(p, Reduction(method="cdpruner", budget=5), 10**6), 5),
        "kwargs_data.image[0].packed_reduction",
    ),
    "a question too long": (
        lambda p: place(ask(p, Reduction(method="cdpruner", budget=5), *[7] * 257), 5),
        "kwargs_data.image[0].packed_reduction",
    ),
    "no settings": (
        lambda p: change(p, PACKED_FIELD, lambda _: None),
        "kwargs_data.image[0].packed_reduction",
    ),
    "no grid": (
        lambda p: change(p, "image_grid_thw", lambda _: None),
        "kwargs_data.image[0].image_grid_thw",
    ),
    "another grid": (grid(1, 14, 4), "kwargs_data.image[0].packed_reduction"),
    "half a unit": (grid(1, 1, 56), "kwargs_data.image[0].image_grid_thw"),
    "two frames": (grid(2, 4, 14), "kwargs_data.image[0].image_grid_thw"),
    "a huge grid": (grid(1, 1000, 1000), "kwargs_data.image[0].image_grid_thw"),
    "grid with fractions": (
        lambda p: change(p, "image_grid_thw", lambda grid: grid / 1.0),
        "kwargs_data.image[0].image_grid_thw",
    ),
    "patches missing": (
        lambda p: change(p, "pixel_values", lambda pixels: pixels[:-1]),
        "kwargs_data.image[0].pixel_values",
    ),
    "small patches": (
        lambda p: change(p, "pixel_values", lambda pixels: pixels[:, :588]),
        "kwargs_data.image[0].pixel_values",
    ),
    "no pixels": (
        lambda p: change(p, "pixel_values", lambda _: None),
        "kwargs_data.image[0]",
    ),
    "embeddings missing": (
        lambda p: place(embeds(p, 13), 13),
        "kwargs_data.image[0].image_embeds",
    ),
    "embeddings too wide": (
        lambda p: change(embeds(p, 14), "image_embeds", lambda x: x.repeat(1, 3)),
        "kwargs_data.image[0].image_embeds",
    ),
}  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN)
def test_a_rendered_image_must_agree_with_its_place(native: Server, broken: str) -> None:
    """One with fewer rows than its place in the prompt would end the engine."""
    spoil, param = BROKEN[broken]
    answer = native.http.post(GENERATE, json=spoil(rendered(native, WIDE, seed=3)))
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == f"features.{param}"
    assert native.http.get("/health").status_code == 200


def test_rendered_embeddings(native: Server) -> None:
    answer = native.http.post(GENERATE, json=embeds(rendered(native, WIDE, seed=3), 14))
    assert answer.status_code == 200, answer.text


def test_rendered_images_that_take_more_positions_than_there_are(native: Server) -> None:
    """As on the chat route."""
    fits = (4 * 2048 - 2048) // (MOST - 2)
    prompt = place(reduce(rendered(native, LONG, seed=1), budget=2), 2)
    [at] = prompt["features"]["mm_placeholders"]["image"]
    start, end, ids = at["offset"], at["offset"] + 2, prompt["token_ids"]
    shown = ids[start - 1 : end + 1]
    for images, status in ((fits, 200), (fits + 1, 400)):
        features = {
            **prompt["features"],
            "mm_hashes": {"image": prompt["features"]["mm_hashes"]["image"] * images},
            "kwargs_data": {"image": prompt["features"]["kwargs_data"]["image"] * images},
            "mm_placeholders": {
                "image": [at | {"offset": start + n * len(shown)} for n in range(images)]
            },
        }
        several = ids[: start - 1] + shown * images + ids[end + 1 :]
        body = prompt | {"token_ids": several, "features": features}
        answer = native.http.post(GENERATE, json=body)
        assert answer.status_code == status, answer.text[:300]
        if status == 400:
            assert answer.json()["error"]["param"] == "features"
