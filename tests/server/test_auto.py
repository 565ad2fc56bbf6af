# SPDX-License-Identifier: Apache-2.0
"""``"auto"`` over HTTP: each image the budget that it asks for, the same wherever it stands."""

from __future__ import annotations

import base64
import io
from typing import Any

import openai
import pytest
from PIL import Image, ImageDraw

from tests.pictures import drawn
from tests.server.conftest import MODEL, TOKENS, Server, turn, user, value

pytestmark = pytest.mark.server

CHAT = "/v1/chat/completions"


def page(seed: int) -> Image.Image:
    """A line of large letters on paper."""
    image = Image.new("RGB", (168, 168), (250, 250, 250 - seed))
    ImageDraw.Draw(image).text((2, 70), "MINIMUM HILL", fill="black", font_size=22)
    return image


def url(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def part(picture: Image.Image, **said: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url(picture), **said}}


def ask(server: Server, *parts: dict[str, Any], **fields: Any) -> Any:
    """The answer's JSON."""
    body = {"model": MODEL, "messages": user(*parts), "max_tokens": 4, "temperature": 0, **fields}
    answer = server.http.post(CHAT, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def kept(answer: Any) -> list[int]:
    return [image["visual_tokens_kept"] for image in answer["reduction"]["images"]]


def hits(server: Server) -> float:
    """Images that were found in the cache of the front end."""
    return value(server.metrics("vllm:"), "vllm:mm_cache_hits_total")


AUTO = {"visual_token_budget": "auto"}


def test_an_image_gets_what_it_asks_for(server: Server) -> None:
    before = server.metrics("vllm_ficoco_")
    pictures = [drawn(0), drawn(30), drawn(50), drawn(80), drawn(144), page(0)]
    answer = ask(server, *map(part, pictures), **AUTO)
    held = [16, 16, 32, 48, TOKENS, 48]
    assert kept(answer) == held
    assert answer["usage"]["prompt_tokens_details"]["image_tokens"] == sum(held)
    assert answer["reduction"]["images"][2] == {
        "method": "score",
        "budget": 32,
        "visual_tokens_before": TOKENS,
        "visual_tokens_kept": 32,
        "requested": "auto",
    }
    whole = answer["reduction"]["images"][4]
    assert (whole["method"], whole["budget"], whole["requested"]) == ("none", None, "auto")
    after = server.metrics("vllm_ficoco_")
    for rung, count in (("N", 1), ("N/3", 2), ("2N/9", 1), ("N/9", 2)):
        series = "vllm_ficoco_auto_budgets_total"
        assert value(after, series, rung=rung) - value(before, series, rung=rung) == count


@pytest.mark.parametrize("busy", [0, 50, 80, 144])
def test_alone_and_among_others_and_by_its_number_it_is_the_same(server: Server, busy: int) -> None:
    """One hash: whoever asks for it, in whatever company, finds it in the caches."""
    picture, others = drawn(busy, 1), [drawn(n, 100 + busy + n) for n in (3, 60, 120)]
    [number] = kept(ask(server, part(picture), **AUTO))
    found = hits(server)
    explicit = ask(server, part(picture), visual_token_budget=number)
    assert kept(explicit) == [number] and hits(server) - found == 1
    assert "requested" not in explicit["reduction"]["images"][0]
    # Prefix caching compares hashes: blocks of 128 tokens, which begin with the image.
    if number == TOKENS:
        again = ask(server, part(picture), **AUTO)
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 128
    found = hits(server)
    parts = [*map(part, others)]
    parts.insert(busy % 4, part(picture))
    among = ask(server, *parts, **AUTO)
    assert kept(among)[busy % 4] == number and hits(server) - found == 1


def test_every_place_where_it_can_be_said(server: Server) -> None:
    picture = drawn(50, 2)

    def budgets(*said: dict[str, Any], **fields: Any) -> list[tuple[str, int]]:
        answer = ask(server, *(part(picture, **one) for one in said), **fields)
        images = answer["reduction"]["images"]
        return [(image["method"], image["visual_tokens_kept"]) for image in images]

    tome = {"method": "tome", "budget": "auto"}
    assert budgets(AUTO) == [("score", 32)]
    assert budgets({}, {"visual_token_budget": 9}, **AUTO) == [("score", 32), ("score", 9)]
    assert budgets({}, AUTO, visual_token_budget=9) == [("score", 9), ("score", 32)]
    assert budgets({"reduction": {"budget": "auto"}}, {}) == [("score", 32), ("none", TOKENS)]
    assert budgets({}, {"reduction": {"method": "tome"}}, **AUTO) == [
        *(("score", 32), ("tome", 32))
    ]
    assert budgets({}, AUTO, {"detail": "low"}, {"detail": "auto"}, reduction=tome) == [
        *(("tome", 32), ("tome", 32), ("tome", 16), ("tome", 32))
    ]
    assert budgets({}, reduction={"method": "none", "budget": "auto"}) == [("none", TOKENS)]


def test_streams_and_responses_say_it(server: Server) -> None:
    picture = drawn(50, 3)
    *_, last = server.openai.chat.completions.create(
        model=MODEL, messages=user(part(picture)), max_tokens=4, stream=True, extra_body=AUTO
    )
    [image] = last.reduction["images"]
    assert (image["requested"], image["budget"]) == ("auto", 32)
    said = {"type": "input_image", "image_url": url(picture), "visual_token_budget": "auto"}
    answer = server.openai.responses.create(model=MODEL, input=turn(said), max_output_tokens=4)
    [image] = answer.reduction["images"]
    assert (image["requested"], image["budget"]) == ("auto", 32)
    following = server.openai.responses.create(
        model=MODEL,
        input=turn(),
        max_output_tokens=4,
        previous_response_id=answer.id,
        extra_body=AUTO,
    )
    assert [one["budget"] for one in following.reduction["images"]] == [32], "of an earlier turn"


@pytest.mark.parametrize("kind", ["server", "tiled", "native"])
def test_an_image_by_its_uuid(kind: str, request: pytest.FixtureRequest) -> None:
    """What it came to is remembered with it, however large the image's layout is."""
    asked: Server = request.getfixturevalue(kind)

    def say(picture: Image.Image | None, uuid: str, **fields: Any) -> Any:
        data = picture and part(picture)["image_url"]
        one = {"type": "image_url", "uuid": uuid, "image_url": data}
        body = {"model": MODEL, "messages": user(one), "max_tokens": 2, **(fields or AUTO)}
        return asked.http.post(CHAT, json=body)

    held = {}
    for busy in (0, 80, 144):
        uuid = f"auto {busy}"
        unknown = say(None, uuid)
        assert unknown.status_code == 400 and unknown.json()["error"]["param"] == "uuid"
        for picture in (drawn(busy, 4), None, None, drawn(busy, 4)):
            answer = say(picture, uuid)
            assert answer.status_code == 200, answer.text
            [image] = answer.json()["reduction"]["images"]
            assert image["requested"] == "auto"
            assert held.setdefault(busy, image["visual_tokens_kept"]) == image["visual_tokens_kept"]
        # By the number that it came to it is the same image; with another it is not known.
        [image] = say(None, uuid).json()["reduction"]["images"]
        number = image["budget"] or image["visual_tokens_before"]
        if number < image["visual_tokens_before"] and kind == "server":
            assert say(None, uuid, visual_token_budget=number).status_code == 200
        assert say(None, uuid, visual_token_budget=number - 1).status_code == 400
    assert held[0] < held[80] < held[144]
    # Another image under the same name asks for something else: the engine must not mix them up.
    assert kept(say(drawn(144, 5), "auto 0").json()) == [held[144]]
    assert kept(say(None, "auto 0").json()) == [held[144]]
    assert kept(say(drawn(0, 4), "auto 0").json()) == [held[0]]


@pytest.mark.parametrize(
    ("said", "param"),
    [
        ({"visual_token_budget": "automatic"}, "visual_token_budget"),
        ({"visual_token_budget": "AUTO"}, "visual_token_budget"),
        ({"reduction": {"budget": "full"}}, "reduction.budget"),
    ],
)
def test_words_that_are_not_known(server: Server, said: dict[str, Any], param: str) -> None:
    for body, where in (
        ({"messages": user(part(drawn(0))), **said}, param),
        ({"messages": user(part(drawn(0), **said))}, f"messages[0].content[0].image_url.{param}"),
    ):
        answer = server.http.post(CHAT, json={"model": MODEL, **body})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, where)
        assert "a whole number from 1 to 1000000, or 'auto'" in error["message"]


@pytest.mark.parametrize(
    ("fields", "fragment"),
    [
        ({"messages": user(), **AUTO}, "no images"),
        ({"reduction": {"method": "random", "budget": "auto"}}, "one of score, ficoco-v, tome"),
        ({"reduction": {"budget": "auto", "rungs": ["1"]}}, "left out; known here"),
        ({"reduction": {"method": "fastv", "budget": "auto"}}, "one of score, ficoco-v, tome"),
        ({"reduction": {"budget": "auto", "options": {"newlines": "all"}}}, "no newline tokens"),
    ],
)
def test_what_goes_wrong_whatever_is_in_the_image(
    server: Server, fields: dict[str, Any], fragment: str
) -> None:
    """Also for an image that would keep all of its tokens."""
    for busy in (0, 144):
        body = {"model": MODEL, "messages": user(part(drawn(busy))), **fields}
        answer = server.http.post(CHAT, json=body)
        assert answer.status_code == 400 and fragment in answer.text, answer.text


def test_the_ladder_is_told(server: Server) -> None:
    about = server.http.get("/v1/reduction").json()
    assert about["auto"]["budgets"] == ["N", "N / 3", "2N / 9", "N / 9"]
    assert about["auto"]["meaning"]


def test_images_of_other_sizes(tiled: Server, native: Server) -> None:
    """A share of what each has; what a method cannot reach is the next larger rung."""
    for asked, size, whole in (
        (tiled, (100, 100), 88),
        (tiled, (200, 50), 68),
        (native, (400, 400), 64),
    ):
        for busy, share in ((0, 1 / 9), (50, 2 / 9), (80, 1 / 3), (144, 1)):
            answer = ask(asked, part(drawn(busy, 6, size)), **AUTO)
            [image] = answer["reduction"]["images"]
            assert image["visual_tokens_before"] == whole
            assert image["visual_tokens_kept"] == int(whole * share)
    resize = {"method": "resize", "budget": "auto"}
    small = part(drawn(0, 7, (10, 10)))
    assert kept(ask(native, small, reduction=resize)) == [4], "2 are the least that may be asked"
    with pytest.raises(openai.BadRequestError):
        native.openai.chat.completions.create(
            model=MODEL,
            messages=user(small),
            extra_body={"reduction": {"method": "resize", "budget": 2}},
        )
    assert 0 < kept(ask(native, part(drawn(0, 8, (400, 400))), reduction=resize))[0] <= 7
