# SPDX-License-Identifier: Apache-2.0
"""The routes: vLLM's with our requests, ``GET /v1/reduction``, and a guard on all the others."""

from __future__ import annotations

import json
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.routing import APIRoute
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.entrypoints.openai.chat_completion import api_router as vllm_chat
from vllm.entrypoints.openai.responses import api_router as vllm_responses
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.utils.api_utils import validate_json_request
from vllm.exceptions import VLLMValidationError

from ficoco_server import preview
from ficoco_server.metrics import INVALID, REQUESTS
from ficoco_server.protocol import OUR_KEYS, ChatRequest, ResponseRequest, holds_image, mentioned
from vllm_ficoco.settings import SettingsError

CHAT, RESPONSES, ABOUT = "/v1/chat/completions", "/v1/responses", "/v1/reduction"
METRICS = "/metrics"


async def create_chat_completion(request: ChatRequest, raw_request: Request) -> Any:
    """vLLM's chat completions; images may have a visual token budget."""
    return await vllm_chat.create_chat_completion(request, raw_request)


async def create_responses(request: ResponseRequest, raw_request: Request) -> Any:
    """vLLM's responses API; images may have a visual token budget."""
    return await vllm_responses.create_responses(request, raw_request)


async def about_reduction(raw_request: Request) -> JSONResponse:
    """What this server can do about visual tokens, what it does by default and what it allows."""
    return JSONResponse(raw_request.app.state.ficoco.describe())


def attach(app: FastAPI) -> None:
    """Add our routes, which vLLM then puts over its own of the same path, and the guard."""
    posts = {
        route.path
        for route in app.routes
        if isinstance(route, APIRoute) and "POST" in route.methods and "{" not in route.path
    }
    # Innermost, so that vLLM's middleware authenticates and counts what the guard answers too.
    app.user_middleware.append(Middleware(Guard, paths=frozenset(posts - {CHAT, RESPONSES})))
    # Straight on the app: vLLM finds what to replace among the app's own APIRoutes.
    for path, endpoint, core in (
        (CHAT, create_chat_completion, vllm_chat.router),
        (RESPONSES, create_responses, vllm_responses.router),
    ):
        app.add_api_route(
            path,
            endpoint,
            methods=["POST"],
            dependencies=[Depends(validate_json_request)],
            responses=_documented(core, path),
        )
    app.add_api_route(ABOUT, about_reduction, methods=["GET"])
    app.add_api_route(
        preview.PATH,
        preview.preview,
        methods=["POST"],
        dependencies=[Depends(validate_json_request)],
    )


def _documented(router: Any, path: str) -> dict[int | str, dict[str, Any]]:
    """The responses that vLLM documents for a route."""
    return next((dict(r.responses) for r in router.routes if r.path == path), {})


class Guard:
    """Refuses our settings on routes that would ignore them, and has /metrics say what is true.

    Args:
        app: the application behind.
        paths: of the POST routes to look at. Other requests pass untouched.
    """

    def __init__(self, app: ASGIApp, paths: frozenset[str]) -> None:
        self.app, self.paths = app, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass, or answer it with a 400."""
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if path.startswith(METRICS) and (reducer := _reducer(scope)):
            reducer.pressure.look()  # a server that has become idle has told nobody
        if scope["type"] != "http" or scope["method"] != "POST" or path not in self.paths:
            return await self.app(scope, receive, send)
        messages: list[Message] = []
        while not messages or messages[-1].get("more_body", False):
            messages.append(await receive())
        body = b"".join(message.get("body", b"") for message in messages)
        refusal = _refusal(body, path, _largest_budget(scope))
        if refusal is not None:
            REQUESTS.labels(INVALID, "refused").inc()
            error = create_error_response(refusal)
            return await JSONResponse(error.model_dump(), error.error.code)(scope, receive, send)
        waiting = iter(messages)

        async def replay() -> Message:
            return next(waiting, None) or await receive()

        return await self.app(scope, replay, send)


def _largest_budget(scope: Scope) -> int | None:
    """The policy's, once the server is up."""
    reducer = _reducer(scope)
    return reducer.policy.max_budget if reducer else None


def _reducer(scope: Scope) -> Any:
    """The server's, once it is up."""
    return getattr(scope["app"].state, "ficoco", None) if "app" in scope else None


def _refusal(body: bytes, path: str, largest: int | None) -> VLLMValidationError | None:
    """Why a body cannot be served at a path of vLLM's that knows nothing of reductions.

    Args:
        body: of the request, as it came.
        path: of the route.
        largest: the policy's largest budget, which images here would pass by.
    """
    # A glance at the bytes spares most bodies the parsing. An escape may spell any word, and in
    # UTF-16, which Python reads as JSON too, half of the bytes are zero.
    words = [*OUR_KEYS, *(["image"] if largest else []), "\\u", "\0"]
    if not any(word.encode() in body for word in words):
        return None
    try:
        parsed = json.loads(body)
        level = mentioned(parsed)
        unreduced = largest is not None and holds_image(parsed)
    except (ValueError, RecursionError):
        return None  # vLLM says what is wrong with it
    if level is None:
        if not unreduced:
            return None
        return VLLMValidationError(
            f"This server has a largest visual token budget, {largest}, which {path} knows nothing "
            f"of: send images to {CHAT} or {RESPONSES}."
        )
    key, value = next(iter(level.said.items()))
    why = "it has no images" if path == "/v1/completions" else f"use {CHAT} or {RESPONSES}"
    refused = SettingsError(level.field(key), value, f"left out on {path}: {why}")
    return VLLMValidationError(str(refused), parameter=refused.field)
