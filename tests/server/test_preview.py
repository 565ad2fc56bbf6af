# SPDX-License-Identifier: Apache-2.0
"""``POST /v1/reduction/preview`` over HTTP, and the command that draws what it says."""

from __future__ import annotations

import io
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.server.conftest import API_KEY, MODEL, TOKENS, Server, image, picture, user, value
from tests.server.test_http import chat
from vllm_ficoco.tiny_llava import CHECKPOINT

pytestmark = pytest.mark.server

PATH = "/v1/reduction/preview"

README = (Path(__file__).parents[2] / "README.md").read_text().split("### A preview")[1]
README_COMMAND = (
    shlex.split(README.split("```bash\n")[1].split("```")[0]),
    README.split("```text\n")[1].split("```")[0],
)


def look(server: Server, seed: int = 0, size: tuple[int, int] = (168, 168), **body: Any) -> Any:
    """The answer to a preview."""
    answer = server.http.post(PATH, json={"image": picture(seed, size), **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def check_whole(preview: dict[str, Any]) -> None:
    """Stages follow from one another, and what is kept and where all ended from them."""
    left = {place for stage in preview["stages"] for place in stage["left"]}
    assert not left & {*preview["kept"]}
    at: dict[int, int | None] = {}
    for stage in reversed(preview["stages"]):
        into = stage["into"] or [None] * len(stage["left"])
        assert len(into) == len(stage["left"]) and stage["kept"] == sorted(stage["kept"])
        for place, taken in zip(stage["left"], into, strict=True):
            assert taken is None or taken in stage["kept"]
            at[place] = at.get(taken, taken) if taken is not None else None
    if preview["receivers"] is None:
        assert not any(at.values())
        return
    for place, ended in enumerate(preview["receivers"]):
        if place in preview["kept"]:
            assert ended == place
        elif place in at:
            assert ended == at[place]


def test_what_a_method_keeps(server: Server) -> None:
    preview = look(server, reduction={"method": "topk", "budget": 48}, question="what is it ?")
    assert preview["object"] == "reduction.preview" and preview["model"] == MODEL
    assert preview["image"] == {"width": 168, "height": 168}
    assert preview["grids"] == [
        {
            "name": "image",
            "first": 0,
            "rows": 12,
            "columns": 12,
            "area": [0, 0, 1, 1],
            "tile": None,
        }
    ]
    assert preview["newlines"] is None and preview["note"] is None
    (stage,) = preview["stages"]
    assert (stage["where"], stage["into"]) == ("output", None)
    assert stage["kept"] == preview["kept"] and len(preview["kept"]) == 48
    assert sorted(stage["left"] + stage["kept"]) == [*range(TOKENS)]
    assert preview["receivers"] is None
    answer = chat(server, image(), reduction={"method": "topk", "budget": 48})
    assert preview["reduction"] == {
        **answer.reduction,
        "estimated_prefill_flops_ratio": preview["reduction"]["estimated_prefill_flops_ratio"],
    }
    again = look(server, reduction={"method": "topk", "budget": 48}, question="what is it ?")
    assert again == preview, "no cache has answered for it"


def test_places_that_need_no_model(server: Server) -> None:
    """One of every two places in both directions, by what the methods say of themselves."""
    corners = [24 * row + 2 * column for row in range(6) for column in range(6)]
    pooled = look(server, reduction={"method": "pooling", "budget": 36})
    assert pooled["kept"] == corners
    assert pooled["receivers"] == [
        place // 12 // 2 * 24 + place % 12 // 2 * 2 for place in range(TOKENS)
    ]
    uniform = look(server, reduction={"method": "uniform", "budget": 36})
    assert uniform["receivers"] is None and len(uniform["kept"]) == 36
    assert {place % 12 // 2 + place // 24 * 6 for place in uniform["kept"]} == {*range(36)}


@pytest.mark.parametrize("method", ["ficoco-v", "tome", "evit", "visionzip", "prumerge", "score"])
def test_methods_stage_by_stage(server: Server, method: str) -> None:
    preview = look(server, 3, reduction={"method": method, "budget": 60})
    check_whole(preview)
    assert len(preview["kept"]) == preview["reduction"]["visual_tokens_kept"] == 60
    merges, in_tower = method != "score", method in ("ficoco-v", "tome", "evit")
    assert (preview["receivers"] is not None) == merges
    assert {stage["where"] for stage in preview["stages"]} == {"tower" if in_tower else "output"}
    assert (len(preview["stages"]) > 1) == in_tower
    if merges:
        assert sum(at is not None for at in preview["receivers"]) > 60


def test_what_is_not_reduced_is_all_there(server: Server) -> None:
    for said in ({"visual_token_budget": TOKENS}, {"reduction": {"method": "none"}}, {}):
        preview = look(server, **said)
        assert preview["stages"] == [] and preview["kept"] == [*range(TOKENS)]
        assert preview["reduction"]["kv_cache_bytes_saved"] == 0


def test_what_the_tower_sees_of_a_wide_image(server: Server) -> None:
    preview = look(server, 0, (336, 168), visual_token_budget=48)
    assert preview["image"] == {"width": 336, "height": 168}
    assert preview["grids"][0]["area"] == [0.25, 0, 0.75, 1], "the middle"


def test_a_preview_is_no_traffic(server: Server) -> None:
    names = ("vllm_ficoco_visual_tokens_total", "vllm_ficoco_requests_total")
    before = [value(server.metrics(), name) for name in names]
    look(server, visual_token_budget=48)
    refused = server.http.post(PATH, json={"image": picture(), "visual_token_budget": 1})
    assert refused.status_code == 400
    assert [value(server.metrics(), name) for name in names] == before
    assert server.http.get("/v1/reduction").json()["preview"] == {"enabled": True, "reason": None}


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "image", "the URL of an image"),
        ({"image": "data:image/png;base64,AAAA"}, "image", "cannot be loaded"),
        ({"visual_token_budget": 1}, "visual_token_budget", "from 2"),
        ({"visual_token_budget": "64"}, "visual_token_budget", "whole number"),
        ({"reduction": {"method": "fastest"}}, "reduction.method", "fastest"),
        ({"reduction": {"method": "random", "budget": 4}}, "reduction.method", "policy"),
        ({"reduction": {"budget": 2, "options": {"of": 3}}}, "reduction.options.of", "alpha"),
        ({"reduction": {"budget": 4}, "visual_token_budget": 4}, "visual_token_budget", "left out"),
        ({"question": 4}, "question", "a string"),
        ({"messages": []}, "messages", "left out; known: image"),
        ({"budget": 4}, "budget", "visual_token_budget"),
    ],
)
def test_a_refusal_names_the_field(
    server: Server, body: dict[str, Any], param: str, words: str
) -> None:
    if "image" not in body and param != "image":
        body = {"image": picture(), **body}
    refused = server.http.post(PATH, json=body)
    assert refused.status_code == 400, refused.text
    error = refused.json()["error"]
    assert error["param"] == param and words in error["message"]


def test_who_may_ask(server: Server) -> None:
    body = {"image": picture()}
    assert httpx.post(server.url + PATH, json=body).status_code == 401
    other = server.http.post(PATH, json={**body, "model": "another"})
    assert other.status_code == 404 and other.json()["error"]["param"] == "model"
    assert server.http.post(PATH, content="image=1").status_code == 400
    assert server.http.post(PATH, json=[1]).status_code == 400
    assert server.http.get(PATH).status_code == 405


def test_a_mark_is_not_for_requests(server: Server) -> None:
    """Not even where clients may set processor options, see tests/engine; here they may not."""
    said = {"mm_processor_kwargs": {"reduction_preview": "mark"}}
    body = {"model": MODEL, "messages": user(image()), "max_tokens": 1, **said}
    assert server.http.post("/v1/chat/completions", json=body).status_code == 400


def test_many_at_once(server: Server) -> None:
    """One after the other, or a 429 that says when to come again."""

    def one(seed: int) -> httpx.Response:
        headers = {"Authorization": f"Bearer {API_KEY}"}
        body = {"image": picture(seed), "visual_token_budget": 40}
        return httpx.post(server.url + PATH, json=body, headers=headers, timeout=120)

    with ThreadPoolExecutor(16) as pool:
        answers = [*pool.map(one, range(16))]
    statuses = {answer.status_code for answer in answers}
    assert 200 in statuses and statuses <= {200, 429}
    for answer in answers:
        if answer.status_code == 429:
            assert answer.headers["Retry-After"] == "1"
            assert "too many previews" in answer.json()["error"]["message"]
        else:
            assert len(answer.json()["kept"]) == 40
    look(server, visual_token_budget=40)


def test_tiles(tiled: Server) -> None:
    wide = (200, 50)  # a thumbnail, and two tiles in a row or more, with padding
    preview = look(tiled, 0, wide, reduction={"method": "uniform", "budget": 30})
    check_whole(preview)
    thumbnail, tiles = preview["grids"]
    assert (thumbnail["name"], thumbnail["rows"], thumbnail["columns"]) == ("thumbnail", 4, 4)
    assert tiles["first"] == 16 and tiles["tile"] == [4, 4]
    assert tiles["rows"] % 4 == tiles["columns"] % 4 == 0
    _, top, _, bottom = tiles["area"]
    # Four rows of patches are the image, the others padding.
    rows = [tiles["rows"] * (0 - top) / (bottom - top), tiles["rows"] * (1 - top) / (bottom - top)]
    assert rows[1] - rows[0] == pytest.approx(preview["newlines"]["count"] == 4 and 4)
    assert len(preview["kept"]) == 30
    assert len(preview["kept"]) + len(preview["stages"][0]["left"]) == 16 + 4 * 13
    inside = range(16 + round(rows[0]) * tiles["columns"], 16 + round(rows[1]) * tiles["columns"])
    assert all(place < 16 or place in inside for place in preview["kept"])
    with_newlines = look(
        tiled,
        0,
        wide,
        reduction={"method": "topk", "budget": 30, "options": {"newlines": "all"}},
    )
    first = with_newlines["newlines"]["first"]
    assert with_newlines["kept"][-4:] == [*range(first, first + 4)]
    for method in ("tome", "globalcom2"):
        preview = look(tiled, 1, wide, reduction={"method": method, "budget": 40})
        check_whole(preview)
        assert len(preview["kept"]) == 40
    resized = look(tiled, 1, (100, 100), reduction={"method": "resize", "budget": 60})
    assert "all places of the smaller image" in resized["note"]
    assert resized["stages"][0]["where"] == "input" and resized["stages"][0]["left"] == []
    assert len(resized["kept"]) == resized["reduction"]["visual_tokens_kept"] <= 60


def test_images_at_their_own_resolution(native: Server) -> None:
    for method in ("score", "ficoco-v"):
        preview = look(native, 0, (196, 140), reduction={"method": method, "budget": 12})
        check_whole(preview)
        (grid,) = preview["grids"]
        assert (grid["rows"], grid["columns"]) == (5, 7) and grid["area"] == [0, 0, 1, 1]
        assert len(preview["kept"]) == 12
        assert (preview["receivers"] is not None) == (method == "ficoco-v")
    body = {
        "model": MODEL,
        "messages": user(image()),
        "max_tokens": 1,
        "mm_processor_kwargs": {"reduction_preview": "mark"},
    }
    refused = native.http.post("/v1/chat/completions", json=body)
    assert refused.status_code == 400 and "reduction_preview" in refused.text


def test_the_command_draws_it(server: Server, tmp_path: Path) -> None:
    example = CHECKPOINT / "examples/night.png"
    data = example.read_bytes()
    (name, *said), shown = README_COMMAND
    assert name == "vllm-ficoco"
    said = [str(example) if word.endswith("night.png") else word for word in said]
    command = [sys.executable, "-m", "ficoco_server.cli", *said]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, f"--base-url={server.url}/v1", *more],
            cwd=tmp_path,
            env={**os.environ, "OPENAI_API_KEY": API_KEY},
            capture_output=True,
            text=True,
            check=False,
        )

    done = run("--json=said.json")
    assert done.returncode == 0 and done.stdout == shown, done.stderr
    kept = json.loads((tmp_path / "said.json").read_text())["kept"]
    drawn, whole = Image.open(tmp_path / "kept.png"), Image.open(io.BytesIO(data)).convert("RGB")
    for place in range(TOKENS):
        at = (place % 12 * 14 + 7, place // 12 * 14 + 7)
        assert (drawn.getpixel(at) == whole.getpixel(at)) == (place in kept)
    wrong = run("--budget=1")
    assert wrong.returncode == 1 and "reduction.budget = 1 is not valid" in wrong.stderr
    assert run("--api-key=wrong").returncode == 1
    nobody = run("--base-url=http://127.0.0.1:9")
    assert nobody.returncode == 1 and "no answer from http://127.0.0.1:9" in nobody.stderr
