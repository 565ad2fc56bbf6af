# SPDX-License-Identifier: Apache-2.0
"""The page's files: all of them are served, and nothing from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from ficoco_server import page
from ficoco_server.plugin import EndpointPlugin
from ficoco_server.policy import Policy, PolicyError

FOLDER = Path(page.__file__).parent
OWN = sorted(path for path in FOLDER.iterdir() if path.suffix in (".html", ".css", ".js"))


@pytest.fixture(scope="module")
def site() -> TestClient:
    """A server with the page alone."""
    app = FastAPI()
    page.attach(app)
    return TestClient(app)


def test_every_file_of_the_page_is_served(site: TestClient) -> None:
    assert {*OWN} <= {*page.FILES.values()}
    for path, file in page.FILES.items():
        answer = site.get(path)
        assert answer.content == file.read_bytes()
        # Browsers keep to the type, and run no scripts of another.
        kind = {".html": "text/html", ".css": "text/css", ".js": "javascript", ".png": "image/png"}
        assert kind.get(file.suffix, "json") in answer.headers["content-type"]
        assert "script-src 'self';" in answer.headers["content-security-policy"]
        assert site.head(path).headers["content-length"] == str(len(answer.content))


def test_what_the_page_names_is_there(site: TestClient) -> None:
    """Relative to the page or to the script that names it: a proxy may put a path before both."""
    html = (FOLDER / "index.html").read_text()
    named = re.findall(r'(?:src|href)="(?!data:)([^"]+)"', html)
    named += [f"page/{name}" for f in OWN for name in re.findall(r'from "\./(.+)"', f.read_text())]
    named += [
        f"page/{name}" for name in re.findall(r'"(\w+\.png)"', (FOLDER / "page.js").read_text())
    ]
    assert len(named) > 7
    for path in named:
        assert site.get(f"/{path}").status_code == 200, path


@pytest.mark.parametrize("file", OWN, ids=lambda file: file.name)
def test_nothing_comes_from_elsewhere(file: Path) -> None:
    assert "://" not in file.read_text()


@pytest.mark.parametrize(("said", "there"), [("", True), ("1", True), ("0", False)])
def test_the_page_can_be_left_out(said: str, there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FICOCO_PAGE", said)
    app = FastAPI()
    EndpointPlugin().attach_router(app)
    assert ("/" in {getattr(route, "path", None) for route in app.routes}) == there


def test_a_switch_is_0_or_1() -> None:
    with pytest.raises(PolicyError, match="FICOCO_PAGE=off is not valid: it must be 1, or 0"):
        Policy.from_environment({"FICOCO_PAGE": "off"})
