# SPDX-License-Identifier: Apache-2.0
"""What a reduction reads from a checkpoint's configuration, and which ones it refuses."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    PixtralVisionConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
)
from transformers import SiglipVisionConfig as SigLIP

from vllm_ficoco.methods import METHODS
from vllm_ficoco.settings import Reduction, SettingsError
from vllm_ficoco.vision.geometry import Geometry, UnsupportedModel, geometry_of
from vllm_ficoco.vision.layout import Layout, Window


def llava(vision: Any = None, **said: Any) -> LlavaConfig:
    """LLaVA-1.5's configuration, but for what is said."""
    tower = vision or CLIPVisionConfig(image_size=336, patch_size=14, num_hidden_layers=24)
    return LlavaConfig(vision_config=tower, text_config=LlamaConfig(num_hidden_layers=32), **said)


def test_llava_15() -> None:
    geometry = geometry_of(llava())
    assert (geometry.grid, geometry.tokens, geometry.layers) == ((24, 24), 576, 23)
    assert geometry.has_cls and geometry.decoder_layers == 32 and geometry.starts == ()


@pytest.mark.parametrize(("layer", "run"), [(-2, 23), (-1, 24), (22, 22), ([-2, -5], 23), ([3], 3)])
def test_layers_that_run(layer: int | list[int], run: int) -> None:
    """Up to the deepest whose output is taken; 0 is the embeddings', -1 the last layer's."""
    assert geometry_of(llava(vision_feature_layer=layer)).layers == run


def test_siglip_has_no_cls() -> None:
    tower = SigLIP(image_size=378, patch_size=14, num_hidden_layers=27)
    geometry = geometry_of(llava(tower, vision_feature_select_strategy="full"))
    assert geometry.grid == (27, 27) and not geometry.has_cls


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (llava(vision_feature_select_strategy="full"), "'default', not 'full'"),
        (llava(SigLIP(), vision_feature_select_strategy="default"), "'full', not 'default'"),
        (llava(PixtralVisionConfig()), "CLIP and SigLIP towers, not in 'pixtral'"),
        (LlamaConfig(), "qwen3_vl_moe models, not for 'llama'"),
    ],
    ids=["CLIP with [CLS]", "SigLIP without its first patch", "Pixtral", "no images"],
)
def test_unsupported(config: Any, says: str) -> None:
    with pytest.raises(UnsupportedModel, match=says.replace("[", r"\[")):
        geometry_of(config)


LAYERED = ("ficoco-k", "tome", "evit")
"""Methods that must have tokens leave between layers of the tower."""

NEXT = Geometry((24, 24), 23, True, 32, (4, 8, 16), by_image=True)
SQUARE = Layout((24, 24), (2, 2), Window(0, 0, 48, 48))
"""Of 672 x 672 pixels in LLaVA-1.6: 48 newlines."""


@pytest.mark.parametrize(
    ("method", "budget"), [("topk", 20), ("ficoco-v", 1), ("ficoco-vl", 1), ("vitcop", 2)]
)
def test_what_is_named_as_the_smallest_budget_is_it(method: str, budget: int) -> None:
    """Also where a budget is an average over the decoder's layers."""

    def asked(budget: int) -> Reduction:
        options = {"newlines": "all"}
        return Reduction(method=method, budget=budget, options=options)

    with pytest.raises(SettingsError, match="at least") as refused:
        NEXT.kept(asked(budget), layout=SQUARE)
    assert (refused.value.field, refused.value.value) == ("budget", budget)
    named = int(refused.value.allowed.split()[2])
    assert named > budget
    assert NEXT.kept(asked(named), layout=SQUARE) > SQUARE.newlines
    with pytest.raises(SettingsError, match=f"at least {named} for"):
        NEXT.kept(asked(named - 1), layout=SQUARE)


def test_tokens_that_are_too_few_are_named_as_such() -> None:
    tokens = [20, 9, 4, 1]
    reduction = Reduction(method="ficoco-vl", options={"tokens": tokens, "newlines": "all"})
    with pytest.raises(SettingsError, match="the first is at least 49 for") as refused:
        NEXT.kept(reduction, "reduction.budget", SQUARE)
    assert (refused.value.field, refused.value.value) == ("reduction.options.tokens", tokens)


@pytest.mark.parametrize("method", ["ficoco-l", "ficoco-vl"])
def test_windows_of_the_grid_are_refused_where_there_is_no_common_one(method: str) -> None:
    """In the decoder an image in tiles is one sequence: its numbers are no places of a grid."""
    given = {"method": method, "budget": 500, "options": {"penalty": 2.0}}
    reduction = Reduction.parse(given)
    with pytest.raises(SettingsError, match="lie on no common grid") as refused:
        NEXT.kept(reduction, "reduction.budget", SQUARE)
    assert (refused.value.field, refused.value.value) == ("reduction.options.penalty", 2.0)
    without = Reduction.parse({**given, "options": {"penalty": 1.0}})
    assert NEXT.kept(without, layout=SQUARE) > 0
    assert NEXT.kept(reduction, layout=Layout((24, 24))) > 0


def test_newlines_are_refused_where_there_are_none() -> None:
    """In a model of one layout; and they are no option of methods in the decoder alone."""
    fixed = Geometry((24, 24), 23, True, 32, (2,))
    with pytest.raises(SettingsError, match="no newline tokens in this model") as refused:
        fixed.kept(Reduction(budget=64, options={"newlines": "all"}), "reduction.budget")
    assert refused.value.field == "reduction.options.newlines"
    for method in (name for name, m in METHODS.items() if m.place == "nowhere"):
        with pytest.raises(SettingsError, match="left out; known here"):
            Reduction.parse({"method": method, "budget": 64, "options": {"newlines": "all"}})


# --- Towers that take images as they come -------------------------------------------------------

QWENS = [Qwen2VLConfig, Qwen2_5_VLConfig, Qwen3VLConfig]
NATIVE = geometry_of(Qwen2_5_VLConfig())
ON_NATIVE = [name for name, m in METHODS.items() if name != "none" and not NATIVE.lacks(m)]


@pytest.mark.parametrize("config", QWENS)
def test_qwen(config: Any) -> None:
    """Grids of their own; tokens can leave behind the tower alone."""
    geometry = geometry_of(config())
    assert geometry.is_native and geometry.by_image and not geometry.has_cls
    assert geometry.offers == {"scaling", "attention"}
    assert geometry.deepstack == (3 if config is Qwen3VLConfig else 0)


@pytest.mark.parametrize(
    ("config", "method", "says"),
    [
        *((config, m, "layers of the vision tower") for config in QWENS for m in LAYERED),
        (llava, "resize", "to scale an image down to fewer tokens before the tower"),
    ],
)
def test_what_a_model_lacks_is_named(config: Any, method: str, says: str) -> None:
    """Beside the methods that it can have."""
    geometry, spec = geometry_of(config()), METHODS[method]
    assert says in geometry.lacks(spec)
    reduction, layout = Reduction(method=method, budget=5), Layout((6, 7))
    for ask in (geometry.check_method, lambda r, f: geometry.parts(r, f, layout)):
        with pytest.raises(SettingsError, match=f"{method} needs {says}") as refused:
            ask(reduction, "reduction.budget")
        assert (refused.value.field, refused.value.value) == ("reduction.method", method)
        able = refused.value.allowed.removeprefix("one of ").split(":")[0].split(", ")
        assert able == [name for name, m in METHODS.items() if not geometry.lacks(m)]
        assert "topk" in able and method not in able


def test_where_methods_act_in_a_tower_that_lets_nothing_leave_between_its_layers() -> None:
    """FiCoCo-V all at once on the output; what has no such variant is refused."""
    for name in ON_NATIVE:
        assert NATIVE.place_of(METHODS[name]) in ("input", "output", "nowhere")
    for name in ("ficoco-v", "ficoco-vl"):
        assert NATIVE.place_of(METHODS[name]) == "output"
        assert geometry_of(llava()).place_of(METHODS[name]) == "tower"
    of_videos = {name for name, m in METHODS.items() if m.for_videos_alone}
    assert set(METHODS) - set(ON_NATIVE) - of_videos - {"none"} == set(LAYERED)


def test_every_count_of_every_native_grid() -> None:
    """Exactly the budget, in one stage on the output; at N and beyond nothing is done.

    ``resize`` leaves the image that it is given as it is: the processor has scaled it.
    """
    asked = cache(lambda name, budget: Reduction(method=name, budget=budget))
    reducing = [name for name in ON_NATIVE if METHODS[name].decoder is None]
    assert len(reducing) > 8
    for rows in range(1, 13):
        for columns in range(1, 13):
            layout, n = Layout((rows, columns)), rows * columns
            for budget in {*range(1, n + 2), 2 * n}:
                for name in reducing:
                    reduction = asked(name, budget)
                    plans = NATIVE.parts(reduction, layout=layout)
                    case = (name, layout, budget, plans)
                    if name == "resize" or budget >= n:
                        assert plans == [], case
                        assert NATIVE.kept(reduction, layout=layout) == n, case
                        continue
                    (plan,) = plans
                    assert (plan.part, plan.keep) == (0, budget), case
                    assert plan.window == (0, 0, rows, columns), case
                    assert plan.stages == ((NATIVE.layers - 1, budget),), case
                    assert NATIVE.kept(reduction, layout=layout) == budget, case


@pytest.mark.parametrize("original", [43, 300])
def test_an_image_that_was_scaled_down_keeps_its_tokens(original: int) -> None:
    """What a budget is compared with is the image as it was sent."""
    layout = Layout((6, 7), original=original)
    for budget in (42, original - 1):
        reduction = Reduction(method="resize", budget=budget)
        assert NATIVE.kept(reduction, layout=layout) == 42
        assert NATIVE.parts(reduction, layout=layout) == []
        assert NATIVE.held(reduction, layout=layout) == [42]
