# SPDX-License-Identifier: Apache-2.0
"""vLLM's requests with our settings on them, and how those are taken out of a body.

Nothing is judged here. vLLM's schema would drop what it does not know without a word, so the
settings of the images are picked from the raw body first; :mod:`ficoco_server.resolve` judges.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import BaseModel, Field, PrivateAttr, WithJsonSchema, model_validator
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

from ficoco_server.metrics import Observation
from ficoco_server.resolve import DETAIL_KEY, Level
from vllm_ficoco.settings import BUDGET_KEY, REDUCTION_KEY

OUR_KEYS = (BUDGET_KEY, REDUCTION_KEY)
IMAGE_KEYS = (*OUR_KEYS, DETAIL_KEY)
_IMAGE_FORMS = ("image_url", "input_image", "image_pil", "image_embeds")


class Asked(NamedTuple):
    """The settings that a body has on its images."""

    images: tuple[Level, ...] = ()
    """One level an image, in the order of the prompt."""
    misplaced: Level | None = None
    """Settings on something that is not an image, or that say two things of one image."""


class ReductionFields(BaseModel):
    """What our requests have over vLLM's."""

    turns: ClassVar[str]
    """The field that holds the messages."""

    # Any: judged later, with one message for every mistake; the schema is for the API's docs.
    visual_token_budget: Annotated[
        Any, WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]})
    ] = Field(default=None, description="Visual tokens that every image of the request may keep.")
    reduction: Annotated[Any, WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "null"}]})] = (
        Field(default=None, description="Method, budget and options; see GET /v1/reduction.")
    )

    _asked: Asked = PrivateAttr(default=Asked())
    _seen: Observation = PrivateAttr(default_factory=Observation)
    _report: dict[str, Any] | None = PrivateAttr(default=None)

    @model_validator(mode="wrap")
    @classmethod
    def _take_image_settings(cls, data: Any, handler: Any) -> Any:
        if not isinstance(data, Mapping):
            return handler(data)
        body, asked = take_settings(data, cls.turns)
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


def is_image(part: Any) -> bool:
    """Whether vLLM takes this part of a message for an image."""
    if not isinstance(part, Mapping):
        return False
    if isinstance(part.get("type"), str) and part.get("uuid") is None:
        return part["type"] in _IMAGE_FORMS
    return any(form in part for form in _IMAGE_FORMS)


def count_images(messages: Any) -> int:
    """Images in messages, as far as their contents are lists."""
    return sum(is_image(part) for _, part in _parts(messages, ""))


def take_settings(body: Mapping[str, Any], turns: str) -> tuple[dict[str, Any], Asked]:
    """A body without the settings of its images, and those. The given body stays as it is."""
    images: list[Level] = []
    misplaced: list[Level] = []

    def without(part: Any, path: str, seen: bool) -> Any:
        if not isinstance(part, Mapping):
            return part
        if not seen or not is_image(part):
            for holder, where in _holders(part, path):
                said = _ours(holder, OUR_KEYS)
                if said:
                    misplaced.append(Level(where, said))
            return part
        inner = part.get("image_url")
        said, inside = _said(part), {}
        if isinstance(inner, Mapping):
            inside = _said(inner)
            part = {**part, "image_url": _drop(inner)}
        twice = {key: said[key] for key in said if inside.get(key, said[key]) != said[key]}
        if twice:
            misplaced.append(Level(path, twice))
        embeds = "image_embeds" in (part.get("type"), *part)
        images.append(Level(path, said | inside, embeds=embeds, inside=tuple(inside)))
        return _drop(part)

    def turn(message: Any, path: str) -> Any:
        if not isinstance(message, Mapping):
            return message
        said = _ours(message, OUR_KEYS)
        if said:
            misplaced.append(Level(path, said))
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
    return taken, Asked(tuple(images), misplaced[0] if misplaced else None)


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
    for holder, where in ((body, ""), (body.get("mm_processor_kwargs"), "mm_processor_kwargs")):
        said = _ours(holder, OUR_KEYS) if isinstance(holder, Mapping) else {}
        if said:
            return Level(where, said)
    for turns in ("messages", "input", "prompt"):
        for path, part in _parts(body.get(turns), turns):
            for holder, where in _holders(part, path):
                if said := _ours(holder, OUR_KEYS):
                    return Level(where, said)
    return None


def holds_image(value: Any) -> bool:
    """Whether there is an image anywhere in a body, in OpenAI's or Anthropic's form."""
    if isinstance(value, list):
        return any(map(holds_image, value))
    if not isinstance(value, Mapping):
        return False
    return is_image(value) or value.get("type") == "image" or any(map(holds_image, value.values()))


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
    return {key: holder[key] for key in keys if holder.get(key) is not None}


def _said(holder: Mapping[str, Any]) -> dict[str, Any]:
    """What a part says of its image; ``detail: auto`` says nothing."""
    said = _ours(holder, IMAGE_KEYS)
    return {k: v for k, v in said.items() if (k, v) != (DETAIL_KEY, "auto")}


def _drop(holder: Mapping[str, Any]) -> dict[str, Any]:
    """What vLLM gets of an image's part: none of our keys, and the one ``detail`` that it takes."""
    left = {key: value for key, value in holder.items() if key not in OUR_KEYS}
    return {**left, DETAIL_KEY: "auto"} if DETAIL_KEY in left else left
