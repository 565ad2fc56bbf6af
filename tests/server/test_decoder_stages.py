# SPDX-License-Identifier: Apache-2.0
"""A server with decoder stages: what requests can ask of it, and what it says and counts."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.server.conftest import MODEL, TOKENS, Server, image, picture, running, user, value
from tests.server.test_preview import check_whole

pytestmark = pytest.mark.server

LAYERS, BYTES = 6, 2 * 6 * 4 * 64 * 2
"""Decoder layers of the shipped model, and bytes of KV cache that a token holds in all of them."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("staged") / "log"
    flags = ["--reduction-stages=2,4", "--block-size=32", "--reduction-min-budget=60"]
    with running(["ficoco_server.cli", "serve", MODEL, *flags], log) as started:
        yield started


def ask(server: Server, *images: dict, **body: object) -> object:
    return server.openai.chat.completions.create(
        model=MODEL, messages=user(*(images or (image(),))), max_tokens=4, extra_body=body
    )


def refusal(server: Server, **body: object) -> dict[str, object]:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(server, **body)
    return refused.value.body


def test_the_report_says_what_every_stage_holds(server: Server) -> None:
    before = server.metrics()
    answer = ask(server, reduction={"method": "fastv", "budget": 90})
    # (2 * 144 + 4 * 63) / 6 = 90. The image is at 1 to 144: of its blocks, 1 to 3 can be left out,
    # and with two of them gone, 80 tokens stay.
    (held,) = answer.reduction["images"]
    assert held["visual_tokens_by_stage"] == [144, 80, 80]
    in_layers = 2 * 144 + 4 * 80
    assert held["visual_tokens_kept"] == answer.reduction["visual_tokens_kept"] == 102
    assert answer.reduction["kv_cache_bytes_held"] == in_layers * BYTES // LAYERS
    assert answer.reduction["kv_cache_bytes_saved"] == (6 * 144 - in_layers) * BYTES // LAYERS
    assert 0.5 < answer.reduction["estimated_prefill_flops_ratio"] < 1
    assert answer.usage.prompt_tokens_details.image_tokens == TOKENS, "all enter the decoder"
    kept = {"stage": "kept", "method": "fastv"}
    after = server.metrics()
    name = "vllm_ficoco_visual_tokens_total"
    assert value(after, name, **kept) - value(before, name, **kept) == 102
    late = {"stage": "layer_4", "method": "fastv"}
    assert value(after, name, **late) - value(before, name, **late) == 80
    blocks = "vllm_ficoco_kv_blocks_saved_total"
    # Three groups of two layers; two blocks fewer in two of them.
    assert value(after, blocks, method="fastv") - value(before, blocks, method="fastv") == 4


def test_a_preview_shows_what_every_stage_holds(server: Server) -> None:
    said = {"image": picture(1), "question": "what color is the circle ?"}
    for method in ("fastv", "ficoco-vl", "k-norm"):
        reduction = {"method": method, "budget": 80}
        answer = server.http.post("/v1/reduction/preview", json={**said, "reduction": reduction})
        assert answer.status_code == 200, answer.text
        preview = answer.json()
        check_whole(preview)
        (held,) = preview["reduction"]["images"]
        late = [stage for stage in preview["stages"] if stage["where"] == "decoder"]
        entered, *by_stage = held["visual_tokens_by_stage"]
        before = [entered, *by_stage]
        fewer = {
            layer: has
            for layer, had, has in zip([2, 4], before, by_stage, strict=False)
            if has < had
        }
        assert fewer and {stage["layer"]: len(stage["kept"]) for stage in late} == fewer
        assert len(preview["kept"]) == held["visual_tokens_by_stage"][-1]
        assert (preview["receivers"] is not None) == (method == "ficoco-vl")


def test_tokens_by_stage(server: Server) -> None:
    settings = {"method": "k-norm", "options": {"tokens": [80, 48]}}
    answer = ask(server, image(reduction=settings), image(1))
    reduced, whole = answer.reduction["images"]
    assert reduced["visual_tokens_by_stage"] == [144, 80, 48] and reduced["budget"] is None
    assert whole["visual_tokens_by_stage"] == [144, 144, 144] and whole["method"] == "none"


def test_an_unreachable_budget_names_the_smallest(server: Server) -> None:
    error = refusal(server, reduction={"method": "ficoco-l", "budget": 20})
    assert error["param"] == "reduction.budget" and "from 60" in error["message"]
    error = refusal(server, reduction={"method": "ficoco-l", "options": {"tokens": [0, 0]}})
    assert error["param"] == "reduction.budget" and "60" in error["message"], "48 on average"


def test_a_layout_that_does_not_fit_names_the_stages(server: Server) -> None:
    error = refusal(server, reduction={"method": "sparsevlm", "budget": 100})
    assert error["param"] == "reduction.method"
    assert "--reduction-stages 1,2,3" in error["message"]


def test_prompt_logprobs_are_refused_with_a_reduction_in_the_decoder(server: Server) -> None:
    for field, said in (("prompt_logprobs", 1), ("echo", True)):  # the second becomes the first
        error = refusal(server, reduction={"method": "fastv", "budget": 90}, **{field: said})
        assert error["param"] == field
        ask(server, visual_token_budget=90, **{field: said})


def test_images_that_do_not_fit_one_step_are_refused_where_the_question_is_read(
    server: Server,
) -> None:
    """A step encodes 2048 / 144 images: more of them would wait for one another for ever."""
    images = [image(seed) for seed in range(15)]
    with pytest.raises(openai.BadRequestError) as refused:
        ask(server, *images, reduction={"method": "ficoco-vl", "budget": 60})
    error = refused.value.body
    assert error["param"] == "messages"
    assert "'15 images'" in error["message"] and "14 images or fewer" in error["message"]
    assert "--max-num-batched-tokens" in error["message"]
    answer = ask(
        server, *images, reduction={"method": "vitcop", "options": {"tokens": [70, 60, 60]}}
    )
    assert len(answer.reduction["images"]) == 15


def test_too_long_says_that_images_enter_whole(server: Server) -> None:
    settings = {"method": "fastv", "budget": 90}
    with pytest.raises(openai.BadRequestError) as refused:
        ask(server, *(image(n) for n in range(16)), reduction=settings)
    said = refused.value.body["message"]
    for words in ("2304 of them", '{"method": "score", "budget": 127}', "fastv", "enter"):
        assert words in said
    early = {"method": "score", "budget": 127}
    answer = ask(server, *(image(n) for n in range(16)), reduction=early)
    assert answer.reduction["visual_tokens_kept"] == 16 * 127


def test_about_reduction(server: Server) -> None:
    about = server.http.get("/v1/reduction").json()
    assert about["model"]["decoder_stages"] == [2, 4]
    assert about["model"]["kv_block_size"] == 32
    assert about["model"]["kv_block_sizes"] == [32, 32, 32]
    allowed = about["policy"]["methods"]
    assert "vitcop" in allowed and "sparsevlm" not in allowed, "which needs three stages"
    assert about["model"]["kv_cache_groups"] == [1, 1, 1]
    methods = {method["name"]: method for method in about["methods"]}
    assert methods["ficoco-vl"]["places"] == ["tower", "decoder"]
    assert methods["sparsevlm"]["decoder_stages"] == 3 and methods["tome"]["decoder_stages"] == 0
