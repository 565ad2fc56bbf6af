# SPDX-License-Identifier: Apache-2.0
"""``"auto"`` in the processor: what an image gets, and under which hash. No engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from vllm.config import ModelConfig
from vllm.exceptions import VLLMValidationError
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.cache import MultiModalProcessorOnlyCache

from tests.checkpoints import random_llava_next, random_qwen
from tests.pictures import drawn
from vllm_ficoco import plugin
from vllm_ficoco.models import processing
from vllm_ficoco.models.processing import COUNTS_KEY, RefusedImage, tokens_by_hash
from vllm_ficoco.settings import AutoBudget, Lowered, Reduction
from vllm_ficoco.tiny_llava import CHECKPOINT

AUTO = {"visual_token_budget": "auto"}


class Processor:
    """vLLM's with our mixin, and a cache.

    Args:
        model: folder of the checkpoint.
    """

    def __init__(self, model: Any) -> None:
        plugin.register()
        config = ModelConfig(model=str(model), dtype="float32")
        self.of: Any = MULTIMODAL_REGISTRY.create_processor(config)
        self.cache = MultiModalProcessorOnlyCache(config)
        template = "<|vision_start|><|image_pad|><|vision_end|>"
        self.image = template if self.of.geometry.is_native else "<image>"

    def __call__(
        self,
        *images: Any,
        kwargs: dict[str, Any] = AUTO,
        uuids: Sequence[str | None] | None = None,
        cached: bool = True,
    ) -> Any:
        """What the engine would get."""
        items = self.of.info.parse_mm_data({"image": [*images]}, validate=False)
        return self.of(
            f"{self.image * len(images)} what ?",
            items,
            {"image": uuids} if uuids else None,
            kwargs,
            self.cache if cached else None,
        )


def lengths(made: Any) -> list[int]:
    return [place.length for place in made["mm_placeholders"]["image"]]


def hashes(made: Any) -> list[str]:
    return list(made["mm_hashes"]["image"])


def explicit(budget: int, **more: Any) -> dict[str, Any]:
    return {"reduction": {"budget": budget, **more}}


MODELS: dict[str, Callable[[Any], Any]] = {
    "llava": lambda folder: CHECKPOINT,
    "llava-next": random_llava_next,
    "qwen2.5-vl": lambda folder: random_qwen(folder, "qwen2.5-vl"),
}


@pytest.fixture(scope="module", params=MODELS)
def processor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return Processor(MODELS[request.param](tmp_path_factory.mktemp("model") / "model"))


@pytest.fixture
def llava() -> Processor:
    return Processor(CHECKPOINT)


def test_the_number_and_the_hash_of_every_image_are_its_own(processor: Processor) -> None:
    """Alone, among others in any order, cached or not, and by its number: one hash."""
    pictures = [drawn(busy, seed, (300, 240)) for seed, busy in enumerate((0, 50, 80, 144))]
    made = [processor(picture) for picture in pictures]
    [whole] = lengths(processor(pictures[0], kwargs={}))
    numbers = [length for one in made for length in lengths(one)]
    assert numbers == [whole // 9, 2 * whole // 9, whole // 3, whole]
    own = [name for one in made for name in hashes(one)]
    assert len({*own}) == 4
    for order in ([3, 1, 0, 2], [0, 1, 2, 3]):
        for cached in (True, False):
            among = processor(*(pictures[i] for i in order), cached=cached)
            assert lengths(among) == [numbers[i] for i in order]
            assert hashes(among) == [own[i] for i in order]
            settled = [packed.reduction for packed in among[COUNTS_KEY]]
            assert settled == [Reduction(budget=numbers[i]).for_tokens(whole) for i in order]
    for picture, number, name in zip(pictures, numbers, own, strict=True):
        said = processor(picture, kwargs=explicit(number))
        assert (lengths(said), hashes(said)) == ([number], [name])
    assert hashes(processor(pictures[3], kwargs={})) == own[3:], "all tokens are vLLM's own path"
    mixed = processor(*pictures[:3], kwargs={"visual_token_budget": ["auto", 7, None]})
    assert lengths(mixed) == [numbers[0], 7, whole] and hashes(mixed)[0] == own[0]


def test_an_image_by_its_uuid(processor: Processor) -> None:
    """It is found by what it came to; the hash says the number, so none can be mixed up."""
    with pytest.raises(VLLMValidationError, match="not known"):
        processor(None, uuids=["one"])
    picture, other = drawn(0, 1, (300, 240)), drawn(144, 2, (300, 240))
    made = processor(picture, uuids=["one"])
    for again in (processor(None, uuids=["one"]), processor(picture, uuids=["one"])):
        assert (lengths(again), hashes(again)) == (lengths(made), hashes(made))
        assert again[COUNTS_KEY] == made[COUNTS_KEY]
    if not processor.of.geometry.by_image:
        assert tokens_by_hash(hashes(made)[0], processor.of.geometry) == lengths(made)[0]
    both = processor(None, drawn(50, 3, (300, 240)), uuids=["one", None])
    assert hashes(both)[0] == hashes(made)[0] != hashes(both)[1]
    # A lower rung, or another method, is something else that was asked for.
    for said in (AutoBudget(rungs=("1", "1/2")), AutoBudget(method="uniform")):
        with pytest.raises(VLLMValidationError, match="not known"):
            processor(None, uuids=["one"], kwargs={"reduction": [said]})
    another = processor(other, uuids=["one"])
    assert hashes(another) != hashes(made) and lengths(another) > lengths(made)
    assert lengths(processor(None, uuids=["one"])) == lengths(another)


def test_what_is_remembered_has_an_end(
    processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The images that were named longest ago are forgotten."""
    monkeypatch.setattr(processing, "_REMEMBERED", 2)
    monkeypatch.setattr(processor.of, "_came_to", {})
    for name in "abac":
        processor(drawn(0, 5), uuids=[name])
    assert lengths(processor(None, None, uuids=["a", "c"]))
    with pytest.raises(VLLMValidationError, match="not known"):
        processor(None, uuids=["b"])


def test_arrays_and_tensors(llava: Processor) -> None:
    """As vLLM takes them in process, at the same number as the file."""
    for busy, number in ((0, 16), (50, 32), (144, 144)):
        picture = drawn(busy, 6)
        pixels = np.asarray(picture)
        first = np.ascontiguousarray(pixels.transpose(2, 0, 1))
        for form in (picture, pixels, first, torch.from_numpy(first)):
            assert lengths(llava(form)) == [number]
    with pytest.raises(VLLMValidationError, match=r"Image 1 .* must come last or first"):
        llava(picture, np.zeros((5, 40, 40), np.uint8))


def test_a_rung_that_a_method_cannot_reach(llava: Processor) -> None:
    """The next larger one that it can; what is wrong besides is refused, whatever the image."""
    llava.of.geometry = llava.of.geometry._replace(layers=2)  # two halvings: 36 at least
    tome = {"reduction": {"method": "tome", "budget": "auto"}}
    pictures = [drawn(busy, 7) for busy in (0, 50, 80, 144)]
    assert lengths(llava(*pictures[:3], kwargs=tome)) == [48, 48, 48]
    with pytest.raises(RefusedImage, match="at least 36"):
        llava(pictures[0], kwargs={"reduction": {"method": "tome", "budget": 16}})
    none = AutoBudget(method="tome", rungs=("1/9", "1/18"))
    with pytest.raises(RefusedImage, match=r"reduction\[0\]\.budget = 16 .* at least 36"):
        llava(pictures[0], kwargs={"reduction": [none]})
    for picture in pictures:
        for options, field in (({"newlines": "all"}, "options.newlines"),):
            wrong = {"reduction": {"budget": "auto", "options": options}}
            with pytest.raises(RefusedImage, match=rf"reduction\.{field}"):
                llava(picture, kwargs=wrong)
        with pytest.raises(RefusedImage, match="--reduction-stages"):
            llava(picture, kwargs={"reduction": {"method": "fastv", "budget": "auto"}})


def test_one_rung_lower(processor: Processor) -> None:
    """Of what an image asks for, and of a budget or none, which its pixels have no say in."""
    pictures = [drawn(busy, 8, (300, 240)) for busy in (0, 50, 80, 144)]
    [whole] = lengths(processor(pictures[0], kwargs={}))
    ninth, two, third = whole // 9, 2 * whole // 9, whole // 3
    lower = [AutoBudget(lower=1)] * 4
    assert lengths(processor(*pictures, kwargs={"reduction": lower})) == [ninth, ninth, two, third]
    for above, number in ((None, third), (third, two), (ninth, ninth), (third + 1, third), (2, 2)):
        kwargs = {"reduction": [Lowered(above=above)] * 4}
        made = processor(*pictures, kwargs=kwargs)
        assert lengths(made) == [number] * 4
        assert hashes(made) == hashes(processor(*pictures, kwargs=explicit(number)))


def test_bad_words(llava: Processor) -> None:
    for kwargs, field in (
        ({"visual_token_budget": "automatic"}, "visual_token_budget"),
        ({"visual_token_budget": ["auto", "full"]}, r"visual_token_budget\[1\]"),
        ({"reduction": {"budget": "Auto"}}, r"reduction\.budget"),
    ):
        with pytest.raises(VLLMValidationError, match=f"^{field} = .*or 'auto'"):
            llava(drawn(0), drawn(1), kwargs=kwargs)
