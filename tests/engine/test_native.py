# SPDX-License-Identifier: Apache-2.0
"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: reduced images say what the reference says.

Greedy tokens and the first logits, through the engine. Steps are shorter than most images and stop
inside of them; every prompt is sent twice, so that it is found in the prefix cache up to the middle
of an image.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media import ImageMediaIO, VideoMediaIO
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from tests.checkpoints import NATIVE, random_qwen
from tests.engine.conftest import Ask, Engine, check_answers, make_engine
from tests.engine.test_decoder_stages import STAGED, STAGES, VISION, wish
from tests.engine.test_decoder_stages import expected as staged
from tests.engine.test_stage_variants import interpreted
from tests.reference.decoder import CHOOSE
from tests.reference.llava import one_thread
from tests.reference.qwen import Answer, Film, ReferenceQwen
from tests.videos import filmed, gif
from vllm_ficoco.engine.positions import Offsets
from vllm_ficoco.methods import METHODS
from vllm_ficoco.vision.geometry import FAMILIES, geometry_of

pytestmark = pytest.mark.engine

NEW_TOKENS = 12
REDUCING = [
    name
    for name, method in METHODS.items()
    if name != "none"
    and not method.decoder
    and not method.for_videos_alone
    and method.needs <= FAMILIES["qwen2_5_vl"]
]
ROOMY = {
    "max_logprobs": -1,
    "logprobs_mode": "raw_logits",
    "limit_mm_per_prompt": {"image": 3, "video": 2},
}
IN_STEPS_OF_24 = {**ROOMY, "max_num_batched_tokens": 24, "max_num_seqs": 12}

SIZES = {
    "square": (224, 224),
    "wide": (308, 84),
    "tall": (90, 330),
    "odd": (196, 140),
    "line": (1400, 28),
    "column": (28, 1100),
    "tiny": (5, 7),
    "huge": (1400, 1300),
}
"""Width and height of images. Windows of Qwen2.5-VL's tower do not fill the odd ones."""

FILMS = {
    "short": (4, (112, 84), 2.0),
    "long": (16, (56, 56), 3.0),
    "odd": (7, (140, 84), 2.0),
    "wide": (6, (224, 56), 5.0),
}
"""Frames, their width and height, and how many a second. Of two the tower makes one. The time of
the long one goes beyond its sides, and in Qwen2.5-VL in steps that are no whole numbers."""


@cache
def film(name: str) -> Film:
    """A file, decoded as vLLM does it. Grains tell apart what else would be alike in all frames,
    and left to rounding."""
    (frames, size, fps), seed = FILMS[name], [*FILMS].index(name)
    clean = filmed(frames, size, seed, event=frames // 2)
    grains = np.random.default_rng(seed).integers(-40, 41, (frames, *clean.shape[1:3], 1))
    file = gif((clean + grains).clip(0, 255).astype(np.uint8), fps)
    loader = VideoMediaIO(ImageMediaIO(), num_frames=-1, video_backend="opencv")
    return Film(*loader.load_bytes(file).media)


@dataclass(frozen=True)
class Shown(Ask):
    """A request to a Qwen-VL."""

    options: dict[str, Any] = field(default_factory=dict)
    """Of the processor."""
    films: Sequence[tuple[str, dict[str, Any] | None]] = ()
    """Videos before the images, and their settings."""
    ends: bool = False
    """With the last image's last token."""
    before: int = 0
    """Words before the images."""

    @property
    def prompt(self) -> str:
        shown = ["<|vision_start|> <|image_pad|> <|vision_end|>"] * len(self.images)
        shown = ["<|vision_start|> <|video_pad|> <|vision_end|>"] * len(self.films) + shown
        words = ["star"] * self.before
        whole = " ".join(["USER:", *words, *shown, self.question, "ASSISTANT:"])
        return whole[: whole.rindex(" <|vision_end|>")] if self.ends else whole

    @property
    def for_vllm(self) -> dict[str, Any]:
        request = super().for_vllm
        if self.options:
            request["mm_processor_kwargs"] = {
                **request.get("mm_processor_kwargs", {}),
                **self.options,
            }
        if self.films:
            videos = [(film(name).frames, film(name).metadata) for name, _ in self.films]
            request.setdefault("multi_modal_data", {})["video"] = videos
            both = {"image": [*self.settings], "video": [given for _, given in self.films]}
            if any(one for each in both.values() for one in each):
                request.setdefault("mm_processor_kwargs", {})["reduction"] = both
        return request


def show(
    *images: tuple[str, dict[str, Any] | None], question: str = "what is there ?", **more: Any
) -> Shown:
    """Images by the names of their sizes, each of which has its own picture, and settings."""
    names, settings = zip(*images, strict=True) if images else ((), ())
    seeds = [[*SIZES].index(name) for name in names]
    sizes = [SIZES[name] for name in names]
    sampling = {"logprobs": -1, "max_tokens": NEW_TOKENS}
    return Shown(seeds, settings, question, sampling, sizes, **more)


def to(budget: int, method: str, **options: Any) -> dict[str, Any]:
    """Settings of an image."""
    return {"method": method, "budget": budget, "options": options}


def of_every_shape() -> list[Shown]:
    """Unreduced, at the edges of what can be asked for, several images, nothing behind one."""
    return [
        show(question="how many are there ?"),
        *(show((size, None)) for size in ("square", "odd", "line", "tiny", "huge")),
        *(show((size, to(3, "topk")), before=28) for size in SIZES),  # astride of two KV blocks
        show(("square", to(1, "uniform")), ("square", to(1, "uniform")), ("tiny", None)),
        show(("odd", to(1000, "topk"))),
        show(("wide", to(20, "ficoco-v")), ("tall", None)),
        show(("tall", None), ("wide", to(7, "visionzip"))),
        show(("huge", to(40, "prumerge")), ("huge", to(5, "pooling")), ("odd", to(9, "random"))),
        show(("square", to(38, "topk")), ends=True),
        show(("wide", None), ("column", to(5, "ficoco-v")), ends=True),
        show(("huge", None), ends=True),
        show(("line", to(40, "pooling")), question="what color is the circle ? " * 8),
        show(("huge", to(30, "topk")), options={"max_pixels": 40_000}),
        show(("tiny", to(6, "uniform")), options={"min_pixels": 20_000}),
        show(("square", None), ("tall", to(9, "resize")), options={"max_pixels": 30_000}),
        show(("odd", to(6, "topk")), ("tall", to(9, "ficoco-v")), films=[("short", None)]),
        show(("odd", None), films=[("short", None)]),
    ]


def of_videos() -> list[Shown]:
    """Whole, at the edges of what can be asked for, frames of which nothing stays, beside images
    and one another, nothing behind one."""
    return [
        *(show(films=[(name, None)]) for name in FILMS),
        *(show(films=[(name, to(7, "topk"))], before=28) for name in FILMS),  # astride of blocks
        show(films=[("short", to(1, "uniform"))]),
        show(films=[("long", to(3, "pooling"))]),
        show(films=[("odd", to(59, "ficoco-v"))]),
        show(films=[("wide", to(1000, "topk"))]),
        show(("odd", to(6, "topk")), ("tall", None), films=[("long", to(20, "score"))]),
        show(("odd", None), films=[("short", to(5, "random")), ("odd", to(30, "visionzip"))]),
        show(("square", to(9, "resize")), films=[("short", to(5, "uniform")), ("short", None)]),
        show(films=[("odd", to(20, "cdpruner"))], question="how many ?"),
        show(films=[("odd", to(20, "cdpruner"))], question="what is the star ?"),
    ]


def of_every_method_on_videos(reference: ReferenceQwen) -> list[Shown]:
    able, names = geometry_of(reference.model.config).methods(video=True), [*FILMS]
    methods = [name for name in able if name != "none" and not METHODS[name].decoder]
    asks = []
    for i, method in enumerate(methods):
        alone = METHODS[method].for_videos_alone  # some keep a whole frame at least
        asks.append(
            show(films=[("odd" if alone else names[i % 4], to(9 + i + 20 * alone, method))])
        )
    if "vidcom2" in able:  # frames can share by what is in them
        for name in FILMS:
            asks.append(show(films=[(name, to(14, "vidcom2")), ("odd", to(25, "dycoke"))]))
            asks.append(show(films=[(name, to(13, "topk", frames="unique"))], before=20))
    return asks


def of_every_method() -> list[Shown]:
    """At two budgets, on images of all shapes, and with options."""
    asks, names = [], [*SIZES]
    for i, method in enumerate(REDUCING):
        asks.append(show((names[i % 6], to(11, method))))
        asks.append(show((names[(i + 3) % 6], to(25, method)), before=20))
    return [
        *asks,
        show(("square", to(21, "ficoco-v", attention="probabilities", normalise=False))),
        show(("tall", to(20, "random", seed=7))),
        show(("wide", to(20, "visionzip", contextual=0.5))),
        show(("line", to(4, "resize")), ("column", to(30, "resize"))),
        show(("odd", to(12, "cdpruner")), ("odd", to(12, "cdpruner")), question="how many ?"),
        show(("odd", to(12, "cdpruner")), question="what is the star ?"),
        show(("tall", to(12, "recoverable", recovered=0.4)), question="how many ?"),
        show(("huge", to(71, "resize")), ("odd", to(4, "resize"))),
    ]


def expected(reference: ReferenceQwen, ask: Ask) -> Answer:
    """What the reference says to a request."""
    assert isinstance(ask, Shown)
    with one_thread():
        reference.ask(ask.behind)
        return reference.answer(
            ask.prompt,
            ask.pictures,
            ask.settings,
            ask.sampling["max_tokens"],
            ask.options,
            [(film(name), given) for name, given in ask.films],
        )


def check(engine: Engine, reference: ReferenceQwen, asks: Sequence[Shown], times: int = 1) -> int:
    """All in one batch, perhaps again: of the last time, how many prompts were found in the prefix
    cache up to the middle of a reduced image."""
    truths = [expected(reference, ask) for ask in asks]
    inside = 0
    made = check_answers(
        engine,
        asks,
        truths,
        lambda i, rendered: check_counts(reference, truths[i], rendered),
        times,
    )
    for ask, (rendered, output) in zip(asks, made, strict=True):
        placed = rendered.get("mm_placeholders", {})
        places = [*placed.get("video", []), *placed.get("image", [])]
        settings = [*(given for _, given in ask.films), *ask.settings]
        inside += any(
            given and place.offset < output.num_cached_tokens < place.offset + place.length
            for place, given in zip(places, settings, strict=True)
        )
    return inside


def check_counts(reference: ReferenceQwen, truth: Answer, rendered: dict[str, Any]) -> None:
    """What the processor says of the images, and that the prompt has room for just that."""
    prompt, config = rendered["prompt_token_ids"], reference.model.config
    assert len(prompt) == truth.length
    due = {"image": truth.kept, "video": truth.of_films}
    for kind, token in ("image", config.image_token_id), ("video", config.video_token_id):
        places = rendered["mm_placeholders"].get(kind, []) if due[kind] else []
        assert [place.get_num_embeds() for place in places] == [len(kept) for kept in due[kind]]
        for place in places:
            own = prompt[place.offset : place.offset + place.length]
            assert own.count(token) == place.get_num_embeds()
        assert prompt.count(token) == sum(place.get_num_embeds() for place in places)
    if truth.kept:
        assert [packed.layout.grid for packed in rendered["visual_tokens"]] == truth.grids


# --- One engine a family ------------------------------------------------------------------------


@dataclass(frozen=True)
class Served:
    """A family's engine and its reference."""

    family: str
    engine: Engine
    reference: ReferenceQwen


@pytest.fixture(scope="module", params=NATIVE)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    checkpoint = random_qwen(tmp_path_factory.mktemp("native"), request.param)
    reference = ReferenceQwen(str(checkpoint))
    options = {**IN_STEPS_OF_24, "enable_mm_embeds": True}
    for engine in make_engine(checkpoint, **options):
        yield Served(request.param, engine, reference)


def test_every_shape_and_method(served: Served) -> None:
    """In steps of 24 tokens, and again from the prefix cache."""
    asks = of_every_shape() + of_every_method() + of_videos()
    asks += of_every_method_on_videos(served.reference)
    if served.family == "qwen3-vl-moe":  # but for its experts, as Qwen3-VL
        asks = asks[::4]
    if served.engine.interpreted:  # in Triton's interpreter, see below
        asks = asks[::5]
    assert check(served.engine, served.reference, asks, times=2) >= len(asks) // 8


def test_without_the_offsets_it_would_be_wrong(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the tests above can see: a reduced image all of whose tokens stand at its first place.

    Of what is not reduced, no bit depends on them.
    """
    if served.engine.interpreted:
        pytest.skip("takes long in Triton's interpreter")
    monkeypatch.setattr(Offsets, "add", lambda *_: None)
    reduced = [show((size, to(20, "topk"))) for size in ("square", "wide", "tall")]
    reduced += [show(films=[(name, to(20, "topk"))]) for name in ("odd", "wide")]
    plain = [show(("square", None)), show(films=[("long", None)]), show()]
    forget(served.engine)
    outputs = served.engine.generate([*reduced, *plain])
    forget(served.engine)
    for ask, output in zip([*reduced, *plain], outputs, strict=True):
        truth, made = expected(served.reference, ask), output.outputs[0]
        logits = [made.logprobs[0][word].logprob for word in range(len(truth.first_logits))]
        far = float((torch.tensor(logits) - truth.first_logits).abs().max())
        assert far > 0.05 if ask in reduced else far < 1e-3, ask


def test_positions_are_right_before_the_model_runs(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a CUDA graph of the whole model is replayed, nothing of it runs that could add."""
    served.engine.generate([show()])  # on a GPU, the capture of graphs has run by now
    monkeypatch.setattr(Offsets, "before_run", lambda *_: None)
    reduced = [show((size, to(20, "topk"))) for size in ("square", "wide")]
    reduced += [show(films=[(name, to(20, "topk"))]) for name in ("long", "odd")]
    check(served.engine, served.reference, reduced)


def test_unreduced_is_bit_identical_to_vllm(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same engine with vLLM's own methods gives the same bits."""
    if served.engine.interpreted:
        pytest.skip("takes long in Triton's interpreter")
    asks = [show((size, None)) for size in SIZES]
    asks += [show(("tiny", None), ("odd", to(1000, "topk"))), show()]
    asks += [show(("odd", None), films=[(name, None)]) for name in FILMS]
    asks += [show(films=[("long", to(1000, "topk"))])]
    check_as_stock(served.engine, asks, monkeypatch)


def check_as_stock(engine: Engine, asks: Sequence[Shown], monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine says what it says with vLLM's own methods, to the bit."""

    def run() -> list[Any]:
        forget(engine)
        return [
            [
                {word: entry.logprob for word, entry in step.items()}
                for step in output.outputs[0].logprobs
            ]
            for output in engine.generate(asks)
        ]

    ours, kind = run(), type(engine.model)
    stock = kind.__bases__[-1]
    assert stock.__module__.startswith("vllm.model_executor.models.")
    names = ("embed_multimodal", "embed_input_ids", "forward", "get_mrope_input_positions")
    with monkeypatch.context() as patch:
        for name in names:
            patch.setattr(kind, name, getattr(stock, name))
        assert run() == ours


def forget(engine: Engine) -> None:
    """Empties what vLLM has kept of images and prompts."""
    engine.llm.reset_mm_cache()
    engine.llm.reset_prefix_cache()
    engine.llm.llm_engine.reset_encoder_cache()


def test_image_embeds_are_what_they_were(served: Served) -> None:
    """As their image, beside others with budgets; refused with a budget of their own."""
    if served.engine.interpreted:
        pytest.skip("takes long in Triton's interpreter")
    ask = show(("odd", None))
    seen = served.reference.see(ask.pictures[0], {})
    grid = torch.tensor([[1, 2 * seen.grid[0], 2 * seen.grid[1]]])
    ready = {"image_embeds": seen.tokens, "image_grid_thw": grid}
    engine, truth = served.engine, expected(served.reference, ask)
    request = {**ask.for_vllm, "multi_modal_data": {"image": ready}}
    engine.add(show(("wide", to(9, "topk"))), "beside")
    engine.llm.llm_engine.add_request("ready", request, engine.params(**ask.sampling))
    assert list(engine.finished()["ready"].outputs[0].token_ids) == truth.tokens
    with pytest.raises(VLLMValidationError, match="image_embeds"):
        engine.llm.generate({**request, "mm_processor_kwargs": {"visual_token_budget": 9}})


# --- Under pressure, and in other ways ----------------------------------------------------------


@contextmanager
def made(tmp_path: Path, family: str, **options: Any) -> Iterator[tuple[Engine, ReferenceQwen]]:
    checkpoint = random_qwen(tmp_path / "model", family)
    with contextmanager(make_engine)(checkpoint, **{**ROOMY, **options}) as engine:
        yield engine, ReferenceQwen(str(checkpoint))


def test_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen3-VL's decoder, which takes in deepstack."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))  # compile, do not load
    options = {"enforce_eager": False, "max_num_batched_tokens": 24, "max_num_seqs": 12}
    with made(tmp_path, "qwen3-vl", **options) as (engine, reference):
        asks = of_every_shape() + of_every_method() + of_videos()
        check(engine, reference, asks[::3], times=2)


def test_on_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The heads of tower and decoder are shared, and so is the evidence."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # one NUMA node serves both ranks
    with made(tmp_path, "qwen2.5-vl", tensor_parallel_size=2) as (engine, reference):
        asks = of_every_shape()[::3] + of_every_method() + of_videos()[::2]
        check(engine, reference, asks + of_every_method_on_videos(reference)[::2])


@pytest.mark.parametrize("family", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
def test_in_the_decoder(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every method in the decoder; Qwen3-VL's first stage starts behind deepstack.

    In blocks of 16, as GPUs have them, of which whole ones can leave these small images.
    """
    monkeypatch.setattr(CPUAttentionBackend, "get_supported_kernel_block_sizes", lambda *_: [16])
    stages = [2, 3, 4] if family == "qwen3-vl" else STAGES
    checkpoint = random_qwen(tmp_path, family, decoder_layers=6)
    options = {
        **STAGED,
        **ROOMY,
        "hf_overrides": {"reduction_stages": stages},
        "block_size": 16,
    }
    with contextmanager(make_engine)(checkpoint, **options) as engine:
        reference = ReferenceQwen(str(checkpoint))
        flat = geometry_of(reference.model.config).videos == "reduced"
        asks = in_the_decoder() + (videos_in_the_decoder() if flat else [])
        check_staged(engine, reference, asks, stages)


def in_the_decoder() -> list[Shown]:
    """Methods in the decoder, before it and in both; text and unreduced images."""
    names = ["square", "wide", "tall", "odd", "line", "column"]
    asks = [show(), show(("wide", None))]
    for i, method in enumerate(m for m in CHOOSE if m not in VISION):
        one, other = names[i % 6], names[(i + 1) % 6]
        asks.append(show((one, wish(method, 25, 12, 5))))
        asks.append(show((other, wish(method, 22, 22, 0)), (one, wish(method, 20, 10, 3))))
    return [
        *asks,
        show(("square", wish("ficoco-vl", 30, 20, 15, 8)), ("tall", to(12, "ficoco-v"))),
        show(("square", wish("vitcop", 40, 30, 12)), ("odd", wish("vitcop", 30, 20, 9))),
        show(("line", wish("vitcop", 30, 20, 4)), ("tiny", wish("fastv", 2))),
        show(("odd", wish("tops", 25, 15, 6)), ("square", wish("mustdrop", 40, 30, 20, 8))),
        show(("column", wish("mustdrop", 20, 15, 9, 4))),
        show(("wide", wish("ficoco-l", 20, 15, 10, penalty=2.0))),
        show(("huge", wish("k-norm", 60, 30, 0)), ("square", None)),
        show(("odd", to(9, "topk")), ("tall", to(9, "resize"))),
    ]


def videos_in_the_decoder() -> list[Shown]:
    """Where no text stands between frames: every method, beside images and one another."""
    asks = [
        show(("square", wish("k-norm", 25, 12, 5)), films=[("short", None)]),
        show(films=[("odd", to(14, "vidcom2")), ("wide", wish("fastv", 25, 12, 5))]),
        show(films=[("odd", wish("ficoco-vl", 50, 40, 25, 8))]),
        show(films=[("wide", wish("vitcop", 40, 30, 9)), ("odd", wish("tops", 45, 30, 6))]),
        show(films=[("odd", wish("mustdrop", 50, 40, 20, 8))]),
        show(("wide", to(20, "ficoco-v")), films=[("odd", wish("dart", 20, 10, 3))]),
    ]
    for i, method in enumerate(m for m in CHOOSE if m not in VISION):
        asks.append(show(films=[(["odd", "wide"][i % 2], wish(method, 28, 14, 4))]))
    return asks


def items_of(ask: Shown) -> Any:
    """The request as if its videos were images."""
    films = [(film(name), given) for name, given in ask.films]
    return SimpleNamespace(
        pictures=[*(one for one, _ in films), *ask.pictures],
        settings=[*(given for _, given in films), *ask.settings],
        **{name: getattr(ask, name) for name in ("prompt", "behind", "sampling")},
    )


def check_staged(
    engine: Engine, reference: ReferenceQwen, asks: Sequence[Shown], stages: Sequence[int]
) -> None:
    """All in one batch: tokens, first logits, and every block back."""
    with one_thread():
        of = cast("Any", reference)
        truths = [staged(of, items_of(ask), engine.block, stages) for ask in asks]
    assert sum(truth.held[-1] < truth.held[0] for truth in truths) > len(asks) * 2 // 3
    free = engine.free_blocks
    for ask, truth, output in zip(asks, truths, engine.generate(asks), strict=True):
        first, words = output.outputs[0].logprobs[0], len(truth.first_logits)
        logits = torch.tensor([first[word].logprob for word in range(words)])
        far = float((logits - truth.first_logits).abs().max())
        assert far < 1e-3, f"{far} apart: {ask}"
        assert list(output.outputs[0].token_ids) == truth.tokens, ask
    assert engine.free_blocks == free


SOAK = 60
"""Requests of the test below."""


def random_ask(lot: random.Random) -> Shown:
    """A request of any kind, from a few images and words."""
    images: list[tuple[str, dict[str, Any] | None]] = []
    for _ in range(lot.choice((0, 1, 1, 1, 2))):
        method = lot.choice((None, *REDUCING))
        budget = lot.choice((4, 7, 12, 20, 33, 50))
        images.append((lot.choice([*SIZES]), method and to(budget, method)))
    words = " ".join(lot.choices(("red", "star", "is", "there", "what", "?"), k=lot.randint(1, 40)))
    ask = show(*images, question=words)
    return replace(ask, sampling={"max_tokens": lot.randint(1, 12)})


def test_under_pressure(tmp_path: Path) -> None:
    """A pool for a few requests forces them out and back in, in steps that stop inside images.

    First against the reference, then a soak: duplicates, aborts and reused prefixes; every output
    is the one that the request gets alone.
    """
    limits = {
        "max_model_len": 256,
        "max_num_batched_tokens": 48,
        "max_num_seqs": 12,
        "num_gpu_blocks_override": 11,
    }
    with made(tmp_path, "qwen2.5-vl", **limits) as (engine, reference):
        preempted = engine.watch_preemptions()
        asks = of_every_shape() + of_every_method() + of_videos()
        check(engine, reference, asks[::2], times=2)
        assert sum(preempted) > 0, "the pool was not small enough to test anything"
        preempted.clear()
        soak(engine, SOAK)
        assert sum(preempted) > 0


def soak(engine: Engine, count: int) -> None:
    """So many requests, a few at a time."""
    lot, core = random.Random(0), engine.llm.llm_engine
    asks = [random_ask(lot) for _ in range(40)]
    alone = []
    for ask in asks:
        forget(engine)
        alone.append(list(engine.generate([ask])[0].outputs[0].token_ids))
    free = engine.free_blocks
    waiting = {f"soak{i}": lot.randrange(len(asks)) for i in range(count)}
    asked, aborting, aborted = dict(waiting), set(), 0
    while waiting or core.has_unfinished_requests():
        while waiting and len(engine.scheduler.requests) < 12:
            name = next(iter(waiting))
            engine.add(asks[waiting.pop(name)], name)
            if lot.random() < 0.15:
                aborting.add(name)
        for output in core.step():
            if output.finished and output.request_id in asked:
                aborting.discard(output.request_id)
                made = list(output.outputs[0].token_ids)
                assert made == alone[asked.pop(output.request_id)], output.request_id
        if aborting and lot.random() < 0.3:
            name = lot.choice(sorted(aborting))
            core.abort_request([name])
            aborting.discard(name)
            del asked[name]
            aborted += 1
    assert not asked, "a request was lost"
    assert aborted > count // 20
    assert engine.free_blocks == free


BOTH = "(every_shape or right_before) and qwen2.5"


def test_on_the_other_model_runner() -> None:
    """Model Runner V2 with asynchronous scheduling, its kernels in Triton's interpreter."""
    run = interpreted(
        "pytest",
        "-p",
        "tests.engine.triton_on_cpu",
        "-k",
        "(every_shape or right_before) and qwen2.5",
        __file__,
    )
    assert run.returncode == 0 and "2 passed" in run.stdout, run.stdout[-4000:]
