"""The application: its routes, what becomes of errors, and what every answer has."""

from __future__ import annotations

import importlib.metadata
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final
from uuid import uuid4

from anyio.to_thread import current_default_thread_limiter
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api import batches, express, files, inspection, models, page
from api.counted import Counted
from api.errors import ApiError, not_found
from api.gateway import Gateway
from runtime.errors import NotFound, ServiceUnreachable
from runtime.logs import get_logger

log = get_logger(__name__)

UPLOADS: Final = "/v1/files"  # have a limit of their own
_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
_V1_HEADERS: Final = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
_DESCRIPTION: Final = (
    "Files and batches as the official `openai` client speaks them; ours beyond that stands under `stoker`. "
    "Send a key as `Authorization: Bearer sk-…` (`stoker keys create`)."
)


def create_app(gateway: Gateway) -> FastAPI:
    """The application with its parts. No documentation page: those load scripts from elsewhere."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, Any]]:
        # A thread more than there are connections would only wait for one.
        current_default_thread_limiter().total_tokens = gateway.settings.gateway.pool_size
        counter = express.counter_of(gateway)
        yield {"counter": counter}
        if counter is not None:
            await counter.desk.close()

    app = FastAPI(
        lifespan=lifespan,
        title="Stoker",
        version=importlib.metadata.version("stoker"),
        description=_DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.gateway = gateway
    for router in (files.router, batches.router, express.router, models.router, inspection.router, page.page_router()):
        app.include_router(router, max_body_size=gateway.settings.gateway.request_bytes)
    app.get("/healthz", include_in_schema=False)(_healthz)
    app.add_exception_handler(ApiError, _answer)
    app.add_exception_handler(NotFound, _answer)
    app.add_exception_handler(ServiceUnreachable, _answer)
    app.add_exception_handler(RequestValidationError, _answer)
    app.add_exception_handler(HTTPException, _answer)
    app.add_exception_handler(Exception, _answer)
    app.add_middleware(WithHeaders, most_bytes=gateway.settings.gateway.request_bytes)
    app.add_middleware(Counted)
    return app


def _healthz(request: Request) -> dict[str, str]:
    """Whether this process answers and reaches Postgres; needs no key and says nothing else."""
    with request.app.state.gateway.database.transaction():
        return {"status": "ok"}


class WithHeaders:
    """Every answer says what browsers may do with it: nothing but show it. A body that is too large ends here."""

    def __init__(self, app: ASGIApp, *, most_bytes: int) -> None:
        self._app, self._most_bytes = app, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; what an answer states itself stays."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        wanted = {
            **_HEADERS,
            "X-Request-Id": f"req_{uuid4().hex}",
            **(_V1_HEADERS if scope["path"].startswith("/v1/") else {}),
        }

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in wanted.items():
                    headers.setdefault(name, value)
            await send(message)

        stated = dict(scope["headers"]).get(b"content-length", b"0")
        if stated.isdigit() and int(stated) > self._most_bytes and scope["path"] != UPLOADS:
            shown = _too_large(self._most_bytes)
            await JSONResponse(shown.answer.model_dump(), status_code=413)(scope, receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)


async def _answer(request: Request, error: Exception) -> JSONResponse:
    """The one place that turns errors into answers."""
    shown = _as_api_error(error)
    if shown.status_code == 413 and not isinstance(error, ApiError):
        shown = _too_large(request.app.state.gateway.settings.gateway.request_bytes)
    if shown.status_code == 405:
        shown.headers = {"Allow": _methods_of(request)}
    if shown.status_code == 500:
        log.error("request_defect", method=request.method, path=request.url.path)  # uvicorn logs its traceback
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


def _too_large(most_bytes: int) -> ApiError:
    return ApiError(
        413, f"a body may have {most_bytes:,} bytes (STOKER_GATEWAY__REQUEST_BYTES); send less", code="body_too_large"
    )


def _methods_of(request: Request) -> str:
    """What the path knows: Starlette names the methods of the first of its routes only."""
    asked = request.url.path.split("/")
    found = set()
    for path, operations in request.app.openapi()["paths"].items():
        parts = path.split("/")
        if len(parts) == len(asked) and all(a == b or a.startswith("{") for a, b in zip(parts, asked, strict=True)):
            found |= {method.upper() for method in operations}
    return ", ".join(sorted(found)) or "GET, HEAD"


def _invalid(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    if first["loc"][0] == "path" and str(first["loc"][1]).endswith("_id"):
        return not_found(f"{str(first['loc'][1]).removesuffix('_id')} of this id")
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")]
    if first["type"] in ("model_attributes_type", "dict_type") and not place:
        return ApiError(400, "the body is no JSON object; send one, with `Content-Type: application/json`")
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no valid JSON: {first.get('ctx', {}).get('error', '')}", code="invalid_json")
    field = ".".join(place) or None
    return ApiError(400, f"{field or 'the body'}: {_said(first)}", param=field, code="invalid_value")


def _said(fault: Any) -> str:
    if fault["type"] == "extra_forbidden":
        return "is unknown; docs/gateway.md and /openapi.json have the names that are known"
    if fault["type"] == "string_pattern_mismatch":
        is_window = fault["loc"][-1] == "completion_window"
        return "write 90m, 24h or 7d" if is_window else "is not of the form that /openapi.json says"
    return str(fault["msg"]).removeprefix("Value error, ")
