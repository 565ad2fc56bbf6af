# SPDX-License-Identifier: Apache-2.0
"""Videos in the front end: settings, the report, the metrics; files that vLLM's decoder reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY
from vllm.exceptions import VLLMClientError, VLLMValidationError
from vllm.multimodal.inputs import PlaceholderRange

from ficoco_server.media import Connector
from ficoco_server.metrics import Observation
from ficoco_server.policy import Policy
from ficoco_server.protocol import ChatRequest, take_settings
from ficoco_server.reducer import Reducer
from ficoco_server.serving import _with_visual
from tests.videos import data_url, filmed, gif, mp4
from vllm_ficoco.cost import Decoder
from vllm_ficoco.models.processing import COUNTS_KEYS, RefusedImage
from vllm_ficoco.packed import Packed
from vllm_ficoco.settings import Reduction, SettingsError
from vllm_ficoco.vision.geometry import Geometry
from vllm_ficoco.vision.layout import Layout

URL = "data:video/mp4;base64,AAAA"
PICTURE, FILM = Layout((4, 4)), Layout((4, 5), frames=8)
"""Of 16 and 160 tokens."""


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


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("file:///etc/hostname", "local files"),
        ("http://127.0.0.1:9/a.mp4", "connect"),
        ("data:video/mp4;utf8,AAAA", "base64"),
        ("data:video/mp4;base64,AAAA", "open"),
        ("data:video/jpeg;base64,AAAA", "identify"),
        ("ftp://127.0.0.1/a.mp4", "HTTP"),
        (data_url(mp4(filmed(1))), "send a single one as an image"),
        (data_url(gif(filmed(1))), "send a single one as an image"),
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
