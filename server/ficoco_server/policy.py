# SPDX-License-Identifier: Apache-2.0
"""What a server allows and what it does where a request says nothing.

The policy comes from environment variables, so that every process of a server and a plain
``vllm serve`` read it alike; the flags of ``vllm-ficoco serve`` only set them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from vllm_ficoco import schedule
from vllm_ficoco.methods import METHODS
from vllm_ficoco.settings import (
    AUTO,
    AUTO_BUDGETS,
    DEFAULT_METHOD,
    MAX_BUDGET,
    NO_REDUCTION,
    AutoBudget,
    Reduction,
    SettingsError,
    ShareOfTokens,
    declared,
)
from vllm_ficoco.vision.geometry import Geometry
from vllm_ficoco.vision.layout import Layout

# Not VLLM_FICOCO_: that prefix is vLLM's own, it warns about every name in it that it does not
# know, and refuses to start with --fail-on-environ-validation.
ENVIRONMENT_PREFIX = "FICOCO_"

BY_POLICY = "by this server's policy"

LOW_SHARE = 9
"""``detail: low`` is the number of an image's tokens divided by this, where nothing was set."""

LOW_MARK = 0.8
"""The low mark where only the high one is given: this share of it."""


class PolicyError(ValueError):
    """The server's own configuration is wrong; it must not start."""


class Marks(NamedTuple):
    """At which loads pressure begins and ends."""

    high: float
    low: float

    @classmethod
    def parse(cls, text: str) -> Marks:
        """``0.85:0.7``, or ``0.85``.

        Raises:
            ValueError: it is not that.
        """
        high, colon, low = text.partition(":")
        marks = cls(float(high), float(low) if colon else LOW_MARK * float(high))
        if not 0 < marks.low <= marks.high <= 1:
            raise ValueError(text)
        return marks


class Policy(BaseModel):
    """Defaults and limits of a server."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    default_method: str = DEFAULT_METHOD
    """The method where a request names none."""
    default_budget: int | Literal["auto"] | None = None
    """The budget of an image where a request names none; without one, such images are not reduced.
    Videos never are."""
    min_budget: int = 1
    max_budget: int | None = None
    """Of images. With a largest budget, those that ask for nothing get it where no default is
    set."""
    methods: tuple[str, ...] = tuple(METHODS)
    """What requests may name. ``none`` is always among them, within ``max_budget``."""
    low_budget: int | None = None
    """Budget of ``detail: low``; by default a ninth of the image's visual tokens."""
    high_budget: int | None = None
    """Budget of ``detail: high``; by default no reduction."""
    auto_budgets: tuple[str, ...] = AUTO_BUDGETS
    """Among which ``auto`` chooses, descending: shares of an image's tokens or numbers of them."""
    graphs: tuple[str, ...] = ()
    """Settings whose images run in CUDA graphs of the tower, see :func:`settings.declared`."""
    preview: bool = True
    """Whether ``POST /v1/reduction/preview`` is there."""
    pressure: Marks | None = None
    """Loads at which budgets that nobody has said begin and end to yield; by default never."""
    alias: Mapping[str, Mapping[str, Any]] = {}
    """Names under which clients find the model with another default for images: what each says of
    method, budget and options. See :meth:`named`."""
    page: bool = True
    """Whether ``GET /`` is a page to see budgets at work."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Policy:
        """The policy of ``FICOCO_DEFAULT_METHOD``, ``FICOCO_MIN_BUDGET`` and so on.

        Raises:
            PolicyError: a value is wrong, or two of them do not go together.
        """
        given: dict[str, Any] = {}
        for name in cls.model_fields:
            text = environment.get(ENVIRONMENT_PREFIX + name.upper(), "").strip()
            if not text:
                continue
            if name == "default_budget" and text.lower() == AUTO:
                given[name] = AUTO
            elif name == "methods":
                given[name] = _entries(text)
            elif name == "auto_budgets":
                given[name] = _rungs(name, text)
            elif name == "graphs":
                given[name] = _declared(name, text)
            elif name == "default_method":
                given[name] = text
            elif name == "pressure":
                given[name] = None if text.lower() == NO_REDUCTION else _marks(name, text)
            elif name == "alias":
                given[name] = _aliases(name, text)
            elif name in ("page", "preview"):
                given[name] = _switch(name, text)
            elif text.lower() != NO_REDUCTION:
                given[name] = _budget(name, text)
        policy = cls(**given)
        policy.check()
        if policy.default_budget is None and policy.max_budget is not None:
            policy = policy.model_copy(update={"default_budget": policy.max_budget})
        return policy

    def check(self) -> None:
        """Whether the values go together.

        Raises:
            PolicyError: which do not.
        """
        unknown = sorted({*self.methods, self.default_method} - set(METHODS))
        if unknown:
            raise PolicyError(
                f"unknown method {', '.join(unknown)} in the reduction policy; "
                f"known: {', '.join(sorted(METHODS))}"
            )
        if self.default_method == NO_REDUCTION:
            raise PolicyError(
                "the default method cannot be 'none': leave out the default budget instead"
            )
        default = f"the default method {self.default_method!r} ({_names('default_method')})"
        self._check_allowed(self.default_method, default)
        limit = self.max_budget or MAX_BUDGET
        if self.min_budget > limit:
            raise PolicyError(
                f"the smallest budget {self.min_budget} ({_names('min_budget')}) is above the "
                f"largest, {limit} ({_names('max_budget')})"
            )
        for name in ("default_budget", "low_budget", "high_budget"):
            value = getattr(self, name)
            self._check_within(value, f"the {name.replace('_', ' ')} {value} ({_names(name)})")

        for text in self.graphs:
            method, budget = declared(text)
            self._check_allowed(method, f"{text} ({_names('graphs')}) is by a method that")
            self._check_within(budget, f"{text} ({_names('graphs')})")

        for name in self.alias:
            reduction, whose = self.named(name), _whose(name)
            if reduction.method != NO_REDUCTION:
                self._check_allowed(reduction.method, f"{whose}: the method {reduction.method!r}")
            elif self.max_budget is not None:
                raise PolicyError(
                    f"{whose}: images may not stay unreduced, the largest budget is "
                    f"{self.max_budget} ({_names('max_budget')})"
                )
            said = self.alias[name].get("budget")  # if by stage, or auto, the model is asked
            self._check_within(said, f"{whose}: the budget {said}")

    def _check_allowed(self, method: str, what: str) -> None:
        """Whether a method is one of the allowed ones.

        Raises:
            PolicyError: it is not; the sentence begins with what it is.
        """
        if method not in self.methods:
            raise PolicyError(
                f"{what} is not among the allowed ones: {', '.join(self.methods)} "
                f"({_names('methods')})"
            )

    def _check_within(self, budget: object, what: str) -> None:
        """Whether a budget that is a number is within the limits.

        Raises:
            PolicyError: it is not; the sentence begins with what it is.
        """
        limit = self.max_budget or MAX_BUDGET
        if isinstance(budget, int) and not self.min_budget <= budget <= limit:
            raise PolicyError(
                f"{what} is outside of the server's own limits, {self.min_budget} to {limit}"
            )

    def named(self, alias: str) -> Reduction:
        """What an image gets of which nobody says more than this name of the model.

        Raises:
            PolicyError: it is no setting.
        """
        said = {"method": self.default_method, **self.alias[alias]}
        try:
            reduction = Reduction.parse(said, "")
        except SettingsError as error:
            raise PolicyError(f"{_whose(alias)}: {str(error).removeprefix('.')}") from None
        if isinstance(reduction, AutoBudget):
            return self.auto().with_method(reduction.method, reduction.options)
        return reduction

    def check_names(self, served: Collection[str]) -> None:
        """Whether names of the model with another default are nobody else's.

        Args:
            served: names of models and adapters that the server has.

        Raises:
            PolicyError: one is.
        """
        taken = [name for name in self.alias if name in served]
        if taken:
            raise PolicyError(
                f"{_whose(taken[0])}: this server has a model or an adapter of this name; all that "
                f"are taken: {', '.join(served)}"
            )

    def check_model(self, geometry: Geometry, largest: Layout | None = None) -> None:
        """Whether the model can do what the server's defaults say.

        Args:
            geometry: the model's.
            largest: of the image with most tokens; by default the one that all images have.

        Raises:
            PolicyError: why not.
        """
        if geometry.unsupported:
            if self.default_budget is not None:
                raise PolicyError(
                    "a default or largest budget cannot be kept with this model: "
                    f"{geometry.unsupported}"
                )
            if self.pressure is not None:
                raise PolicyError(
                    f"budgets of this model cannot yield to pressure ({_names('pressure')}): "
                    f"{geometry.unsupported}"
                )
            for name in self.alias:
                raise PolicyError(f"{_whose(name)}: {geometry.unsupported}")
            return
        video = largest is not None and largest.is_video  # a model that takes nothing else
        if reason := geometry.refuses(METHODS[self.default_method], video):
            able = [name for name in self.methods if not geometry.refuses(METHODS[name], video)]
            raise PolicyError(
                f"{self.default_method!r} cannot be the default method "
                f"({_names('default_method')}): {reason}; of the allowed ones these can: "
                f"{', '.join(able) or 'none'}"
            )
        layout = largest or geometry.layout
        low = self.low(geometry)
        if isinstance(low, ShareOfTokens):
            low = low.count(layout.tokens)
        default = self.default_budget
        if isinstance(default, str):  # of auto, the method need not reach the lower rungs
            default = self.auto().ladder(layout.tokens)[0]
        for name, budget in (
            ("default_budget", default),
            ("low_budget", low),
            ("high_budget", self.high()),
        ):
            try:
                if budget is not None:
                    reduction = Reduction(method=self.default_method, budget=budget)
                    geometry.stages(reduction, layout=layout)
            except SettingsError as error:
                raise PolicyError(
                    f"the {name.replace('_', ' ')} {budget} ({_names(name)}) does not go with the "
                    f"default method {self.default_method!r} on this model: it must be "
                    f"{error.allowed}"
                ) from None

        for name in self.alias:
            self._check_alias(name, geometry, layout)

        for text in self.graphs if not geometry.by_image else ():
            method, rung = declared(text)
            (budget,) = schedule.ladder(geometry.tokens, [rung])
            try:
                geometry.parts(Reduction(method=method, budget=budget))
            except SettingsError as error:
                raise PolicyError(
                    f"{text} ({_names('graphs')}) is not possible with this model: the budget "
                    f"must be {error.allowed}"
                ) from None

    def _check_alias(self, name: str, geometry: Geometry, layout: Layout) -> None:
        """Whether the model can do what one of its names says, with its largest image.

        Raises:
            PolicyError: why not.
        """
        reduction = self.named(name)
        try:
            check_reachable(reduction, geometry, layout)
        except SettingsError as error:
            raise PolicyError(f"{_whose(name)}, on this model: {error}") from None
        if reduction.budget is None:
            held = geometry.held(reduction, layout=layout)
            average = math.ceil(schedule.average_over_layers(held, geometry.spans))
            if not self.min_budget <= average <= (self.max_budget or MAX_BUDGET):
                raise PolicyError(
                    f"{_whose(name)}: it keeps {average} tokens on average, and must be "
                    f"{self.limits('image')}"
                )

    def graphed(self) -> list[str]:
        """What :data:`GRAPHS_KEY` of the model's configuration says: the settings of
        ``graphs``, and those that images get by themselves or by a word (default, low, auto, the
        model's names)."""
        by_word: list[tuple[str, Sequence[int | str | None]]] = [
            (
                self.default_method,
                (
                    self.default_budget if self.default_budget != AUTO else None,
                    self.low_budget or f"1/{LOW_SHARE}",
                    *self.auto_budgets,
                    # What shares of the tokens that are outside of the limits become.
                    self.min_budget if self.min_budget > 1 else None,
                    self.max_budget,
                ),
            )
        ]
        for named in map(self.named, self.alias):
            usual = named.options == METHODS[named.method].options().model_dump(mode="json")
            if named.method != NO_REDUCTION and usual:
                waits = isinstance(named, AutoBudget)
                by_word.append((named.method, self.auto_budgets if waits else (named.budget,)))
        own = [
            f"{method}@{budget}"
            for method, budgets in by_word
            if METHODS[method].fits_a_graph
            for budget in budgets
            if budget not in (None, "1")
        ]
        return list(dict.fromkeys([*self.graphs, *own]))

    def auto(self) -> AutoBudget:
        """Budget of an image that asks for ``auto``."""
        return AutoBudget(
            method=self.default_method,
            rungs=self.auto_budgets,
            least=self.min_budget,
            most=self.max_budget,
        )

    def low(self, geometry: Geometry) -> int | ShareOfTokens:
        """Budget of ``detail: low``; a share, where an image's tokens depend on its size."""
        share = ShareOfTokens(
            method=self.default_method,
            share=LOW_SHARE,
            least=self.min_budget,
            most=self.max_budget,
        )
        return self.low_budget or (share if geometry.by_image else share.count(geometry.tokens))

    def high(self) -> int | None:
        """Budget of ``detail: high``; None for no reduction."""
        return self.high_budget or self.max_budget

    def largest(self, modality: str) -> int | None:
        """The largest budget of an image. A video has none: it is many images."""
        return self.max_budget if modality == "image" else None

    def limits(self, modality: str) -> str:
        """The allowed budgets, in words."""
        largest = self.largest(modality)
        upper = f" to {largest}" if largest else " on"
        return f"a budget from {self.min_budget}{upper}, {BY_POLICY}"


def check_reachable(reduction: Reduction, geometry: Geometry, layout: Layout) -> None:
    """Whether the model can do with an image of this layout what it gets by default.

    Raises:
        SettingsError: why not.
    """
    if reduction.method == NO_REDUCTION:
        return
    if isinstance(reduction, AutoBudget):  # the method need not reach the lower rungs
        reduction = reduction.at(reduction.ladder(layout.tokens)[0])
    geometry.check_method(reduction, video=layout.is_video)
    geometry.stages(reduction, layout=layout)


def _whose(alias: str) -> str:
    """A name of the model, for messages."""
    return f"the model name {alias!r} ({_names('alias')})"


def _names(field: str) -> str:
    """A value of the policy as an operator knows it."""
    return f"{ENVIRONMENT_PREFIX}{field.upper()}, --reduction-{field.replace('_', '-')}"


def _wrong(name: str, text: str, allowed: str) -> PolicyError:
    return PolicyError(
        f"the {name.replace('_', ' ')} {text!r} ({_names(name)}) is not valid: it must be {allowed}"
    )


def _marks(name: str, text: str) -> Marks:
    try:
        return Marks.parse(text)
    except ValueError:
        allowed = (
            "a share of the server above 0 and not above 1, as in 0.85, or two, as in 0.85:0.7, "
            "the second not above the first"
        )
        raise _wrong(name, text, allowed) from None


def _switch(name: str, text: str) -> bool:
    if text not in ("0", "1"):
        raise PolicyError(
            f"{ENVIRONMENT_PREFIX}{name.upper()}={text} is not valid: it must be 1, or 0 for none"
        )
    return text == "1"


def _budget(name: str, text: str) -> int:
    try:
        budget = int(text)
    except ValueError:
        budget = 0
    if not 1 <= budget <= MAX_BUDGET:
        auto = f", or {AUTO!r}" if name == "default_budget" else ""
        raise _wrong(name, text, f"a whole number from 1 to {MAX_BUDGET}{auto}")
    return budget


def _entries(text: str) -> tuple[str, ...]:
    """What stands between commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _aliases(name: str, text: str) -> dict[str, dict[str, Any]]:
    """``fast=64; tiny={"method": "tome", "budget": 16}``, by name."""
    found: dict[str, dict[str, Any]] = {}
    rest = text
    try:
        while rest := rest.lstrip("; \n"):
            alias, _, rest = (part.strip() for part in rest.partition("="))
            if rest.startswith("{"):
                said, end = json.JSONDecoder().raw_decode(rest)
                rest = rest[end:].lstrip()
            else:
                value, semicolon, rest = rest.partition(";")
                said, rest = _said(value.strip()), semicolon + rest
            if not alias or rest[:1] not in ("", ";"):
                raise ValueError
            if alias in found:
                raise _wrong(name, text, f"with every name once, and {alias!r} is there twice")
            found[alias] = said
    except PolicyError:
        raise
    except (ValueError, RecursionError):
        allowed = (
            "NAME=BUDGET, a number, 'auto' or 'none', or "
            'NAME={"method": METHOD, "budget": BUDGET}, with semicolons between several'
        )
        raise _wrong(name, text, allowed) from None
    return found


def _said(value: str) -> dict[str, Any]:
    """What the budget of a name says.

    Raises:
        ValueError: it is no budget.
    """
    if value.lower() == NO_REDUCTION:
        return {"method": NO_REDUCTION}
    return {"budget": AUTO if value.lower() == AUTO else int(value)}


def _declared(name: str, text: str) -> tuple[str, ...]:
    entries = _entries(text)
    for entry in entries:
        try:
            declared(entry)
        except ValueError as error:
            raise _wrong(name, text, f"a list, with commas, of which each is {error}") from None
    return entries


def _rungs(name: str, text: str) -> tuple[str, ...]:
    """The entries of a ladder, in the one spelling that each has."""
    rungs = []
    for entry in text.split(","):
        try:
            rungs.append(schedule.rung(entry.strip()))
        except ValueError as error:
            raise _wrong(name, text, f"a list, with commas, of which each is {error}") from None
    for kind in (int, Fraction):  # of a share and a number, the image decides which is more
        same = [rung for rung in rungs if isinstance(rung, kind)]
        if any(upper <= lower for upper, lower in pairwise(same)):
            raise _wrong(name, text, "descending, without repeating one")
    if any(isinstance(rung, int) and rung > MAX_BUDGET for rung in rungs):
        raise _wrong(name, text, f"of no number above {MAX_BUDGET}")
    return tuple(map(str, rungs))
