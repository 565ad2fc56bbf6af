# SPDX-License-Identifier: Apache-2.0
"""Videos of LLaVA-OneVision and LLaVA-NeXT-Video say what the reference says, reduced or not.

Frames come out of files through vLLM's decoder. Sixteen greedy tokens and the first logits, through
the engine; prompts are as long as their videos keep tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vllm.multimodal.media import ImageMediaIO, VideoMediaIO

from tests.checkpoints import VIDEO_TOKEN, random_llava_next_video, random_llava_onevision
from tests.engine.conftest import Ask, Engine, check_answers, make_engine, picture
from tests.engine.test_decoder_stages import STAGED, STAGES, VISION, expected, wish
from tests.engine.test_tiles import FIRST_LOGITS, IMAGE, ROOMY, to
from tests.reference.decoder import CHOOSE
from tests.reference.llava import one_thread
from tests.reference.llava_videos import ReferenceVideos
from tests.videos import filmed, gif, mp4
from tests.waiting import NoWaiting
from vllm_ficoco.methods import METHODS
from vllm_ficoco.models.processing import COUNTS_KEYS
from vllm_ficoco.packed import PACKED_FIELDS, pack
from vllm_ficoco.settings import Reduction

pytestmark = pytest.mark.engine

TIGHT = {
    **ROOMY,
    "max_num_batched_tokens": 48,
    "max_model_len": 640,
    "num_gpu_blocks_override": 22,
    "limit_mm_per_prompt": {"image": 3, "video": 3},
}
"""Steps smaller than most videos, and a pool for a few requests."""


@lru_cache
def clip(frames: int) -> np.ndarray:
    """(frames, height, width, 3): what vLLM makes of a file with a film in which things happen."""
    film = filmed(frames, size=(112, 84), seed=frames, event=frames // 2)
    if frames == 1:  # a file of one has none, for vLLM
        return film
    file = gif(film) if frames % 2 else mp4(film)
    loader = VideoMediaIO(ImageMediaIO(), num_frames=-1)
    seen, _ = loader.load_bytes(file).media
    assert seen.shape == film.shape
    return np.asarray(seen)


@dataclass(frozen=True)
class Show(Ask):
    """A request with videos, by their number of frames, and images, by their size."""

    items: Sequence[int | tuple[int, int]] = ()

    @property
    def pictures(self) -> list[Any]:
        return [clip(item) if isinstance(item, int) else picture(1, item) for item in self.items]

    @property
    def prompt(self) -> str:
        marks = ("<video> " if isinstance(item, int) else "<image> " for item in self.items)
        return f"USER: {''.join(marks)}{self.question} ASSISTANT:"

    @property
    def modalities(self) -> list[str]:
        return ["video" if isinstance(item, int) else "image" for item in self.items]

    @property
    def for_vllm(self) -> dict[str, Any]:
        data: dict[str, list[Any]] = {}
        said: dict[str, list[Any]] = {}
        for modality, item, settings in zip(
            self.modalities, self.pictures, self.settings, strict=True
        ):
            data.setdefault(modality, []).append(item)
            said.setdefault(modality, []).append(settings)
        request: dict[str, Any] = {"prompt": self.prompt}
        if data:
            request["multi_modal_data"] = data
        if any(self.settings):
            listed = said if len(said) > 1 else next(iter(said.values()))
            request["mm_processor_kwargs"] = {"reduction": listed}
        return request


def show(
    *items: tuple[int | tuple[int, int], dict[str, Any] | None], question: str = "what is there ?"
) -> Show:
    """Videos and images, and the settings of each."""
    seen, settings = zip(*items, strict=True) if items else ((), ())
    return Show((), settings, question, FIRST_LOGITS, (), seen)


def of_every_method(closed: bool) -> list[Ask]:
    """Every method before the decoder, at budgets that frames share evenly and not; those that can
    with either way to share."""
    geometry_methods = [
        name
        for name, method in METHODS.items()
        if name != "none" and method.place in ("output", "tower") and not method.decoder
        if method.place == "output" or method.at_output
    ]
    asks = []
    for i, method in enumerate(geometry_methods):
        frames = 3 + i % 3
        asks.append(show((frames, to(7 * frames + 2 + closed, method))))
        if "frames" in METHODS[method].options.model_fields:
            asks.append(show((frames, to(5 * frames + closed, method, frames="unique"))))
        else:
            asks.append(show((8, to(8 * 11 + 3 + closed, method))))
    return asks


def of_every_length(closed: bool) -> list[Ask]:
    """Unreduced, and at the edges of what can be asked for."""
    each = 16
    return [
        show(question="how many are there ?"),
        *(show((frames, None)) for frames in (1, 2, 5, 8)),
        show((1, to(5 + closed, "topk"))),
        show((5, to(1 + closed, "topk"))),  # one frame keeps one
        show((5, to(3 + closed, "topk"))),
        show((8, to(9 + closed, "visionzip"))),
        show((5, to(5 * each + closed - 1, "ficoco-v"))),
        show((5, to(5 * each + closed, "topk"))),
        show((5, {"method": "none"})),
        show((8, to(20 + closed, "topk", frames="unique"))),
        show((4, to(4 * each + closed - 3, "uniform", frames="unique"))),
    ]


@one_thread()
def counts(reference: ReferenceVideos, item: Any) -> int:
    """Visual tokens of a video or an image."""
    return len(reference.visual_tokens(clip(item) if isinstance(item, int) else picture(1, item)))


def check(
    engine: Engine,
    reference: ReferenceVideos,
    asks: Sequence[Any],
    stages: Sequence[int] = (),
    times: int = 1,
) -> list[Any]:
    """All in one batch, perhaps again: what comes out, the last time."""
    with one_thread():
        truths = [expected(reference, ask, engine.block, stages) for ask in asks]
    whole = {item: counts(reference, item) for ask in asks for item in ask.items}
    made = check_answers(
        engine, asks, truths, lambda i, rendered: check_counts(whole, asks[i], rendered), times
    )
    return [output for _, output in made]


def check_counts(whole: dict[Any, int], ask: Show, rendered: dict[str, Any]) -> None:
    """What the processor says of the items, and that the prompt has room for just that."""
    prompt, token = rendered["prompt_token_ids"], {"image": IMAGE, "video": VIDEO_TOKEN}
    for modality in {*ask.modalities}:
        places, said = rendered["mm_placeholders"][modality], rendered[COUNTS_KEYS[modality]]
        of_it = [i for i, other in enumerate(ask.modalities) if other == modality]
        for i, place, packed in zip(of_it, places, said, strict=True):
            tokens, given = whole[ask.items[i]], ask.settings[i] or {"method": "none"}
            budget = given.get("budget", tokens)
            if given["method"] in VISION:
                budget = given["options"]["tokens"][0]
            assert packed.layout.tokens == tokens, ask
            assert place.length == min(budget, tokens), ask
            span = prompt[place.offset : place.offset + place.length]
            assert span == [token[modality]] * place.length
        assert prompt.count(token[modality]) == sum(place.length for place in places)


def in_the_decoder(closed: bool) -> list[Ask]:
    """Every method in the decoder, on videos of several lengths."""
    asks = [show(), show((5, None))]
    for i, method in enumerate(m for m in CHOOSE if m not in VISION):
        asks.append(show((4 + i % 3, wish(method, 50, 25, 5))))
    return [
        *asks,
        show((5, wish("ficoco-vl", 70, 40, 20, 10))),
        show((4, wish("vitcop", 60, 30, 12))),
        show((6, wish("vitcop", 80 + closed, 50, 20, frames="unique"))),
        show((5, wish("tops", 60, 30, 12))),
        show((6, wish("mustdrop", 70, 50, 20, 9))),
        show((8, wish("k-norm", 120, 60, 10))),
        show((5, to(20, "topk"))),
    ]


def check_numbers(engine: Engine, reference: ReferenceVideos) -> None:
    """Methods in the decoder are told where the tokens stand that are left of a video."""
    reduction = Reduction.parse(wish("vitcop", 30, 20, 9))
    reference.visual_tokens(clip(5), VISION["vitcop"], 30)
    layout = engine.llm.renderer.get_mm_processor().video_layout(5)
    with torch.inference_mode():
        (made,) = engine.model.embed_multimodal(
            pixel_values_videos=reference.pixels[None],
            **{PACKED_FIELDS["video"]: [pack(reduction, layout)]},
        )
    assert made.leaving.places.tolist() == reference.place
    spots = made.leaving.raster.spots(made.leaving.places)
    torch.testing.assert_close(spots, torch.tensor(reference.spots))


# --- LLaVA-OneVision ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def onevision_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of frames of 7 x 7 patches and 4 x 4 tokens."""
    return random_llava_onevision(tmp_path_factory.mktemp("onevision"), side=7)


def among_images() -> list[Ask]:
    """Videos and images in one prompt, each with settings of its own."""
    small, wide = (60, 60), (200, 90)
    return [
        show((small, to(20, "ficoco-v")), (4, to(21, "topk"))),
        show((5, to(31, "visionzip")), (wide, to(30, "tome")), (3, None)),
        show((wide, None), (3, to(10, "vidcom2"))),
        show((2, to(9, "pooling")), (5, to(9, "pooling")), (small, None)),
        show((2, to(5, "random", seed=7)), (2, None), (2, to(5, "random"))),
    ]


@pytest.fixture(scope="module")
def reference(onevision_checkpoint: Path) -> ReferenceVideos:
    return ReferenceVideos(str(onevision_checkpoint))


@pytest.fixture(scope="module")
def engine(onevision_checkpoint: Path) -> Iterator[Engine]:
    yield from make_engine(onevision_checkpoint, **TIGHT)


def test_onevision(engine: Engine, reference: ReferenceVideos) -> None:
    """Steps cut videos and images, requests are forced out and back in; then videos come from the
    processor's cache."""
    preempted = engine.watch_preemptions()
    asks = [*of_every_length(True), *of_every_method(True), *among_images()]
    check(engine, reference, asks, times=2)
    assert sum(preempted) > 0, "the pool was not small enough to test anything"


def test_onevision_unreduced_is_bit_identical_to_vllm(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same engine with vLLM's own methods gives the same bits."""
    from vllm.model_executor.models.llava_onevision import (
        LlavaOnevisionForConditionalGeneration as Stock,
    )

    asks = [show((5, None)), show((5, None), question="how many are there ?"), show()]

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
        patch.setattr(type(engine.model), "embed_multimodal", without_ours(Stock))
        for name in ("embed_input_ids", "forward", "_process_video_pixels"):
            patch.setattr(type(engine.model), name, getattr(Stock, name))
        patch.setattr(
            type(engine.model), "_video_pixels_to_features", Stock._video_pixels_to_features
        )
        assert run() == ours


def without_ours(stock: Any) -> Any:
    """vLLM's method, which is not shown our field."""

    def embed(self: Any, **kwargs: Any) -> Any:
        for name in PACKED_FIELDS.values():
            kwargs.pop(name, None)
        return stock.embed_multimodal(self, **kwargs)

    return embed


@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_onevision_a_video_does_not_depend_on_the_batch_it_is_in(
    engine: Engine, reference: ReferenceVideos, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """Alone and beside others, with as many frames at once as there may be; and the host does not
    wait for what a video is reduced to."""
    processor = engine.llm.renderer.get_mm_processor()
    lengths, methods = [4, 5, 3, 5, 2], ["topk", None, None, "vidcom2", "visionzip"]
    pixels, packed = [], []
    for frames, method in zip(lengths, methods, strict=True):
        made = reference.processor.video_processor([clip(frames)], return_tensors="pt")
        pixels.append(made["pixel_values_videos"][0])
        reduction = method and Reduction(method=method, budget=14)
        packed.append(pack(reduction, processor.video_layout(frames)))
    monkeypatch.setattr(engine.model, "images_at_once", at_once)

    def embed(*index: int) -> Any:
        fields = {PACKED_FIELDS["video"]: [packed[i] for i in index]}
        shown = [pixels[i] for i in index]
        with NoWaiting(shown):
            return engine.model.embed_multimodal(pixel_values_videos=shown, **fields)

    with torch.inference_mode():
        together = embed(*range(len(lengths)))
        assert [len(tokens) for tokens in together] == [14, 81, 49, 14, 14]
        for i, tokens in enumerate(together):
            (alone,) = embed(i)
            torch.testing.assert_close(tokens, alone, rtol=1e-4, atol=1e-4)
        # Unreduced videos of different lengths alone stop vLLM's own runner.
        assert [tokens.shape[:-1] for tokens in embed(1, 2)] == [(81,), (49,)]


def test_onevision_in_the_decoder(tmp_path: Path) -> None:
    """The second time prompts come from the prefix cache."""
    checkpoint = random_llava_onevision(tmp_path, decoder_layers=6, side=7)
    reference = ReferenceVideos(str(checkpoint))
    options = {**STAGED, **ROOMY, "limit_mm_per_prompt": {"image": 3, "video": 3}}
    asks = [
        *in_the_decoder(True),
        show(((60, 60), wish("k-norm", 30, 20, 9)), (4, wish("fastv", 30))),
        show((4, wish("k-norm", 40, 20, 9)), ((60, 60), to(20, "topk"))),
    ]
    with contextmanager(make_engine)(checkpoint, **options) as engine:
        if engine.interpreted:  # Model Runner V2, in Triton's interpreter: see test_tiles.py
            check(engine, reference, asks[::6], STAGES)
            return
        check_numbers(engine, reference)
        outputs = check(engine, reference, asks, STAGES, times=2)
        assert sum(output.num_cached_tokens > 0 for output in outputs) > 2


# --- LLaVA-NeXT-Video ---------------------------------------------------------------------------


def test_next_video(tmp_path: Path) -> None:
    """Tokens that are squares of patches, with [CLS]; before the decoder and inside of it."""
    checkpoint = random_llava_next_video(tmp_path, decoder_layers=6)
    reference = ReferenceVideos(str(checkpoint))
    options = {**STAGED, **ROOMY, "limit_mm_per_prompt": {"video": 1}}
    asks = [*of_every_length(False), *of_every_method(False), *in_the_decoder(False)]
    with contextmanager(make_engine)(checkpoint, **options) as engine:
        check_numbers(engine, reference)
        check(engine, reference, asks, STAGES, times=2)
