"""The page at `/`: static files of api/page/, each known by name when the router is made. It must not know rows.

What the page shows it reads itself, from the API, with the key that its user gives it; these files hold nothing secret.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request, Response

from api.errors import not_found

FOLDER = Path(__file__).parent / "page"
CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Nothing but our own files runs or is asked: an answer of a model that holds markup stays text, and if it ever did not,
# it could neither run nor tell anybody. Forms are sent by our scripts.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class _StaticFile:
    content: bytes
    content_type: str
    etag: str


def page_router() -> APIRouter:
    """Routes of the page and its files, which are read once, now; they ask for no key and are in no API description."""
    files = {path.name: _read(path) for path in FOLDER.iterdir() if path.suffix in CONTENT_TYPES}
    router = APIRouter(include_in_schema=False)

    @router.api_route("/", methods=["GET", "HEAD"])
    def index(request: Request) -> Response:
        return _answer(request, files["index.html"])

    @router.api_route("/page/{name}", methods=["GET", "HEAD"])
    def file(request: Request, name: str) -> Response:
        found = files.get(name)
        if found is None:
            raise not_found("file of the page")
        return _answer(request, found)

    return router


def _read(path: Path) -> _StaticFile:
    content = path.read_bytes()
    return _StaticFile(content, CONTENT_TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')


def _answer(request: Request, found: _StaticFile) -> Response:
    headers = HEADERS | {"ETag": found.etag}
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if found.etag in known or "*" in known:
        return Response(status_code=304, headers=headers)
    return Response(found.content, media_type=found.content_type, headers=headers)
