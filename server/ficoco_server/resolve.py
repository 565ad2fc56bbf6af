# SPDX-License-Identifier: Apache-2.0
"""From what a request says, here and there, to the settings of every image and every video.

The nearest wins: the image, then the request, then the server's default. What depends on how many
tokens an image has is in :func:`fit`. Where all images of a model have as many, it is asked at
once; else when the prompt is rendered, and the processor has seen the image's size.

A video is like an image whose tokens depend on it, but for the policy: budgets there are of images,
and would ruin a video. By default it stays whole, and no budget is too large for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ficoco_server.policy import BY_POLICY, Policy
from vllm_ficoco.schedule import average_over_layers
from vllm_ficoco.settings import (
    A_NUMBER_FOR_A_VIDEO,
    AUTO,
    BUDGET_KEY,
    MAX_BUDGET,
    NO_REDUCTION,
    REDUCTION_KEY,
    AutoBudget,
    Lowered,
    OfLadder,
    Reduction,
    SettingsError,
    Waiting,
    check_size,
)
from vllm_ficoco.vision.geometry import Geometry
from vllm_ficoco.vision.layout import Layout

DETAIL_KEY = "detail"
_DETAILS = {"low": "low", "high": "high", "original": "high", "auto": "auto", "": "auto"}


def detail_of(value: Any) -> str | None:
    """What a ``detail`` means: ``low``, ``high`` or ``auto``; None for what cannot be one.

    ``original`` is OpenAI's word for a size above ``high``. Some clients send an enum's name in
    upper case, and some a field that nobody has set, as null or empty.
    """
    return _DETAILS.get(value.lower()) if isinstance(value, str) else None


class Level(NamedTuple):
    """What was said in one place of a request: on the request itself, on one image or one video."""

    path: str = ""
    """Where, for messages: empty for the request, ``messages[0].content[1]``, ..."""
    said: Mapping[str, Any] = {}
    """Our keys as they were sent, nulls left out."""
    embeds: bool = False
    """The image comes as embeddings, which cannot be reduced."""
    named: bool = False
    """The image has a ``uuid``, by which it is found again, together with its settings."""
    inside: tuple[str, ...] = ()
    """Keys that stood in the image's ``image_url``, or the video's ``video_url``."""
    modality: str = "image"

    def field(self, key: str) -> str:
        """The path of a key that was said here."""
        if key in self.inside:
            key = f"{self.modality}_url.{key}"
        return f"{self.path}.{key}" if self.path else key


class Wish(NamedTuple):
    """Settings on their way from the server's default over the request to one image."""

    method: str
    budget: int | Waiting | None
    options: Mapping[str, Any] = {}
    field: str = ""
    """Where it was said; empty for the server's default."""
    said: bool = False
    """How many tokens was said, too: this budget is no default of the server's."""
    name: str = ""
    """The name of the model that stands for it, where nobody has said more."""


class Settled(NamedTuple):
    """What holds for one image, or one video."""

    reduction: Reduction | None
    """None: it keeps all its tokens."""
    field: str = ""
    """Where its budget was said, or that it has none; empty for the server's default."""
    embeds: bool = False
    """It comes as embeddings."""
    modality: str = "image"
    name: str = ""
    """The name of the model that stands for it."""


def settled(
    policy: Policy,
    request: Level,
    images: Sequence[Level],
    geometry: Geometry,
    lower: bool = False,
    alias: str = "",
) -> list[Settled]:
    """What holds for every image and video of a request; where its size matters, before
    :func:`fit`.

    The nearest wins, part by part: a budget on an image goes with the method that the request
    names around it. What a name of the model stands for is for images of which nothing was said,
    and goes with nothing that was.

    Args:
        policy: of the server.
        request: what is said on the request.
        images: what is said on each image and each video.
        geometry: of the model.
        lower: budgets of images that nobody has said, and those of ``auto``, are a rung lower.
        alias: the name of the model, where the policy has a default for it.

    Raises:
        SettingsError: what was said cannot be used here; nothing more than without ``lower``.
    """
    general = {
        modality: _narrow(policy, _default(policy, modality), request, geometry, modality)
        for modality in {image.modality: None for image in images} or ("image",)
    }
    if not images and general["image"].field and general["image"].method != NO_REDUCTION:
        key, value = next(iter(request.said.items()))
        raise SettingsError(
            request.field(key), value, "left out: the request has no images and no videos"
        )
    known = not geometry.unsupported and not geometry.by_image
    admitted = []
    for image in images:
        wish = _narrow(policy, general[image.modality], image, geometry, image.modality)
        if alias and not wish.field and image.modality == "image":
            wish = _by_name(policy, alias)
        one = _admit(policy, wish, image, geometry)
        if lower and image.modality == "image" and not geometry.unsupported:
            one = _lowered(policy, wish, one, image)
        if known and image.modality == "image" and not isinstance(one.reduction, OfLadder):
            one = one._replace(reduction=fit(policy, one, geometry, geometry.layout))
        admitted.append(one)
    return admitted


def fit(
    policy: Policy,
    image: Settled,
    geometry: Geometry,
    layout: Layout,
    chosen: Reduction | None = None,
) -> Reduction | None:
    """The settings of an image or video of this layout; None where it keeps all its tokens.

    Args:
        policy: of the server.
        image: what was settled for it before it was seen.
        geometry: of the model.
        layout: of the image.
        chosen: what the processor has chosen of a ladder, which holds.

    Raises:
        SettingsError: the method cannot reach the budget, or the policy forbids what comes out.
    """
    reduction = image.reduction
    if reduction is None:
        most = policy.largest(image.modality)
        if most and layout.tokens > most and not image.embeds:
            raise SettingsError(image.field, NO_REDUCTION, policy.limits(image.modality))
        return None
    if isinstance(reduction, OfLadder):
        return chosen
    try:
        geometry.stages(reduction, layout=layout)
        if reduction.budget is None:
            held = geometry.held(reduction, layout=layout)
            on_average = math.ceil(average_over_layers(held, geometry.spans))
            _within(policy, on_average, "budget", image.modality)
    except SettingsError as error:
        raise as_written(image, error) from None
    return reduction.for_tokens(layout.sent)


def as_written(image: Settled, error: SettingsError) -> SettingsError:
    """What is wrong with the settings of an image, in the words of its client.

    Args:
        image: what was settled for it.
        error: of a field of the settings: ``budget``, ``method``, ``options.tokens``.
    """
    if not image.field:
        whose = "this server's default"
        if image.name:
            whose = f"what the model name {image.name!r} stands for"
        allowed = f"{error.allowed} ({error.value} is {whose})"
        return SettingsError(BUDGET_KEY, error.value, allowed)
    field = image.field
    if field.endswith(".budget"):
        field = field.removesuffix("budget") + error.field
    return SettingsError(field, error.value, error.allowed)


def _default(policy: Policy, modality: str) -> Wish:
    """What holds where nothing is said. A default budget is an image's."""
    budget = policy.default_budget if modality == "image" else None
    return Wish(policy.default_method, policy.auto() if isinstance(budget, str) else budget)


def _by_name(policy: Policy, alias: str) -> Wish:
    """What holds for an image of which no more was said than a name of the model. That is as good
    as a number: who chose the name gets no less."""
    named = policy.named(alias)
    budget: int | Waiting | None = named.budget
    if isinstance(named, AutoBudget):
        budget = policy.auto()
    return Wish(named.method, budget, named.options, said=True, name=alias)


def _narrow(policy: Policy, around: Wish, level: Level, geometry: Geometry, modality: str) -> Wish:
    """What holds at a level for images or videos, given what holds around it."""
    said, field = _read(policy, level, geometry)
    if said is None:
        return around
    if said.get("method") == NO_REDUCTION:
        Reduction.parse(said, field)
        return Wish(NO_REDUCTION, None, field=field, said=True)
    if around.method == NO_REDUCTION:  # said farther away: no more than "not by default"
        around = _default(policy, modality)
    if said.get("budget") == AUTO:
        said = {**said, "budget": policy.auto()}
    method = said.get("method", around.method)
    inherited = dict(around.options) if method == around.method else {}
    if "budget" in said:
        inherited.pop("tokens", None)  # they are instead of a budget, and this one is nearer
    budget, options = said.get("budget", around.budget), said.get("options", inherited)
    settings = {**said, "method": method, "options": options}
    if isinstance(options, Mapping) and options.get("tokens") is not None:
        budget = said.get("budget")  # that of a level around does not hold: these are instead of it
        settings["budget"] = budget
    elif budget is None:
        settings["budget"] = 1  # checked where it is really needed
    else:
        settings["budget"] = budget
    if isinstance(budget, AutoBudget):
        settings["budget"] = AUTO
    counted = around.said or "budget" in said
    if field.endswith(REDUCTION_KEY):
        checked = Reduction.parse(settings, field)
        return Wish(checked.method, budget, checked.options, field, counted)
    if not isinstance(budget, Waiting):
        Reduction.of_budget(budget, field)
    return Wish(method, budget, options, field, counted)


def _read(policy: Policy, level: Level, geometry: Geometry) -> tuple[dict[str, Any] | None, str]:
    """What a level says in terms of ``reduction``, and under which key; None for nothing."""
    said = level.said
    budget, reduction = said.get(BUDGET_KEY), said.get(REDUCTION_KEY)
    detail = said.get(DETAIL_KEY)
    if budget is not None and reduction is not None:
        raise SettingsError(
            level.field(BUDGET_KEY), budget, f"left out where {REDUCTION_KEY} is given"
        )
    if detail is not None:
        field = level.field(DETAIL_KEY)
        meaning = detail_of(detail)
        if meaning is None:
            raise SettingsError(field, detail, "'low', 'high', 'original' or 'auto'")
        if meaning != "auto":
            if len(said) > 1:
                other = BUDGET_KEY if reduction is None else REDUCTION_KEY
                raise SettingsError(field, detail, f"left out or 'auto' where {other} is given")
            return _read_detail(policy, meaning, level, geometry), field
    if budget is not None:
        Reduction.of_budget(budget, level.field(BUDGET_KEY))
        return {"budget": budget}, level.field(BUDGET_KEY)
    if reduction is not None:
        field = level.field(REDUCTION_KEY)
        if not isinstance(reduction, Mapping):
            raise SettingsError(field, reduction, "an object with method, budget and options")
        check_size(reduction, field)
        return {k: v for k, v in reduction.items() if v is not None}, field
    return None, ""


def _read_detail(policy: Policy, detail: str, level: Level, geometry: Geometry) -> dict[str, Any]:
    if detail == "high":
        budget = policy.high()
        return {"method": NO_REDUCTION} if budget is None else {"budget": budget}
    if geometry.unsupported:
        raise SettingsError(
            level.field(DETAIL_KEY), detail, f"left out, 'auto' or 'high': {geometry.unsupported}"
        )
    return {"budget": policy.low(geometry)}


def _admit(policy: Policy, wish: Wish, image: Level, geometry: Geometry) -> Settled:
    """A wish as settings, where the model can follow it and the policy lets it.

    What the image's tokens have a say in is left to :func:`fit`.
    """
    is_video = image.modality == "video"
    if wish.method == NO_REDUCTION:
        return Settled(None, wish.field, image.embeds, image.modality)
    no_default = wish.budget is None and not wish.name
    if not wish.field and (no_default or image.embeds):
        return Settled(None, wish.field, image.embeds, image.modality)
    if wish.budget is None and wish.options.get("tokens") is None:
        of_videos = " for videos" if is_video else ""
        raise SettingsError(
            f"{wish.field}.budget", None, f"given: this server has no default budget{of_videos}"
        )
    if geometry.unsupported:
        raise SettingsError(wish.field, _word(wish.budget), f"left out: {geometry.unsupported}")
    if image.embeds:
        value = _word(wish.budget)
        raise SettingsError(wish.field, value, f"left out for {image.modality}_embeds")
    whole = wish.field.endswith(REDUCTION_KEY)
    if wish.method not in policy.methods:
        raise SettingsError(
            f"{wish.field}.method" if whole else wish.field,
            wish.method,
            f"one of {', '.join(policy.methods)}, {BY_POLICY}",
        )
    field = f"{wish.field}.budget" if whole else wish.field
    if is_video and isinstance(wish.budget, Waiting):
        raise SettingsError(field, _word(wish.budget), A_NUMBER_FOR_A_VIDEO)
    reduction: Reduction
    if isinstance(wish.budget, Waiting):
        reduction = wish.budget.with_method(wish.method, wish.options)
    else:
        if wish.budget is not None:
            _within(policy, wish.budget, field, image.modality)
        settings = {"method": wish.method, "budget": wish.budget, "options": wish.options}
        reduction = Reduction.parse(settings)
    if is_video and not whole and (reason := geometry.refuses(reduction.spec, video=True)):
        able = ", ".join(geometry.methods(video=True))
        if able:  # nobody has named the method here
            allowed = f"in a {REDUCTION_KEY} with one of the methods {able}: {reason}"
            raise SettingsError(field, wish.budget, allowed)
    if geometry.by_image or is_video:  # what the model lacks for the method, whatever the image
        geometry.check_method(reduction, field, is_video)
    return Settled(reduction, field, modality=image.modality, name=wish.name)


def _lowered(policy: Policy, wish: Wish, settled: Settled, image: Level) -> Settled:
    """What was settled for an image, a rung lower if its budget is the server's affair.

    One with a uuid keeps its settings, or it would not be found by its uuid when they are others.
    """
    automatic = isinstance(settled.reduction, AutoBudget)
    by_stage = wish.options.get("tokens") is not None
    if image.embeds or image.named or by_stage or (wish.said and not automatic):
        return settled
    if isinstance(settled.reduction, AutoBudget):
        return settled._replace(reduction=settled.reduction.model_copy(update={"lower": 1}))
    assert not isinstance(wish.budget, Waiting)
    lower = Lowered(
        method=wish.method,
        options=dict(wish.options),
        rungs=policy.auto_budgets,
        least=policy.min_budget,
        most=policy.max_budget,
        above=wish.budget,
    )
    return settled._replace(reduction=lower)


def _word(budget: int | Waiting | None) -> int | str | None:
    """A budget as a client says it."""
    if isinstance(budget, Waiting):
        return AUTO if isinstance(budget, AutoBudget) else "low"
    return budget


def _within(policy: Policy, budget: int, field: str, modality: str) -> None:
    most = policy.largest(modality)
    if not policy.min_budget <= budget <= (most or MAX_BUDGET):
        raise SettingsError(field, budget, policy.limits(modality))
