# SPDX-License-Identifier: Apache-2.0
"""``GET /``: a page on which budgets can be seen at work.

It is a few files that ask this server's own API, as any client does: chat completions in streams,
``/v1/reduction``, its preview, and ``/metrics``. It holds nothing of anybody and computes nothing,
so it comes without an API key; what it asks for needs one as ever, and it has a field for that.
All that it loads is here: it works where there is no other network.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse

from vllm_ficoco.tiny_llava import CHECKPOINT

FILES = {
    "/": Path(__file__).parent / "index.html",
    **{
        f"/page/{name}": Path(__file__).parent / name
        for name in ("page.css", "page.js", "server.js", "kept.js", "again.js")
    },
    **{
        f"/page/{name}": CHECKPOINT / "examples" / name
        for name in ("night.png", "star.png", "crosses.png", "questions.json")
    },
}
"""What is served where. The page names the others relative to itself, so that it also works behind
a proxy that puts a path before it."""

HEADERS = {
    # Nothing from elsewhere and nothing to elsewhere; pictures that one drops on it are blobs.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # With the next version of the package, the next version of the page.
    "Cache-Control": "no-cache",
}


def attach(app: FastAPI) -> None:
    """Add the page to a server."""
    for path, file in FILES.items():
        app.add_api_route(path, _sender(file), methods=["GET", "HEAD"], include_in_schema=False)


def _sender(file: Path) -> Callable[[], Awaitable[FileResponse]]:
    async def send() -> FileResponse:
        return FileResponse(file, headers=HEADERS)

    return send
