# SPDX-License-Identifier: Apache-2.0
"""vLLM's requests with our settings on them, and how those are taken out of a body.

Nothing is judged here. vLLM's schema would drop what it does not know without a word, so the
settings of images and videos are picked from the raw body first; :mod:`ficoco_server.resolve`
judges.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import chain, islice
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import BaseModel, Field, PrivateAttr, WithJsonSchema, model_validator
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

from ficoco_server.metrics import Observation
from ficoco_server.resolve import DETAIL_KEY, Level, Settled, detail_of
from vllm_ficoco.preview import Mark
from vllm_ficoco.settings import AUTO, BUDGET_KEY, MODALITIES, REDUCTION_KEY, SettingsError

OUR_KEYS = (BUDGET_KEY, REDUCTION_KEY)
IMAGE_KEYS = (*OUR_KEYS, DETAIL_KEY)
NEAR_KEYS = {"visualtokenbudget": BUDGET_KEY, "budget": BUDGET_KEY, "reduction": REDUCTION_KEY}
"""What clients write for our keys, without case and separators."""
_OTHER_WORDS = ("redaction",)
"""A letter off, and meant: gateways have a field of this name."""
_WRAPPERS = ("extra_body", "mm_processor_kwargs", "media_io_kwargs")
"""Fields with objects in them that have keys of a request's."""
_IMAGE_FORMS = ("image_url", "input_image", "image_pil", "image_embeds")
_FORMS = dict.fromkeys(_IMAGE_FORMS, "image") | {
    "audio_embeds": "",
    "video_embeds": "video",
    "prompt_embeds": "",
    "audio_url": "",
    "input_audio": "",
    "video_url": "video",
}
"""What is an image or a video, in the order in which vLLM looks for them in a part that does not
say its type."""
_USUAL_KEYS = frozenset((*IMAGE_KEYS, *_FORMS, "type", "url", "uuid"))
"""Of images and videos; none of them is a slip of the pen."""


class Asked(NamedTuple):
    """The settings that a body has on its images and videos."""

    images: tuple[Level, ...] = ()
    """One level an image, in the order of the prompt."""
    videos: tuple[Level, ...] = ()
    """One a video."""
    misplaced: SettingsError | None = None
    """Settings in a place or a spelling in which they would do nothing, or that say two things of
    one image."""


class ReductionFields(BaseModel):
    """What our requests have over vLLM's."""

    turns: ClassVar[str]
    """The field that holds the messages."""

    # Any: judged later, with one message for every mistake; the schema is for the API's docs.
    visual_token_budget: Annotated[
        Any,
        WithJsonSchema(
            {"anyOf": [{"type": "integer", "minimum": 1}, {"const": AUTO}, {"type": "null"}]}
        ),
    ] = Field(
        default=None,
        description="Visual tokens that every image and every video of the request may keep, or, "
        "for images, 'auto': by what is in it.",
    )
    reduction: Annotated[Any, WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "null"}]})] = (
        Field(default=None, description="Method, budget and options; see GET /v1/reduction.")
    )

    _asked: Asked = PrivateAttr(default_factory=Asked)  # a default would be copied, deeply
    _settled: list[Settled] = PrivateAttr(default_factory=list)
    """Of its images, then of its videos."""
    _lowers: bool | None = PrivateAttr(default=None)
    """Whether budgets of its that nobody has said are a rung lower; None before that is decided."""
    _seen: Observation = PrivateAttr(default_factory=Observation)
    _report: dict[str, Any] | None = PrivateAttr(default=None)
    _mark: Mark | None = PrivateAttr(default=None)
    """Of a preview, whose image is followed."""
    _shown: Any = PrivateAttr(default=None)
    """Of a preview, what is known of its image once the prompt is rendered."""

    @model_validator(mode="wrap")
    @classmethod
    def _take_image_settings(cls, data: Any, handler: Any) -> Any:
        if not isinstance(data, Mapping):
            return handler(data)
        body, asked = take_settings(data, cls.turns)
        if (stray := stray_setting(data, cls.model_fields)) is not None:
            asked = asked._replace(misplaced=stray)
        request = handler(body)
        request._asked = asked
        return request

    @property
    def level(self) -> Level:
        """What is said on the request itself."""
        values = {BUDGET_KEY: self.visual_token_budget, REDUCTION_KEY: self.reduction}
        return Level(said={k: v for k, v in values.items() if v is not None})


# field_names caches the fields of a class and is inherited: a fresh one for each.
class ChatRequest(ReductionFields, ChatCompletionRequest):
    """A chat completion request with a visual token budget."""

    turns: ClassVar[str] = "messages"
    field_names: ClassVar[set[str] | None] = None


class ResponseRequest(ReductionFields, ResponsesRequest):
    """A request to the responses API with a visual token budget."""

    turns: ClassVar[str] = "input"
    field_names: ClassVar[set[str] | None] = None


def modality_of(part: Any) -> str:
    """What vLLM takes this part of a message for: ``image``, ``video``, or empty for another."""
    if not isinstance(part, Mapping):
        return ""
    if isinstance(part.get("type"), str) and part.get("uuid") is None:
        return _FORMS.get(part["type"], "")
    return next((modality for form, modality in _FORMS.items() if form in part), "")


def _near_misses(keys: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Keys that are nearly ours, and which of ours; of the first thousand, if there are more."""
    for key in islice(keys, 1000):
        if (ours := meant(key)) is not None:
            yield key, ours


def meant(key: str) -> str | None:
    """Which of our keys a client means with one of a request or an image that is not known there.

    It differs by case, separators, or one letter left out, put in, exchanged or swapped with the
    next; but begins with the same one, because a deduction is no typing error.
    """
    return _meant(key) if len(key) <= 30 else None


@lru_cache(maxsize=1024)  # most requests have the same keys
def _meant(key: str) -> str | None:
    plain = "".join(filter(str.isalpha, key.lower()))
    if plain in _OTHER_WORDS:
        return None
    return next((ours for near, ours in NEAR_KEYS.items() if _one_letter_off(plain, near)), None)


def _one_letter_off(one: str, other: str) -> bool:
    same = 0
    while one[same : same + 1] == other[same : same + 1] != "":
        same += 1
    a, b = one[same:], other[same:]
    swapped = a[1::-1] == b[:2] and a[2:] == b[2:]
    return same > 0 and (a[1:] == b or a == b[1:] or a[1:] == b[1:] or swapped)


def stray_setting(body: Mapping[str, Any], known: Collection[str]) -> SettingsError | None:
    """The first of our settings that vLLM would ignore among the fields of a request.

    That is one of our keys in any object of the body, or a key of the body itself that is not
    ``known`` and nearly ours. Schemas, tools, and the texts of users are no such places.
    """
    for key, ours in _near_misses(body.keys() - known):
        if body[key] is not None:
            return SettingsError(key, body[key], f"{ours}, if visual tokens are meant")
    for holder, where in _objects(body):
        wrapped = where == "extra_body"
        exact = ((key, key) for key in OUR_KEYS)
        for key, ours in chain(exact, _near_misses(holder) if wrapped else ()):
            if holder.get(key) is not None:
                allowed = f"the request's own field {ours}"
                if wrapped:
                    allowed += ", as clients send what is in their argument extra_body"
                return SettingsError(f"{where}.{key}", holder[key], allowed)
    return None


def _objects(body: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The objects right in a body, but for our own, and those inside of its wrappers."""
    for name, value in body.items():
        if isinstance(value, dict) and name not in OUR_KEYS:
            yield value, name
            for key, inner in value.items() if name in _WRAPPERS else ():
                if isinstance(inner, dict) and key not in OUR_KEYS:
                    yield inner, f"{name}.{key}"


def count_items(messages: Any) -> Counter[str]:
    """Images and videos in messages, as far as their contents are lists."""
    counts: Counter[str] = Counter()
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, list):  # a batch of conversations
            counts += count_items(message)
        elif isinstance(message, Mapping):
            for contents in (message.get("content"), message.get("output")):
                counts.update(map(modality_of, contents if isinstance(contents, list) else ()))
    return counts


def take_settings(body: Mapping[str, Any], turns: str) -> tuple[dict[str, Any], Asked]:
    """A body without the settings of its images and videos, and those. The given body stays as it
    is."""
    items: dict[str, list[Level]] = {modality: [] for modality in MODALITIES}
    misplaced: list[SettingsError] = []

    def refuse(where: str, said: Mapping[str, Any]) -> None:
        """Settings that must not stand where they do."""
        for key, value in said.items() if not misplaced else ():
            allowed = "once on an image, on a video or on the request, nowhere else"
            misplaced.append(SettingsError(f"{where}.{key}", value, allowed))

    def without(part: Any, path: str, seen: bool) -> Any:
        if not isinstance(part, Mapping):
            return part
        modality = modality_of(part)
        if not seen or not modality:
            for holder, where in _holders(part, path):
                refuse(where, _ours(holder, OUR_KEYS))
            return part
        for holder, where in _holders(part, path):
            if where not in (path, f"{path}.{modality}_url"):
                refuse(where, _ours(holder, OUR_KEYS))
                continue
            for key, ours in _near_misses(holder.keys() - _USUAL_KEYS) if not misplaced else ():
                if holder[key] is not None:
                    allowed = f"{ours}, if visual tokens are meant"
                    misplaced.append(SettingsError(f"{where}.{key}", holder[key], allowed))
        url = f"{modality}_url"
        inner = part.get(url)
        said, inside = _said(part, modality), {}
        if isinstance(inner, Mapping):
            inside = _said(inner, modality)
            part = {**part, url: _drop(inner, modality)}
        twice = {key: said[key] for key in said if inside.get(key, said[key]) != said[key]}
        refuse(path, twice)
        embeds = f"{modality}_embeds" in (part.get("type"), *part)
        named = part.get("uuid") is not None
        level = Level(path, said | inside, embeds, named, tuple(inside), modality)
        items[modality].append(level)
        return _drop(part, modality)

    def turn(message: Any, path: str) -> Any:
        if not isinstance(message, Mapping):
            return message
        refuse(path, _ours(message, OUR_KEYS))
        seen = turns != "input" or not _only_text(message)
        return {
            **message,
            **{
                key: [
                    without(part, f"{path}.{key}[{i}]", seen) for i, part in enumerate(message[key])
                ]
                for key in ("content", "output")
                if isinstance(message.get(key), list)
            },
        }

    taken = dict(body)
    if isinstance(body.get(turns), list):
        taken[turns] = [turn(m, f"{turns}[{i}]") for i, m in enumerate(body[turns])]
    first = misplaced[0] if misplaced else None
    return taken, Asked(tuple(items["image"]), tuple(items["video"]), first)


def _only_text(message: Mapping[str, Any]) -> bool:
    """Whether the responses API takes no more of a message than the text that it begins with."""
    content = message.get("content")
    first = content[0] if isinstance(content, list) and content else None
    text = first.get("text") if isinstance(first, Mapping) else None
    return message.get("role") == "assistant" and text is not None


def mentioned(body: Any) -> Level | None:
    """The first of our settings anywhere in the body of another route; ``detail`` is not ours."""
    if not isinstance(body, Mapping):
        return None
    for holder, where in ((body, ""), *_objects(body)):
        if said := _ours(holder, OUR_KEYS):
            return Level(where, said)
    for turns in ("messages", "input", "prompt"):
        for path, part in _parts(body.get(turns), turns):
            for holder, where in _holders(part, path):
                if said := _ours(holder, OUR_KEYS):
                    return Level(where, said)
    return None


def holds_image(value: Any) -> bool:
    """Whether there is an image anywhere in a body, in OpenAI's, Anthropic's or vLLM's own form."""
    if isinstance(value, list):
        return any(map(holds_image, value))
    if not isinstance(value, Mapping):
        return False
    is_image = modality_of(value) == "image" or value.get("type") in ("image", *_IMAGE_FORMS)
    if is_image or value.get("mm_hashes"):
        return True  # the last are processed images, for /inference/v1/generate
    return any(map(holds_image, value.values()))


def _parts(messages: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The parts of all messages, whose contents are lists, with their paths."""
    if not isinstance(messages, list):
        return
    for i, message in enumerate(messages):
        here = f"{path}[{i}]"
        if isinstance(message, list):  # a batch of conversations
            yield from _parts(message, here)
        elif isinstance(message, Mapping):
            for key in ("content", "output"):
                if isinstance(message.get(key), list):
                    for j, part in enumerate(message[key]):
                        yield f"{here}.{key}[{j}]", part


def _holders(part: Any, path: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    """A part and the objects right inside it, but for the arguments of a tool."""
    if isinstance(part, Mapping):
        yield part, path
        for key, value in part.items():
            if isinstance(value, Mapping) and key not in (*OUR_KEYS, "input"):
                yield value, f"{path}.{key}"


def _ours(holder: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    if holder.keys().isdisjoint(keys):  # mostly
        return {}
    return {key: holder[key] for key in keys if holder.get(key) is not None}


def _said(holder: Mapping[str, Any], modality: str) -> dict[str, Any]:
    """What a part says of its image or video; ``detail: auto`` says nothing."""
    said = _ours(holder, IMAGE_KEYS if modality == "image" else OUR_KEYS)
    if detail_of(said.get(DETAIL_KEY)) == "auto":
        del said[DETAIL_KEY]
    return said


def _drop(holder: Mapping[str, Any], modality: str) -> dict[str, Any]:
    """What vLLM gets of a part: none of our keys, and the one ``detail`` that it takes."""
    left = {key: value for key, value in holder.items() if key not in OUR_KEYS}
    if modality == "image" and DETAIL_KEY in left:
        left[DETAIL_KEY] = "auto"
    return left
