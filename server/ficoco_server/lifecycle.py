# SPDX-License-Identifier: Apache-2.0
"""The end of a server: one that is told to stop answers what it has taken, and a dead one says so.

On a signal, vLLM's server stops its engine and only then its HTTP server. In between it takes new
requests, which nobody answers, and if the engine's time runs out (by default at once), requests in
flight stay open in silence. Its process returns 0 however it ended.

So our engine client, which vLLM finds in the state of its application, first closes the door, then
waits until the requests behind it have been answered, then stops the engine; who is left after the
time-out gets an error. Everything else it passes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.entrypoints.serve import create_error_response
from vllm.exceptions import GracefulHTTPError

LAST_WORDS = 5
"""Seconds that clients have to read an error, before a server that ends hangs up on them."""

_engine: Engine | None = None
"""Of the server in this process."""


def attach(app: FastAPI) -> None:
    """Put a door into a server."""
    app.state.door = Door()
    app.user_middleware.append(Middleware(Doorkeeper, door=app.state.door))


def watch(engine_client: Any, state: Any) -> None:
    """Let a server with a door stop through it."""
    global _engine
    _engine = state.engine_client = Engine(engine_client, state)


def has_failed() -> bool:
    """Whether a server in this process, which has ended, had not been told to."""
    return _engine is not None and not _engine.told


def stopping() -> GracefulHTTPError:
    """What those hear whom a server that stops does not answer."""
    return GracefulHTTPError("The server is shutting down.", HTTPStatus.SERVICE_UNAVAILABLE)


class Door:
    """Counts the requests inside. Used in the server's event loop alone."""

    def __init__(self) -> None:
        self.closed = False
        self._inside = 0
        self._empty = asyncio.Event()
        self._empty.set()

    def enter(self) -> None:
        """A request comes in."""
        self._inside += 1
        self._empty.clear()

    def leave(self) -> None:
        """It has been answered to the end, or its client has left."""
        self._inside -= 1
        if not self._inside:
            self._empty.set()

    async def close(self, seconds: float) -> None:
        """Let nobody in any more; wait so long for those inside."""
        self.closed = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._empty.wait(), seconds)


class Doorkeeper:
    """Lets requests through a door; while that is closed, all but the metrics are sent away."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self.app, self.door = app, door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with a 503."""
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or path.startswith("/metrics"):
            return await self.app(scope, receive, send)
        if self.door.closed:
            error = create_error_response(stopping())
            answer = JSONResponse(error.model_dump(), error.error.code, {"Connection": "close"})
            return await answer(scope, receive, send)
        self.door.enter()
        try:
            await self.app(scope, receive, send)
        finally:
            self.door.leave()


class Engine:
    """vLLM's engine client, as a server sees it.

    Args:
        client: vLLM's. All that is not defined here is asked of it.
        state: of the server's application, with its door; vLLM adds the HTTP server later.
    """

    def __init__(self, client: Any, state: Any) -> None:
        self._client, self._state = client, state
        self._loop = asyncio.get_running_loop()
        self.told = False
        """To stop, by a signal."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    # Some of vLLM's routes assert that it is one of vLLM's.
    __class__ = property(lambda self: type(self._client))

    @property
    def errored(self) -> bool:
        """Whether the engine is dead. vLLM's server asks every 5 seconds, and then ends."""
        dead: bool = self._client.errored
        if dead:
            self._hurry()
        return dead

    def shutdown(self, timeout: float | None = None) -> None:
        """Stop. vLLM calls this once, on a signal, in a thread beside the event loop.

        Args:
            timeout: seconds for the requests that are inside, and for the engine to stop.
        """
        self.told = not self._client.errored
        seconds = timeout or 0.0
        end = time.monotonic() + seconds
        if self._client.vllm_config.parallel_config._api_process_count > 1:
            # Their parent kills them at the end of this time, so clients must hear of it before.
            seconds = max(0.0, seconds - LAST_WORDS)
        asyncio.run_coroutine_threadsafe(self._close(seconds), self._loop).result()
        self._client.shutdown(timeout=max(0.0, end - time.monotonic()))
        # vLLM drops whom it has not answered by now, without a word.
        self._loop.call_soon_threadsafe(self._client.output_processor.propagate_error, stopping())

    async def _close(self, seconds: float) -> None:
        self._hurry()
        # With several API servers this is empty: they share a listener, and the door is enough.
        # Before the server has started, there is none.
        for listener in getattr(self._state.server, "servers", ()):
            listener.close()
        await self._state.door.close(seconds)

    def _hurry(self) -> None:
        """Do not let the server wait for ever for a client that does not read."""
        self._state.server.config.timeout_graceful_shutdown = LAST_WORDS
