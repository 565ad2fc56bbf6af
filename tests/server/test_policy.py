# SPDX-License-Identifier: Apache-2.0
"""The server's policy: what it reads, and what it makes of a request. No server, no engine."""

from typing import Any

import pytest

from ficoco_server import resolve
from ficoco_server.policy import Policy, PolicyError
from ficoco_server.resolve import Level
from vllm_ficoco.settings import AutoBudget, Reduction, SettingsError
from vllm_ficoco.vision.geometry import Geometry
from vllm_ficoco.vision.layout import Layout, Window

TINY = Geometry((12, 12), 9, True)
LLAVA = Geometry((24, 24), 23, True)
NATIVE = Geometry((0, 0), 4, False, by_image=True, offers=frozenset({"scaling", "attention"}))
TEXT_MODEL = Geometry.none("visual tokens can be reduced for LLaVA models, not for 'llama'")
IMAGE = "messages[0].content[0].image_url"


def read(**environment: str) -> Policy:
    return Policy.from_environment({f"FICOCO_{k.upper()}": v for k, v in environment.items()})


def on_request(**said: Any) -> Level:
    return Level(said=said)


def on_image(embeds: bool = False, **said: Any) -> Level:
    return Level(IMAGE, said, embeds)


def settle(
    policy: Policy, request: Level, *images: Level, geometry: Any = TINY
) -> list[Reduction | None]:
    settled = resolve.settled(policy, request, images, geometry)
    return [image.reduction for image in settled]


# --- The environment ------------------------------------------------------------------------


def test_nothing_set() -> None:
    policy = read()
    assert (policy.default_method, policy.default_budget) == ("score", None)
    assert policy.low(TINY) == 16 and policy.low(LLAVA) == 64 and policy.high() is None


def test_previews_are_there_unless_switched_off() -> None:
    assert read().preview and read(preview="1").preview and not read(preview="0").preview


def test_everything_set() -> None:
    policy = read(
        default_method="tome",
        default_budget="64",
        min_budget="8",
        max_budget="96",
        methods=" tome, evit,,",
        low_budget="12",
        high_budget="90",
    )
    assert policy.methods == ("tome", "evit")
    assert (policy.default_budget, policy.min_budget, policy.max_budget) == (64, 8, 96)
    assert (policy.low(TINY), policy.high()) == (12, 90)


def test_a_largest_budget_is_the_default_and_bounds_the_details() -> None:
    policy = read(max_budget="10")
    assert (policy.default_budget, policy.low(TINY), policy.high()) == (10, 10, 10)
    assert read(min_budget="20").low(TINY) == 20
    assert read(max_budget="none").max_budget is None


@pytest.mark.parametrize(
    ("environment", "fragments"),
    [
        ({"default_budget": "many"}, ["FICOCO_DEFAULT_BUDGET", "--reduction-default-budget"]),
        ({"min_budget": "0"}, ["FICOCO_MIN_BUDGET", "from 1"]),
        ({"max_budget": "6.5"}, ["FICOCO_MAX_BUDGET", "whole number"]),
        ({"default_method": "fastest"}, ["unknown method fastest", "known", "tome"]),
        ({"methods": "tome,fastest"}, ["unknown method fastest"]),
        ({"methods": "tome"}, ["'score'", "--reduction-default-method", "tome"]),
        ({"default_method": "none"}, ["leave out the default budget"]),
        ({"min_budget": "9", "max_budget": "8"}, ["smallest budget 9", "largest, 8"]),
        (
            {"default_budget": "9", "max_budget": "8"},
            ["default budget 9", "--reduction-default-budget", "1 to 8"],
        ),
        ({"low_budget": "1", "min_budget": "2"}, ["low budget 1", "limits"]),
        ({"high_budget": "99", "max_budget": "98"}, ["high budget 99"]),
        ({"low_budget": "auto"}, ["FICOCO_LOW_BUDGET", "whole number"]),
        ({"preview": "never"}, ["FICOCO_PREVIEW=never", "or 0 for none"]),
        ({"default_budget": "automatic"}, ["FICOCO_DEFAULT_BUDGET", "or 'auto'"]),
        (
            {"auto_budgets": "1,1/3,lots"},
            ["1,1/3,lots", "FICOCO_AUTO_BUDGETS", "--reduction-auto-budgets", "such as 1/3"],
        ),
        ({"auto_budgets": "1,,1/3"}, ["FICOCO_AUTO_BUDGETS", "whole number from 2"]),
        ({"auto_budgets": "1,3/2"}, ["FICOCO_AUTO_BUDGETS"]),
        ({"auto_budgets": "1/9,1/3"}, ["FICOCO_AUTO_BUDGETS", "descending"]),
        ({"auto_budgets": "1/3,2/6"}, ["descending, without repeating"]),
        ({"auto_budgets": "1,64,1/3,64"}, ["descending, without repeating"]),
        ({"auto_budgets": "2000000,5"}, ["no number above 1000000"]),
        (
            {"graphs": "score@64,fastest@64"},
            ["FICOCO_GRAPHS", "--reduction-graphs", "METHOD@TOKENS, as in score@64", "tome"],
        ),
        ({"graphs": "score@1/0"}, ["'score@1/0'", "a share such as 1/9"]),
        ({"graphs": "cdpruner@64"}, ["FICOCO_GRAPHS", "read the question"]),
        ({"graphs": "tome@64", "methods": "score"}, ["tome@64", "allowed ones: score"]),
        ({"graphs": "score@64", "max_budget": "63"}, ["score@64", "limits, 1 to 63"]),
    ],
)
def test_a_wrong_policy_stops_the_start(environment: dict[str, str], fragments: list[str]) -> None:
    with pytest.raises(PolicyError) as caught:
        read(**environment)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_graphs_are_kept_for_what_is_named_and_what_images_get_by_themselves() -> None:
    assert read().graphs == ()
    assert read().graphed() == ["score@1/9", "score@1/3", "score@2/9"]
    policy = read(
        graphs="tome@64, score@1/3",
        default_budget="100",
        low_budget="20",
        min_budget="10",
        max_budget="200",
        auto_budgets="1,150,1/3",
    )
    own = ["score@100", "score@20", "score@150", "score@10", "score@200"]
    assert policy.graphed() == ["tome@64", "score@1/3", *own]
    assert read(default_method="cdpruner", graphs="score@8").graphed() == ["score@8"]


def test_a_graph_that_the_model_cannot_have_stops_the_start() -> None:
    policy = read(graphs="tome@1/9")
    policy.check_model(TINY)
    policy.check_model(NATIVE, Layout((8, 8)))
    with pytest.raises(PolicyError, match=r"tome@1/9 \(FICOCO_GRAPHS.*budget must be at least 36"):
        policy.check_model(Geometry((12, 12), 2, True))


def test_defaults_that_the_model_cannot_keep_stop_the_start() -> None:
    read(default_budget="64").check_model(TINY)
    read().check_model(TEXT_MODEL)
    with pytest.raises(PolicyError, match="not for 'llama'"):
        read(default_budget="64").check_model(TEXT_MODEL)
    with pytest.raises(PolicyError, match="tome"):  # it halves at most, a few times
        read(default_method="tome", default_budget="1").check_model(Geometry((24, 24), 2, True))


def test_the_ladder() -> None:
    assert read().auto_budgets == ("1", "1/3", "2/9", "1/9")
    assert read(auto_budgets=" 1 , 3/9,64").auto_budgets == ("1", "1/3", "64")
    policy = read(default_budget="Auto", min_budget="20", max_budget="100", default_method="tome")
    assert policy.default_budget == "auto"
    assert policy.auto() == AutoBudget(method="tome", least=20, most=100)
    assert policy.auto().ladder(144) == [100, 48, 32, 20]


def test_a_default_by_what_is_in_an_image() -> None:
    policy = read(default_budget="auto")
    for geometry, largest in ((TINY, None), (NATIVE, Layout((12, 12)))):
        read(default_budget="auto", default_method="topk").check_model(geometry, largest)
        [one, other, low, said] = settle(
            read(default_budget="auto", default_method="topk"),
            Level(),
            on_image(),
            on_image(detail="auto"),
            on_image(reduction={"method": "uniform"}),
            on_image(visual_token_budget=9),
            geometry=geometry,
        )
        assert one == other == AutoBudget(method="topk")
        assert low == AutoBudget(method="uniform")
        assert said == Reduction(method="topk", budget=9)
    assert settle(policy, Level(), on_image(embeds=True)) == [None]
    assert settle(policy, on_request(reduction={"method": "none"}), on_image()) == [None]
    with pytest.raises(PolicyError, match="not for 'llama'"):
        policy.check_model(TEXT_MODEL)
    # Only the smallest budgets are out of reach: such images get a larger one.
    halves = Geometry((24, 24), 2, True)
    tome = {"default_method": "tome", "default_budget": "auto", "low_budget": "144"}
    read(**tome).check_model(halves)
    with pytest.raises(PolicyError, match="default budget 143"):
        read(**tome | {"max_budget": "143", "low_budget": "143"}).check_model(halves)


# --- What holds for an image ----------------------------------------------------------------


def test_a_nearer_budget_is_instead_of_tokens_by_stage() -> None:
    staged = Geometry((12, 12), 9, True, 6, (2, 4))
    request = on_request(reduction={"method": "k-norm", "options": {"tokens": [80, 40]}})
    by_stage, nearer, low = settle(
        read(),
        request,
        on_image(),
        on_image(visual_token_budget=90),
        on_image(detail="low"),
        geometry=Geometry((24, 24), 23, True, 32, (2, 22)),
    )
    assert by_stage is not None and by_stage.budget is None
    assert nearer == Reduction(method="k-norm", budget=90)
    assert low == Reduction(method="k-norm", budget=64)
    with pytest.raises(SettingsError, match=r"options\.tokens"):
        both = {"budget": 90, "options": {"tokens": [80, 40]}}
        settle(read(), request, on_image(reduction=both), geometry=staged)


def test_the_nearest_wins() -> None:
    policy = read(default_budget="100")
    request = on_request(visual_token_budget=64)
    assert settle(policy, Level(), on_image()) == [Reduction(budget=100)]
    assert settle(policy, request, on_image(), on_image(visual_token_budget=32)) == [
        Reduction(budget=64),
        Reduction(budget=32),
    ]
    assert settle(policy, request, on_image(detail="low")) == [Reduction(budget=16)]
    assert settle(policy, request, on_image(detail="high")) == [None]
    assert settle(policy, request, on_image(reduction={"method": "none"})) == [None]


def test_auto_says_nothing() -> None:
    # Many clients always send it, so it must not undo what the request says.
    request = on_request(visual_token_budget=64)
    assert settle(read(), request, on_image(detail="auto")) == [Reduction(budget=64)]
    assert settle(read(), Level(), on_image(detail="auto")) == [None]
    assert settle(read(), Level(), on_image(detail="auto", visual_token_budget=9)) == [
        Reduction(budget=9)
    ]


def test_method_and_budget_are_inherited_one_by_one() -> None:
    policy = read(default_method="tome")
    assert settle(policy, on_request(visual_token_budget=64), on_image()) == [
        Reduction(method="tome", budget=64)
    ]
    request = on_request(reduction={"method": "evit", "budget": 64})
    assert settle(policy, request, on_image(visual_token_budget=32), on_image(detail="low")) == [
        Reduction(method="evit", budget=32),
        Reduction(method="evit", budget=16),
    ]
    assert settle(policy, request, on_image(reduction={"method": "topk"})) == [
        Reduction(method="topk", budget=64)
    ]


def test_auto_is_inherited_as_a_number_is() -> None:
    auto = AutoBudget()
    assert settle(read(), on_request(visual_token_budget="auto"), on_image()) == [auto]
    assert settle(read(), Level(), on_image(visual_token_budget="auto")) == [auto]
    options = {"lambda": 0.5}
    request = on_request(reduction={"budget": "auto", "method": "ficoco-v", "options": options})
    same, other, low, none = settle(
        read(),
        request,
        on_image(),
        on_image(reduction={"method": "tome"}),
        on_image(detail="low"),
        on_image(reduction={"method": "none"}),
    )
    assert same == auto.with_method("ficoco-v", options)
    assert other == auto.with_method("tome", {})
    assert low == Reduction(budget=16, method="ficoco-v", options=options)
    assert none is None
    staged = Geometry((24, 24), 23, True, 32, (2, 22))
    by_stage = on_request(reduction={"method": "k-norm", "options": {"tokens": [80, 40]}})
    assert settle(read(), by_stage, on_image(visual_token_budget="auto"), geometry=staged) == [
        auto.with_method("k-norm", {})
    ]


def test_options_stay_with_their_method() -> None:
    options = {"lambda": 0.5}
    request = on_request(reduction={"method": "ficoco-v", "budget": 64, "options": options})
    same, other = settle(
        read(), request, on_image(visual_token_budget=32), on_image(reduction={"method": "tome"})
    )
    assert same == Reduction(method="ficoco-v", budget=32, options=options)
    assert other == Reduction(method="tome", budget=64)


def test_none_on_the_request_does_not_undo_an_image() -> None:
    request = on_request(reduction={"method": "none"})
    assert settle(read(), request, on_image(), on_image(visual_token_budget=32)) == [
        None,
        Reduction(budget=32),
    ]


def test_a_method_alone_takes_the_default_budget() -> None:
    request = on_request(reduction={"method": "tome"})
    assert settle(read(default_budget="64"), request, on_image()) == [
        Reduction(method="tome", budget=64)
    ]
    with pytest.raises(SettingsError, match=r"reduction\.budget .* no default budget"):
        settle(read(), request, on_image())


def test_a_budget_of_all_tokens_is_no_reduction() -> None:
    assert settle(read(), on_request(visual_token_budget=144), on_image()) == [None]


def test_requests_without_images() -> None:
    assert settle(read(default_budget="64"), Level()) == []
    assert settle(read(), on_request(reduction={"method": "none"})) == []
    with pytest.raises(SettingsError, match="no images"):
        settle(read(), on_request(visual_token_budget=64))


def test_models_without_support() -> None:
    assert settle(read(), Level(), on_image(detail="high"), geometry=TEXT_MODEL) == [None]
    for request, image in (
        (on_request(visual_token_budget=64), on_image()),
        (on_request(visual_token_budget="auto"), on_image()),
        (Level(), on_image(reduction={"budget": 64})),
        (Level(), on_image(detail="low")),
    ):
        with pytest.raises(SettingsError, match="not for 'llama'"):
            settle(read(), request, image, geometry=TEXT_MODEL)


def test_embeddings_of_images() -> None:
    policy = read(default_budget="64")
    assert settle(policy, Level(), on_image(embeds=True), on_image()) == [
        None,
        Reduction(budget=64),
    ]
    with pytest.raises(SettingsError, match="image_embeds"):
        settle(policy, on_request(visual_token_budget=64), on_image(embeds=True))
    with pytest.raises(SettingsError, match="left out for image_embeds"):
        settle(policy, on_request(visual_token_budget="auto"), on_image(embeds=True))


@pytest.mark.parametrize(
    ("environment", "said", "field", "fragment"),
    [
        ({"max_budget": "64"}, {"visual_token_budget": 65}, "visual_token_budget", "from 1 to 64"),
        ({"min_budget": "8"}, {"visual_token_budget": 7}, "visual_token_budget", "from 8"),
        ({"max_budget": "64"}, {"reduction": {"budget": 144}}, "reduction.budget", "to 64"),
        ({"max_budget": "64"}, {"reduction": {"method": "none"}}, "reduction", "to 64"),
        (
            {"methods": "score,tome"},
            {"reduction": {"method": "random", "budget": 9}},
            "reduction.method",
            "one of score, tome",
        ),
    ],
)
def test_outside_of_the_policy(
    environment: dict[str, str], said: dict[str, Any], field: str, fragment: str
) -> None:
    for request, image, where in (
        (on_request(**said), on_image(), field),
        (Level(), on_image(**said), f"{IMAGE}.{field}"),
    ):
        with pytest.raises(SettingsError) as caught:
            settle(read(**environment), request, image)
        assert caught.value.field == where
        assert fragment in str(caught.value) and "policy" in str(caught.value)


@pytest.mark.parametrize(
    ("said", "field"),
    [
        *(
            ({"visual_token_budget": value}, "visual_token_budget")
            for value in (64.0, 0, -1, "64", True, 10**30, [64], {}, float("nan"))
        ),
        *(({"reduction": value}, "reduction") for value in (64, "tome", [], True)),
        ({"visual_token_budget": "automatic"}, "visual_token_budget"),
        ({"reduction": {"budget": "Auto"}}, "reduction.budget"),
        ({"reduction": {"budget": "auto", "rungs": ["1"]}}, "reduction.rungs"),
        ({"reduction": {"budget": "auto", "method": "fastest"}}, "reduction.method"),
        ({"reduction": {"budget": "auto", "options": {"alpha": 9}}}, "reduction.options.alpha"),
        (
            {"reduction": {"budget": "auto", "method": "k-norm", "options": {"tokens": [9]}}},
            "reduction.budget",
        ),
        ({"visual_token_budget": "auto", "reduction": {"budget": 9}}, "visual_token_budget"),
        ({"visual_token_budget": 9, "reduction": {"budget": 9}}, "visual_token_budget"),
        ({"reduction": {"budget": 9.5}}, "reduction.budget"),
        ({"reduction": {"budget": [None]}}, "reduction.budget"),
        ({"reduction": {"budget": 9, "method": "fastest"}}, "reduction.method"),
        ({"reduction": {"budget": 9, "method": ["tome"]}}, "reduction.method"),
        ({"reduction": {"budget": 9, "ratio": 0.5}}, "reduction.ratio"),
        ({"reduction": {"budget": 9, "options": []}}, "reduction.options"),
        ({"reduction": {"budget": 9, "options": {"lambada": 1}}}, "reduction.options.lambada"),
        ({"reduction": {"budget": 9, "options": {"alpha": 9}}}, "reduction.options.alpha"),
        ({"reduction": {"method": "none", "ratio": 1}}, "reduction.ratio"),
        ({"reduction": {}}, "reduction.budget"),
        ({"reduction": {"budget": None}}, "reduction.budget"),
    ],
)
def test_settings_that_cannot_be_used(said: dict[str, Any], field: str) -> None:
    for request, image, where in (
        (on_request(**said), on_image(), field),
        (Level(), on_image(**said), f"{IMAGE}.{field}"),
    ):
        with pytest.raises(SettingsError) as caught:
            settle(read(), request, image)
        assert caught.value.field == where
        assert where in str(caught.value)


@pytest.mark.parametrize("detail", ["medium", " ", 3, True, ["low"], {"low": 1}])
def test_unknown_details(detail: Any) -> None:
    with pytest.raises(SettingsError, match="'low', 'high', 'original' or 'auto'"):
        settle(read(), Level(), on_image(detail=detail))


def test_what_clients_write_for_a_detail() -> None:
    """OpenAI's newest word, an enum's name in upper case, a field that nobody has set."""
    policy = read(default_budget="100", high_budget="90", low_budget="20")

    def budget(detail: str) -> Any:
        [reduction] = settle(policy, Level(), on_image(detail=detail))
        return reduction and reduction.budget

    assert [budget(d) for d in ("high", "HIGH", "original", "Original")] == [90] * 4
    assert [budget(d) for d in ("low", "LOW", "Low")] == [20] * 3
    assert [budget(d) for d in ("auto", "AUTO", "")] == [100] * 3
    for said in ("AUTO", ""):  # they say nothing beside a budget, either
        assert settle(policy, Level(), on_image(detail=said, visual_token_budget=9)) == [
            Reduction(budget=9)
        ]


def test_a_detail_beside_a_budget() -> None:
    for other in ({"visual_token_budget": 9}, {"reduction": {"budget": 9}}):
        with pytest.raises(SettingsError, match="'auto' where"):
            settle(read(), Level(), on_image(detail="low", **other))


def test_a_budget_that_the_method_cannot_reach() -> None:
    request = on_request(reduction={"method": "tome", "budget": 1})
    with pytest.raises(SettingsError) as caught:
        settle(read(), request, on_image(), geometry=Geometry((24, 24), 2, True))
    assert caught.value.field == "reduction.budget"


# --- Where an image's tokens depend on its size ---------------------------------------------

TILED = Geometry((4, 4), 6, True, 6, (2, 4), by_image=True)
LARGE = Layout((4, 4), (2, 2), Window(0, 0, 8, 8))
"""Of 88 tokens, 8 of them newlines."""
SMALL = Layout((4, 4), (1, 2), Window(0, 2, 4, 4))
"""Of 36 tokens, 4 of them newlines."""


def fit(policy: Policy, image: Level, layout: Layout, request: Level | None = None) -> Any:
    """What comes out for an image, in both steps."""
    [wanted] = resolve.settled(policy, request or Level(), [image], TILED)
    return resolve.fit(policy, wanted, TILED, layout)


def test_a_budget_waits_for_the_image() -> None:
    for budget, large, small in ((20, 20, 20), (36, 36, None), (60, 60, None), (88, None, None)):
        said = on_image(visual_token_budget=budget)
        assert settle(read(), Level(), said, geometry=TILED) == [Reduction(budget=budget)]
        for layout, due in ((LARGE, large), (SMALL, small)):
            assert fit(read(), said, layout) == (due and Reduction(budget=due))


def test_low_is_a_share_of_the_image() -> None:
    low = on_image(detail="low")
    request = on_request(
        reduction={"method": "topk", "budget": 80, "options": {"newlines": "none"}}
    )
    assert fit(read(), low, LARGE) == Reduction(budget=88 // 9)
    assert fit(read(), low, SMALL, request) == Reduction(method="topk", budget=36 // 9)
    bounded = read(min_budget="5", max_budget="8")
    assert fit(bounded, low, LARGE) == Reduction(budget=8)
    assert fit(bounded, low, SMALL) == Reduction(budget=5)
    assert fit(read(low_budget="30"), low, LARGE) == Reduction(budget=30)
    assert fit(read(min_budget="40"), low, SMALL) is None, "it has no more than that"
    with pytest.raises(SettingsError, match=r"detail = 'low' .* image_embeds"):
        settle(read(), Level(), on_image(embeds=True, detail="low"), geometry=TILED)


def test_nobody_sends_a_share() -> None:
    for share in ({"share": 9}, {"budget": 9, "share": 9, "least": 1, "most": None}):
        with pytest.raises(SettingsError, match="known here: method, budget, options"):
            settle(read(), on_request(reduction=share), on_image(), geometry=TILED)


def test_the_largest_budget_holds_for_images_that_have_more() -> None:
    policy = read(max_budget="50")
    for said, field in (
        ({"reduction": {"method": "none"}}, "reduction"),
        ({"visual_token_budget": 51}, "visual_token_budget"),
    ):
        with pytest.raises(
            SettingsError, match=r"from 1 to 50, by this server's policy"
        ) as refused:
            fit(policy, on_image(**said), LARGE)
        assert refused.value.field == f"{IMAGE}.{field}"
    whole = on_image(reduction={"method": "none"})
    assert fit(policy, whole, SMALL) is None
    assert fit(policy, on_image(), LARGE) == Reduction(budget=50)
    assert fit(policy, on_image(), SMALL) is None


def test_tokens_by_stage_are_averaged_over_what_the_image_has() -> None:
    """Two of six layers hold the whole image."""
    said = {"method": "k-norm", "options": {"tokens": [20, 10]}}
    policy = read(max_budget="39")
    assert fit(policy, on_image(reduction=said), SMALL) == Reduction.parse(said)  # 22
    with pytest.raises(SettingsError) as refused:
        fit(policy, on_image(reduction=said), LARGE)  # 39.3
    assert (refused.value.field, refused.value.value) == (f"{IMAGE}.reduction.budget", 40)


@pytest.mark.parametrize(
    ("said", "field", "allowed"),
    [
        ({"method": "sparsevlm", "budget": 999}, "method", "--reduction-stages 1,2,3"),
        ({"method": "best", "budget": 9}, "method", "one of"),
        ({"method": "topk", "budget": 9, "options": {"newlines": 1}}, "options.newlines", "'none'"),
    ],
)
def test_what_no_image_can_have_is_refused_at_once(
    said: dict[str, Any], field: str, allowed: str
) -> None:
    with pytest.raises(SettingsError) as refused:
        settle(read(), Level(), on_image(reduction=said), geometry=TILED)
    assert refused.value.field == f"{IMAGE}.reduction.{field}" and allowed in refused.value.allowed


@pytest.mark.parametrize(
    ("said", "field"),
    [
        ({"visual_token_budget": 8}, "visual_token_budget"),
        ({"reduction": {"budget": 8}}, "reduction.budget"),
        ({"detail": "low"}, "detail"),
    ],
)
def test_what_this_image_cannot_have_is_named_where_it_was_said(
    said: dict[str, Any], field: str
) -> None:
    """With all newlines the larger image is left with nothing else, the smaller one is not."""
    request = on_request(reduction={"method": "topk", "budget": 80, "options": {"newlines": "all"}})
    image = on_image(**said)
    if "reduction" in said:
        image = on_image(reduction=request.said["reduction"] | said["reduction"])
    policy = read(max_budget="80", low_budget="8")
    assert fit(policy, image, SMALL, request).budget == 8
    with pytest.raises(SettingsError, match="at least 9 for an image of 88 visual tok") as refused:
        fit(policy, image, LARGE, request)
    assert (refused.value.field, refused.value.value) == (f"{IMAGE}.{field}", 8)


def test_a_default_that_an_image_cannot_keep_is_called_one() -> None:
    policy = Policy(default_method="pyramiddrop", default_budget=9)
    geometry = TILED._replace(starts=(1, 2, 4))
    [wanted] = resolve.settled(policy, Level(), [on_image()], geometry)
    with pytest.raises(SettingsError) as refused:
        resolve.fit(policy, wanted, geometry, LARGE)
    assert refused.value.field == "visual_token_budget"
    assert refused.value.allowed.endswith("(9 is this server's default)")
    with pytest.raises(PolicyError, match="default budget 9"):
        policy.check_model(geometry, LARGE)
    Policy(default_method="pyramiddrop", default_budget=40, low_budget=40).check_model(
        geometry, LARGE
    )


# --- What a model lacks ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "geometry", "missing"),
    [
        ("tome", NATIVE, "layers of the vision tower"),
        ("ficoco-k", NATIVE, "layers of the vision tower"),
        ("resize", TINY, "to scale an image down"),
    ],
)
def test_a_method_that_the_model_cannot_do(method: str, geometry: Geometry, missing: str) -> None:
    """As the default it stops the start, and a request's is refused before there is an image."""
    with pytest.raises(PolicyError, match=f"{method} needs {missing}.* these can: uniform"):
        read(default_method=method, methods=f"{method},uniform").check_model(
            geometry, Layout((8, 8))
        )
    for request, image in (
        (on_request(reduction={"method": method, "budget": 5}), on_image()),
        (Level(), on_image(reduction={"method": method, "budget": 5})),
    ):
        with pytest.raises(SettingsError, match=f"{method} needs {missing}") as refused:
            settle(read(), request, image, geometry=geometry)
        assert refused.value.field.endswith("reduction.method")


def test_a_server_that_only_scales_images_down() -> None:
    policy = read(default_method="resize", methods="resize", default_budget="40")
    policy.check_model(NATIVE, Layout((8, 8)))
    scaled = Layout((2, 3), original=64)
    for said, budget in (
        ({}, 40),
        ({"visual_token_budget": 7}, 7),
        ({"reduction": {"budget": 6}}, 6),
        ({"detail": "low"}, 64 // 9),
    ):
        [wanted] = resolve.settled(policy, Level(), [on_image(**said)], NATIVE)
        reduction = resolve.fit(policy, wanted, NATIVE, scaled)
        assert reduction == Reduction(method="resize", budget=budget)
        assert NATIVE.kept(reduction, layout=scaled) == 6
    [wanted] = resolve.settled(policy, Level(), [on_image(visual_token_budget=64)], NATIVE)
    assert resolve.fit(policy, wanted, NATIVE, Layout((8, 8))) is None
    with pytest.raises(SettingsError, match="one of resize, by this server's policy"):
        settle(policy, on_request(reduction={"method": "uniform"}), on_image(), geometry=NATIVE)
