# SPDX-License-Identifier: Apache-2.0
"""Settings have one canonical form, and whatever is wrong is a SettingsError that says what."""

from __future__ import annotations

import copy
import json
import pickle
from fractions import Fraction
from types import MappingProxyType
from typing import Any

import pytest
import torch

from vllm_ficoco.methods import METHODS
from vllm_ficoco.packed import Packed, pack, unpack
from vllm_ficoco.settings import (
    AUTO_BUDGETS,
    DEFAULT_METHOD,
    MAX_BUDGET,
    AutoBudget,
    Lowered,
    Reduction,
    SettingsError,
    per_item,
)

NAN, INF = float("nan"), float("inf")
FICOCO = {
    "attention": "logits",
    "coefficient": 2.0,
    "epsilon": 0.998,
    "lambda": 0.35,
    "normalise": True,
    "window": 2,
    "quantile": "row",
    "receivers": None,
    "weighted": True,
}
SCORE = {"alpha": None}


def ficoco(options: object) -> dict[str, object]:
    """A method with options of every kind."""
    return {"method": "ficoco-v", "budget": 64, "options": options}


# --- One form -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"budget": 64}, {"budget": 64, "method": "score", "options": {}}),
        ({"budget": 64}, {"budget": 64, "method": None, "options": None}),
        ({"budget": 64}, {"options": SCORE, "method": "score", "budget": 64}),
        (ficoco({}), {"options": FICOCO, "method": "ficoco-v", "budget": 64}),
        (
            ficoco({"coefficient": 3}),
            {"options": {"coefficient": 3.0}, "budget": 64, "method": "ficoco-v"},
        ),
        (ficoco({"lambda": 0}), ficoco({"lambda": 0.0})),
        (ficoco({"lambda": 0.5, "window": 3}), ficoco({"window": 3, "lambda": 0.5})),
        (
            {"method": "visionzip", "budget": 9},
            {"method": "visionzip", "budget": 9, "options": {"contextual": 0.15625}},
        ),
        ({"method": "none"}, {"method": "none", "budget": 7}),
        ({"budget": 64}, MappingProxyType({"budget": 64})),
        (ficoco({"lambda": 0.0}), ficoco({"lambda": -0.0})),
    ],
)
def test_two_spellings_of_one_meaning(one: dict, other: dict) -> None:
    """Equal, with the same hash and the same key."""
    a, b = Reduction.parse(one), Reduction.parse(other)
    assert a == b
    assert a.key == b.key
    assert hash(a) == hash(b)
    assert len({a, b}) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"method": "ficoco-v", "budget": 65},
        {"budget": 64, "method": "tome"},
        {"budget": 64},
        ficoco({"lambda": 0.36}),
        ficoco({"normalise": False}),
        {"method": "none"},
    ],
)
def test_other_meanings_have_other_keys(other: dict) -> None:
    """A cache must never take one for the other."""
    a, b = Reduction.parse(ficoco({})), Reduction.parse(other)
    assert a != b
    assert a.key != b.key


def test_the_canonical_form() -> None:
    """Defaults are filled in under the names that clients write; the key is compact JSON."""
    reduction = Reduction.parse({"budget": 64})
    assert reduction.method == DEFAULT_METHOD == "score"
    named = Reduction.parse(ficoco({}))
    for one, method, options in (reduction, "score", SCORE), (named, "ficoco-v", FICOCO):
        assert one.options == options
        assert list(one.options) == sorted(options)
        assert json.loads(one.key) == {"method": method, "budget": 64, "options": options}
        assert " " not in one.key
    assert Reduction.of_budget(64) == reduction
    assert Reduction.parse(reduction) is reduction
    assert Reduction.parse(json.loads(reduction.key)) == reduction


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_parses_with_its_defaults(method: str) -> None:
    """The options come back as the method's own model, unchanged."""
    reduction = Reduction.parse({"method": method, "budget": 3})
    assert reduction.spec is METHODS[method]
    assert reduction.parsed_options() == METHODS[method].options()


def test_options_reach_the_method() -> None:
    """Under the names of Python."""
    options = {"lambda": 1, "attention": "probabilities", "window": 5}
    parsed = Reduction.parse(ficoco(options)).parsed_options()
    assert (parsed.lambda_, parsed.attention, parsed.window) == (1.0, "probabilities", 5)
    assert isinstance(parsed.lambda_, float)


def test_the_input_is_left_alone() -> None:
    """What the client sent is not changed, and does not change the settings later."""
    sent: dict[str, Any] = ficoco({"window": 3})
    before = copy.deepcopy(sent)
    reduction = Reduction.parse(sent)
    assert sent == before
    sent["options"]["window"] = 4
    assert reduction.options["window"] == 3


def test_none_has_one_form() -> None:
    """Whatever its budget; it reduces nothing."""
    forms = {Reduction.parse({"method": "none", "budget": b}) for b in (None, 1, 64, MAX_BUDGET)}
    assert len(forms) == 1
    assert forms.pop().for_tokens(576) is None


def test_for_tokens() -> None:
    """An image of no more tokens than the budget is not reduced."""
    reduction = Reduction.of_budget(64)
    assert reduction.for_tokens(65) is reduction
    assert reduction.for_tokens(64) is None
    assert reduction.for_tokens(1) is None


@pytest.mark.parametrize(
    "sent",
    [
        {"budget": 1},
        {"budget": MAX_BUDGET, "method": "tome"},
        {"method": "none"},
        ficoco({"lambda": 1 / 3, "epsilon": 1e-300}),
        {"budget": 64, "method": "random", "options": {"seed": 2**31 - 1}},
    ],
)
def test_pack_and_unpack(sent: dict) -> None:
    """Settings survive as a uint8 tensor, to the last bit."""
    reduction = Reduction.parse(sent)
    packed = pack(reduction)
    assert packed.dtype == torch.uint8
    assert packed.dim() == 1
    assert unpack(packed) == Packed(reduction)
    assert unpack(packed).reduction.key == reduction.key
    assert unpack(packed.clone()) == Packed(reduction)


def test_no_reduction_packs_to_nothing() -> None:
    """None is an empty tensor."""
    assert pack(None).numel() == 0
    assert pack(None).dtype == torch.uint8
    assert unpack(pack(None)) == Packed()


# --- What is wrong ------------------------------------------------------------------------------

BAD_BUDGETS = [
    64.0,
    0.5,
    NAN,
    INF,
    True,
    False,
    -1,
    0,
    "64",
    "",
    MAX_BUDGET + 1,
    10**30,
    [64],
    {},
    b"6",
]


@pytest.mark.parametrize("budget", BAD_BUDGETS, ids=repr)
def test_bad_budgets(budget: object) -> None:
    """Only whole numbers in range; the message names the field, the value and the range."""
    for read, name in (
        (lambda: Reduction.of_budget(budget), "visual_token_budget"),
        (lambda: Reduction.parse({"budget": budget}), "reduction.budget"),
        (lambda: Reduction.parse({"budget": budget}, "reduction[2]"), "reduction[2].budget"),
        (lambda: Reduction.parse({"method": "none", "budget": budget}), "reduction.budget"),
    ):
        with pytest.raises(SettingsError) as wrong:
            read()
        assert wrong.value.field == name
        assert wrong.value.allowed == f"a whole number from 1 to {MAX_BUDGET}, or 'auto'"
        assert str(wrong.value) == (
            f"{name} = {budget!r} is not valid: it must be a whole number from 1 to {MAX_BUDGET}, "
            "or 'auto'."
        )


def test_no_budget() -> None:
    """A method alone is not enough; nor is nothing."""
    for sent in ({}, {"method": "tome"}, {"budget": None}):
        with pytest.raises(
            SettingsError, match=r"^reduction\.budget = None .* 1 to 1000000"
        ) as wrong:
            Reduction.parse(sent)
        assert wrong.value.field == "reduction.budget"
    with pytest.raises(SettingsError, match=r"^visual_token_budget = None "):
        Reduction.of_budget(None)


@pytest.mark.parametrize(
    ("sent", "field", "allowed"),
    [
        (None, "reduction", "an object"),
        ([], "reduction", "an object"),
        ([{"budget": 64}], "reduction", "an object"),
        ("ficoco-v", "reduction", "an object"),
        (64, "reduction", "an object"),
        (True, "reduction", "an object"),
        (NAN, "reduction", "an object"),
        ({"method": "fast-v", "budget": 64}, "reduction.method", "ficoco-v"),
        ({"method": "FiCoCo-V", "budget": 64}, "reduction.method", "ficoco-v"),
        ({"method": "", "budget": 64}, "reduction.method", "visionzip"),
        ({"method": 3, "budget": 64}, "reduction.method", "string"),
        ({"method": ["tome"], "budget": 64}, "reduction.method", "string"),
        ({"method": {"tome": 1}, "budget": 64}, "reduction.method", "string"),
        ({"method": True, "budget": 64}, "reduction.method", "string"),
        ({"budget": 64, "ratio": 0.5}, "reduction.ratio", "method, budget, options"),
        ({"budget": 64, "lambda": 0.5}, "reduction.lambda", "method, budget, options"),
        ({"budget": 64, "Budget": 64}, "reduction.Budget", "method, budget, options"),
        ({"budget": 64, "options": []}, "reduction.options", "dictionary"),
        ({"budget": 64, "options": "lambda"}, "reduction.options", "dictionary"),
        ({"budget": 64, "options": 0}, "reduction.options", "dictionary"),
        ({"budget": 64, "options": [["lambda", 0.5]]}, "reduction.options", "dictionary"),
        (ficoco({"lamda": 0.5}), "reduction.options.lamda", "lambda"),
        (ficoco({"lambda_": 0.5}), "reduction.options.lambda_", "lambda,"),
        (ficoco({"seed": 1}), "reduction.options.seed", "known here"),
        (ficoco({"lambda": 1.01}), "reduction.options.lambda", "equal to 1"),
        (ficoco({"lambda": -1e-9}), "reduction.options.lambda", "equal to 0"),
        (ficoco({"lambda": NAN}), "reduction.options.lambda", "finite"),
        (ficoco({"lambda": "0.5"}), "reduction.options.lambda", "number"),
        (ficoco({"lambda": True}), "reduction.options.lambda", "number"),
        (ficoco({"lambda": None}), "reduction.options.lambda", "number"),
        (ficoco({"lambda": [0.5]}), "reduction.options.lambda", "number"),
        (ficoco({"coefficient": INF}), "reduction.options.coefficient", "finite"),
        (ficoco({"coefficient": 0.9}), "reduction.options.coefficient", "to 1"),
        (ficoco({"coefficient": 10**400}), "reduction.options.coefficient", ""),
        (ficoco({"window": 2.0}), "reduction.options.window", "integer"),
        (ficoco({"window": 0}), "reduction.options.window", "equal to 1"),
        (ficoco({"window": 65}), "reduction.options.window", "equal to 64"),
        (ficoco({"epsilon": -INF}), "reduction.options.epsilon", "finite"),
        (ficoco({"normalise": 1}), "reduction.options.normalise", "boolean"),
        (ficoco({"attention": "keys"}), "reduction.options.attention", "logits"),
        (ficoco({"attention": ["logits"]}), "reduction.options.attention", "logits"),
        (ficoco({"lambda": {"a": [{"b": {}}]}}), "reduction.options.lambda", "number"),
        (
            {"method": "tome", "budget": 64, "options": {"r": 8}},
            "reduction.options.r",
            "known here: newlines",
        ),
        (
            {"method": "visionzip", "budget": 64, "options": {"contextual": 1}},
            "reduction.options.contextual",
            "less than 1",
        ),
        (
            {"method": "prumerge", "budget": 64, "options": {"neighbours": 0}},
            "reduction.options.neighbours",
            "equal to 1",
        ),
        (
            {"method": "random", "budget": 64, "options": {"seed": -1}},
            "reduction.options.seed",
            "equal to 0",
        ),
        (
            {"method": "random", "budget": 64, "options": {"seed": 2**31}},
            "reduction.options.seed",
            "less than 2147483648",
        ),
        (
            ficoco({"quantile": "matrix", "receivers": 0}),
            "reduction.options.receivers",
            "left out where quantile is 'matrix'",
        ),
        (
            {
                "method": "ficoco-vl",
                "budget": 64,
                "options": {"quantile": "matrix", "receivers": 1},
            },
            "reduction.options.quantile",
            "'row' where receivers is given",
        ),
        (ficoco({"quantile": "column"}), "reduction.options.quantile", "'row'"),
        ({"method": "none", "options": {"a": 1}}, "reduction.options.a", "no options"),
    ],
    ids=repr,
)
def test_bad_reductions(sent: object, field: str, allowed: str) -> None:
    """SettingsError and nothing else; it names the field, what was given and what is allowed."""
    with pytest.raises(SettingsError) as wrong:
        Reduction.parse(sent)
    error = wrong.value
    assert error.field == field
    assert allowed in error.allowed
    value: Any = sent
    for part in field.split(".")[1:]:
        value = value[part]
    assert error.value is value or error.value == value
    shown = repr(value)
    message = str(error)
    assert message.startswith(f"{field} = {shown[:97]}")
    assert message.endswith(f"is not valid: it must be {error.allowed}.")


@pytest.mark.parametrize(
    "sent",
    [
        {1: 2, "budget": 64},
        {None: 2, "budget": 64},
        {"budget": 64, "options": {1: 2}},
        {"budget": 64, "options": {("lambda",): 2}},
        {"budget": 64, "\ud800": 1},
        {"budget": 64, "options": {"\ud800": 1}},
        ficoco({"attention": "\ud800"}),
        {"budget": 64, "method": "\ud800"},
        {"budget": 64, "method": "tome\x00"},
        {"budget": torch.tensor(64)},
        {"budget": object()},
        {"budget": 10**5000},
        ficoco({"coefficient": 10**5000}),
    ],
    ids=lambda sent: str(list(sent))[:40].encode("ascii", "replace").decode(),
)
def test_junk_is_a_settings_error(sent: dict) -> None:
    """Nothing that a client sends gets past as another exception."""
    with pytest.raises(SettingsError):
        Reduction.parse(sent)


@pytest.mark.parametrize(
    "depth",
    [
        100,
        5000,
    ],
)
def test_deep_junk_is_a_settings_error(depth: int) -> None:
    """However deep it is nested."""
    junk: object = 1
    for _ in range(depth):
        junk = {"a": junk}
    with pytest.raises(SettingsError):
        Reduction.parse(ficoco({"lambda": junk}))


def test_long_values_are_cut() -> None:
    """A message shows no more than 100 characters of the value."""
    with pytest.raises(SettingsError) as wrong:
        Reduction.parse({"budget": 64, "method": "x" * 10_000})
    assert len(str(wrong.value)) - len(wrong.value.allowed) < 200
    assert "x" * 90 in str(wrong.value)
    assert "..." in str(wrong.value)


def test_long_names_are_cut() -> None:
    """A path may have a client's own key in it, of any length."""
    for sent in ({"x" * 10_000: 1}, {"budget": 64, "options": {"x" * 10_000: 1}}):
        with pytest.raises(SettingsError) as wrong:
            Reduction.parse(sent)
        assert len(wrong.value.field) <= 200 and len(str(wrong.value)) < 700
        assert wrong.value.field.startswith("reduction.") and "x" * 90 in wrong.value.field


class Watched(list):
    """A list that counts how often somebody asks for its next element."""

    seen = 0

    def __iter__(self) -> Any:
        for element in super().__iter__():
            self.seen += 1
            yield element


def test_no_more_of_a_value_is_looked_at_than_is_shown() -> None:
    """A body may hold a million of them."""
    many = Watched([1.5] * 100_000)
    for read in (
        lambda: Reduction.of_budget(many),
        lambda: Reduction.of_budget([{"a": [many]}]),
        lambda: Reduction.parse({"budget": many}),
        lambda: Reduction.parse({"method": "k-norm", "options": {"tokens": many}}),
        lambda: Reduction.parse({"method": "tome", "budget": 9, "options": {"r": [[many]]}}),
        lambda: Reduction.parse({"method": [many], "budget": 64}),
        lambda: per_image({"visual_token_budget": many}, 2),
        lambda: SettingsError("detail", many, "'low'"),
    ):
        many.seen = 0
        with pytest.raises(SettingsError) as wrong:
            raise read()
        assert many.seen <= 100
        assert len(str(wrong.value)) < 400


def test_no_more_mistakes_are_collected_than_settings_may_have() -> None:
    """Of options that are all wrong, and of a list of tokens."""
    for sent in (
        {"method": "tome", "budget": 9, "options": {str(i): 1 for i in range(100_000)}},
        {str(i): 1 for i in range(100_000)},
        {"method": "k-norm", "options": {"tokens": ["a"] * 100_000}},
        ficoco({"lambda": [[[0] * 500], [[0] * 500]]}),
    ):
        with pytest.raises(SettingsError, match="no more than 1000 entries") as wrong:
            Reduction.parse(sent, "messages[0].reduction")
        assert wrong.value.field == "messages[0].reduction"
    assert Reduction.parse({"method": "k-norm", "options": {"tokens": [9] * 900}}).budget is None


@pytest.mark.parametrize(
    "value",
    [
        *([], {}, [1, [2.5, None]], {"a": {"b": [True, "c"]}, "d": -1}, "it's", '"', b"6", ""),
        *("x" * 98, "x" * 99, [1] * 33, [1] * 34, {"k" * 50: "v" * 60}, [["a" * 200] * 2], 10**90),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_value_is_shown_as_python_writes_it(value: object) -> None:
    """As far as there is room."""
    whole = repr(value)
    shown = whole if len(whole) <= 100 else whole[:97] + "..."
    assert str(SettingsError("a", value, "b")) == f"a = {shown} is not valid: it must be b."


def test_half_a_surrogate_pair_can_be_sent_back() -> None:
    """JSON may spell one, UTF-8 cannot."""
    wrong = SettingsError("messages[0].content[0].\ud800.reduction", "\ud800", "left out")
    assert "\\ud800" in wrong.field
    str(wrong).encode()


def test_a_settings_error_is_a_value_error() -> None:
    """So that callers who know nothing of it answer with "bad request"."""
    assert issubclass(SettingsError, ValueError)


def test_a_settings_error_crosses_processes() -> None:
    """It can be pickled, as an exception of a worker is."""
    error = SettingsError("reduction.budget", 0, "more")
    back = pickle.loads(pickle.dumps(error))
    assert str(back) == str(error)
    assert (back.field, back.value, back.allowed) == (error.field, error.value, error.allowed)


def test_settings_cannot_be_changed() -> None:
    """They are keys of caches."""
    reduction = Reduction.of_budget(64)
    with pytest.raises(ValueError, match="frozen"):
        reduction.budget = 65


# --- Per image and video ------------------------------------------------------------------------


def per_image(kwargs: dict, images: int) -> list[Reduction | None]:
    """Of a prompt with images alone."""
    found = per_item(kwargs, {"image": images, "video": 0})
    assert found == {**per_item(kwargs, {"image": images}), "video": []}
    return found["image"]


def test_one_setting_for_all_images() -> None:
    """A number or an object holds for every image; nothing means no reduction."""
    assert per_image({}, 2) == [None, None]
    assert per_image({"visual_token_budget": None, "reduction": None}, 2) == [None, None]
    assert per_image({"visual_token_budget": 64}, 2) == [Reduction.of_budget(64)] * 2
    tome = {"method": "tome", "budget": 9}
    assert per_image({"reduction": tome}, 3) == [Reduction.parse(tome)] * 3
    assert per_image({"visual_token_budget": 64, "reduction": None}, 1) == [Reduction.of_budget(64)]
    assert per_image({"visual_token_budget": 64}, 0) == []
    assert per_image({"num_crops": 4, "visual_token_budget": 64}, 1) == [Reduction.of_budget(64)]


def test_a_setting_for_every_image() -> None:
    """A list has one entry an image, null for one that keeps its tokens."""
    got = per_image({"visual_token_budget": [64, None, 1]}, 3)
    assert got == [Reduction.of_budget(64), None, Reduction.of_budget(1)]
    tome = {"method": "tome", "budget": 9}
    assert per_image({"reduction": (None, tome)}, 2) == [None, Reduction.parse(tome)]
    assert per_image({"visual_token_budget": []}, 0) == []


@pytest.mark.parametrize(
    ("kwargs", "images", "field", "allowed"),
    [
        (
            {"visual_token_budget": 64, "reduction": {"budget": 64}},
            1,
            "visual_token_budget",
            "left out",
        ),
        ({"visual_token_budget": [64], "reduction": [None]}, 1, "visual_token_budget", "left out"),
        ({"visual_token_budget": [64]}, 2, "visual_token_budget", "one entry per image (2)"),
        ({"visual_token_budget": [64, 64]}, 1, "visual_token_budget", "one entry per image (1)"),
        ({"visual_token_budget": []}, 1, "visual_token_budget", "one entry per image (1)"),
        ({"reduction": [None, None]}, 1, "reduction", "one entry per image (1)"),
        ({"visual_token_budget": [64, 0]}, 2, "visual_token_budget[1]", "whole number"),
        ({"visual_token_budget": [True]}, 1, "visual_token_budget[0]", "whole number"),
        ({"visual_token_budget": [[64]]}, 1, "visual_token_budget[0]", "whole number"),
        ({"visual_token_budget": "64"}, 2, "visual_token_budget", "whole number"),
        ({"visual_token_budget": b"64"}, 2, "visual_token_budget", "whole number"),
        ({"visual_token_budget": {"0": 64}}, 1, "visual_token_budget", "whole number"),
        ({"visual_token_budget": 0}, 0, "visual_token_budget", "whole number"),
        ({"visual_token_budget": False}, 1, "visual_token_budget", "whole number"),
        ({"reduction": "tome"}, 1, "reduction", "an object"),
        ({"reduction": 64}, 1, "reduction", "an object"),
        ({"reduction": [{"budget": 1}, 64]}, 2, "reduction[1]", "an object"),
        ({"reduction": [None, {"method": "x", "budget": 1}]}, 2, "reduction[1].method", "one of"),
        (
            {"reduction": [ficoco({"lambda": 2})]},
            1,
            "reduction[0].options.lambda",
            "equal to 1",
        ),
        ({"reduction": {}}, 1, "reduction.budget", "whole number"),
    ],
    ids=repr,
)
def test_bad_settings_of_images(kwargs: dict, images: int, field: str, allowed: str) -> None:
    """The message says which image's entry is wrong, or which list or key."""
    with pytest.raises(SettingsError) as wrong:
        per_image(kwargs, images)
    assert wrong.value.field == field
    assert allowed in wrong.value.allowed
    assert str(wrong.value).startswith(f"{field} = ")


TOME = {"method": "tome", "budget": 9}


@pytest.mark.parametrize(
    ("kwargs", "images", "videos"),
    [
        ({}, [None, None], [None]),
        ({"visual_token_budget": 64}, [64, 64], [64]),
        ({"reduction": TOME}, [TOME, TOME], [TOME]),
        ({"visual_token_budget": [64]}, [], [64]),
        ({"visual_token_budget": [64, None]}, [64, None], []),
        ({"visual_token_budget": {"video": 64}}, [None], [64]),
        ({"visual_token_budget": {"image": [5, None], "video": [7]}}, [5, None], [7]),
        ({"visual_token_budget": {"image": "auto", "video": None}}, ["auto"], [None]),
        ({"visual_token_budget": {"image": 5, "video": [None, 7]}}, [5], [None, 7]),
        ({"reduction": {"image": [None], "video": TOME}}, [None], [TOME, TOME]),
        ({"reduction": {"image": TOME}}, [TOME], []),
        ({"visual_token_budget": {"image": 5, "video": []}}, [5], []),
        ({"visual_token_budget": "auto"}, ["auto"], []),
    ],
    ids=repr,
)
def test_settings_of_images_and_videos(kwargs: dict, images: list, videos: list) -> None:
    """A value holds for all, an object says what holds for which modality."""

    def read(value: Any) -> Reduction | None:
        if value is None:
            return None
        return Reduction.parse(value) if isinstance(value, dict) else Reduction.of_budget(value)

    found = per_item(kwargs, {"image": len(images), "video": len(videos)})
    assert found == {"image": [*map(read, images)], "video": [*map(read, videos)]}


@pytest.mark.parametrize(
    ("kwargs", "field", "allowed"),
    [
        ({"visual_token_budget": [1, 2, 3]}, "visual_token_budget", '"video": [...]'),
        ({"visual_token_budget": [64]}, "visual_token_budget", '"video": [...]'),
        ({"reduction": [TOME, None, None]}, "reduction", '"video": [...]'),
        (
            {"visual_token_budget": {"image": [5], "video": [7]}},
            "visual_token_budget.image",
            "one entry per image (2)",
        ),
        (
            {"visual_token_budget": {"image": 5, "video": [7, 8]}},
            "visual_token_budget.video",
            "one entry per video (1)",
        ),
        (
            {"visual_token_budget": {"image": [5, 0]}},
            "visual_token_budget.image[1]",
            "whole number",
        ),
        (
            {"visual_token_budget": {"video": 5, "audio": 6}},
            "visual_token_budget.audio",
            "left out",
        ),
        ({"reduction": {"video": TOME, "budget": 6}}, "reduction.budget", "left out"),
        ({"reduction": {"video": [{"budget": 0}]}}, "reduction.video[0].budget", "whole number"),
        ({"reduction": {"image": {**TOME, "methods": 1}}}, "reduction.image.methods", "left out"),
        ({"visual_token_budget": "auto"}, "visual_token_budget", "a number for a video"),
        ({"visual_token_budget": {"video": "auto"}}, "visual_token_budget.video", "a number for"),
        ({"reduction": {"budget": "auto"}}, "reduction.budget", "a number for a video"),
        (
            {"reduction": {"video": [{"budget": "auto"}]}},
            "reduction.video[0].budget",
            "a number for a video",
        ),
        ({"visual_token_budget": {"video": [[5]]}}, "visual_token_budget.video[0]", "whole number"),
        ({"visual_token_budget": {"video": {"video": 5}}}, "visual_token_budget.video", "whole"),
        ({"visual_token_budget": {"image": [1] * 1001}}, "visual_token_budget", "no more than"),
    ],
    ids=lambda value: repr(value)[:80],
)
def test_bad_settings_of_images_and_videos(kwargs: dict, field: str, allowed: str) -> None:
    """The message says which modality's entry is wrong, in a prompt of two images and a video."""
    with pytest.raises(SettingsError) as wrong:
        per_item(kwargs, {"image": 2, "video": 1})
    assert (wrong.value.field, allowed in wrong.value.allowed) == (field, True), wrong.value


# --- Budgets that wait for the image --------------------------------------------------------


def test_auto_in_both_places() -> None:
    """One meaning, and its own key; none of it is in a number."""
    auto = Reduction.of_budget("auto")
    assert isinstance(auto, AutoBudget) and auto.rungs == AUTO_BUDGETS
    assert Reduction.parse({"budget": "auto"}) == auto
    assert Reduction.parse({"budget": "auto", "method": "tome"}) == auto.with_method("tome", {})
    assert auto.key != auto.with_method("tome", {}).key
    assert auto.key != Reduction.of_budget(1).key, "its own budget is nobody's"
    assert auto.key != auto.model_copy(update={"lower": 1}).key
    assert auto.key != AutoBudget(rungs=("1", "1/2")).key
    assert Reduction.parse({"method": "none", "budget": "auto"}) == Reduction(method="none")
    assert per_image({"visual_token_budget": "auto"}, 2) == [auto, auto]
    assert per_image({"visual_token_budget": ["auto", 5, None]}, 3) == [
        auto,
        Reduction(budget=5),
        None,
    ]
    assert per_image({"reduction": [{"budget": "auto"}]}, 1) == [auto]
    with pytest.raises(TypeError, match="settled by the processor"):
        auto.for_tokens(144)
    with pytest.raises(ValueError):  # what travels with an image is settled
        unpack(pack(auto))


@pytest.mark.parametrize(
    ("given", "field", "allowed"),
    [
        ({"budget": "automatic"}, "reduction.budget", "or 'auto'"),
        ({"budget": "Auto"}, "reduction.budget", "or 'auto'"),
        ({"budget": ["auto"]}, "reduction.budget", "or 'auto'"),
        ({"budget": "auto", "rungs": ["1"]}, "reduction.rungs", "left out"),
        ({"budget": "auto", "lower": 1}, "reduction.lower", "left out"),
        ({"budget": 5, "least": 1}, "reduction.least", "left out"),
        ({"budget": "auto", "method": "fast"}, "reduction.method", "one of"),
        ({"budget": "auto", "options": {"alpha": 9}}, "reduction.options.alpha", "equal to 8"),
        (
            {"budget": "auto", "method": "k-norm", "options": {"tokens": [5]}},
            "reduction.budget",
            "left out where options.tokens is given",
        ),
    ],
)
def test_what_is_wrong_beside_auto(given: dict, field: str, allowed: str) -> None:
    """No more can be said with it than with a number; what a server adds is not a client's."""
    with pytest.raises(SettingsError) as wrong:
        Reduction.parse(given)
    assert wrong.value.field == field and allowed in wrong.value.allowed


@pytest.mark.parametrize("rungs", [AUTO_BUDGETS, ("1", "1/2"), ("1/3",), ("300", "60", "1/9")])
@pytest.mark.parametrize(("least", "most"), [(1, None), (20, 100)])
def test_the_rung_of_an_image(rungs: tuple[str, ...], least: int, most: int | None) -> None:
    """The smallest with as many tokens as it asks for; behind it the larger ones."""
    auto = AutoBudget(rungs=rungs, least=least, most=most)
    for tokens in (1, 2, 9, 64, 144, 576, 2928):
        ladder = auto.ladder(tokens)
        assert ladder == sorted({*ladder}, reverse=True)
        for share in (Fraction(k, 36) for k in range(37)):
            choices = auto.choices(tokens, share, Fraction(0))
            enough = [count for count in ladder if count >= int(tokens * share)]
            assert choices[0] == min(enough, default=ladder[0])
            assert choices == [count for count in ladder[::-1] if count >= choices[0]]


def test_rungs_lower_than_what_an_image_asks_for() -> None:
    """By as many as are said; not below what its writing needs, nor what it asked for itself."""
    for lower, expected in ((0, 144), (1, 48), (2, 32), (3, 16), (9, 16)):
        auto = AutoBudget(lower=lower)
        assert auto.choices(144, Fraction(1), Fraction(0))[0] == expected
        assert auto.choices(144, Fraction(1), Fraction(1, 3))[0] == max(expected, 48)
        assert auto.choices(144, Fraction(1, 9), Fraction(0))[0] == 16


@pytest.mark.parametrize(
    ("above", "tokens", "choices"),
    [
        (None, 144, [48, 144]),
        (144, 144, [48, 144]),
        (500, 144, [48, 144]),
        (48, 144, [32, 48]),
        (47, 144, [32, 47]),
        (17, 144, [16, 17]),
        (16, 144, [16]),
        (5, 144, [5]),
        (None, 1, [1]),
        (None, 4, [1, 4]),
    ],
)
def test_one_rung_lower(above: int | None, tokens: int, choices: list[int]) -> None:
    """The largest below the budget and the image; where none is, the budget stays."""
    assert Lowered(above=above).choices(tokens) == choices


def test_names_of_what_was_chosen() -> None:
    """The first rung of that number, where some have the same."""
    auto = AutoBudget(rungs=("1", "1/3", "64", "1/9"), least=10, most=100)
    named = [(144, 100), (144, 48), (144, 64), (144, 16), (30, 30), (30, 10), (144, 7)]
    assert [auto.rung_name(budget, tokens) for tokens, budget in named] == [
        *("N", "N/3", "64", "N/9", "N", "N/3", "7")
    ]


def test_a_copy_has_a_key_of_its_own() -> None:
    """A key is made once for an object; a changed copy must not be found by it in a cache."""
    one = Reduction(method="score", budget=16)
    assert one.key
    other = one.model_copy(update={"budget": 32})
    assert other.key == Reduction(method="score", budget=32).key != one.key
    assert other != one and {one: 1}.get(other) is None
    assert one == Reduction(method="score", budget=16)  # one of which the key was asked
    assert Reduction.parse({"budget": 16}) == Reduction.of_budget(16)


@pytest.mark.parametrize("budget", [True, 16.0, "16"])
def test_settings_that_are_known_do_not_let_others_pass(budget: object) -> None:
    """Objects are shared between requests that say the same, and these only compare equal."""
    Reduction.parse({"budget": 16})
    Reduction.parse({"budget": 1})
    with pytest.raises(SettingsError):
        Reduction.parse({"budget": budget})
    with pytest.raises(SettingsError):
        Reduction.of_budget(budget)
