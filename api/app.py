"""The application: its routes, what becomes of errors, and what every answer has."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api import batches, files, inspection, page
from api.errors import ApiError, not_found
from api.gateway import Gateway
from runtime.errors import NotFound, ServiceUnreachable
from runtime.logs import get_logger

log = get_logger(__name__)

UPLOADS: Final = ("POST", "/v1/files")
_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
_API_HEADERS: Final = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
_DESCRIPTION: Final = (
    "Files and batches as the official `openai` client speaks them; ours beyond that stands under `stoker`. "
    "Send a key as `Authorization: Bearer sk-…` (`stoker keys create`)."
)


def create_app(gateway: Gateway) -> FastAPI:
    """The application with its parts. No documentation page: those load scripts from elsewhere."""
    app = FastAPI(
        title="Stoker",
        version=importlib.metadata.version("stoker"),
        description=_DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.gateway = gateway
    for router in (files.router, batches.router, inspection.router, page.router):
        app.include_router(router)
    app.get("/healthz", include_in_schema=False)(_healthz)
    app.add_exception_handler(ApiError, _answer)
    app.add_exception_handler(NotFound, _answer)
    app.add_exception_handler(ServiceUnreachable, _answer)
    app.add_exception_handler(RequestValidationError, _answer)
    app.add_exception_handler(HTTPException, _answer)
    app.add_exception_handler(Exception, _answer)
    app.middleware("http")(_with_headers)
    app.add_middleware(BodyLimit, most_bytes=gateway.settings.gateway.request_bytes)
    return app


def _healthz(request: Request) -> dict[str, str]:
    """Whether this process answers and reaches Postgres; needs no key and says nothing else."""
    with request.app.state.gateway.database.transaction():
        return {"status": "ok"}


async def _with_headers(request: Request, proceed: Callable[[Request], Awaitable[Response]]) -> Response:
    began = time.monotonic()
    response = await proceed(request)
    path = request.url.path
    for name, value in {**_HEADERS, **(_API_HEADERS if path.startswith("/v1/") else {})}.items():
        response.headers.setdefault(name, value)
    route = request.scope.get("route")
    log.debug(
        "request",
        method=request.method,
        route=getattr(route, "path", "-"),
        status=response.status_code,
        ms=round((time.monotonic() - began) * 1000, 1),
    )
    return response


async def _answer(request: Request, error: Exception) -> JSONResponse:
    """The one place that turns errors into answers."""
    shown = _as_api_error(error)
    if shown.status_code == 500:
        log.error("request_defect", method=request.method, path=request.url.path, exc_info=error)
    return JSONResponse(shown.answer.model_dump(), status_code=shown.status_code, headers=shown.headers)


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, NotFound):
        return not_found(str(error).removeprefix("no "))
    if isinstance(error, ServiceUnreachable):
        log.warning("service_away", error=str(error))
        return ApiError(503, "a service behind the gateway is away; try again", kind="server_error", code="unavailable")
    if isinstance(error, RequestValidationError):
        return _invalid(error)
    if isinstance(error, HTTPException):
        kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
        return ApiError(error.status_code, f"{error.detail}; see /openapi.json", kind=kind, headers=error.headers)  # type: ignore[arg-type]
    return ApiError(500, "a defect of ours; it is in the gateway's log", kind="server_error", code="internal_error")


def _invalid(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no valid JSON: {first.get('ctx', {}).get('error', '')}", code="invalid_json")
    field = ".".join(place) or None
    return ApiError(400, f"{field or 'the body'}: {_said(first)}", param=field, code="invalid_value")


def _said(fault: Any) -> str:
    return str(fault["msg"]).removeprefix("Value error, ")


class BodyLimit:
    """Refuses bodies over `most_bytes`, stated or not, but for uploads, which have their own limit."""

    def __init__(self, app: ASGIApp, *, most_bytes: int) -> None:
        self._app, self._most_bytes = app, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (scope["method"], scope["path"]) == UPLOADS:
            await self._app(scope, receive, send)
            return
        stated = dict(scope["headers"]).get(b"content-length", b"0")
        if not stated.isdigit() or int(stated) > self._most_bytes:
            await self._refuse(scope, receive, send)
            return
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._most_bytes:
                raise self._too_large()
            return message

        await self._app(scope, counted, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        shown = self._too_large()
        await JSONResponse(shown.answer.model_dump(), status_code=shown.status_code)(scope, receive, send)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body has more than {self._most_bytes:,} bytes", code="body_too_large")
