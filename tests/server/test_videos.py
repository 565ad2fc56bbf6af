# SPDX-License-Identifier: Apache-2.0
"""Videos in the front end: settings, the report, the metrics; files that vLLM's decoder reads."""

from __future__ import annotations

import json
import re
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY
from vllm.config import ModelConfig
from vllm.entrypoints.scale_out.token_in_token_out.mm_serde import (
    decode_mm_kwargs_item,
    encode_mm_kwargs_item,
)
from vllm.exceptions import VLLMClientError, VLLMValidationError
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import PlaceholderRange
from vllm.plugins import load_general_plugins
from vllm.version import __version__ as VLLM

from ficoco_server.media import Connector
from ficoco_server.metrics import Observation
from ficoco_server.policy import Policy, PolicyError
from ficoco_server.protocol import ChatRequest, take_settings
from ficoco_server.reducer import Reducer
from ficoco_server.serving import _with_visual
from loadtest.__main__ import main
from loadtest.traffic import video as video_of_squares
from tests.checkpoints import (
    random_llava_next,
    random_llava_next_video,
    random_llava_onevision,
    random_qwen,
)
from tests.server.conftest import API_KEY, MODEL, Server, user, value
from tests.server.conftest import image as picture_part
from tests.server.test_http import chat
from tests.server.test_refusals import post
from tests.server.test_tiles import CHAT, GENERATE, check_refused
from tests.videos import data_url, filmed, gif, mp4
from vllm_ficoco.cost import Decoder, prefill_flops_ratio
from vllm_ficoco.models.processing import COUNTS_KEYS, RefusedImage
from vllm_ficoco.packed import PACKED_FIELDS, Packed, pack, unpack
from vllm_ficoco.settings import Reduction, SettingsError
from vllm_ficoco.vision.geometry import Geometry
from vllm_ficoco.vision.layout import Layout

URL = "data:video/mp4;base64,AAAA"
PICTURE, FILM = Layout((4, 4)), Layout((4, 5), frames=8)
"""Of 16 and 160 tokens."""


ONE_SEQUENCE = (random_llava_next_video, random_llava_onevision)
"""Models of which a video's tokens follow one another; in Qwen3-VL text stands between frames."""


def image(**said: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": URL, **said}}


def video(**said: Any) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": URL, **said}}


def request(*parts: Any, **fields: Any) -> ChatRequest:
    turns = [{"role": "user", "content": [*parts, {"type": "text", "text": "what is it ?"}]}]
    return ChatRequest.model_validate({"model": "m", "messages": turns, **fields})


@pytest.fixture
def reducer() -> Reducer:
    """Of a model at native resolution, on a server with stages and small blocks."""
    made = Reducer.__new__(Reducer)
    made.policy = Policy()
    made.geometry = Geometry(
        (0, 0), 4, False, 6, (2, 4), True, frozenset({"scaling", "attention"}), videos="reduced"
    )
    made.decoder = Decoder(6, 256, 640, 4, 4, 64, 2)
    made.block_size, made.encoder_tokens, made.context = 4, 200, 300
    made.parts = ()
    return made


def settle(reducer: Reducer, asked: ChatRequest) -> Any:
    """The settings of its images and videos, as the processor takes them."""
    return reducer.by_modality(asked, reducer.settle(asked, asked.messages))


def refusal(reducer: Reducer, asked: ChatRequest) -> VLLMValidationError:
    with pytest.raises(VLLMValidationError) as refused:
        reducer.settle(asked, asked.messages)
    return refused.value


def made_of(reducer: Reducer, asked: ChatRequest) -> tuple[list[Reduction | None], dict[str, Any]]:
    """Its settings where their sizes are known, and what the processor makes of it: text, then
    its images, then its videos."""
    start, places, counts = 10, {"image": [], "video": []}, {"image": [], "video": []}
    for one in reducer.settle(asked, asked.messages) and asked._settled:
        layout = FILM if one.modality == "video" else PICTURE
        reduction = one.reduction and one.reduction.for_tokens(layout.tokens)
        length = reducer.geometry.kept(reduction, layout=layout)
        places[one.modality].append(PlaceholderRange(start, length))
        counts[one.modality].append(Packed(reduction, layout))
        start += length
    made = {
        "prompt_token_ids": [0] * (start + 10),
        "mm_placeholders": {kind: some for kind, some in places.items() if some},
        "mm_hashes": {kind: [f"{kind} {n}" for n in range(len(s))] for kind, s in places.items()},
        **{COUNTS_KEYS[kind]: some for kind, some in counts.items()},
    }
    return reducer.fit(asked, made), made


# --- Settings -----------------------------------------------------------------------------------


def test_videos_have_settings_of_their_own(reducer: Reducer) -> None:
    asked = request(
        video(reduction={"method": "uniform", "budget": 40}),
        image(detail="low"),
        {**video(), "visual_token_budget": 9},
        image(),
        video(),
        visual_token_budget=12,
    )
    assert [level.field("reduction") for level in asked._asked.videos] == [
        "messages[0].content[0].video_url.reduction",
        "messages[0].content[2].reduction",
        "messages[0].content[4].reduction",
    ]
    settled = settle(reducer, asked)
    assert [r.budget for r in settled["video"]] == [40, 9, 12]
    assert settled["image"][1:] == [Reduction(budget=12)]
    assert settled["video"][0].method == "uniform"


def test_vllm_does_not_see_the_settings_of_a_video() -> None:
    """And gets ``detail`` as it came: of a video it means nothing."""
    given = {**video(visual_token_budget=9, detail="low"), "reduction": {"budget": 9}}
    turns = [{"role": "user", "content": [given]}]
    taken, asked = take_settings({"messages": turns}, "messages")
    assert taken["messages"][0]["content"] == [video(detail="low")]
    assert asked.videos[0].said == {"visual_token_budget": 9, "reduction": {"budget": 9}}


def test_without_videos_the_processor_gets_a_list(reducer: Reducer) -> None:
    assert settle(reducer, request(image(visual_token_budget=5))) == [Reduction(budget=5)]
    both = settle(reducer, request(video(visual_token_budget=5)))
    assert both == {"image": [], "video": [Reduction(budget=5)]}


def test_videos_of_earlier_turns_follow_the_request(reducer: Reducer) -> None:
    asked = request(video(visual_token_budget=9), image(), visual_token_budget=12)
    turns = [*request(video(), video()).messages, *asked.messages]
    settled = reducer.by_modality(asked, reducer.settle(asked, turns))
    assert [r.budget for r in settled["video"]] == [12, 12, 9]
    assert [r.budget for r in settled["image"]] == [12]


@pytest.mark.parametrize("default", [64, "auto"])
def test_a_default_budget_is_of_images(reducer: Reducer, default: Any) -> None:
    """It would ruin a video, and so would pressure."""
    reducer.policy = Policy(default_budget=default, max_budget=64, default_method="topk")
    asked = request(image(), video())
    asked._lowers = True
    settled = settle(reducer, asked)
    assert settled["image"][0] is not None and settled["video"] == [None]
    settled = settle(reducer, request(image(), video(visual_token_budget=100)))
    assert settled["video"] == [Reduction(method="topk", budget=100)]


def test_an_images_largest_budget_is_none_of_a_video(reducer: Reducer) -> None:
    reducer.policy = Policy(max_budget=12, min_budget=4)
    asked = request(video(reduction={"method": "none"}), video(visual_token_budget=100))
    assert made_of(reducer, asked)[0] == [None, Reduction(budget=100)]
    asked = request(video(reduction={"method": "vitcop", "options": {"tokens": [90, 60, 30]}}))
    [reduction], _ = made_of(reducer, asked)
    assert reduction is not None and reduction.options["tokens"] == [90, 60, 30]


@pytest.mark.parametrize(
    ("parts", "fields", "policy", "param", "allowed"),
    [
        ([video()], {"visual_token_budget": "auto"}, {}, "visual_token_budget", "a number for a"),
        (
            [image(), video()],
            {"reduction": {"budget": "auto"}},
            {},
            "reduction.budget",
            "a number for a video",
        ),
        (
            [video(visual_token_budget="auto")],
            {},
            {},
            "messages[0].content[0].video_url.visual_token_budget",
            "a number for a video",
        ),
        (
            [image(), video(reduction={"method": "topk"})],
            {},
            {"default_budget": 12},
            "messages[0].content[1].video_url.reduction.budget",
            "no default budget for videos",
        ),
        (
            [video(visual_token_budget=3)],
            {},
            {"min_budget": 4, "max_budget": 9},
            "messages[0].content[0].video_url.visual_token_budget",
            "a budget from 4 on, by this server's policy",
        ),
        (
            [video(reduction={"method": "topk", "budget": 9})],
            {},
            {"methods": ("score",)},
            "messages[0].content[0].video_url.reduction.method",
            "one of score, by this server's policy",
        ),
        (
            [video()],
            {"reduction": {"method": "resize", "budget": 9}},
            {},
            "reduction.method",
            "reduces in the tower or before it",
        ),
        (
            [video(visual_token_budget=9)],
            {"reduction": {"method": "resize", "budget": 9}},
            {},
            "messages[0].content[0].video_url.visual_token_budget",
            "in a reduction with one of the methods none, ficoco-v, score",
        ),
        (
            [{"type": "video_embeds", "video_embeds": "AAAA"}],
            {"visual_token_budget": 9},
            {},
            "visual_token_budget",
            "left out for video_embeds",
        ),
        (
            [video(visual_token_budget=0)],
            {},
            {},
            "messages[0].content[0].video_url.visual_token_budget",
            "a whole number",
        ),
    ],
)
def test_settings_that_a_video_cannot_have(
    reducer: Reducer, parts: Any, fields: Any, policy: Any, param: str, allowed: str
) -> None:
    reducer.policy = Policy(**policy)
    refused = refusal(reducer, request(*parts, **fields))
    assert refused.parameter == param
    assert allowed in str(refused)


def test_a_model_whose_videos_stay_whole(reducer: Reducer) -> None:
    """Settings for one are refused, and are none that its images cannot have."""
    for geometry in (reducer.geometry._replace(videos="whole"), Geometry((12, 12), 9, True)):
        reducer.geometry = geometry
        refused = refusal(reducer, request(image(), video(), visual_token_budget=9))
        assert refused.parameter == "visual_token_budget"
        assert "the videos of this model stay whole" in str(refused)
        assert settle(reducer, request(image(visual_token_budget=9), video())) == {
            "image": [Reduction(budget=9)],
            "video": [None],
        }


def test_methods_for_videos_alone(reducer: Reducer) -> None:
    said = {"method": "vidcom2", "budget": 9}
    asked = request(image(), video(reduction=said), image(visual_token_budget=5))
    settled = settle(reducer, asked)
    assert [r and r.method for r in settled["image"]] == [None, "score"]
    assert settled["video"][0].method == "vidcom2"
    refused = refusal(reducer, request(image(), video(), reduction=said))
    assert refused.parameter == "reduction.method"
    assert "vidcom2 compares the frames of a video" in str(refused)
    with pytest.raises(PolicyError, match="vidcom2 compares the frames of a video"):
        Policy(default_method="vidcom2").check_model(reducer.geometry, PICTURE)
    Policy(default_method="vidcom2").check_model(reducer.geometry, FILM)


def test_what_a_video_cannot_have_names_the_clients_field(reducer: Reducer) -> None:
    asked = request(image(), video(), video(reduction={"budget": 9, "method": "topk"}))
    reducer.settle(asked, asked.messages)
    error = SettingsError("budget", 9, "at least 10")
    refused = reducer.refused(asked, RefusedImage(1, error, "reduction.video[1]", "video"))
    assert refused.parameter == "messages[0].content[2].video_url.reduction.budget"


# --- The report ---------------------------------------------------------------------------------


def test_report_of_an_image_and_videos(reducer: Reducer) -> None:
    asked = request(video(visual_token_budget=40), image(visual_token_budget=6), video())
    settings, made = made_of(reducer, asked)
    assert settings == [Reduction(budget=6), Reduction(budget=40), None]
    report = reducer.report(settings, [False] * 3, made)
    assert report is not None
    assert report["method"] == "mixed" and report["budget"] is None
    assert report["visual_tokens_before"] == 16 + 2 * 160
    assert report["visual_tokens_kept"] == 6 + 40 + 160
    assert report["kv_cache_bytes_saved"] == (10 + 120) * 6144
    [of_image], of_videos = report["images"], report["videos"]
    assert (of_image["visual_tokens_before"], of_image["visual_tokens_kept"]) == (16, 6)
    assert [one["visual_tokens_kept"] for one in of_videos] == [40, 160]
    assert of_videos[0]["visual_tokens_by_stage"] == [40, 40, 40]
    assert [one["method"] for one in of_videos] == ["score", "none"]
    usage = _with_visual({"multimodal_tokens": {"audio": 3}}, report)
    assert usage["multimodal_tokens"] == {"audio": 3, "image": 6, "video": 200}
    assert (usage["image_tokens"], usage["video_tokens"]) == (6, 200)


def test_a_report_says_nothing_of_videos_where_there_are_none(reducer: Reducer) -> None:
    settings, made = made_of(reducer, request(image(visual_token_budget=6)))
    report = reducer.report(settings, [False], made)
    assert report is not None and "videos" not in report
    assert _with_visual({}, report)["multimodal_tokens"] == {"image": 6}
    settings, made = made_of(reducer, request(video(visual_token_budget=6)))
    report = reducer.report(settings, [False], made)
    assert report is not None and report["images"] == []
    assert _with_visual({}, report)["multimodal_tokens"] == {"video": 6}


def test_the_engine_was_given_what_was_settled_for_videos(reducer: Reducer) -> None:
    settings, made = made_of(reducer, request(image(), video(visual_token_budget=40)))
    made["mm_placeholders"]["video"] = [PlaceholderRange(26, 41)]
    with pytest.raises(RuntimeError, match=r"\[16, 40\] visual tokens were due"):
        reducer.report(settings, [False] * 2, made)


def test_the_metrics_say_what_was_a_video(reducer: Reducer) -> None:
    def count(modality: str, stage: str, method: str) -> float:
        labels = {"modality": modality, "stage": stage, "method": method}
        return REGISTRY.get_sample_value("vllm_ficoco_visual_tokens_total", labels) or 0

    settings, made = made_of(reducer, request(image(), video(visual_token_budget=40)))
    seen = Observation()
    seen.describe(reducer.prefilled(reducer.report(settings, [False] * 2, made)))
    of = [("image", "input", "none"), ("video", "input", "score"), ("video", "kept", "score")]
    before = [count(*labels) for labels in of]
    seen._start()
    assert [count(*labels) - had for labels, had in zip(of, before, strict=True)] == [16, 160, 40]


def test_a_prompt_that_is_too_long_for_its_videos(reducer: Reducer) -> None:
    asked = request(video(), video(), image())
    settings, made = made_of(reducer, asked)
    with pytest.raises(VLLMValidationError) as refused:
        reducer.refuse_too_long(asked, settings, [False] * 3, made)
    message = str(refused.value)
    assert "336 of them visual tokens of 1 image and 2 videos" in message
    assert "visual_token_budget 131 or less for every image and video it would fit" in message
    reducer.policy = Policy(max_budget=9)
    assert "visual_token_budget 139 or less for every video" in reducer._what_would_fit(
        [None] * 2, [FILM] * 2, 279
    )
    reducer.policy = Policy(methods=("tome", "resize"))
    fits = reducer._what_would_fit([None] * 2, [FILM, PICTURE], 279)
    assert fits == "2 images and videos that keep all their tokens do not fit; send fewer."


def test_one_step_encodes_videos(reducer: Reducer) -> None:
    said = {"method": "fastv", "budget": 70}
    asked = request(video(reduction=said), image(), image())
    settings, made = made_of(reducer, asked)
    reducer.encoder_tokens = 192
    reducer.refuse_too_many(asked, settings, [False] * 3, made)
    reducer.encoder_tokens = 191
    with pytest.raises(VLLMValidationError, match="encoded in one step") as refused:
        reducer.refuse_too_many(asked, settings, [False] * 3, made)
    assert "2 images and 1 video of 192 visual tokens in the tower" in str(refused.value)
    assert "images and videos of 191 visual tokens there, or fewer" in str(refused.value)


@pytest.mark.parametrize(
    ("make", "modalities"),
    [
        (random_llava_next, ["image"]),
        (random_llava_next_video, ["video"]),
        (random_llava_onevision, ["image", "video"]),
        (partial(random_qwen, family="qwen3-vl"), ["image", "video"]),
    ],
)
def test_what_a_server_says_of_its_model(make: Any, modalities: list[str], tmp_path: Path) -> None:
    load_general_plugins()
    model = ModelConfig(model=str(make(tmp_path / "model")))
    processor = MULTIMODAL_REGISTRY.create_processor(model)
    cache = SimpleNamespace(block_size=32, cache_dtype="auto", effective_attention_block_size=32)
    config = SimpleNamespace(model_config=model, cache_config=cache)
    about = Reducer(config, Policy(), processor, 2048).describe()
    assert about["model"]["modalities"] == modalities
    for modality, methods in ("image", "methods"), ("video", "video_methods"):
        assert ("score" in about["policy"][methods]) == (modality in modalities)
    assert ("vidcom2" in about["policy"]["video_methods"]) == (make in ONE_SEQUENCE)


# --- Files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [mp4, gif])
async def test_a_file_is_read(kind: Any, tmp_path: Path) -> None:
    """By vLLM's own decoder, from a data URL and from a folder that is allowed."""
    film = filmed(6)
    (tmp_path / "film").write_bytes(kind(film))
    connector = Connector(allowed_local_media_path=str(tmp_path))
    for url in (data_url(kind(film)), f"file://{tmp_path}/film"):
        for loaded in (connector.fetch_video(url), await connector.fetch_video_async(url)):
            frames, metadata = loaded.media
            assert frames.shape == film.shape and metadata["fps"] == 2
            assert abs(frames.astype(float) - film).mean() < (0.1 if kind is gif else 12)


not_read = pytest.mark.skipif(VLLM.startswith("0.33"), reason="vLLM 0.33 reads one frame")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("file:///etc/hostname", "local files"),
        ("data:video/mp4;utf8,AAAA", "base64"),
        ("data:video/mp4;base64,AAAA", "open"),
        ("data:video/jpeg;base64,AAAA", "identify"),
        ("ftp://127.0.0.1/a.mp4", "HTTP"),
        pytest.param(data_url(mp4(filmed(1))), "send a single one as an image", marks=not_read),
        pytest.param(data_url(gif(filmed(1))), "send a single one as an image", marks=not_read),
        (data_url(mp4(filmed(3))[:200]), "open"),
    ],
)
async def test_videos_that_cannot_be_loaded(url: str, reason: str) -> None:
    connector = Connector()
    for load in (connector.fetch_video_async, connector.fetch_video):
        with pytest.raises(VLLMClientError) as refused:
            loaded = load(url)
            await loaded  # type: ignore[misc]
        assert getattr(refused.value, "parameter", "") == "video_url"
        assert "The video cannot be loaded" in str(refused.value) and reason in str(refused.value)


# --- Over HTTP: a Qwen2.5-VL ----------------------------------------------------------------------

SMALL, LONG, TALL = (6, (112, 84)), (12, (56, 56)), (5, (84, 140))
"""Frames, and width and height of each."""
TOKENS = {SMALL: 3 * 12, LONG: 6 * 4, TALL: 2 * 15}
"""Of 28 x 28 pixels of two frames each; an odd frame is not read."""
DECODER = Decoder(3, 128, 256, 4, 2, 32, 4)


def film(shape: Any = SMALL, seed: int = 0, kind: Any = gif, **said: Any) -> dict[str, Any]:
    """A video of a chat message."""
    frames, size = shape
    url = data_url(kind(filmed(frames, size, seed)))
    return {"type": "video_url", "video_url": {"url": url, **said}}


def reported(answer: Any, modality: str = "video") -> list[tuple[Any, ...]]:
    """Of every video what an answer's report says."""
    names = ("method", "budget", "visual_tokens_before", "visual_tokens_kept")
    return [tuple(one[name] for name in names) for one in answer.reduction[f"{modality}s"]]


@pytest.mark.server
@pytest.mark.parametrize("kind", [mp4, gif])
@pytest.mark.parametrize("shape", TOKENS)
def test_a_budget_is_held_exactly(native: Server, shape: Any, kind: Any) -> None:
    """Sent twice: what the report says survives the processor's cache."""
    tokens, text = TOKENS[shape], chat(native).usage.prompt_tokens + 2  # a video's begin and end
    for budget in (1 + shape[0] // 2, tokens - 1, tokens):
        held = min(budget, tokens)
        said = ("score", budget) if held < tokens else ("none", None)
        answers = [chat(native, film(shape, 1, kind), visual_token_budget=budget) for _ in range(2)]
        for answer in answers:
            assert answer.usage.prompt_tokens == text + held
            details = answer.usage.prompt_tokens_details
            assert details.video_tokens == details.multimodal_tokens["video"] == held
            assert reported(answer) == [(*said, tokens, held)]
            report = answer.reduction
            assert report["visual_tokens_before"] == tokens and report["images"] == []
            assert report["kv_cache_bytes_saved"] == (tokens - held) * 3 * 2 * 2 * 32 * 4
            ratio = prefill_flops_ratio([text + held] * 3, text + tokens, DECODER)
            assert report["estimated_prefill_flops_ratio"] == round(ratio, 4)
        assert len({answer.choices[0].message.content for answer in answers}) == 1


@pytest.mark.server
def test_every_image_and_video_its_own_settings(native: Server) -> None:
    parts = [
        film(SMALL, 1, reduction={"method": "uniform", "budget": 9}),
        picture_part(1, (100, 100), visual_token_budget=3),
        film(LONG, 2),
        picture_part(2, (200, 50)),
        film(TALL, 3, mp4, visual_token_budget=1000),
    ]
    videos = [("uniform", 9, 36, 9), ("score", 8, 24, 8), ("none", None, 30, 30)]
    images = [("score", 3, 16, 3), ("score", 8, 14, 8)]
    whole = chat(native, *parts, visual_token_budget=8)
    assert (reported(whole), reported(whole, "image")) == (videos, images)
    assert whole.reduction["method"] == "mixed"
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(chat(native, *parts, visual_token_budget=8, **options))
    assert (reported(chunks[-1]), reported(chunks[-1], "image")) == (videos, images)
    details = chunks[-1].usage.prompt_tokens_details
    assert (details.image_tokens, details.video_tokens) == (11, 47)
    assert details.visual_tokens_kept == 58
    alone = chat(native, *parts)
    assert reported(alone)[1] == ("none", None, 24, 24), "an unreduced one beside reduced ones"


@pytest.mark.server
def test_every_method_that_is_allowed_for_videos(native: Server) -> None:
    about = native.http.get("/v1/reduction").json()
    assert about["model"]["modalities"] == ["image", "video"]
    methods = about["policy"]["video_methods"]
    assert {"none", "score", "topk", "uniform", "ficoco-v"} <= {*methods}
    assert not {"tome", "resize", "fastv"} & {*methods}
    for method in methods:
        answer = chat(native, film(), reduction={"method": method, "budget": 30})
        assert [one[-1] for one in reported(answer)] == [36 if method == "none" else 30], method
    for method in {*about["policy"]["methods"]} - {*methods}:
        body = {"messages": user(film()), "reduction": {"method": method, "budget": 30}}
        check_refused(native, CHAT, body, "reduction.method", f"one of {', '.join(methods)}")


@pytest.mark.server
def test_frames_that_the_client_asks_for(native: Server) -> None:
    """N is of the frames that are left of a file, and so is what a budget of N means."""
    for fps, tokens in (1, 12), (0.7, 8), (2, 24):
        said = {"media_io_kwargs": {"video": {"fps": fps}}, "visual_token_budget": 10}
        answer = post(native, CHAT, {"messages": user(film(LONG)), **said})
        assert answer.status_code == 200, answer.text
        [one] = answer.json()["reduction"]["videos"]
        assert (one["visual_tokens_before"], one["visual_tokens_kept"]) == (tokens, min(tokens, 10))


@pytest.mark.server
def test_metrics_count_videos(native: Server) -> None:
    name = "vllm_ficoco_visual_tokens_total"
    before = native.metrics()
    chat(
        native,
        film(seed=40),
        picture_part(40, (100, 100)),
        reduction={"method": "dpp", "budget": 7},
    )
    now = native.metrics()

    def change(name: str, **labels: str) -> float:
        return value(now, name, method="dpp", **labels) - value(
            before, name, method="dpp", **labels
        )

    assert change(name, stage="input", modality="video") == 36
    assert change(name, stage="kept", modality="video") == 7
    assert change(name, stage="input", modality="image") == 16
    saved = "vllm_ficoco_kv_cache_bytes_saved_total"
    assert change(saved, modality="video") == 29 * DECODER.kv_bytes_per_token
    assert change("vllm_ficoco_kv_blocks_saved_total", modality="video") > 0


@pytest.mark.server
def test_a_video_by_its_uuid(native: Server) -> None:
    def ask(data: bool, **said: Any) -> Any:
        url = film(seed=80)["video_url"] if data else None
        part = {"type": "video_url", "uuid": "a video of ours", "video_url": url}
        return post(native, CHAT, {"messages": user(part), **said})

    for said, held in ({"visual_token_budget": 6}, 6), ({}, 36):
        unknown = ask(False, **said)
        assert unknown.status_code == 400 and unknown.json()["error"]["param"] == "uuid"
        for data in (True, False, False):
            answer = ask(data, **said)
            assert answer.status_code == 200, answer.text
            [report] = answer.json()["reduction"]["videos"]
            assert (report["visual_tokens_before"], report["visual_tokens_kept"]) == (36, held)


@pytest.mark.server
def test_refusals_of_videos(native: Server) -> None:
    part = "messages[0].content[0].video_url"
    for said, param, fragment in (
        ({"visual_token_budget": "auto"}, "visual_token_budget", "a number for a video"),
        ({"reduction": {"budget": 0}}, "reduction.budget", "a whole number"),
        ({"visual_token_budget": 1}, "visual_token_budget", "a budget from 2 on"),
    ):
        key = next(iter(said))
        check_refused(native, CHAT, {"messages": user(film()), **said}, param, fragment)
        on_part = {"messages": user(film(**said))}
        check_refused(native, CHAT, on_part, param.replace(key, f"{part}.{key}"), fragment)
    for url in (data_url(gif(filmed(1))), "file:///etc/hostname", "data:video/mp4;base64,AAAA"):
        for path in (CHAT, "/v1/messages"):
            body = {"messages": user({"type": "video_url", "video_url": {"url": url}})}
            answer = post(native, path, body)
            assert answer.status_code == 400, answer.text
            if path == CHAT:
                assert answer.json()["error"]["param"] == "video_url"
                assert ("a single one as an image" in answer.text) == ("gif" in url)
    body = {"messages": user(film(visual_token_budget=5)), "max_tokens": 2}
    prompt = post(native, CHAT, body | {"return_token_ids": True}).json()["prompt_token_ids"]
    assert post(native, "/tokenize", body).json()["tokens"] == prompt
    assert post(native, f"{CHAT}/render", body).json()["token_ids"] == prompt
    answer = post(native, "/v1/messages", {"messages": user(film(visual_token_budget=5))})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == f"{part}.visual_token_budget"


@pytest.mark.server
def test_a_prompt_too_long_for_the_model(native: Server) -> None:
    """The largest budget that would do, counted with what stands between the videos."""
    body = {"messages": user(*(film((10, (280, 196)), seed) for seed in range(12)))}

    def ask(**said: Any) -> Any:
        return post(native, CHAT, body | said)

    refused = ask()
    assert refused.status_code == 400, refused.text
    message = refused.json()["error"]["message"]
    fits = int(re.findall(r"visual_token_budget (\d+) or less for every video", message)[0])
    assert ask(visual_token_budget=fits).status_code == 200
    assert ask(visual_token_budget=fits + 1).status_code == 400, "it is the largest"


@pytest.mark.server
def test_a_rendered_video_stays_whole(native: Server) -> None:
    body = {"model": MODEL, "messages": user(film()), "max_tokens": 2, "temperature": 0}

    def rendered() -> Any:
        return native.http.post(f"{CHAT}/render", json=body).json()

    answer = native.http.post(GENERATE, json=rendered())
    assert answer.status_code == 200, answer.text
    chosen = native.http.post(CHAT, json=body | {"return_token_ids": True}).json()["choices"][0]
    assert answer.json()["choices"][0]["token_ids"] == chosen["token_ids"]
    unseen = rendered()
    unseen["features"]["kwargs_data"] = unseen["features"]["mm_metadata"] = None
    reduced = rendered()
    [data] = reduced["features"]["kwargs_data"]["video"]
    item, name = decode_mm_kwargs_item(data), PACKED_FIELDS["video"]
    item[name].data = pack(Reduction(budget=5), unpack(item[name].data).layout)
    reduced["features"]["kwargs_data"]["video"] = [encode_mm_kwargs_item(item)]
    reduced["features"]["mm_metadata"] = None
    longer = rendered()
    longer["token_ids"].append(longer["token_ids"][-1])
    longer["features"]["mm_placeholders"]["video"][0]["length"] += 1
    cut = rendered()
    item = decode_mm_kwargs_item(data)
    item["pixel_values_videos"].data = item["pixel_values_videos"].data[:-4]
    cut["features"]["kwargs_data"]["video"] = [encode_mm_kwargs_item(item)]
    for prompt, fragment in (
        (unseen, "a hash does not say"),
        (reduced, "stays whole here"),
        (longer, "36, what its frames have"),
        (cut, "pixel_values_videos, and what goes with them"),
    ):
        refused = native.http.post(GENERATE, json=prompt)
        assert refused.status_code == 400, refused.text
        assert fragment in refused.json()["error"]["message"]


@pytest.mark.server
def test_a_load_test_of_videos(
    native: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", API_KEY)
    flags = ["--videos=6", "--image-size=56", "--budgets=1000,8", "--methods=score", "--repeat=1"]
    flags += ["--concurrency=4", "--requests=8", "--output-tokens=4", f"--out={tmp_path}"]
    main([f"--base-url={native.url}", *flags])
    lines = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [line["setting"] for line in lines] == ["none", "score@8"]
    assert lines[0]["conditions"]["visual_tokens"] == 12
    assert lines[0]["conditions"]["video_frames"] == 6
    assert lines[1]["watch"]["visual_tokens_kept"] == {"score": pytest.approx(8 / 12)}


def test_the_load_tests_videos_differ_and_move() -> None:
    urls = {video_of_squares(56, 5, [1, seed]) for seed in range(8)}
    assert len(urls) == 8
    frames, _ = Connector().fetch_video(urls.pop()).media
    assert frames.shape == (5, 56, 56, 3)
    assert all((a != b).any() for a, b in pairwise(frames))
