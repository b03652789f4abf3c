"""Counting requests by their route: its template, never what a client wrote in its place."""

from __future__ import annotations

import asyncio
import time
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.metrics import HTTP_REQUESTS, HTTP_SECONDS

_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_NO_ROUTE: Final = "none"
_DEFECT: Final = "500"  # that answer is made outside of here, or by the server
_GONE: Final = "499"  # nginx's: the client went before there was an answer


class Counted:
    """Counts every request when its answer has ended."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on as it is."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        status: str | None = None

        async def send_and_look(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, send_and_look)
        except asyncio.CancelledError:
            status = status or _GONE
            raise
        finally:
            route = getattr(scope.get("route"), "path", _NO_ROUTE)
            method = scope["method"] if scope["method"] in _METHODS else "other"
            HTTP_REQUESTS.add(1, method=method, route=route, status=status or _DEFECT)
            HTTP_SECONDS.observe(time.monotonic() - began, route=route)
