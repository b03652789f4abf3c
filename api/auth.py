"""Who asks: from the key in a request's header to the principal, before anything of its body is read.

Routers are made with `route_class=KeyedRoute`: FastAPI reads and parses a body before it asks dependencies, and such a
route asks for the key before that. A route says what it needs by a parameter `principal: Reader` (or `Submitter`, or
`Admin`).
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Annotated, Any, Final

from fastapi import Depends, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from api.errors import ApiError
from api.gateway import Gateway, gateway_of
from models.keys import is_one_of, parse_key
from models.states import Scope
from runtime.logs import get_logger
from store.keys import LivingKey, living_key, touch_key
from store.rate_limits import Allowance

log = get_logger(__name__)

BEARER: Final = HTTPBearer(
    auto_error=False, scheme_name="key", description="A key of `stoker keys create`, as the openai client sends it."
)
_SCOPE: Final = "required_scope"
_PRESENTED = Annotated[HTTPAuthorizationCredentials | None, Depends(BEARER)]


@dataclass(frozen=True, slots=True)
class Principal:
    """Whose request it is, and what it may do."""

    key_id: str
    tenant: str
    name: str
    scopes: frozenset[Scope]
    expires_at: datetime | None

    def may(self, scope: Scope) -> bool:
        """Whether a scope is among its own; admin has all."""
        return scope in self.scopes or Scope.ADMIN in self.scopes


@cache
def requires(scope: Scope) -> Callable[..., Awaitable[Principal]]:
    """A dependency: the principal of the request, which has this scope.

    Raises ApiError 401, 403 or 429.
    """

    async def holds(request: Request, _: _PRESENTED) -> Principal:
        return await _admit(request, scope)

    setattr(holds, _SCOPE, scope)
    return holds


Reader = Annotated[Principal, Depends(requires(Scope.READ))]
Submitter = Annotated[Principal, Depends(requires(Scope.SUBMIT))]
Admin = Annotated[Principal, Depends(requires(Scope.ADMIN))]


class KeyedRoute(APIRoute):
    """A route whose principal is known before its body is read; its answers say what the key may yet ask."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler that comes after the key."""
        answer = super().get_route_handler()
        scopes = tuple(_scopes_of(self.dependant))

        async def admitted(request: Request) -> Response:
            for scope in scopes:
                await _admit(request, scope)
            response = await answer(request)
            if scopes:
                response.headers.update(request.state.rate_headers)
            return response

        return admitted


def _scopes_of(dependant: Dependant) -> Iterator[Scope]:
    for one in dependant.dependencies:
        scope = getattr(one.call, _SCOPE, None)
        if isinstance(scope, Scope):
            yield scope
        yield from _scopes_of(one)


async def _admit(request: Request, scope: Scope) -> Principal:
    """The principal, found once a request."""
    principal: Principal | None = getattr(request.state, "principal", None)
    if principal is None:
        principal = await run_in_threadpool(_authenticate, request)
        request.state.principal = principal
    if not principal.may(scope):
        raise ApiError(
            403,
            f"the key {principal.key_id} lacks the scope {scope}; use one that has it: "
            f"`stoker keys create --tenant {principal.tenant} --scope {scope}`",
            kind="permission_error",
            code="missing_scope",
        )
    return principal


def _authenticate(request: Request) -> Principal:
    gateway = gateway_of(request)
    address = request.client.host if request.client is not None else "unknown"
    scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
    presented = parse_key(credentials.strip()) if scheme.lower() == "bearer" else None
    refused_s = gateway.limits.refused_s(address, None if presented is None else presented.digest)
    if refused_s > 0:
        raise _too_many("too many requests from this address had no right key; wait", refused_s)
    key = None if presented is None else _right_key(gateway, presented.id, presented.digest)
    if presented is None or key is None:
        gateway.limits.failed(address)
        log.info("authentication_failed", address=address, key=None if presented is None else presented.id)
        raise _unauthenticated()
    gateway.limits.welcome(address, presented.digest)
    per_minute = key.requests_per_minute or gateway.settings.gateway.requests_per_minute
    allowance = gateway.limits.take(key.id, per_minute)
    request.state.rate_headers = headers = _rate_headers(per_minute, allowance)
    if allowance.wait_s > 0:
        raise _too_many(f"the key {key.id} may ask {per_minute} times a minute; wait", allowance.wait_s, headers)
    return Principal(key_id=key.id, tenant=key.tenant, name=key.name, scopes=key.scopes, expires_at=key.expires_at)


def _right_key(gateway: Gateway, key_id: str, digest: bytes) -> LivingKey | None:
    with gateway.database.transaction() as session:
        key = living_key(session, key_id)
        if not is_one_of(digest, () if key is None else key.digests):
            return None
        if key is not None and not key.is_fresh:
            touch_key(session, key_id)
    return key


def _rate_headers(per_minute: int, allowance: Allowance) -> dict[str, str]:
    if allowance.remaining is None:
        return {}
    return {
        "x-ratelimit-limit-requests": str(per_minute),
        "x-ratelimit-remaining-requests": str(allowance.remaining),
    }


def _unauthenticated() -> ApiError:
    return ApiError(
        401,
        "no right key: send `Authorization: Bearer sk-…` with one of `stoker keys create` that is neither expired "
        "nor revoked",
        kind="authentication_error",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def _too_many(why: str, wait_s: float, headers: dict[str, str] | None = None) -> ApiError:
    after = max(1, math.ceil(wait_s))
    return ApiError(
        429,
        f"{why} {after} s",
        kind="rate_limit_error",
        code="rate_limit_exceeded",
        headers={**(headers or {}), "Retry-After": str(after)},
    )
