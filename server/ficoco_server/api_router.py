# SPDX-License-Identifier: Apache-2.0
"""The routes: vLLM's with our requests, ``GET /v1/reduction``, and a guard on all the others."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.routing import APIRoute
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.entrypoints.openai.chat_completion import api_router as vllm_chat
from vllm.entrypoints.openai.responses import api_router as vllm_responses
from vllm.entrypoints.scale_out.render import api_router as vllm_render
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.tokenize import api_router as vllm_tokenize
from vllm.entrypoints.serve.tokenize.protocol import TokenizeCompletionRequest
from vllm.entrypoints.serve.utils.api_utils import validate_json_request
from vllm.exceptions import VLLMValidationError

from ficoco_server import preview
from ficoco_server.metrics import INVALID, REQUESTS
from ficoco_server.protocol import (
    OUR_KEYS,
    ChatRequest,
    ResponseRequest,
    TokensRequest,
    holds_image,
    mentioned,
)
from vllm_ficoco.settings import SettingsError

CHAT, RESPONSES, ABOUT = "/v1/chat/completions", "/v1/responses", "/v1/reduction"
RENDER_CHAT, RENDER_RESPONSES = f"{CHAT}/render", f"{RESPONSES}/render"
GENERATE = "/inference/v1/generate"
TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
METRICS = "/metrics"


async def create_chat_completion(request: ChatRequest, raw_request: Request) -> Any:
    """vLLM's chat completions; images may have a visual token budget."""
    return await vllm_chat.create_chat_completion(request, raw_request)


async def create_responses(request: ResponseRequest, raw_request: Request) -> Any:
    """vLLM's responses API; images may have a visual token budget."""
    return await vllm_responses.create_responses(request, raw_request)


async def render_chat_completion(request: ChatRequest, raw_request: Request) -> Any:
    """vLLM's rendering of a prompt for another server; images may have a visual token budget."""
    return await vllm_render.render_chat_completion(request, raw_request)


async def render_responses(request: ResponseRequest, raw_request: Request) -> Any:
    """The same of a request to the responses API."""
    return await vllm_render.render_responses(request, raw_request)


async def tokenize(request: TokenizeCompletionRequest | TokensRequest, raw_request: Request) -> Any:
    """vLLM's tokens of a prompt; images may have a visual token budget."""
    return await vllm_tokenize.tokenize(request, raw_request)


ROUTES: dict[str, tuple[Callable[..., Any], Any]] = {
    CHAT: (create_chat_completion, vllm_chat),
    RESPONSES: (create_responses, vllm_responses),
    RENDER_CHAT: (render_chat_completion, vllm_render),
    RENDER_RESPONSES: (render_responses, vllm_render),
    TOKENIZE: (tokenize, vllm_tokenize),
}
"""Which of vLLM's take our requests, and where vLLM's are."""


async def about_reduction(raw_request: Request) -> JSONResponse:
    """What this server can do about visual tokens, what it does by default and what it allows."""
    return JSONResponse(raw_request.app.state.ficoco.describe())


def attach(app: FastAPI) -> None:
    """Add our routes, which vLLM then puts over its own of the same path, and the guard."""
    posts = {
        route.path: route.endpoint
        for route in app.routes
        if isinstance(route, APIRoute) and "POST" in route.methods and "{" not in route.path
    }
    # Innermost, so that vLLM's middleware authenticates and counts what the guard answers too.
    guarded = posts.keys() - ROUTES.keys() | {TOKENIZE}
    app.user_middleware.append(Middleware(Guard, paths=frozenset(guarded)))
    # Straight on the app: vLLM finds what to replace among the app's own APIRoutes.
    for path, (endpoint, core) in ROUTES.items():
        route = next(r for r in core.router.routes if isinstance(r, APIRoute) and r.path == path)
        if path in (RENDER_CHAT, RENDER_RESPONSES) and posts.get(path) is not route.endpoint:
            continue  # a server without --enable-scale-out says so, whatever it is sent
        app.add_api_route(
            path,
            endpoint,
            methods=["POST"],
            dependencies=[Depends(validate_json_request)],
            response_model=route.response_model,
            responses=dict(route.responses),
        )
    app.add_api_route(ABOUT, about_reduction, methods=["GET"])
    app.add_api_route(
        preview.PATH,
        preview.preview,
        methods=["POST"],
        dependencies=[Depends(validate_json_request)],
    )


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
        refusal = _refusal(body, path, *_known_to_chat(scope))
        if refusal is not None:
            REQUESTS.labels(INVALID, "refused").inc()
            error = create_error_response(refusal)
            return await JSONResponse(error.model_dump(), error.error.code)(scope, receive, send)
        waiting = iter(messages)

        async def replay() -> Message:
            return next(waiting, None) or await receive()

        return await self.app(scope, replay, send)


def _reducer(scope: Scope) -> Any:
    """The server's, once it is up."""
    return getattr(scope["app"].state, "ficoco", None) if "app" in scope else None


def _known_to_chat(scope: Scope) -> tuple[int | None, Collection[str]]:
    """The policy's largest budget and names of the model, once the server is up."""
    reducer = _reducer(scope)
    return (reducer.policy.max_budget, reducer.policy.alias) if reducer else (None, ())


def _refusal(
    body: bytes, path: str, largest: int | None, alias: Collection[str] = ()
) -> VLLMValidationError | None:
    """Why a body cannot be served at a path of vLLM's that knows nothing of reductions.

    Args:
        body: of the request, as it came.
        path: of the route.
        largest: the policy's largest budget, which images here would pass by.
        alias: names of the model that stand for a budget, which this path does not know.
    """
    # A glance at the bytes spares most bodies the parsing. An escape may spell any word, and in
    # UTF-16, which Python reads as JSON too, half of the bytes are zero.
    words = [*OUR_KEYS, *(["image"] if largest else []), *alias, "\\u", "\0"]
    if not any(word.encode() in body for word in words):
        return None
    try:
        parsed = json.loads(body)
        level = mentioned(parsed)
        unreduced = largest is not None and holds_image(parsed)
    except (ValueError, RecursionError):
        return None  # vLLM says what is wrong with it
    if path == TOKENIZE and isinstance(parsed, dict) and "prompt" not in parsed:
        return None  # messages, whose settings hold there
    if path not in (TOKENIZE, DETOKENIZE) and isinstance(parsed, dict):
        name = parsed.get("model")
        if isinstance(name, str) and name in alias:
            own = f"the model's own name on {path}"
            allowed = f"{own}: this one stands for a budget, which {CHAT} and {RESPONSES} know"
            error = SettingsError("model", name, allowed)
            return VLLMValidationError(str(error), parameter="model")
    if level is None:
        if not unreduced:
            return None
        return VLLMValidationError(
            f"This server has a largest visual token budget, {largest}, which {path} knows nothing "
            f"of: send images to {CHAT} or {RESPONSES}."
        )
    key, value = next(iter(level.said.items()))
    why = f"use {CHAT} or {RESPONSES}"
    if path in ("/v1/completions", TOKENIZE):
        why = "it has no images"
    elif path == GENERATE:
        why = f"say it to {RENDER_CHAT}, which renders the prompt with it"
    refused = SettingsError(level.field(key), value, f"left out on {path}: {why}")
    return VLLMValidationError(str(refused), parameter=refused.field)
