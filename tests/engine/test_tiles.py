# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT and LLaVA-OneVision: images in tiles say what the reference says, reduced or not.

Sixteen greedy tokens and the first logits, through the engine; prompts are as long as their images
keep tokens, which is what the processor says of them, also where it has seen the image before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from vllm.exceptions import VLLMValidationError

from tests.checkpoints import random_llava_next, random_llava_onevision
from tests.engine.conftest import Ask, Engine, check_answers, make_engine, picture
from tests.engine.following import follow
from tests.engine.test_decoder_stages import STAGED, STAGES, VISION, expected, wish
from tests.engine.test_stage_variants import interpreted
from tests.reference.decoder import CHOOSE
from tests.reference.llava import one_thread
from tests.reference.tiles import ReferenceTiles
from vllm_ficoco.methods import METHODS
from vllm_ficoco.packed import PACKED_FIELD, Packed, pack
from vllm_ficoco.settings import Reduction

pytestmark = pytest.mark.engine

REDUCING = [
    name
    for name, method in METHODS.items()
    if name not in ("none", "resize") and not method.decoder and not method.for_videos_alone
]
FIRST_LOGITS = {"logprobs": -1}
IMAGE = 4
"""Its token."""
ROOMY = {"max_logprobs": -1, "logprobs_mode": "raw_logits", "max_num_batched_tokens": 2048}
STEPS_OF_48 = {
    **ROOMY,
    "max_num_batched_tokens": 48,
    "max_model_len": 320,
    "num_gpu_blocks_override": 12,
}
"""Smaller than most images, and a pool for a few requests."""

SIZES = {
    "square": (112, 112),
    "wide": (160, 70),
    "tall": (40, 200),
    "tiny": (5, 7),
    "padded": (90, 113),
    "huge": (1400, 1300),
    "thumbnail alone": (1400, 2),
    "rows alone": (2, 1400),
    "shrunk": (150, 200),
    "standing": (944, 1153),
    "largest": (625, 1000),
}
"""Width and height of images; the last three are of interest to LLaVA-OneVision."""
USUAL = ["square", "wide", "tall", "tiny", "padded", "huge"]
THIN = ["thumbnail alone", "rows alone"]


def show(*images: tuple[str, dict[str, Any] | None], question: str = "what is there ?") -> Ask:
    """Images by the names of their sizes, each of which has its own picture, and settings."""
    names, settings = zip(*images, strict=True) if images else ((), ())
    seeds = [[*SIZES].index(name) for name in names]
    return Ask(seeds, settings, question, FIRST_LOGITS, [SIZES[name] for name in names])


def to(budget: int, method: str, **options: Any) -> dict[str, Any]:
    """Settings of an image."""
    return {"method": method, "budget": budget, "options": options}


def of_every_method(whole: dict[str, int]) -> list[Ask]:
    """Every method before the decoder at two budgets and with either option of newlines.

    Args:
        whole: visual tokens of the usual images.
    """
    asks = []
    for i, method in enumerate(REDUCING):
        one, other = USUAL[i % len(USUAL)], USUAL[(i + 1) % len(USUAL)]
        asks.append(show((one, to(whole[one] // 5, method))))
        asks.append(show((other, to(2 * whole[other] // 3, method, newlines="all"))))
    return asks


def of_every_shape(whole: dict[str, int]) -> list[Ask]:
    """Unreduced, at the edges of what can be asked for, and several images in a prompt."""
    return [
        show(question="how many are there ?"),
        *(show((size, None)) for size in [*USUAL, *THIN]),
        show(("wide", to(whole["wide"] - 2, "topk"))),  # newlines leave alone
        show(("wide", to(whole["wide"] - 2, "tome"))),
        show(("tall", to(13, "uniform", newlines="all"))),
        show(("square", to(3, "evit"))),  # fewer than there are tiles
        show(("square", to(1, "ficoco-v"))),
        show(("square", to(whole["square"], "topk"))),
        show(("square", {"method": "none"})),
        show(("thumbnail alone", to(5, "topk"))),
        show(("thumbnail alone", to(15, "ficoco-v", newlines="all"))),
        show(("rows alone", to(18, "prumerge"))),
        show(("rows alone", to(9, "visionzip", newlines="all"))),
        show(("padded", to(40, "ficoco-v", attention="probabilities", normalise=False))),
        show(("padded", to(40, "random", seed=7))),
        show(("square", to(2, "globalcom2"))),
        show(("tall", to(30, "globalcom2", attention="probabilities", temperature=1.0))),
        show(("wide", to(10, "hired", alpha=0.2)), ("rows alone", to(17, "hired"))),
        show(("thumbnail alone", to(7, "globalcom2")), ("huge", to(70, "hired", alpha=0.9))),
        show(("square", to(30, "ficoco-v")), ("tall", to(20, "topk"))),
        show(("tiny", to(9, "visionzip")), ("huge", None), ("wide", to(33, "tome"))),
        show(
            ("tiny", None), ("tiny", to(9, "pooling")), ("tiny", to(9, "pooling", newlines="all"))
        ),
    ]


def in_the_decoder() -> list[Ask]:
    """Every method in the decoder; images of other shapes beside each other."""
    asks = [show(), show(("wide", None))]
    for i, method in enumerate(m for m in CHOOSE if m not in VISION):
        one, other = USUAL[i % 6], USUAL[(i + 1) % 6]
        asks.append(show((one, wish(method, 25, 12, 5))))
        asks.append(show((other, wish(method, 22, 22, 0)), (one, wish(method, 20, 10, 3))))
    return [
        *asks,
        show(("square", wish("ficoco-vl", 60, 40, 20, 10)), ("tall", to(20, "ficoco-v"))),
        show(("wide", wish("ficoco-vl", 30, 20, 10, 0, newlines="all")), ("tall", None)),
        show(("square", wish("vitcop", 50, 30, 12)), ("padded", wish("vitcop", 60, 40, 9))),
        show(("wide", wish("vitcop", 40, 30, 12, newlines="all")), ("tiny", wish("fastv", 9))),
        show(("rows alone", wish("a-score", 15, 7, 2)), ("thumbnail alone", wish("dart", 9))),
        show(("rows alone", wish("vitcop", 19, 9, 2)), ("huge", wish("k-norm", 70, 40, 10))),
        show(("tall", wish("vitcop", 40, 25, 9, newlines="all"))),
        show(("tiny", wish("vitcop", 24, 15, 6, newlines="all"))),
        show(("padded", wish("tops", 50, 30, 12)), ("tall", wish("tops", 40, 25, 9))),
        show(("wide", wish("mustdrop", 50, 30, 20, 9)), ("square", wish("mustdrop", 60, 40, 9, 0))),
        show(*(("square", wish("k-norm", 50, 30, 12)),) * 2, ("square", wish("k-norm", 9, 9, 0))),
    ]


@one_thread()
def counts(reference: ReferenceTiles) -> dict[str, int]:
    """Visual tokens of images of the sizes above."""
    return {size: len(reference.visual_tokens(picture(0, SIZES[size]))) for size in SIZES}


def check(
    engine: Engine,
    reference: ReferenceTiles,
    asks: Sequence[Ask],
    stages: Sequence[int] = (),
    times: int = 1,
) -> list[Any]:
    """All in one batch, perhaps again: what comes out, the last time."""
    with one_thread():
        truths = [expected(reference, ask, engine.block, stages) for ask in asks]
    tokens = counts(reference)
    made = check_answers(
        engine, asks, truths, lambda i, rendered: check_counts(tokens, asks[i], rendered), times
    )
    return [output for _, output in made]


def check_counts(tokens: dict[str, int], ask: Ask, rendered: dict[str, Any]) -> None:
    """What the processor says of the images, and that the prompt has room for just that."""
    prompt, images = rendered["prompt_token_ids"], len(ask.images)
    places = rendered["mm_placeholders"]["image"] if images else []
    said: Sequence[Packed] = rendered["visual_tokens"] if images else []
    assert len(places) == len(said) == images
    for name, settings, packed, place in zip(
        map([*SIZES].__getitem__, ask.images), ask.settings, said, places, strict=True
    ):
        whole, given = tokens[name], settings or {"method": "none"}
        budget = given.get("budget", whole)
        if given["method"] in VISION:
            budget = given["options"]["tokens"][0]
        assert packed.layout is not None and packed.layout.tokens == whole, ask
        in_decoder = given["method"] in CHOOSE
        assert (packed.reduction is not None) == (budget < whole or in_decoder), ask
        assert place.length == min(budget, whole), ask
        assert prompt[place.offset : place.offset + place.length] == [IMAGE] * place.length
    assert prompt.count(IMAGE) == sum(place.length for place in places)


def check_resize(engine: Engine, reference: ReferenceTiles) -> None:
    """An image that is scaled down gives what the smaller image gives by itself."""
    config = engine.llm.llm_engine.vllm_config.model_config.hf_config
    sampling = engine.params(max_tokens=8)

    def run(image: Image.Image, *settings: dict[str, Any]) -> Any:
        request: dict[str, Any] = {
            "prompt": Ask([0]).prompt,
            "multi_modal_data": {"image": [image]},
        }
        if settings:
            request["mm_processor_kwargs"] = {"reduction": [*settings]}
        return engine.llm.generate([request], [sampling], use_tqdm=False)[0]

    for name in ("huge", "padded"):
        image = picture(3, SIZES[name])
        whole, smaller = len(reference.visual_tokens(image)), {}
        for height, width in config.image_grid_pinpoints:
            scale = min(width / image.width, height / image.height)
            if scale < 1:
                size = round(image.width * scale), round(image.height * scale)
                fitted = image.resize(size, Image.Resampling.BICUBIC)
                tokens = len(reference.visual_tokens(fitted))
                if tokens not in smaller or size < smaller[tokens].size:
                    smaller[tokens] = fitted
        for budget in sorted(b for b in {whole - 1, *smaller} if b < whole):
            kept = max(tokens for tokens in smaller if tokens <= budget)
            due, made = run(smaller[kept]), run(image, to_most(budget))
            assert len(made.prompt_token_ids) == len(due.prompt_token_ids)
            assert made.outputs[0].token_ids == due.outputs[0].token_ids, (name, budget)
        with pytest.raises(VLLMValidationError, match=f"at least {min(smaller)}"):
            run(image, to_most(min(smaller) - 1))


def to_most(budget: int) -> dict[str, Any]:
    """Scaled down."""
    return {"method": "resize", "budget": budget}


# --- LLaVA-NeXT ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def next_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_llava_next(tmp_path_factory.mktemp("next"))


@pytest.fixture(scope="module")
def reference(next_checkpoint: Path) -> ReferenceTiles:
    return ReferenceTiles(str(next_checkpoint))


@pytest.fixture(scope="module")
def engine(next_checkpoint: Path) -> Iterator[Engine]:
    yield from make_engine(next_checkpoint, **ROOMY)


def test_next(engine: Engine, reference: ReferenceTiles) -> None:
    """The second time images come from the processor's cache and prompts from the prefix cache."""
    whole = counts(reference)
    outputs = check(engine, reference, of_every_shape(whole) + of_every_method(whole), times=2)
    assert sum(output.num_cached_tokens > 0 for output in outputs) > 20
    check_resize(engine, reference)


def test_next_who_follows_an_image_sees_what_the_reference_keeps(
    engine: Engine, reference: ReferenceTiles
) -> None:
    """Of every part, by numbers in the whole image, newlines among them."""
    for ask in of_every_method(counts(reference)):
        (settings,) = ask.settings
        assert settings is not None
        if METHODS[settings["method"]].asks_question:
            continue
        with one_thread():
            reference.visual_tokens(
                *ask.pictures, settings["method"], settings["budget"], settings["options"]
            )
        (seen,) = follow(engine, [ask])
        assert seen.entered == reference.place, ask
        where = "tower" if METHODS[settings["method"]].place == "tower" else "output"
        layers = seen.at(where)
        assert layers and {*layers[max(layers)]} <= {*seen.entered}


def test_next_unreduced_is_bit_identical_to_vllm(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same engine with vLLM's own methods gives the same bits."""
    from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration as Stock

    asks = [show((size, None)) for size in [*USUAL, *THIN]]
    asks += [show(("tiny", None), ("square", to(88, "topk"))), show()]

    def run() -> list[Any]:
        engine.llm.reset_mm_cache()
        engine.llm.reset_prefix_cache()
        engine.llm.llm_engine.reset_encoder_cache()
        return [
            [
                {word: entry.logprob for word, entry in step.items()}
                for step in output.outputs[0].logprobs
            ]
            for output in engine.generate(asks)
        ]

    ours = run()
    with monkeypatch.context() as patch:
        for name in ("embed_multimodal", "embed_input_ids", "forward", "_image_pixels_to_features"):
            patch.setattr(type(engine.model), name, getattr(Stock, name))
        assert run() == ours


@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_next_an_image_does_not_depend_on_the_batch_it_is_in(
    engine: Engine, reference: ReferenceTiles, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """Alone and beside others, alike or not, with as many tiles at once as there may be."""
    processor = engine.llm.renderer.get_mm_processor()
    images = [picture(seed, SIZES[size]) for seed, size in enumerate([*USUAL, *USUAL])]
    processed = reference.processor.image_processor(images, return_tensors="pt")
    pixels, sizes = processed["pixel_values"], processed["image_sizes"]  # tiles that pad, too
    settings: list[Reduction | None] = [
        None if i == 4 else Reduction(method=REDUCING[i % 4], budget=20 + i // 9)
        for i in range(len(images))
    ]
    packed = [
        pack(reduction, processor.layout_of(*image.size))
        for reduction, image in zip(settings, images, strict=True)
    ]
    monkeypatch.setattr(engine.model, "images_at_once", at_once)

    def embed(*index: int) -> Any:
        return engine.model.embed_multimodal(
            pixel_values=pixels[[*index]],
            image_sizes=sizes[[*index]],
            **{PACKED_FIELD: [packed[i] for i in index]},
        )

    with torch.inference_mode():
        for i, together in enumerate(embed(*range(len(images)))):
            (alone,) = embed(i)
            torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_next_in_chunks_with_preemption_and_reused_prefixes(
    next_checkpoint: Path, reference: ReferenceTiles
) -> None:
    """Steps cut images, and the pool forces requests out and back in."""
    whole = counts(reference)
    asks = (of_every_shape(whole) + of_every_method(whole))[::2]
    with contextmanager(make_engine)(next_checkpoint, **STEPS_OF_48) as engine:
        preempted = engine.watch_preemptions()
        check(engine, reference, asks, times=2)
        assert sum(preempted) > 0, "the pool was not small enough to test anything"


def test_next_in_the_decoder(tmp_path: Path) -> None:
    """SigLIP and Mistral; also without [CLS] and before the decoder, on a server with stages."""
    checkpoint = random_llava_next(tmp_path, "siglip", decoder_layers=6, text="mistral")
    reference = ReferenceTiles(str(checkpoint))
    with contextmanager(make_engine)(checkpoint, **{**STAGED, **ROOMY}) as engine:
        asks = [*in_the_decoder(), *of_every_method(counts(reference))[::2]]
        if engine.interpreted:  # in Triton's interpreter, see below
            asks = asks[::6]
        check(engine, reference, asks, STAGES)


def test_next_on_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SigLIP and Qwen2."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # one NUMA node serves both ranks
    checkpoint = random_llava_next(tmp_path, "siglip", text="qwen2")
    reference = ReferenceTiles(str(checkpoint))
    whole = counts(reference)
    with contextmanager(make_engine)(checkpoint, **ROOMY, tensor_parallel_size=2) as engine:
        check(engine, reference, of_every_shape(whole)[::3] + of_every_method(whole))


def test_next_on_the_other_model_runner() -> None:
    """Model Runner V2 with asynchronous scheduling, its kernels in Triton's interpreter."""
    run = interpreted(
        "pytest", "-p", "tests.engine.triton_on_cpu", "-k", "in_the_decoder and next", __file__
    )
    assert run.returncode == 0 and "1 passed" in run.stdout, run.stdout[-4000:]


# --- LLaVA-OneVision ----------------------------------------------------------------------------


def test_onevision(tmp_path: Path) -> None:
    """With steps shorter than an image; one that stands is larger than the largest that lies."""
    checkpoint = random_llava_onevision(tmp_path)
    reference = ReferenceTiles(str(checkpoint))
    whole = counts(reference)
    large = ["shrunk", "standing", "largest"]
    asks = [
        *(show((size, None)) for size in large),
        *(show((size, to(whole[size] - 1, "topk"))) for size in large),
        *(show((size, to(40, "ficoco-v", newlines="all"))) for size in large),
        show(("shrunk", to(30, "tome")), ("tall", to(20, "visionzip")), ("tiny", None)),
        *of_every_method(whole)[::3],
        *of_every_shape(whole)[::3],
    ]
    with contextmanager(make_engine)(
        checkpoint, **{**ROOMY, "max_num_batched_tokens": 100}
    ) as engine:
        check(engine, reference, asks, times=2)
        check_resize(engine, reference)


def test_onevision_in_the_decoder(tmp_path: Path) -> None:
    checkpoint = random_llava_onevision(tmp_path, decoder_layers=6)
    reference = ReferenceTiles(str(checkpoint))
    with contextmanager(make_engine)(checkpoint, **{**STAGED, **ROOMY}) as engine:
        asks = [
            *in_the_decoder(),
            show(("shrunk", wish("k-norm", 150, 60, 20)), ("largest", wish("fastv", 50))),
            show(("shrunk", wish("vitcop", 140, 60, 20))),
            show(("shrunk", wish("random-decoder", 100, 60, 20))),
        ]
        check(engine, reference, asks, STAGES)
