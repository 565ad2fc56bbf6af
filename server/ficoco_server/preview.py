# SPDX-License-Identifier: Apache-2.0
"""``POST /v1/reduction/preview``: which tokens of an image a reduction keeps, and what becomes of
the others.

A preview is a chat completion of one token, whose image is followed on its way
(:mod:`vllm_ficoco.preview`). So what it shows is what requests get, and vLLM's scheduler gives it
its turn among them. One runs at a time, and none while others wait for the engine.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Annotated, Any, NamedTuple

from fastapi import Request
from pydantic import BaseModel, ConfigDict, WithJsonSchema
from starlette.responses import JSONResponse
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.utils.api_utils import with_cancellation
from vllm.exceptions import GracefulHTTPError, VLLMValidationError

from ficoco_server.metrics import Observation
from ficoco_server.places import Places, followed
from ficoco_server.protocol import ChatRequest, meant
from ficoco_server.reducer import Reducer
from vllm_ficoco.preview import FETCH, WORKER_EXTENSION, Area, Mark, Step
from vllm_ficoco.settings import BUDGET_KEY, REDUCTION_KEY, SettingsError

PATH = "/v1/reduction/preview"

WAITING = 4
"""Previews that may wait for the one that runs."""

RETRY_AFTER = {"Retry-After": "1"}

_OF_CHAT = ("image_url", "messages")
"""What a chat completion calls the image, in messages of vLLM's and ours."""


class PreviewRequest(BaseModel):
    """What is to be shown; settings mean what they mean on a chat completion."""

    model_config = ConfigDict(extra="allow")  # and refused in words of ours

    image: Any = None
    question: Any = ""
    model: Any = None
    # Judged with those of all requests.
    visual_token_budget: Annotated[Any, WithJsonSchema({})] = None
    reduction: Annotated[Any, WithJsonSchema({})] = None

    def as_chat(self) -> ChatRequest:
        """The chat completion of one token that is followed.

        Raises:
            SettingsError: a field is not what it should be.
        """
        for field, value in (self.model_extra or {}).items():
            ours = meant(field)
            known = ", ".join(type(self).model_fields)
            allowed = f"{ours}, if visual tokens are meant" if ours else f"left out; known: {known}"
            raise SettingsError(field, value, allowed)
        if not isinstance(self.image, str) or not self.image:
            allowed = "a string: the URL of an image, or a data URL"
            raise SettingsError("image", self.image, allowed)
        for field in ("question", "model"):
            if not isinstance(getattr(self, field), str | None):
                raise SettingsError(field, getattr(self, field), "a string")
        content: list[Any] = [{"type": "image_url", "image_url": {"url": self.image}}]
        if self.question:
            content.append({"type": "text", "text": self.question})
        chat = ChatRequest(
            model=self.model,
            messages=[{"role": "user", "content": content}],
            max_completion_tokens=1,
            temperature=0,
            **{BUDGET_KEY: self.visual_token_budget, REDUCTION_KEY: self.reduction},
        )
        chat._mark, chat._seen = Mark(secrets.token_hex(16)), Unseen()
        return chat


class Unseen(Observation):
    """Of a preview, which is no traffic: its tokens and latencies do not count."""

    def finish(self, outcome: Any) -> None:
        """Nothing."""

    def _start(self) -> None:
        pass

    def _tick(self, result: Any) -> None:
        pass

    def _read(self, stats: Any) -> None:
        pass


class Shown(NamedTuple):
    """What is known of a followed image once its prompt is rendered."""

    places: Places
    width: int
    height: int
    """Pixels, as it was loaded."""
    note: str | None
    """What is to be said of a method that has no places."""
    resized: bool
    """It was scaled down."""


def shown(reducer: Reducer, engine_input: Any, sizes: str) -> Shown:
    """What is known of the one image of a prompt.

    Args:
        reducer: of the server.
        engine_input: what the processor has made of the prompt.
        sizes: the key of its size in there.
    """
    ((width, height, seen),) = engine_input[sizes]
    ((reduction, layout, *_),) = reducer.made(engine_input)
    assert layout is not None
    area: Area = seen
    parts = reduction is not None and reducer.geometry.parts(reduction, layout=layout)
    note = None
    if layout.original:
        note = (
            "resize scales the image down before the tower, from "
            f"{layout.original} visual tokens to {layout.tokens}: all places of the smaller image "
            "stay"
        )
    return Shown(Places(layout, bool(parts), area), width, height, note, bool(layout.original))


class Previews:
    """The previews of a server.

    Args:
        reducer: of the server.
        engine_client: vLLM's.
        busy: whether requests wait for the engine.
    """

    def __init__(self, reducer: Reducer, engine_client: Any, busy: Callable[[], bool]) -> None:
        self.reducer, self.busy = reducer, busy
        self._engine = engine_client
        self._turn = asyncio.Semaphore(1)
        self._inside = 0

    @asynccontextmanager
    async def turn(self) -> Any:
        """While it lasts, no other preview runs.

        Raises:
            GracefulHTTPError: too many wait, or the server has no time for it.
        """
        if self.reducer.no_previews:
            raise GracefulHTTPError(self.reducer.no_previews, HTTPStatus.FORBIDDEN)
        if self._inside > WAITING:
            raise GracefulHTTPError(
                f"There are too many previews at once: one runs, and {WAITING} wait. Try again.",
                HTTPStatus.TOO_MANY_REQUESTS,
            )
        self._inside += 1
        try:
            async with self._turn:
                if self.busy():
                    raise GracefulHTTPError(
                        "Previews stand back while requests wait for the engine. Try again.",
                        HTTPStatus.SERVICE_UNAVAILABLE,
                    )
                yield
        finally:
            self._inside -= 1

    async def look(self, chat: ChatRequest, handler: Any) -> dict[str, Any] | ErrorResponse:
        """What becomes of the image of a request of ours.

        Args:
            chat: it.
            handler: of chat completions.

        Raises:
            VLLMValidationError: it cannot be answered.
        """
        try:
            answer = await handler.create_chat_completion(chat)
        except VLLMValidationError as refused:
            if str(refused.parameter).startswith(_OF_CHAT):
                refused.parameter = "image"
            raise
        if isinstance(answer, ErrorResponse):
            return answer
        seen = chat._shown
        steps = await self._fetch(str(chat._mark)) if any(_reduced(chat)) else []
        found = followed(seen.places, steps, self.reducer.geometry.layers - 1)
        if len(found["kept"]) != (held := _held_at_the_end(chat._report)):
            raise RuntimeError(f"{held} tokens are held, and {len(found['kept'])} were seen")
        if seen.resized:
            kept = {"kept": found["kept"], "left": [], "into": None}
            found["stages"].insert(0, {"where": "input", "layer": None, **kept})
        newlines = seen.places.newlines
        return {
            "object": "reduction.preview",
            "model": answer.model,
            "reduction": chat._report,
            "image": {"width": seen.width, "height": seen.height},
            "grids": seen.places.grids,
            "newlines": {"first": seen.places.total - newlines, "count": newlines}
            if newlines
            else None,
            **found,
            "note": seen.note,
        }

    async def _fetch(self, mark: str) -> list[Step]:
        """What the workers have noted; every rank of the engine that ran it says the same."""
        core = self._engine.engine_core
        engines = await core.call_utility_all_async("collective_rpc", FETCH, 30.0, (mark,), None)
        said = [worker for workers in engines for worker in workers]
        return [Step(*step) for step in max(said, key=len, default=[])]


def _reduced(chat: ChatRequest) -> list[Any]:
    return [one.reduction for one in chat._settled]


def _held_at_the_end(report: Any) -> int:
    """Visual tokens of the one image of a report in the decoder's last layers."""
    (image,) = report["images"]
    held: int = image.get("visual_tokens_by_stage", [image["visual_tokens_kept"]])[-1]
    return held


async def preview(request: PreviewRequest, raw_request: Request) -> Any:
    """Which tokens of an image a reduction keeps, and what becomes of the others."""
    return await _answer(request, raw_request)


@with_cancellation
async def _answer(request: PreviewRequest, raw_request: Request) -> JSONResponse:
    state = raw_request.app.state
    previews: Previews = state.ficoco_previews
    try:
        chat = request.as_chat()
    except SettingsError as error:
        raise VLLMValidationError(str(error), parameter=error.field) from None
    try:
        async with previews.turn():
            found = await previews.look(chat, state.openai_serving_chat)
    except GracefulHTTPError as refused:
        said = create_error_response(refused)
        code = said.error.code
        return JSONResponse(said.model_dump(), code, RETRY_AFTER if code != 403 else None)
    if isinstance(found, ErrorResponse):
        return JSONResponse(found.model_dump(), found.error.code)
    return JSONResponse(found)


def obstacle(vllm_config: Any, reducer: Reducer) -> str:
    """Why there are no previews; empty where there are.

    Args:
        vllm_config: of the server.
        reducer: of the server.
    """
    if not reducer.policy.preview:
        return "Previews are switched off (--no-preview, FICOCO_PREVIEW=0)."
    if reducer.geometry.unsupported or "image" not in reducer.modalities:
        reason = reducer.geometry.unsupported or "no images of this model can be reduced"
        return f"There is nothing to preview: {reason}."
    if vllm_config.ec_transfer_config is not None:
        return "There are no previews where other servers encode the images (--ec-transfer-config)."
    extension = vllm_config.parallel_config.worker_extension_cls
    if extension != WORKER_EXTENSION:
        return (
            f"Previews need the worker extension {WORKER_EXTENSION}, and this server has another "
            f"one: --worker-extension-cls {extension}."
        )
    return ""
