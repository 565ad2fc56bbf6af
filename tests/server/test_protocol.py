# SPDX-License-Identifier: Apache-2.0
"""Settings out of bodies, the report into answers, the observation. No server, no engine."""

import asyncio
import json
from collections.abc import AsyncIterator
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import PlaceholderRange
from vllm.platforms import current_platform
from vllm.renderers.chat_utils import _KNOWN_CONTENT_PART_FIELDS

from ficoco_server import cli, metrics, protocol
from ficoco_server.api_router import Guard, _refusal
from ficoco_server.metrics import INVALID, REQUESTS, Observation, budget_bucket
from ficoco_server.policy import Policy, PolicyError
from ficoco_server.protocol import (
    Asked,
    ChatRequest,
    ResponseRequest,
    holds_image,
    meant,
    mentioned,
    stray_setting,
    take_settings,
)
from ficoco_server.reducer import Reducer, _refuse_prompt_logprobs
from ficoco_server.serving import _check_graphs, _check_stages, _with_report
from vllm_ficoco.cost import Decoder
from vllm_ficoco.engine.checks import SCHEDULER
from vllm_ficoco.models.processing import COUNTS_KEY, COUNTS_KEYS, RefusedImage
from vllm_ficoco.packed import Packed
from vllm_ficoco.settings import Reduction, SettingsError
from vllm_ficoco.vision.geometry import Geometry
from vllm_ficoco.vision.layout import Layout, Window

URL = "data:image/png;base64,AAAA"


def body(*parts: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": list(parts)}], **fields}


def image(**said: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": URL, **said}}


TEXT = {"type": "text", "text": "what is it ?"}


# --- Settings out of bodies -----------------------------------------------------------------


def test_settings_of_images_in_order() -> None:
    given = body(image(detail="low"), TEXT, image(visual_token_budget=9), image())
    given["messages"].append({"role": "user", "content": [image(reduction={"budget": 3})]})
    untouched = deepcopy(given)
    request = ChatRequest.model_validate(given)
    assert given == untouched
    assert [(level.path, level.said) for level in request._asked.images] == [
        ("messages[0].content[0]", {"detail": "low"}),
        ("messages[0].content[2]", {"visual_token_budget": 9}),
        ("messages[0].content[3]", {}),
        ("messages[1].content[0]", {"reduction": {"budget": 3}}),
    ]
    assert request._asked.misplaced is None


def test_a_setting_is_called_by_the_place_where_it_stood() -> None:
    given = body({**image(detail="low"), "visual_token_budget": 9})
    [level] = take_settings(given, "messages")[1].images
    assert level.said == {"detail": "low", "visual_token_budget": 9}
    assert level.field("detail") == "messages[0].content[0].image_url.detail"
    assert level.field("visual_token_budget") == "messages[0].content[0].visual_token_budget"


def test_two_settings_of_one_image_must_be_the_same() -> None:
    same = body({**image(visual_token_budget=9), "visual_token_budget": 9})
    assert take_settings(same, "messages")[1].misplaced is None
    other = body({**image(visual_token_budget=9), "visual_token_budget": 64})
    misplaced = take_settings(other, "messages")[1].misplaced
    assert misplaced is not None and misplaced.value == 64
    assert misplaced.field == "messages[0].content[0].visual_token_budget"
    for nothing in ("auto", "AUTO", "", None):
        for outer, inner in ((nothing, "low"), ("low", nothing)):
            given = body({**image(detail=inner), "detail": outer})
            [level] = take_settings(given, "messages")[1].images
            assert level.said == {"detail": "low"}


def test_vllm_does_not_see_them() -> None:
    taken, _ = take_settings(body(image(detail="low", visual_token_budget=9), TEXT), "messages")
    assert taken["messages"][0]["content"] == [image(detail="auto"), TEXT]


@pytest.mark.parametrize(
    ("part", "modality", "embeds"),
    [
        (image(), "image", False),
        ({"type": "input_image", "image_url": URL}, "image", False),
        ({"image_url": URL}, "image", False),
        ({"type": "image_url", "image_url": None, "uuid": "a"}, "image", False),
        ({"type": "image_embeds", "image_embeds": "AAAA"}, "image", True),
        ({"image_embeds": None, "uuid": "a"}, "image", True),
        ({"type": "video_url", "video_url": {"url": URL}}, "video", False),
        ({"video_url": URL}, "video", False),
        ({"type": "video_url", "video_url": None, "uuid": "a"}, "video", False),
        ({"type": "video_embeds", "video_embeds": "AAAA"}, "video", True),
        ({"video_embeds": None, "uuid": "a"}, "video", True),
        ({"type": "video_url", "video_url": URL, "image_url": URL, "uuid": "a"}, "image", False),
        ({"audio_url": URL, "video_url": URL}, "", False),
        ({"type": "audio_url", "audio_url": URL}, "", False),
        (TEXT, "", False),
        ("text", "", False),
        (None, "", False),
    ],
)
def test_what_is_an_image_or_a_video(part: Any, modality: str, embeds: bool) -> None:
    """As vLLM sees it, which goes by the type, or by the first key that it finds."""
    asked = take_settings(body(part), "messages")[1]
    assert [level.embeds for level in asked.images] == [embeds] * (modality == "image")
    assert [level.embeds for level in asked.videos] == [embeds] * (modality == "video")


@pytest.mark.parametrize("messages", [None, "hello", [], [None], [[]], [{"content": 3}], {"a": 1}])
def test_odd_messages_are_left_to_vllm(messages: Any) -> None:
    taken, asked = take_settings({"messages": messages}, "messages")
    assert taken == {"messages": messages} and asked.images == ()


@pytest.mark.parametrize(
    ("given", "where"),
    [
        (
            body({**TEXT, "visual_token_budget": 9}),
            "messages[0].content[0].visual_token_budget",
        ),
        (
            body({"type": "audio_url", "audio_url": {"url": URL, "reduction": {}}}),
            "messages[0].content[0].audio_url.reduction",
        ),
        (
            body({"type": "video_url", "video_url": {}, "image_url": {"reduction": {}}}),
            "messages[0].content[0].image_url.reduction",
        ),
        (
            body({**image(), "metadata": {"reduction": {}}}),
            "messages[0].content[0].metadata.reduction",
        ),
        (
            {"messages": [{"role": "user", "content": "a", "reduction": 1}]},
            "messages[0].reduction",
        ),
        *(
            ({"messages": [], holder: {"visual_token_budget": 9}}, f"{holder}.visual_token_budget")
            for holder in (
                *("vllm_xargs", "extra_body", "chat_template_kwargs", "metadata", "stream_options"),
                *("mm_processor_kwargs", "media_io_kwargs", "kv_transfer_params", "model_kwargs"),
            )
        ),
        *(
            ({"messages": [], holder: {"images": {"reduction": 9}}}, f"{holder}.images.reduction")
            for holder in ("extra_body", "mm_processor_kwargs", "media_io_kwargs")
        ),
        ({"messages": [], "extra_body": {"visualTokenBudget": 9}}, "extra_body.visualTokenBudget"),
    ],
)
def test_settings_in_the_wrong_place_are_noticed(given: dict[str, Any], where: str) -> None:
    asked = take_settings(given, "messages")[1]
    misplaced = asked.misplaced or stray_setting(given, ChatRequest.model_fields)
    assert misplaced is not None and misplaced.field == where


MISSPELT = [
    *("budget", "Budget", "BUDGET", "budgets", "bugdet"),
    *("visual_token_budgets", "visual_tokens_budget", "visual_tokn_budget", "visual_token_bugdet"),
    *("visualTokenBudget", "VISUAL_TOKEN_BUDGET", "visual-token-budget", "visual.token.budget"),
    *("Reduction", "REDUCTION", "reductions", "redution", "reductoin", "reducti0n", "_reduction"),
]


@pytest.mark.parametrize("key", MISSPELT)
def test_a_setting_that_is_misspelt(key: str) -> None:
    """On the request and on an image, in and beside its image_url."""
    right = "reduction" if "ed" in key.lower() else "visual_token_budget"
    part = "messages[0].content[0]"
    for given, field in (
        (body(image(), **{key: 9}), key),
        (body(image(**{key: 9})), f"{part}.image_url.{key}"),
        (body({**image(), key: 9}), f"{part}.{key}"),
        (body({"type": "input_image", "image_url": URL, key: 9}), f"{part}.{key}"),
        (body({"type": "video_url", "video_url": {"url": URL, key: 9}}), f"{part}.video_url.{key}"),
    ):
        asked = take_settings(given, "messages")[1]
        wrong = asked.misplaced or stray_setting(given, ChatRequest.model_fields)
        assert wrong is not None and wrong.field == field
        assert wrong.allowed.startswith(f"{right},")


@pytest.mark.parametrize(
    "key",
    [
        *("deduction", "redaction", "red_action", "reaction", "production", "introduction"),
        *("bucket", "max_budget", "budget_tokens", "method", "thinking_token_budget", "visual"),
        *("token_budget", "", "b", "r" * 10_000),
    ],
)
def test_a_key_that_is_none_of_ours(key: str) -> None:
    assert meant(key) is None


def test_no_field_of_vllm_is_taken_for_a_misspelt_setting() -> None:
    for model in (ChatCompletionRequest, ResponsesRequest, GenerateRequest, CompletionRequest):
        assert [name for name in model.model_fields if meant(name)] == []
    assert [name for name in _KNOWN_CONTENT_PART_FIELDS if meant(name)] == []


def test_of_many_keys_few_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours are found among any number of others, and a body of a million keys takes no longer."""
    looked: list[str] = []
    monkeypatch.setattr(protocol, "meant", lambda key: looked.append(key))
    many = {f"visual_token_{i}": 1 for i in range(50_000)}
    given = {**body(image(**many)), **many, "extra_body": {**many, "reduction": {"budget": 9}}}
    assert take_settings(given, "messages")[1].misplaced is None
    stray = stray_setting(given, ChatRequest.model_fields)
    assert stray is not None and stray.field == "extra_body.reduction"
    assert len(looked) <= 3000


@pytest.mark.parametrize(
    "fields",
    [
        {"reduction": {"method": "tome", "options": {"budget": 1}}},
        {"metadata": {"budget": "9", "Reduction": "a user's tag"}},
        {"chat_template_kwargs": {"budget": 9, "enable_thinking": False}},
        {"vllm_xargs": {"visual_token_budget": None, "budgets": 3}},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {
            "type": "object", "properties": {"reduction": {}, "budget": {}}}}}]},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {
            "properties": {"reduction": {"type": "integer"}}}}}},
        {"structured_outputs": {"json": {"properties": {"visual_token_budget": {}}}}},
        {"guided_json": {"properties": {"reduction": {"type": "integer"}}}},
        {"budget": None, "documents": [{"reduction": "a text"}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "type": "function",
            "function": {"name": "f", "arguments": '{"reduction": 9}'}}]}]},
    ],
)  # fmt: skip
def test_what_users_may_call_by_our_names(fields: dict[str, Any]) -> None:
    given = body(image(), TEXT) | fields
    assert take_settings(given, "messages")[1].misplaced is None
    assert stray_setting(given, ChatRequest.model_fields) is None


def test_strays_reach_the_one_refusal(reducer: Reducer) -> None:
    for fields, param in (
        ({"budget": 9}, "budget"),
        ({"vllm_xargs": {"reduction": 9}}, "vllm_xargs.reduction"),
        ({"extra_body": {"visual_token_budget": 9}}, "extra_body.visual_token_budget"),
    ):
        for request in (
            ChatRequest.model_validate(body(image(), **fields)),
            ResponseRequest.model_validate({"input": "hello", **fields}),
        ):
            with pytest.raises(VLLMValidationError) as refused:
                reducer.settle(request, [])
            assert refused.value.parameter == param


def test_settings_of_a_responses_request() -> None:
    parts = [
        {"type": "input_image", "image_url": URL, "detail": "low"},
        {"type": "input_text", "text": "what is it ?"},
        {"type": "input_image", "image_url": URL, "visual_token_budget": 9},
    ]
    request = ResponseRequest.model_validate(
        {"input": [{"role": "user", "content": parts}], "visual_token_budget": 5}
    )
    assert request.level.said == {"visual_token_budget": 5}
    assert [(level.path, level.said) for level in request._asked.images] == [
        ("input[0].content[0]", {"detail": "low"}),
        ("input[0].content[2]", {"visual_token_budget": 9}),
    ]
    assert ResponseRequest.model_validate({"input": "hello"})._asked.images == ()


def test_images_that_the_responses_api_leaves_out_are_no_images() -> None:
    """Of what an assistant has said it takes the first text; settings behind it do nothing."""
    text, picture = {"type": "output_text", "text": "a"}, {"type": "input_image", "image_url": URL}

    def asked(*parts: Any, role: str = "assistant") -> Any:
        return take_settings({"input": [{"role": role, "content": list(parts)}]}, "input")[1]

    assert asked(text, picture) == Asked()
    assert asked(text, {**picture, "visual_token_budget": 9}).misplaced is not None
    assert len(asked(picture, text).images) == len(asked(text, picture, role="user").images) == 1


def test_values_arrive_as_they_were_sent() -> None:
    for value in ("64", 64.0, True, [64], 10**30):
        request = ChatRequest.model_validate(body(TEXT, visual_token_budget=value))
        assert request.level.said == {"visual_token_budget": value}
        assert type(request.level.said["visual_token_budget"]) is type(value)
    assert ChatRequest.model_validate(body(TEXT, reduction=None)).level.said == {}


def test_a_copy_keeps_the_settings() -> None:
    request = ResponseRequest.model_validate({"input": "hello", "visual_token_budget": 5})
    assert request.model_copy(update={"input": []})._asked is request._asked


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ({"visual_token_budget": 9}, ""),
        ({"reduction": {}}, ""),
        ({"extra_body": {"reduction": {}}}, "extra_body"),
        ({"mm_processor_kwargs": {"images": {"reduction": {}}}}, "mm_processor_kwargs.images"),
        (body(image(visual_token_budget=9)), "messages[0].content[0].image_url"),
        (
            {"messages": [body(image(reduction=1))["messages"]]},
            "messages[0][0].content[0].image_url",
        ),
        (
            {"input": [{"content": [{"type": "input_image", "reduction": 1}]}]},
            "input[0].content[0]",
        ),
    ],
)
def test_mentioned(given: dict[str, Any], where: str) -> None:
    level = mentioned(given)
    assert level is not None and level.path == where


@pytest.mark.parametrize(
    "given",
    [
        [],
        "reduction",
        {"prompt": "reduction"},
        {"reduction": None},
        body(image(detail="low")),
        body({"type": "tool_use", "name": "boil", "input": {"reduction": 5}}),
    ],
)
def test_not_mentioned(given: Any) -> None:
    assert mentioned(given) is None


# --- The guard ------------------------------------------------------------------------------


async def _through_guard(payload: bytes, path: str = "/v1/messages") -> tuple[list[Any], bytes]:
    """What the guard sent, and the body that the application behind it received."""
    received, sent = [], []
    halves = [payload[: len(payload) // 2], payload[len(payload) // 2 :]]
    messages = [{"type": "http.request", "body": half, "more_body": i == 0}
                for i, half in enumerate(halves)]  # fmt: skip

    async def app(scope: Any, receive: Any, send: Any) -> None:
        more = True
        while more:
            message = await receive()
            received.append(message["body"])
            more = message.get("more_body", False)

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": []}
    await Guard(app, frozenset({"/v1/messages"}))(scope, receive, send)
    return sent, b"".join(received)


async def test_the_guard_lets_others_pass_unchanged() -> None:
    for payload in (b'{"prompt": "about reduction"}', b"not json, visual_token_budget", b"{}"):
        assert await _through_guard(payload) == ([], payload)
    mine = b'{"visual_token_budget": 64}'
    assert await _through_guard(mine, "/v1/chat/completions") == ([], mine)


def test_images_are_found_in_any_form() -> None:
    """For the largest budget, which routes that do not know it would pass by."""
    anthropic = {"type": "image", "source": {"type": "base64", "data": "AAAA"}}
    for part in (image(), anthropic, {"type": "input_image", "image_url": URL}):
        assert holds_image({"messages": [{"role": "user", "content": [TEXT, part]}]})
        assert holds_image({"messages": [[{"role": "user", "content": [part]}]]})
    assert not holds_image({"messages": [{"role": "user", "content": "an image_url"}]})


def test_images_do_not_pass_by_the_largest_budget() -> None:
    """On routes that know no budgets: refused where the policy has a largest one, else let pass."""
    payload = json.dumps({"messages": [{"role": "user", "content": [image()]}]}).encode()
    text = b'{"messages": [{"role": "user", "content": "an image ?"}]}'
    refused = _refusal(payload, "/v1/messages", 64)
    assert refused is not None
    assert "64" in str(refused) and "/v1/chat/completions" in str(refused)
    assert _refusal(payload, "/v1/messages", None) is None
    assert _refusal(text, "/v1/messages", 64) is None


def test_rendered_images_do_not_pass_by_the_largest_budget() -> None:
    """Of ``/inference/v1/generate``: by their features, and by parts that vLLM renders."""
    features = {"mm_hashes": {"image": ["a"]}, "mm_placeholders": {"image": [{"offset": 1}]}}
    part = {"type": "image_url", "url": URL}
    for images in (
        {"features": features},
        {"content_parts": [part]},
        {"content_parts": [{**part, "uuid": "a"}]},
    ):
        payload = json.dumps({"token_ids": [1], "sampling_params": {}, **images}).encode()
        assert "largest visual token budget" in str(_refusal(payload, "/inference/v1/generate", 64))
        assert _refusal(payload, "/inference/v1/generate", None) is None
    for features in (None, {"mm_hashes": {}}):
        payload = json.dumps({"token_ids": [1], "image": 0, "features": features}).encode()
        assert _refusal(payload, "/inference/v1/generate", 64) is None


async def test_the_guard_refuses_what_is_spelt_with_escapes() -> None:
    sent, _ = await _through_guard(b'{"visual\\u005ftoken_budget": 64}')
    assert sent[0]["status"] == 400
    sent, _ = await _through_guard(b'{"mm_processor_kwargs": {"visual_token_budget": 64}}')
    assert sent[0]["status"] == 400
    sent, _ = await _through_guard('{"visual_token_budget": 64}'.encode("utf-16"))
    assert sent[0]["status"] == 400


async def test_the_guard_refuses() -> None:
    before = REQUESTS.labels(INVALID, "refused")._value.get()
    sent, received = await _through_guard(b'{"visual_token_budget": 64}')
    assert sent[0]["status"] == 400 and received == b""
    error = json.loads(sent[1]["body"])["error"]
    assert error["param"] == "visual_token_budget" and "/v1/messages" in error["message"]
    assert REQUESTS.labels(INVALID, "refused")._value.get() == before + 1


# --- The report -----------------------------------------------------------------------------


@pytest.fixture
def reducer() -> Reducer:
    made = Reducer.__new__(Reducer)
    made.policy, made.geometry = Policy(), Geometry((12, 12), 9, True)
    made.decoder = Decoder(6, 256, 640, 4, 4, 64, 2)
    return made


def engine_input(*lengths: int, text: int = 10) -> dict[str, Any]:
    return {
        "prompt_token_ids": [0] * (text + sum(lengths)),
        "mm_placeholders": {"image": [PlaceholderRange(10, length) for length in lengths]},
    }


def test_report_of_two_images(reducer: Reducer) -> None:
    settings = [Reduction(budget=64), None]
    report = reducer.report(settings, [False, False], engine_input(64, 144))
    assert report is not None
    assert report["method"] == "mixed" and report["budget"] is None
    assert (report["visual_tokens_before"], report["visual_tokens_kept"]) == (288, 208)
    assert report["kv_cache_bytes_held"] == 208 * 6144
    assert report["kv_cache_bytes_saved"] == 80 * 6144
    assert 0.5 < report["estimated_prefill_flops_ratio"] < 1
    assert [i["visual_tokens_kept"] for i in report["images"]] == [64, 144]
    assert [i["method"] for i in report["images"]] == ["score", "none"]


def test_no_report_without_images(reducer: Reducer) -> None:
    assert reducer.report([], [], {"prompt_token_ids": [1]}) is None


@pytest.mark.parametrize("lengths", [(63,), (144,), (64, 64), ()])
def test_a_report_is_true_or_there_is_none(reducer: Reducer, lengths: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match="visual tokens were due"):
        reducer.report([Reduction(budget=64)], [False], engine_input(*lengths))


LARGE = Layout((4, 4), (2, 2), Window(0, 0, 8, 8))
SMALL = Layout((4, 4), (1, 2), Window(0, 2, 4, 4))
"""Of 88 and 36 tokens; the tower makes 80 and 48."""


@pytest.fixture
def tiles() -> Reducer:
    """Of a model in tiles, on a server with stages and small blocks."""
    made = Reducer.__new__(Reducer)
    made.policy = Policy()
    made.geometry = Geometry((4, 4), 6, True, 6, (2, 4), by_image=True)
    made.decoder = Decoder(6, 256, 640, 4, 4, 64, 2)
    made.block_size, made.encoder_tokens, made.context = 4, 130, 200
    return made


def asked(reducer: Reducer, *images: Packed, **fields: Any) -> tuple[Any, dict[str, Any]]:
    """A settled request with so many images, and what the processor would make of it."""
    request = ChatRequest.model_validate(body(*(image() for _ in images), TEXT, **fields))
    reducer.settle(request, request.messages)
    start, places = 10, []
    for reduction, layout, *_ in images:
        length = reducer.geometry.kept(reduction, layout=layout)
        places.append(PlaceholderRange(start, length))
        start += length
    return request, {
        "prompt_token_ids": [0] * (start + 10),
        "mm_placeholders": {"image": places},
        "mm_hashes": {"image": [str(n) for n in range(len(images))]},
        COUNTS_KEY: list(images),
    }


def test_report_of_images_in_tiles(tiles: Reducer) -> None:
    reduction = Reduction(method="fastv", budget=50)
    request, made = asked(
        tiles,
        Packed(reduction, LARGE),
        Packed(None, SMALL),
        reduction={"method": "fastv", "budget": 50},
    )
    settings = tiles.fit(request, made)
    assert settings == [reduction, None], "the second has fewer tokens"
    report = tiles.report(settings, [False, False], made)
    assert report is not None
    large, small = report["images"]
    held = large.pop("visual_tokens_by_stage")
    # (2 * 88 + 4 * 31) / 6 = 50, of which whole blocks of 4 are held.
    assert held[0] == 88 and held[1] == held[2] and 31 <= held[1] < 31 + 8
    kept = -(-(2 * 88 + 4 * held[1]) // 6)
    assert large == {
        "method": "fastv",
        "budget": 50,
        "visual_tokens_before": 88,
        "visual_tokens_kept": kept,
    }
    assert small == {
        "method": "none",
        "budget": None,
        "visual_tokens_before": 36,
        "visual_tokens_kept": 36,
        "visual_tokens_by_stage": [36, 36, 36],
    }
    assert report["visual_tokens_before"] == 88 + 36
    assert report["kv_cache_bytes_saved"] == 4 * (88 - held[1]) * 1024


def test_the_engine_was_given_what_was_settled(tiles: Reducer) -> None:
    topk, uniform = (Reduction(method=name, budget=20) for name in ("topk", "uniform"))
    _, made = asked(tiles, Packed(topk, LARGE))
    assert tiles.report([topk], [False], made) is not None
    with pytest.raises(RuntimeError, match="were due"):
        tiles.report([uniform], [False], made)
    with pytest.raises(RuntimeError, match="visual tokens were due"):
        tiles.report([topk, None], [False, False], made)
    made["mm_placeholders"]["image"] = [PlaceholderRange(10, 21)]
    with pytest.raises(RuntimeError, match=r"\[20\] visual tokens were due"):
        tiles.report([topk], [False], made)


def test_prompt_logprobs_go_with_images_that_stay_whole(tiles: Reducer) -> None:
    said = {"reduction": {"method": "fastv", "budget": 50}, "prompt_logprobs": 1}
    request, made = asked(tiles, Packed(None, SMALL), **said)
    assert tiles.fit(request, made) == [None]
    request, made = asked(tiles, Packed(Reduction(method="fastv", budget=50), LARGE), **said)
    with pytest.raises(VLLMValidationError, match="leave inside the decoder") as refused:
        tiles.fit(request, made)
    assert refused.value.parameter == "prompt_logprobs"
    assert request._seen.method == INVALID


def test_what_an_image_cannot_have_names_the_clients_field(tiles: Reducer) -> None:
    tiles.policy = Policy(max_budget=50, default_budget=50)
    request = ChatRequest.model_validate(
        body(image(), image(reduction={"method": "none"}), TEXT, reduction={"budget": 40})
    )
    tiles.settle(request, request.messages)
    made = {COUNTS_KEY: [Packed(Reduction(budget=40), LARGE), Packed(None, LARGE)]}
    with pytest.raises(VLLMValidationError, match="from 1 to 50, by this") as refused:
        tiles.fit(request, made)
    assert refused.value.parameter == "messages[0].content[1].image_url.reduction"
    made[COUNTS_KEY][1] = Packed(None, SMALL)
    assert tiles.fit(request, made) == [Reduction(budget=40), None]
    error = SettingsError("options.newlines", "all", "left out")
    named = tiles.refused(request, RefusedImage(0, error, "reduction[0]"))
    assert named.parameter == "reduction.options.newlines"
    assert str(named).startswith("reduction.options.newlines = 'all' is not valid")


def made_of(tokens: int) -> Any:
    """A place in a prompt."""
    return PlaceholderRange(200, tokens)


@pytest.mark.parametrize(
    ("layouts", "enough"),
    [([LARGE], 79), ([LARGE, SMALL], 128), ([SMALL, SMALL], 96), ([SMALL, None], 51)],
)
def test_one_step_encodes_tiles(tiles: Reducer, layouts: list[Layout | None], enough: int) -> None:
    """What the tower makes of an image, its padding too; one image alone always runs."""
    reduction = Reduction(method="ficoco-vl", budget=20)
    settings = [layout and reduction for layout in layouts]
    images = [Packed(r, layout) for r, layout in zip(settings, layouts, strict=True)]
    request, made = asked(tiles, *(one for one in images if one.layout))
    embeds = [layout is None for layout in layouts]
    if any(embeds):
        made["mm_placeholders"]["image"].append(PlaceholderRange(100, 3))
        made["mm_hashes"]["image"].append("embeds")
        made[COUNTS_KEY].append(Packed())
    tiles.encoder_tokens = enough
    tiles.refuse_too_many(request, settings, embeds, made)
    tiles.encoder_tokens = enough - 1
    if len(layouts) == 1:
        return tiles.refuse_too_many(request, settings, embeds, made)
    with pytest.raises(VLLMValidationError, match="encoded in one step") as refused:
        tiles.refuse_too_many(request, settings, embeds, made)
    assert refused.value.parameter == "messages"
    for said in (f"2 images of {enough} visual", f"images of {enough - 1} visual", "ficoco-vl"):
        assert said in str(refused.value)
    made["mm_hashes"]["image"] = ["the same"] * 2
    tiles.refuse_too_many(request, settings, embeds, made)
    made["mm_hashes"]["video"], made["mm_placeholders"]["video"] = ["moves"], [made_of(enough)]
    made[COUNTS_KEYS["video"]] = [Packed()]
    with pytest.raises(VLLMValidationError, match="1 image and 1 video of"):
        tiles.refuse_too_many(request, [*settings, None], [*embeds, False], made)


@pytest.mark.parametrize(
    ("policy", "room", "said"),
    [
        ({}, 36 * 3 + 2 * 80 + 1, "visual_token_budget 80 or less"),
        ({}, 36 * 3 + 2 * 36, "visual_token_budget 36 or less"),
        ({}, 36 * 3 + 2 * 36 - 1, "visual_token_budget 35 or less"),
        ({"max_budget": 50}, 36 * 3 + 2 * 80, "visual_token_budget 50 or less"),
        ({"min_budget": 40}, 36 * 3 + 2 * 40, "visual_token_budget 40 or less"),
        ({"min_budget": 40}, 36 * 3 + 79, "budget of this server, 40, at most 4 images"),
        ({"min_budget": 40}, -5, "at most 0 images"),
    ],
)
def test_the_budget_that_fits_leaves_small_images_whole(
    tiles: Reducer, policy: dict[str, int], room: int, said: str
) -> None:
    tiles.policy = Policy(**policy)
    assert said in tiles._what_would_fit([None] * 5, [LARGE, SMALL, SMALL, LARGE, SMALL], room)


def test_a_budget_that_fits_can_be_reached(tiles: Reducer) -> None:
    """ToMe halves at most, six times; a tile of 16 tokens in a tower of one layer, once."""
    tiles.geometry = tiles.geometry._replace(layers=1)
    tiles.policy = Policy(default_method="tome")
    assert "visual_token_budget 60" in tiles._what_would_fit([None], [LARGE], 60)
    fits = tiles._what_would_fit([None], [LARGE], 30)
    assert '"budget": 30' in fits and "tome" not in fits


def test_images_at_native_resolution_in_one_step(tiles: Reducer) -> None:
    """No tiles, so no padding; and what is suggested is no method that the model cannot do."""
    tiles.geometry = Geometry(
        (0, 0), 4, False, 6, (2, 4), True, frozenset({"scaling", "attention"})
    )
    reduction = Reduction(method="fastv", budget=50)
    images = [Packed(reduction, Layout((8, 8)))] * 3
    request, made = asked(tiles, *images, reduction={"method": "fastv", "budget": 50})
    with pytest.raises(VLLMValidationError, match=r"images of 130 visual tokens there, or") as said:
        tiles.refuse_too_many(request, [reduction] * 3, [False] * 3, made)
    assert "3 images of 192 visual tokens" in str(said.value)
    tiles.policy = Policy(default_method="fastv", methods=("fastv", "tome"))
    fits = tiles._what_would_fit([reduction], [Layout((8, 8))], 20)
    assert fits == "1 images that keep all their tokens do not fit; send fewer."


def test_what_was_scaled_down_counts_as_it_was_sent(tiles: Reducer) -> None:
    tiles.geometry = tiles.geometry._replace(starts=(), offers=frozenset({"scaling"}))
    resize = Reduction(method="resize", budget=20)
    _, made = asked(tiles, Packed(resize, LARGE._replace(original=200)))
    report = tiles.report([resize], [False], made)
    assert report is not None
    assert (report["visual_tokens_before"], report["visual_tokens_kept"]) == (200, 88)
    assert report["kv_cache_bytes_saved"] == (200 - 88) * tiles.decoder.kv_bytes_per_token
    tiles.policy = Policy(default_method="resize", methods=("resize",))
    scaled = [LARGE._replace(original=200), SMALL]
    assert "visual_token_budget 114 or less" in tiles._what_would_fit([resize] * 2, scaled, 150)


def test_settings_hidden_in_mm_processor_kwargs(reducer: Reducer) -> None:
    request = ChatRequest.model_validate(
        body(image(), mm_processor_kwargs={"visual_token_budget": 9})
    )
    with pytest.raises(VLLMValidationError, match="own field visual_token_budget"):
        reducer.settle(request, [])


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"echo": True}, "echo"),
        ({"echo": True, "logprobs": True, "top_logprobs": 3, "min_tokens": 9}, "echo"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"prompt_logprobs": -1, "echo": True, "return_token_ids": True}, "prompt_logprobs"),
        ({"echo": False, "return_token_ids": True, "logprobs": True, "top_logprobs": 1}, None),
        ({"vllm_xargs": {"prompt_logprobs": 1}, "return_prompt_text": True}, None),
    ],
)
def test_what_becomes_prompt_logprobs_is_named(fields: dict[str, Any], named: str | None) -> None:
    """Whatever the field, if it has vLLM ask for logprobs of rows that leave in the decoder."""
    request = ChatRequest.model_validate(body(image(), **fields))
    assert (request.to_sampling_params(16, {}).prompt_logprobs is None) == (named is None)
    if named is None:
        _refuse_prompt_logprobs(request)
        return
    with pytest.raises(SettingsError, match="leave inside the decoder") as refused:
        _refuse_prompt_logprobs(request)
    assert refused.value.field == named and refused.value.value == fields[named]


def test_no_other_field_asks_for_prompt_logprobs() -> None:
    """Of vLLM's own: each alone, with a value that it takes."""
    for model, least in ((ChatCompletionRequest, body(TEXT)), (ResponsesRequest, {"input": "a"})):
        asking = set()
        for name in model.model_fields.keys() - least.keys():
            for value in (True, 1, 0.5, "a", ["a"], [1], {"a": 1}):
                try:
                    request = model.model_validate({**least, name: value})
                    params = request.to_sampling_params(16, {})
                except (VLLMValidationError, ValueError, TypeError, AttributeError):
                    continue
                whole = params.prompt_logprobs, params.prompt_logprob_token_ids
                asking |= {name} if whole != (None, None) else set()
        assert asking == ({"echo", "prompt_logprobs"} if model is ChatCompletionRequest else set())


def test_images_of_earlier_turns_follow_the_request(reducer: Reducer) -> None:
    request = ResponseRequest.model_validate(
        {
            "input": [{"role": "user", "content": [{"type": "input_image", "image_url": URL,
                                                    "visual_token_budget": 9}]}],
            "visual_token_budget": 64,
        }
    )  # fmt: skip
    turns = [*body(image())["messages"], *body(image())["messages"]]
    assert reducer.settle(request, turns) == [Reduction(budget=64), Reduction(budget=9)]


def chunk(finish: str | None = None, text: str = "", usage: bool = False) -> str:
    data: dict[str, Any] = {"choices": [{"delta": {"content": text}, "finish_reason": finish}]}
    if usage:
        data = {"choices": [], "usage": {"prompt_tokens": 3}}
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"


async def _stream(*chunks: str, report: bool = True) -> tuple[list[str], Any]:
    async def source() -> AsyncIterator[str]:
        for one in chunks:
            yield one

    held = REPORT if report else None
    request: Any = SimpleNamespace(_seen=Observation(), _report=held)
    return [one async for one in _with_report(request, source())], request._seen


DONE = "data: [DONE]\n\n"
REPORT = {
    "method": "tome",
    "visual_tokens_before": 144,
    "visual_tokens_kept": 64,
    "kv_cache_bytes_saved": 8,
    "images": [{"visual_tokens_kept": 64}],
}


FIGURES = {
    "image_tokens": 64,
    "reduction_method": "tome",
    "visual_tokens_before": 144,
    "visual_tokens_kept": 64,
    "kv_cache_bytes_saved": 8,
}


@pytest.mark.parametrize(
    ("chunks", "bearing"),
    [
        ([chunk(text="a"), chunk("stop")], [1]),
        ([chunk(text='"finish_reason":"stop" "choices":[]'), chunk("length")], [1]),
        ([chunk("stop"), chunk(text="b"), chunk("stop")], [0, 2]),
        ([chunk(text="a"), chunk("stop"), chunk(usage=True)], [1, 2]),
    ],
)
async def test_chunks_that_bear_the_report(chunks: list[str], bearing: list[int]) -> None:
    """The last one, and before it those with a finish_reason, of which clients keep more."""
    got, _ = await _stream(*chunks, DONE)
    assert got[-1] == DONE and len(got) == len(chunks) + 1
    for i, (had, sent) in enumerate(zip(chunks, got, strict=False)):
        if i not in bearing:
            assert sent == had
            continue
        data = json.loads(sent.removeprefix("data: "))
        assert data.pop("reduction") == REPORT
        if "usage" in data:
            details = data["usage"].pop("prompt_tokens_details")
            assert details == {"multimodal_tokens": {"image": 64}, **FIGURES}
        assert data == json.loads(had.removeprefix("data: "))


async def test_no_token_waits_for_the_next() -> None:
    async def source() -> AsyncIterator[str]:
        yield chunk(text='an odd "finish_reason":"stop"')
        await asyncio.Event().wait()

    request: Any = SimpleNamespace(_seen=Observation(), _report={"a": 1})
    stream = _with_report(request, source())
    await asyncio.wait_for(anext(stream), 1)
    await stream.aclose()
    assert request._seen._ended


async def test_streams_without_report_or_with_an_error() -> None:
    chunks = [chunk(text="a"), chunk("stop"), DONE]
    assert (await _stream(*chunks, report=False))[0] == chunks
    failed = [chunk(text="a"), 'data: {"error":{"message":"x"}}\n\n', DONE]
    before = REQUESTS.labels("none", "error")._value.get()
    assert (await _stream(*failed))[0] == failed
    assert REQUESTS.labels("none", "error")._value.get() == before + 1


# --- The observation ------------------------------------------------------------------------


def test_budget_buckets_are_few() -> None:
    labels = {budget_bucket(Reduction(budget=b)) for b in range(1, 3000)}
    assert labels == {"<=32", "<=64", "<=128", "<=192", "<=256", "<=576", ">576"}
    assert budget_bucket(None) == "full"


def test_only_the_first_end_counts() -> None:
    success, cancelled = (REQUESTS.labels("none", o) for o in ("success", "cancelled"))
    before = success._value.get(), cancelled._value.get()
    seen = Observation()
    seen.finish("success")
    seen.finish("cancelled")
    assert (success._value.get(), cancelled._value.get()) == (before[0] + 1, before[1])


async def test_results_are_closed_with_their_reader() -> None:
    closed = False

    async def engine() -> AsyncIterator[Any]:
        nonlocal closed
        try:
            while True:
                yield SimpleNamespace(metrics=None, outputs=[])
        finally:
            closed = True

    seen = Observation()
    results = seen.results(engine(), streaming=True)
    await anext(results)
    await results.aclose()
    assert closed and seen.cancelled


async def test_failures_are_told_apart() -> None:
    async def fail(error: Exception) -> None:
        raise error

    for error, outcome in (
        (VLLMValidationError("no"), "refused"),
        (ValueError("no"), "refused"),
        (RuntimeError("no"), "error"),
    ):
        counter = REQUESTS.labels("none", outcome)
        before = counter._value.get()
        with pytest.raises(type(error)):
            await Observation().watch(fail(error))
        assert counter._value.get() == before + 1


def test_collectors_are_made_once() -> None:
    again = metrics._once(metrics.Counter, "vllm_ficoco_requests_total", "", ["method", "outcome"])
    assert again is REQUESTS
    assert "vllm_ficoco_requests_total" in REGISTRY._names_to_collectors


# --- The command ----------------------------------------------------------------------------


def test_our_plugins_join_an_allow_list() -> None:
    assert cli._plugins("other") == ["other", "vllm_ficoco", "ficoco_server"]
    assert cli._plugins("ficoco_server,other") == ["ficoco_server", "other", "vllm_ficoco"]
    assert cli._plugins("") == ["vllm_ficoco", "ficoco_server"]


def test_all_installed_plugins_stay_on(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {
        "vllm.general_plugins": ["vllm_ficoco", "general"],
        "vllm.stat_logger_plugins": ["stats"],
        "vllm.endpoint_plugins": ["ficoco_server", "opt-in"],
        "console_scripts": ["script"],
    }
    entries = SimpleNamespace(
        groups=set(installed),
        select=lambda group: [SimpleNamespace(name=name) for name in installed[group]],
    )
    monkeypatch.setattr(cli, "entry_points", lambda: entries)
    assert cli._plugins(None) == ["vllm_ficoco", "general", "stats", "ficoco_server"]


def test_stages_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Any] = []
    monkeypatch.setattr(cli, "prepare", lambda *_: None)
    monkeypatch.setattr(cli, "serve", lambda _, stages: served.append(stages))
    monkeypatch.setenv("FICOCO_STAGES", "")  # the command sets it, too
    cli.main(["serve", "tiny-llava"])
    cli.main(["serve", "tiny-llava", "--reduction-stages", "2,4"])
    monkeypatch.setenv("FICOCO_STAGES", "3")
    cli.main(["serve", "tiny-llava"])
    monkeypatch.setenv("FICOCO_STAGES", "")
    cli.main(["serve", "tiny-llava"])
    assert served == [[], [2, 4], [3], []]
    with pytest.raises(SystemExit):
        cli.main(["serve", "tiny-llava", "--reduction-stages", "two"])


@pytest.mark.parametrize("flags", [["--grpc"], ["--scheduler-cls", "another.scheduler"]])
def test_what_the_command_cannot_serve_with(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    monkeypatch.setattr(ServeSubcommand, "cmd", lambda *_: pytest.fail("it would start"))
    with pytest.raises(SystemExit):
        cli.serve(["tiny-llava", *flags], [2, 4])
    assert f"not {flags[0]}" in capsys.readouterr().err


def started_with_stages(monkeypatch: pytest.MonkeyPatch, flags: list[str]) -> Any:
    """vLLM's arguments, with which the command would start a server."""
    started: list[Any] = []
    monkeypatch.setattr(ServeSubcommand, "cmd", started.append)
    cli.serve(["tiny-llava", *flags], [2, 4])
    [args] = started
    return args


@pytest.mark.parametrize(
    ("flags", "size"), [([], 32), (["--block-size=64"], 64)], ids=["by default", "as said"]
)
def test_stages_come_with_blocks_that_fit_into_an_image(
    monkeypatch: pytest.MonkeyPatch, flags: list[str], size: int
) -> None:
    """vLLM's own choice for CPUs is 128 tokens, of which no image of 144 need have a whole one."""
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _: True)
    args = started_with_stages(monkeypatch, flags)
    assert args.block_size == size and args.scheduler_cls == SCHEDULER
    assert args.hf_overrides == {"reduction_stages": [2, 4]}


@pytest.mark.parametrize(
    ("flags", "blackwell", "backend"),
    [
        ([], False, None),
        ([], True, "FLASH_ATTN"),
        (["--dtype=float32"], True, "TRITON_ATTN"),
        (["--attention-backend=FLASHINFER"], True, "FLASHINFER"),
    ],
)
def test_stages_on_a_gpu_set_only_what_they_need_and_was_not_said(
    monkeypatch: pytest.MonkeyPatch, flags: list[str], blackwell: bool, backend: str | None
) -> None:
    """What is said and does not do is refused by the model, with a message, not replaced."""
    platform = type(current_platform)
    monkeypatch.setattr(platform, "is_cuda", lambda _: True)
    monkeypatch.setattr(platform, "is_device_capability_family", lambda *_: blackwell)
    args = started_with_stages(monkeypatch, flags)
    assert not args.enforce_eager and args.compilation_config.cudagraph_mode is None
    assert getattr(args.attention_backend, "name", args.attention_backend) == backend


def test_settings_for_graphs_come_to_the_engine_where_somebody_asks_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def overrides(*flags: str) -> Any:
        return started_with_stages(monkeypatch, list(flags)).hf_overrides

    own = ["score@1/9", "score@1/3", "score@2/9"]
    assert "reduction_graphs" not in overrides()
    assert overrides("-cc.cudagraph_mm_encoder=true")["reduction_graphs"] == own
    monkeypatch.setenv("FICOCO_GRAPHS", "tome@20")
    assert overrides() == {"reduction_stages": [2, 4], "reduction_graphs": ["tome@20", *own]}
    given = overrides('--hf-overrides={"reduction_graphs": ["evit@9"]}')
    assert given["reduction_graphs"] == ["evit@9"]


def test_graphs_that_plain_vllm_would_not_have_stop_the_start() -> None:
    said, nothing = Policy(graphs=("tome@20",)), SimpleNamespace()
    _check_graphs(Policy(), nothing)
    _check_graphs(said, SimpleNamespace(reduction_graphs=["tome@20"]))
    with pytest.raises(PolicyError, match=r'--hf-overrides .\{"reduction_graphs": \["tome@20"'):
        _check_graphs(said, nothing)


def test_stages_that_plain_vllm_would_not_have_stop_the_start() -> None:
    _check_stages("", ())
    _check_stages("2, 4", (2, 4))
    for starts in ((), (3,)):
        with pytest.raises(PolicyError, match=r"--scheduler-cls .* --hf-overrides"):
            _check_stages("2,4", starts)


def test_environment_of_the_command(tmp_path: Path) -> None:
    given = tmp_path / "given"
    environment = {"PROMETHEUS_MULTIPROC_DIR": str(given), "HF_HUB_OFFLINE": "0"}
    cli.prepare(environment, ["tiny-llava"])
    assert environment["PROMETHEUS_MULTIPROC_DIR"] == str(given) and given.is_dir()
    assert environment["HF_HUB_OFFLINE"] == "0"
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "1"
    environment = {}
    cli.prepare(environment, ["llava-hf/llava-1.5-7b-hf"])
    assert environment["PROMETHEUS_MULTIPROC_DIR"]
    assert "HF_HUB_OFFLINE" not in environment and "VLLM_CPU_KVCACHE_SPACE" not in environment


def test_the_shipped_model_by_name() -> None:
    args = SimpleNamespace(model_tag="tiny-llava", model="default", served_model_name=None)
    cli._resolve_tiny(args)
    assert args.model == args.model_tag and args.model.endswith("/vllm_ficoco/tiny_llava")
    assert args.served_model_name == ["tiny-llava"]
    args = SimpleNamespace(model_tag="other", model="default", served_model_name=None)
    cli._resolve_tiny(args)
    assert (args.model_tag, args.model, args.served_model_name) == ("other", "default", None)


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--help"], "--reduction-default-budget"),
        (["--version"], "vllm-ficoco "),
    ],
)
def test_help_and_version(
    arguments: list[str], fragment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(arguments)
    assert fragment in capsys.readouterr().out


def test_a_wrong_policy_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    # All that the command sets, to be restored behind it.
    for name in ("FICOCO_MIN_BUDGET", "VLLM_PLUGINS", "HF_HUB_OFFLINE", "VLLM_CPU_KVCACHE_SPACE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    with pytest.raises(SystemExit):
        cli.main(["serve", "tiny-llava", "--reduction-min-budget", "some"])
    said = capsys.readouterr().err
    assert "the min budget 'some' (FICOCO_MIN_BUDGET, --reduction-min-budget)" in said
    with pytest.raises(SystemExit):
        cli.main(["launch"])
    assert "unknown command 'launch'" in capsys.readouterr().err
