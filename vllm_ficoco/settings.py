# SPDX-License-Identifier: Apache-2.0
"""The settings of a reduction: what a request asks for, checked, in one canonical form.

This is the only definition. The multimodal processor, the model, the front end and the tests
all read requests through :class:`Reduction`, so none of them can understand a budget differently.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from vllm_ficoco import schedule
from vllm_ficoco.methods import METHODS, Method

DEFAULT_METHOD = "score"
"""The method of a request that names a budget and nothing else."""

MAX_BUDGET = 1_000_000
"""Largest budget that is taken for a number of tokens and not for a mistake."""

AUTO = "auto"
"""The budget that an image gets by what is in it."""

A_NUMBER_FOR_A_VIDEO = "a number for a video: only images say what they need"
"""In the words of a refusal of :data:`AUTO`."""

AUTO_BUDGETS = ("1", "1/3", "2/9", "1/9")
"""The budgets among which ``auto`` chooses where nothing was set, see :func:`schedule.rung`."""

_BUDGET_RANGE = f"a whole number from 1 to {MAX_BUDGET}, or {AUTO!r}"

_MOST_ENTRIES = 1000
"""In settings, which name a few options and at most a number for every layer of a decoder."""

_USUAL = frozenset({"method", "budget", "options"})

NO_REDUCTION = "none"
"""The method that keeps every token."""

BUDGET_KEY = "visual_token_budget"
REDUCTION_KEY = "reduction"
"""The two keys under which settings travel in vLLM's ``mm_processor_kwargs``."""


class SettingsError(ValueError):
    """A setting that cannot be used: which field, what was given, what is allowed.

    Args:
        field: dotted path of the setting, as the client wrote it (``reduction.budget``).
        value: what was given.
        allowed: what would have been right, as the rest of the sentence "it must be ...".
    """

    def __init__(self, field: str, value: object, allowed: str) -> None:
        # A path may have a client's own key in it, and half a surrogate pair cannot be sent back.
        field = _cut(field, 200).encode(errors="backslashreplace").decode()
        self.field, self.value, self.allowed = field, value, allowed
        super().__init__(f"{field} = {_shown(value)} is not valid: it must be {allowed}.")

    def __reduce__(self) -> tuple[type[SettingsError], tuple[str, object, str]]:
        return type(self), (self.field, self.value, self.allowed)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def _shown(value: object) -> str:
    """The first 100 characters of a value's ``repr``; no more of it than that is looked at."""
    shown = ""
    for piece in _pieces(value):
        shown += piece
        if len(shown) > 100:
            break
    return _cut(shown, 100)


def _pieces(value: object) -> Iterator[str]:
    """What the ``repr`` of a JSON value is made of, from the left."""
    if isinstance(value, str | bytes):
        yield repr(value[:100])
    elif isinstance(value, dict):
        yield "{"
        for i, (key, inner) in enumerate(value.items()):
            yield ", " if i else ""
            yield from _pieces(key)
            yield ": "
            yield from _pieces(inner)
        yield "}"
    elif isinstance(value, list):
        yield "["
        for i, inner in enumerate(value):
            yield ", " if i else ""
            yield from _pieces(inner)
        yield "]"
    else:
        try:
            yield repr(value)
        except (ValueError, RecursionError):  # thousands of digits
            yield f"a {type(value).__name__} too large to print"


def check_size(value: object, field: str) -> None:
    """Refuse settings that are too large to be any, before work is done on all of them.

    Raises:
        SettingsError: an object or a list, with all inside of it, has more than 1,000 entries.
    """
    waiting, seen = [value], 0
    while waiting:
        outer = waiting.pop()
        if isinstance(outer, Mapping | list | tuple):
            seen += len(outer)
            if seen > _MOST_ENTRIES:
                raise SettingsError(field, value, f"of no more than {_MOST_ENTRIES} entries")
            waiting.extend(outer.values() if isinstance(outer, Mapping) else outer)


class Reduction(BaseModel):
    """How one image or video is reduced: a method, a budget and the method's options.

    Two settings that mean the same compare equal, hash equal and have the same :attr:`key`,
    because defaults are filled in, names resolved and options sorted when it is made. Use
    :meth:`parse` for anything that comes from outside: it raises :class:`SettingsError` only.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    method: str = DEFAULT_METHOD
    budget: int | None = None
    """Visual tokens of it to keep, on average over the decoder's layers. What has no more than that
    is not reduced. None where ``options.tokens`` says what each stage keeps."""
    options: dict[str, Any] = {}

    @field_validator("method")
    @classmethod
    def _known_method(cls, name: str) -> str:
        if name not in METHODS:
            raise SettingsError("method", name, f"one of {', '.join(sorted(METHODS))}")
        return name

    @field_validator("budget")
    @classmethod
    def _sensible_budget(cls, budget: int | None) -> int | None:
        if budget is not None and not 1 <= budget <= MAX_BUDGET:
            raise SettingsError("budget", budget, _BUDGET_RANGE)
        return budget

    @model_validator(mode="after")
    def _canonical_form(self) -> Reduction:
        try:
            options = METHODS[self.method].options.model_validate(self.options)
        except ValidationError as error:
            raise _explain(error, "options", METHODS[self.method].options) from None
        # Adding zero makes 0.0 of -0.0, which is equal but spelt differently.
        canonical = {
            name: value + 0.0 if isinstance(value, float) else value
            for name, value in sorted(options.model_dump(mode="json").items())
        }
        tokens = canonical.get("tokens")
        if tokens is None and self.budget is None and self.method != NO_REDUCTION:
            raise SettingsError("budget", None, _BUDGET_RANGE)
        if tokens is not None and self.budget is not None:
            raise SettingsError("budget", self.budget, "left out where options.tokens is given")
        # The model is frozen for its users; here it is still being made.
        object.__setattr__(self, "options", canonical)
        if self.method == NO_REDUCTION:
            object.__setattr__(self, "budget", MAX_BUDGET)
        return self

    @classmethod
    def parse(cls, value: object, field: str = REDUCTION_KEY) -> Reduction:
        """Check what a client sent: a mapping with ``method``, ``budget``, ``options``.

        The budget is a number or ``auto``, which gives an :class:`AutoBudget`.

        Args:
            value: the client's value.
            field: where it stood, for the message.

        Raises:
            SettingsError: whatever is wrong with it.
        """
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise SettingsError(field, value, "an object with method, budget and options")
        check_size(value, field)
        given = {k: v for k, v in value.items() if v is not None}
        budget, method = given.get("budget"), given.get("method", DEFAULT_METHOD)
        usual = type(budget) is int and type(method) is str and not given.keys() - _USUAL
        try:
            if cls is Reduction and usual and given.get("options", {}) == {}:
                return _without_options(method, budget)
            if not _is_auto(budget):
                return cls.model_validate(given)
            options = given.get("options")
            if isinstance(options, Mapping) and options.get("tokens") is not None:
                allowed = "left out where options.tokens is given"
                raise SettingsError(f"{field}.budget", AUTO, allowed)
            checked = cls.model_validate({**given, "budget": 1})
            if checked.method == NO_REDUCTION:
                return checked
            return AutoBudget(method=checked.method, options=checked.options)
        except ValidationError as error:
            raise _explain(error, field, cls) from None

    @classmethod
    def of_budget(cls, budget: object, field: str = BUDGET_KEY) -> Reduction:
        """The default method at this budget.

        Raises:
            SettingsError: the budget is no whole number in range, and not ``auto``.
        """
        if isinstance(budget, cls):  # what the word auto came to
            return budget
        if _is_auto(budget):
            return AutoBudget()
        if isinstance(budget, bool) or not isinstance(budget, int) or not 1 <= budget <= MAX_BUDGET:
            raise SettingsError(field, budget, _BUDGET_RANGE)
        return _without_options(DEFAULT_METHOD, int(budget))

    @property
    def spec(self) -> Method:
        """The method that the settings name."""
        return METHODS[self.method]

    @property
    def key(self) -> str:
        """Canonical JSON: one spelling for one meaning, fit for a cache key."""
        # Under a name that pydantic takes for no field; a request asks for it a dozen times.
        known: str | None = self.__dict__.get("_key")
        if known is None:
            known = json.dumps(self.model_dump(), sort_keys=True, separators=(",", ":"))
            self.__dict__["_key"] = known
        return known

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """As pydantic's; a copy has a key of its own."""
        made = super().model_copy(update=update, deep=deep)
        made.__dict__.pop("_key", None)
        return made

    def __hash__(self) -> int:
        return hash(self.key)

    def for_tokens(self, tokens: int) -> Reduction | None:
        """These settings for an image of so many visual tokens; None where nothing is reduced."""
        whole = self.budget is not None and self.budget >= tokens
        return None if self.method == NO_REDUCTION or whole else self

    @property
    def keeps_newlines(self) -> bool:
        """Whether the newline tokens of an image in tiles stay."""
        return self.options.get("newlines") == "all"

    def parsed_options(self) -> Any:
        """The options as the method's own model."""
        return self.spec.options.model_validate(self.options)


def declared(text: str) -> tuple[str, Fraction | int]:
    """What is reduced in CUDA graphs: a method and a budget, a number or a share of the tokens.

    Args:
        text: ``score@64`` or ``score@1/9``; the method's options are the default ones.

    Raises:
        ValueError: it is not that; says what is allowed.
    """
    method, _, budget = text.partition("@")
    able = [n for n, spec in METHODS.items() if spec.fits_a_graph and n != NO_REDUCTION]
    if method not in able:
        raise ValueError(
            "METHOD@TOKENS, as in score@64 or score@1/9, with one of the methods "
            f"{', '.join(able)} (others read the question or have a part in the decoder)"
        )
    if budget.isdecimal() and 1 <= int(budget) <= MAX_BUDGET:
        return method, int(budget)
    try:
        return method, schedule.rung(budget)
    except ValueError:
        words = f"a whole number from 1 to {MAX_BUDGET} or a share such as 1/9"
        raise ValueError(f"METHOD@TOKENS with {words} behind the @") from None


class Waiting(Reduction):
    """A budget that waits for the image. A server makes them, or clients with the word ``auto``."""

    budget: int | None = 1
    """Nobody's."""

    def with_method(self, method: str, options: Mapping[str, Any]) -> Self:
        """The same by another method."""
        return self.model_validate({**dict(self), "method": method, "options": dict(options)})


class ShareOfTokens(Waiting):
    """A budget that is a share of the tokens that an image has.

    A server makes one of ``detail: low`` where an image's tokens depend on its size. Clients name
    counts: nothing that they send becomes one.
    """

    share: int
    """The budget is the number of tokens divided by this,"""
    least: int
    """but not less than this"""
    most: int | None = None
    """and not more than this."""

    def count(self, tokens: int) -> int:
        """The budget of an image of so many visual tokens."""
        budget = max(tokens // self.share, self.least)
        return min(budget, self.most or budget)

    def for_tokens(self, tokens: int) -> Reduction | None:
        settled = Reduction(method=self.method, budget=self.count(tokens), options=self.options)
        return settled.for_tokens(tokens)


class OfLadder(Waiting):
    """A budget that is one of a ladder's.

    Which of them a method can reach depends on the image, too: the processor takes the first one
    that it can, see :attr:`choices` of the two kinds.
    """

    rungs: tuple[str, ...] = AUTO_BUDGETS
    """Shares of an image's tokens or numbers of them, descending, as :func:`schedule.rung`."""
    least: int = 1
    """No budget is smaller than this"""
    most: int | None = None
    """or larger than this."""

    def ladder(self, tokens: int) -> list[int]:
        """The budgets for an image of so many tokens, descending, each one once."""
        counts = schedule.ladder(tokens, _parsed(self.rungs), self.least, self.most)
        return sorted(set(counts), reverse=True)

    def rung_name(self, budget: int, tokens: int) -> str:
        """How the rung is called that gives such an image this budget; a number, if none does."""
        rungs = _parsed(self.rungs)
        counts = schedule.ladder(tokens, rungs, self.least, self.most)
        named = zip(counts, map(schedule.rung_name, rungs), strict=True)
        return next((name for count, name in named if count == budget), str(budget))

    def at(self, budget: int) -> Reduction:
        """The settings with one of the budgets."""
        return Reduction(method=self.method, budget=budget, options=self.options)

    def for_tokens(self, tokens: int) -> Reduction | None:
        raise TypeError("a budget of a ladder is settled by the processor")


class AutoBudget(OfLadder):
    """The budget that an image asks for by what is in it (:mod:`vllm_ficoco.vision.complexity`)."""

    lower: int = 0
    """How many rungs less than that."""

    def choices(self, tokens: int, share: Fraction, least: Fraction) -> list[int]:
        """The budgets for an image, the best one first, then what is to be had if a method cannot
        reach that: the larger ones, ascending.

        Args:
            tokens: of the image.
            share: of them that the image asks for: the smallest rung that has as many.
            least: share of them below which ``lower`` does not lead.
        """
        rungs = self.ladder(tokens)

        def smallest(share: Fraction) -> int:
            return sum(count >= int(tokens * share) for count in rungs[1:])

        chosen = max(smallest(share), min(smallest(share) + self.lower, smallest(least)))
        return rungs[chosen::-1]


class Lowered(OfLadder):
    """A budget, or that of no reduction, one rung lower."""

    above: int | None = None
    """The budget; None for all tokens."""

    def choices(self, tokens: int) -> list[int]:
        """The budgets for an image, the best one first: the largest rung below, what a method can
        reach in its place, and the budget as it was."""
        whole = min(self.above or tokens, tokens)
        below = [count for count in self.ladder(tokens) if count < whole]
        return [*below[:1], whole]


@lru_cache(maxsize=1024)
def _without_options(method: str, budget: int) -> Reduction:
    """A method at a budget: the same object every time, because most requests say the same.

    Raises:
        ValidationError: they cannot be used.
    """
    return Reduction(method=method, budget=budget)


@lru_cache
def _parsed(rungs: tuple[str, ...]) -> tuple[Fraction | int, ...]:
    return tuple(map(schedule.rung, rungs))


MODALITIES = ("image", "video")
"""What can be reduced, as vLLM calls it."""


def per_item(
    kwargs: Mapping[str, object], counts: Mapping[str, int]
) -> dict[str, list[Reduction | None]]:
    """The settings of every image and video of a prompt, from its ``mm_processor_kwargs``.

    ``visual_token_budget`` is a number or ``auto``, ``reduction`` an object: for all of them, or,
    in a prompt with one modality, a list with one entry an item, ``None`` for one that keeps all
    its tokens. Or either is an object by modality, ``{"image": ..., "video": ...}``, with such a
    value or list for each; one that is left out is not reduced.

    Args:
        kwargs: the prompt's.
        counts: by modality, how many items the prompt has.

    Raises:
        SettingsError: both keys are given, a list has the wrong length or two modalities to stand
            for, an entry is wrong, or a video's budget is ``auto``.
    """
    budget, reduction = kwargs.get(BUDGET_KEY), kwargs.get(REDUCTION_KEY)
    if budget is not None and reduction is not None:
        raise SettingsError(BUDGET_KEY, budget, f"left out where {REDUCTION_KEY} is given")
    field, value = (BUDGET_KEY, budget) if reduction is None else (REDUCTION_KEY, reduction)
    if isinstance(value, Mapping) and any(modality in value for modality in MODALITIES):
        check_size(value, field)
        if unknown := [key for key in value if key not in MODALITIES]:
            raise SettingsError(
                f"{field}.{unknown[0]}",
                value[unknown[0]],
                f"left out: an object by modality has {' and '.join(MODALITIES)} alone",
            )
        each = {modality: (f"{field}.{modality}", value.get(modality)) for modality in counts}
    else:
        if _is_list(value) and sum(count > 0 for count in counts.values()) > 1:
            allowed = 'an object with a list for each, {"image": [...], "video": [...]}'
            raise SettingsError(field, value, f"{allowed}, where a prompt has images and videos")
        # What is said of nothing is looked at, too.
        default = next((m for m, count in counts.items() if count), next(iter(counts)))
        said = {default} if _is_list(value) else {*counts}
        each = {m: (field, value if m in said else None) for m in counts}
    return {
        modality: _of_items(modality, count, *each[modality], of_budgets=reduction is None)
        for modality, count in counts.items()
    }


def _of_items(
    modality: str, count: int, field: str, value: object, of_budgets: bool
) -> list[Reduction | None]:
    """The settings of every item of one modality."""

    def read(value: object, field: str) -> Reduction:
        made = Reduction.of_budget(value, field) if of_budgets else Reduction.parse(value, field)
        if modality == "video" and count and isinstance(made, AutoBudget):
            field = field if of_budgets else f"{field}.budget"
            raise SettingsError(field, AUTO, A_NUMBER_FOR_A_VIDEO)
        return made

    if value is None:
        return [None] * count
    if not _is_list(value):
        return [read(value, field)] * count
    assert isinstance(value, Sequence)
    if len(value) != count:
        raise SettingsError(field, value, f"a list with one entry per {modality} ({count})")
    return [None if v is None else read(v, f"{field}[{i}]") for i, v in enumerate(value)]


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _is_auto(budget: object) -> bool:
    return isinstance(budget, str) and budget == AUTO


def _explain(error: ValidationError, field: str, model: type[BaseModel]) -> SettingsError:
    """The first complaint of pydantic, in the one form of error that users see."""
    first = error.errors(include_url=False)[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, SettingsError):
        return SettingsError(f"{field}.{cause.field}", cause.value, cause.allowed)
    path = ".".join([field, *(str(part) for part in first["loc"])])
    if path == f"{field}.budget":
        return SettingsError(path, first["input"], _BUDGET_RANGE)
    if first["type"] == "extra_forbidden":
        names = [field.alias or name for name, field in model.model_fields.items()]
        known = ", ".join(names) or "nothing, the method has no options"
        return SettingsError(path, first["input"], f"left out; known here: {known}")
    return SettingsError(path, first["input"], first["msg"].removeprefix("Input should be "))
