# SPDX-License-Identifier: Apache-2.0
"""The page in Chromium, before a real server. Skipped where there is no Chromium, or no playwright
(``pip install -e '.[browser]'``, ``apt-get install chromium``)."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.server.conftest import API_KEY, MODEL, TOKENS, Server, value
from vllm_ficoco.tiny_llava import CHECKPOINT

api = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]

REPORTS = Path(__file__).parents[2] / "reports"
WAIT = 120_000  # ms for answers, on a loaded machine
SIGNED_IN = f"sessionStorage.setItem('ficoco-api-key', '{API_KEY}')"
TEAL = (0, 128, 128)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@contextmanager
def opened(chromium: Any, server: Server) -> Iterator[Any]:
    """The page of somebody who has given the key. It asks nobody else, and nothing fails in it."""
    context = chromium.new_context(viewport={"width": 1080, "height": 900}, color_scheme="light")
    context.add_init_script(SIGNED_IN)
    tab = context.new_page()
    asked, failed = list[str](), list[str]()
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("pageerror", lambda error: failed.append(str(error)))
    tab.goto(server.url)
    api.expect(tab.locator("#about")).to_contain_text("visual tokens (N)")
    api.expect(tab.locator("#chosen")).to_contain_text("night.png")
    yield tab
    context.close()
    assert failed == []
    elsewhere = [url for url in asked if not url.startswith((server.url, "data:", "blob:"))]
    assert elsewhere == []


@pytest.fixture
def tab(chromium: Any, server: Server) -> Iterator[Any]:
    with opened(chromium, server) as tab:
        yield tab


def card(tab: Any, number: int) -> Any:
    return tab.locator("article").nth(number)


def choose(tab: Any, number: int, method: str, budget: str) -> None:
    """The setting of a card."""
    card(tab, number).get_by_label("Method").select_option(method)
    card(tab, number).get_by_label("Budget").fill(budget)


def only(tab: Any, method: str, budget: str) -> Any:
    """The one card that is left, with this setting."""
    for _ in range(tab.locator("article").count() - 1):
        card(tab, 1).get_by_role("button", name="Remove").click()
    choose(tab, 0, method, budget)
    return card(tab, 0)


def ask(tab: Any) -> None:
    tab.get_by_role("button", name="Ask", exact=True).click()
    api.expect(tab.locator("#stop")).to_be_visible()
    api.expect(tab.locator("#stop")).to_be_hidden(timeout=WAIT)


def figure(of: Any, name: str) -> str:
    return of.locator(f"[data-figure={name}]").inner_text()


def caption(of: Any) -> str:
    return of.locator("figcaption").inner_text()


def colours(canvas: Any, rows: int, columns: int) -> list[tuple[int, ...]]:
    """What is painted in the middle of each place of a grid over the whole picture."""
    painted = canvas.evaluate(
        """(canvas, [rows, columns]) => [...Array(rows * columns).keys()].map((place) => {
            const x = canvas.width * ((place % columns) + 0.5) / columns;
            const y = canvas.height * (Math.floor(place / columns) + 0.5) / rows;
            return [...canvas.getContext("2d").getImageData(x, y, 1, 1).data.slice(0, 3)];
        })""",
        [rows, columns],
    )
    return [tuple(colour) for colour in painted]


def hover(canvas: Any, place: int, rows: int, columns: int) -> None:
    """Point at the middle of a place of a grid over the whole picture."""
    box = canvas.bounding_box()
    row, column = divmod(place, columns)
    x, y = box["width"] * (column + 0.5) / columns, box["height"] * (row + 0.5) / rows
    canvas.hover(position={"x": x, "y": y})


def teal(size: tuple[int, int]) -> bytes:
    """A picture of one colour, on which dimmed places are easy to see."""
    file = io.BytesIO()
    Image.new("RGB", size, TEAL).save(file, "PNG")
    return file.getvalue()


def bring(tab: Any, name: str, size: tuple[int, int]) -> None:
    """Choose a file."""
    file = {"name": name, "mimeType": "image/png", "buffer": teal(size)}
    tab.get_by_label("Drop or paste a picture").set_input_files(files=[file])
    api.expect(tab.locator("#chosen")).to_have_text(f"{name}, {size[0]} × {size[1]}")


def previews(tab: Any, **said: Any) -> None:
    """Answer previews with this in the server's stead."""
    whole = {
        "object": "reduction.preview",
        "newlines": None,
        "receivers": None,
        "note": None,
    } | said
    tab.route("**/v1/reduction/preview", lambda route: route.fulfill(json=whole))


# --- With the server ------------------------------------------------------------------------


def test_a_key_is_asked_for_and_kept_in_the_tab(chromium: Any, server: Server) -> None:
    context = chromium.new_context()
    tab = context.new_page()
    tab.goto(server.url)
    api.expect(tab.locator("#about")).to_contain_text("wants an API key")
    api.expect(tab.locator("#go")).to_be_disabled()
    tab.locator("#key").fill("not the key")
    tab.locator("#key").press("Tab")
    api.expect(tab.locator("#about")).to_contain_text("wants an API key")
    tab.locator("#key").fill(API_KEY)
    tab.locator("#key").press("Tab")
    for _ in range(2):
        api.expect(tab.locator("#about")).to_contain_text(f"{TOKENS} visual tokens")
        api.expect(tab.locator("#go")).to_be_enabled()
        tab.reload()
    other = context.new_page()
    other.goto(server.url)
    api.expect(other.locator("#about")).to_contain_text("wants an API key")
    context.close()


def test_answers_side_by_side(tab: Any, server: Server) -> None:
    tab.get_by_role("button", name="Example star.png").click()
    api.expect(tab.locator("#question")).to_have_value("what color is the star ?")
    choose(tab, 2, "ficoco-v", "N/9")
    ask(tab)
    star = base64.b64encode((CHECKPOINT / "examples/star.png").read_bytes()).decode()
    image = {"url": f"data:image/png;base64,{star}"}
    question = {"type": "text", "text": "what color is the star ?"}
    for number, (method, kept) in enumerate([("score", TOKENS), ("score", 48), ("ficoco-v", 16)]):
        said = {"reduction": {"method": method, "budget": kept}}
        answer = server.openai.chat.completions.create(
            model=MODEL,
            messages=[
                {"role": "user", "content": [{"type": "image_url", "image_url": image}, question]}
            ],
            temperature=0,
            extra_body=said,
        )
        shown = card(tab, number)
        assert shown.locator(".answer").inner_text() == answer.choices[0].message.content.strip()
        assert figure(shown, "kept") == f"{kept} of {TOKENS}"
        held = f"{kept * 6}.0 KiB" if kept == 16 else f"{kept * 6} KiB"  # a token has 6,144 bytes
        assert figure(shown, "held").startswith(held)
        ratio = 100 * answer.model_extra["reduction"]["estimated_prefill_flops_ratio"]
        assert figure(shown, "flops").startswith(f"{ratio:.1f} %")
        for name in ("first", "total"):
            assert re.fullmatch(r"\d+ ms|\d+\.\d\d s", figure(shown, name))
    asked = {"image": image["url"], "question": question["text"], **said}
    receivers = server.http.post("/v1/reduction/preview", json=asked).json()["receivers"]
    taken = Counter(to for place, to in enumerate(receivers) if to not in (place, None))
    place, others = taken.most_common()[len(taken) // 3]
    hover(shown.locator("canvas"), place, 12, 12)
    row, column = divmod(place, 12)
    words = f"Row {row + 1}, column {column + 1}: kept, and took in {others} others."
    assert caption(shown) == words
    REPORTS.mkdir(exist_ok=True)  # docs/page.png is one of these
    shot = Image.open(io.BytesIO(tab.screenshot(full_page=True)))
    shot.convert("RGB").quantize(128).save(REPORTS / "page.png", optimize=True)


def test_what_is_kept_is_what_the_server_says(tab: Any) -> None:
    bring(tab, "teal.png", (168, 168))
    shown = only(tab, "ficoco-v", "N/3")
    with tab.expect_response("**/v1/reduction/preview") as answered:
        ask(tab)
    said = answered.value.json()
    last = said["stages"][-1]
    assert caption(shown) == f"48 of {TOKENS} tokens after layer {last['layer']} of the tower."
    painted = colours(shown.locator("canvas"), 12, 12)
    assert [place for place, colour in enumerate(painted) if colour == TEAL] == said["kept"]
    merged = next(p for p, to in enumerate(said["receivers"]) if to not in (p, None))
    row, column = divmod(said["receivers"][merged], 12)
    hover(shown.locator("canvas"), merged, 12, 12)
    assert caption(shown).endswith(f": merged into row {row + 1}, column {column + 1}.")


def test_a_refusal_stands_in_its_card(tab: Any) -> None:
    choose(tab, 0, "score", "1")
    choose(tab, 1, "tome", "many")
    choose(tab, 2, "none", "")
    ask(tab)
    assert "from 2" in card(tab, 0).locator(".answer").inner_text()
    assert "'many'" in card(tab, 1).locator(".answer").inner_text()
    assert figure(card(tab, 2), "kept") == f"{TOKENS} of {TOKENS}"


RECORDED = {
    "curl": "curl() { cat; }\n",
    "python": """
import json, sys, types

class OpenAI:
    def __init__(self, **given):
        self.chat = self.completions = self

    def create(self, extra_body, **body):
        sys.exit(print(json.dumps(body | extra_body)))

sys.modules["openai"] = types.SimpleNamespace(OpenAI=OpenAI)
""",
}
"""Put before a snippet, it prints what it would send."""


@pytest.mark.parametrize("language", RECORDED)
def test_the_request_can_be_made_elsewhere(language: str, tab: Any, tmp_path: Path) -> None:
    """With a file and a question that are hard to quote."""

    def run(code: str) -> str:
        command = ["bash", "-c", code] if language == "curl" else [sys.executable, "-c", code]
        environment = os.environ | {"OPENAI_API_KEY": API_KEY}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    name = "it's a $HOME `file`.png"
    (tmp_path / name).write_bytes(teal((168, 168)))
    bring(tab, name, (168, 168))
    tab.locator("#question").fill('is "this" a `red` $HOME \\ star \\n ?')
    shown = only(tab, "tome", "60")
    with tab.expect_request("**/v1/chat/completions") as sent:
        ask(tab)
    shown.get_by_text("This request as curl").click()
    code = shown.locator(f".{language}").inner_text()
    assert API_KEY not in code
    body = sent.value.post_data_json
    assert body.pop("stream") and body.pop("stream_options")
    assert json.loads(run(RECORDED[language] + code)) == body
    printed = run(code)
    assert shown.locator(".answer").inner_text() in printed
    assert re.search(r"""['"]visual_tokens_kept['"]: ?60\b""", printed)


def test_the_live_strip_says_what_metrics_say(tab: Any, server: Server) -> None:
    only(tab, "score", "16")
    ask(tab)
    with tab.expect_response("**/metrics"):
        pass
    series = server.metrics()
    had, kept = (
        value(series, "vllm_ficoco_visual_tokens_total", stage=stage) for stage in ("input", "kept")
    )
    assert had - kept >= TOKENS - 16
    api.expect(tab.locator("#saved")).to_have_text(f"{had - kept:,.0f} of {had:,.0f}")
    api.expect(tab.locator("#running")).to_have_text("0")
    assert re.fullmatch(r"\d+\.\d %", tab.locator("#cache").inner_text())


def test_shares_of_an_image_whose_size_says_n(chromium: Any, tiled: Server) -> None:
    with opened(chromium, tiled) as tab:
        tab.get_by_label("Longest answer").fill("4")
        bring(tab, "teal.png", (200, 100))
        ask(tab)
        _, of, said = figure(card(tab, 0), "kept").split()
        n = int(said)
        assert of == "of" and n > 40  # a thumbnail of 16, tiles, and newlines
        for number, part in enumerate((1, 3, 9)):
            assert figure(card(tab, number), "kept") == f"{n // part} of {n}"
        assert caption(card(tab, 0)) == f"All {n} tokens stay."
        assert caption(card(tab, 2)).startswith(f"{n // 9} of {n} tokens after the tower, ")
        large = card(tab, 2).locator("canvas").last
        assert large.get_attribute("aria-label").startswith("The tiles,")


# --- What is drawn, with previews that are said here --------------------------------------------

MERGED = {
    "reduction": {"visual_tokens_before": 16},
    "grids": [
        {"name": "image", "first": 0, "rows": 4, "columns": 4, "area": [0, 0, 1, 1], "tile": None}
    ],
    "stages": [
        {
            "where": "tower",
            "layer": 3,
            "kept": [0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14],
            "left": [2, 15],
            "into": [1, 14],
        },
        {
            "where": "decoder",
            "layer": 4,
            "kept": [0, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13],
            "left": [1, 14],
            "into": [5, None],
        },
    ],
}
"""2 goes into 1, which goes into 5; 15 into 14, which goes."""


def test_where_a_place_has_gone(tab: Any) -> None:
    previews(tab, **MERGED)
    bring(tab, "teal.png", (200, 100))
    shown = only(tab, "ficoco-v", "48")
    ask(tab)
    canvas = shown.locator("canvas")

    def clear() -> list[int]:
        tab.mouse.move(0, 0)
        return [place for place, colour in enumerate(colours(canvas, 4, 4)) if colour == TEAL]

    assert caption(shown) == "12 of 16 tokens from layer 4 of the decoder on."
    assert clear() == MERGED["stages"][1]["kept"]
    box = canvas.bounding_box()
    assert box["width"] == pytest.approx(2 * box["height"], abs=2)
    for place, words in (
        (2, "Row 1, column 3: merged into row 2, column 2."),
        (5, "Row 2, column 2: kept, and took in 2 others."),
        (6, "Row 2, column 3: kept."),
        (15, "Row 4, column 4: gone from layer 4 of the decoder on."),
    ):
        hover(canvas, place, 4, 4)
        assert caption(shown) == words
    canvas.focus()
    for key in ("ArrowUp", "ArrowRight"):  # from the last one round to the first, and on
        canvas.press(key)
    assert caption(shown).startswith("Row 3, column 1:")
    slider = shown.get_by_label("Stage by stage")
    slider.focus()
    slider.press("ArrowLeft")
    assert caption(shown) == "14 of 16 tokens after layer 3 of the tower."
    assert clear() == MERGED["stages"][0]["kept"]
    hover(canvas, 2, 4, 4)
    assert caption(shown) == "Row 1, column 3: merged into row 1, column 2."
    slider.press("ArrowLeft")
    assert caption(shown) == "16 of 16 tokens before any leave."
    assert clear() == list(range(16))


def test_tiles_and_their_padding(tab: Any) -> None:
    tiles = {"name": "tiles", "first": 16, "rows": 8, "columns": 8, "area": [0, -0.5, 1, 1.5]}
    thumbnail = MERGED["grids"][0] | {"name": "thumbnail"}
    seen = [*range(16), *range(32, 64), *range(80, 84)]
    kept = [3, 5, 36, 37, 50, 81]
    left = sorted({*seen} - {*kept})
    previews(
        tab,
        reduction={"visual_tokens_before": len(seen)},
        grids=[thumbnail, tiles | {"tile": [4, 4]}],
        newlines={"first": 80, "count": 4},
        stages=[{"where": "output", "layer": 2, "kept": kept, "left": left, "into": None}],
        note="a word more",
    )
    bring(tab, "teal.png", (200, 100))
    shown = only(tab, "score", "48")
    ask(tab)
    assert caption(shown) == (
        "6 of 52 tokens after the tower, 1 of 4 newlines among them. a word more."
    )
    small, large = shown.locator("canvas").all()
    assert [p for p, colour in enumerate(colours(small, 4, 4)) if colour == TEAL] == [3, 5]
    # Half of the tiles' rows are padding, above and below the picture.
    assert [32 + p for p, colour in enumerate(colours(large, 4, 8)) if colour == TEAL] == [
        36,
        37,
        50,
    ]
    hover(large, 4, 4, 8)
    assert caption(shown) == "Row 3, column 5 of the tiles: kept."
    large.focus()
    for _ in range(2):
        large.press("ArrowUp")
    assert caption(shown) == "Row 1, column 5 of the tiles: padding, which the model does not see."


def test_a_busy_server_is_asked_again(tab: Any) -> None:
    answers = [(503, {"error": {"message": "busy"}}), (200, MERGED)]

    def fulfil(route: Any) -> None:
        status, body = answers.pop(0)
        route.fulfill(status=status, json=body, headers={"Retry-After": "1"})

    tab.route("**/v1/reduction/preview", fulfil)
    shown = only(tab, "score", "48")
    ask(tab)
    assert answers == [] and caption(shown).startswith("12 of 16 tokens")


# --- How it looks -----------------------------------------------------------------------------


def test_a_phone_and_the_dark(tab: Any) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    previews(tab, **MERGED)
    tab.set_viewport_size({"width": 360, "height": 740})
    ask(tab)
    card(tab, 0).get_by_text("This request as curl").click()
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    light = tab.evaluate(background)
    clear = colours(card(tab, 0).locator("canvas"), 4, 4)
    tab.emulate_media(color_scheme="dark")
    assert tab.evaluate(background) != light
    dark = colours(card(tab, 0).locator("canvas"), 4, 4)
    changed = [place for place in range(16) if dark[place] != clear[place]]
    assert changed == [1, 2, 14, 15]  # the veil
