"""Single requests, as the OpenAI API has them: held open here, answered by the express node of a worker."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any, Final

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool

from api.auth import KeyedRoute, Principal, Submitter
from api.errors import ApiError, refusals
from api.gateway import Gateway, gateway_of
from api.streamed import EVENTS, events_of
from models.singles import ENGINE_DIED, SingleAnswer, SingleRequest, read_single
from pipeline.budgets import CODE as BUDGET_EXCEEDED
from pipeline.budgets import BudgetExceeded
from pipeline.held import Desk, TooManyHeld
from pipeline.serving import ServedModels, served_models
from pipeline.singles import Charge, charge_single, settle_single
from runtime.errors import Problem, ServiceUnreachable
from runtime.logs import get_logger
from store.express import ExpressQueue

log = get_logger(__name__)

router = APIRouter(prefix="/v1", tags=["single requests"], route_class=KeyedRoute)

SERVED_FOR_S: Final = 1.0  # how long it is taken as known who serves what
JSON: Final = "application/json"
_REFUSALS: Final = refusals(400, 404, 413, 502, 504)
_TRUST: Final = {"type": "object", "properties": {"trust": {"enum": ["own", "external"], "default": "own"}}}


def _described(**members: Any) -> dict[str, Any]:
    """How a request's body is described: what is checked of it; everything else goes to the engine as it is."""
    properties = {"model": {"type": "string", "minLength": 1}, "stoker": _TRUST, **members}
    schema = {"type": "object", "required": ["model", *members], "properties": properties}
    return {"requestBody": {"required": True, "content": {JSON: {"schema": schema}}}}


_MESSAGE: Final = {"type": "object", "required": ["role"], "properties": {"role": {"type": "string", "minLength": 1}}}
_TEXTS: Final = {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1}]}


@dataclass(slots=True)
class Counter:
    """Where single requests are handed in: one a loop."""

    gateway: Gateway
    desk: Desk
    served: ServedModels | None = None
    served_until: float = 0.0
    looking: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def served_now(self) -> ServedModels | None:
        """What live express nodes serve; None if there are none."""
        async with self.looking:
            if time.monotonic() >= self.served_until:
                workers = await run_in_threadpool(self.gateway.board.workers, node="express")
                self.served = served_models(workers)
                self.served_until = time.monotonic() + SERVED_FOR_S
            return self.served


def counter_of(gateway: Gateway) -> Counter | None:
    """For the running loop; None where no broker is named. Close its desk."""
    if gateway.invite is None:
        return None
    settings = gateway.settings
    queue = ExpressQueue(settings.require_redis())
    return Counter(gateway, Desk(queue, most=settings.gateway.express_requests, invite=gateway.invite))


@router.post(
    "/chat/completions",
    responses=_REFUSALS,
    openapi_extra=_described(messages={"type": "array", "minItems": 1, "items": _MESSAGE}),
)
async def create_chat_completion(request: Request, principal: Submitter) -> Response:
    """Answer one chat now. With `stream`, the whole answer is one event at its end."""
    return await _answer(request, principal, "/v1/chat/completions")


@router.post("/completions", responses=_REFUSALS, openapi_extra=_described(prompt=_TEXTS))
async def create_completion(request: Request, principal: Submitter) -> Response:
    """Answer one prompt now. With `stream`, the whole answer is one event at its end."""
    return await _answer(request, principal, "/v1/completions")


@router.post("/embeddings", responses=_REFUSALS, openapi_extra=_described(input=_TEXTS))
async def create_embedding(request: Request, principal: Submitter) -> Response:
    """The embeddings of some texts now."""
    return await _answer(request, principal, "/v1/embeddings")


async def _answer(request: Request, principal: Principal, path: str) -> Response:
    counter: Counter | None = request.state.counter
    gateway = gateway_of(request)
    single = _read(await request.body(), path, gateway)
    if counter is None or (served := await counter.served_now()) is None:
        raise _away("no worker answers single requests now: start one with STOKER_WORKER__EXPRESS_SLOTS above 0")
    if single.model not in served.allowed(single.trust):
        raise _unserved(single, served)
    charge = await run_in_threadpool(_charged, gateway, principal, single)
    answer: SingleAnswer | None = None
    try:
        answer = await _held(
            request, counter.desk, single, key_id=principal.key_id, wait_s=gateway.settings.gateway.express_s
        )
    finally:
        await asyncio.shield(run_in_threadpool(_settle, gateway, principal, charge, answer))
    return _response(single, answer)


def _read(raw: bytes, path: str, gateway: Gateway) -> SingleRequest:
    single = read_single(raw, path, max_output_tokens=gateway.settings.limits.max_output_tokens)
    if isinstance(single, Problem):
        message = f"{single.field} {single.message}" if single.field else single.message
        raise ApiError(400, message, param=single.field, code=single.code)
    return single


def _charged(gateway: Gateway, principal: Principal, single: SingleRequest) -> Charge:
    try:
        with gateway.database.transaction() as session:
            return charge_single(
                session,
                key_id=principal.key_id,
                path=single.path,
                body=single.body,
                most_output=gateway.settings.limits.max_output_tokens,
            )
    except BudgetExceeded as error:
        raise _unpaid(str(error)) from error


def _unpaid(message: str) -> ApiError:
    return ApiError(429, message, kind="rate_limit_error", code="insufficient_quota")


def _settle(gateway: Gateway, principal: Principal, charge: Charge, answer: SingleAnswer | None) -> None:
    """What was answered is not withheld while Postgres is away: then the most that it could take stays spent."""
    try:
        with gateway.database.transaction() as session:
            settle_single(session, charge, answer, tenant=principal.tenant, key_id=principal.key_id)
    except ServiceUnreachable as error:
        log.warning("single_not_settled", key=principal.key_id, error=str(error))


async def _held(request: Request, desk: Desk, single: SingleRequest, *, key_id: str, wait_s: float) -> SingleAnswer:
    """The answer, unless its client goes first: then nobody reads what is raised."""
    asking = asyncio.create_task(desk.ask(single, key_id=key_id))
    gone = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait((asking, gone), timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
        if asking.done():
            return asking.result()
        if gone.done():
            raise ApiError(400, "the client has gone", code="cancelled")
        raise ApiError(
            504,
            f"not answered within {wait_s:g} s (STOKER_GATEWAY__EXPRESS_S); ask for less, or submit a batch",
            kind="server_error",
            code="timeout",
        )
    except TooManyHeld as error:
        raise ApiError(
            429, f"{error}; try again soon", kind="rate_limit_error", code="too_many_requests", headers=_soon()
        ) from error
    finally:
        gone.cancel()
        asking.cancel()
        await asyncio.wait((asking, gone))


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _response(single: SingleRequest, answer: SingleAnswer) -> Response:
    if answer.code is not None or answer.response is None or answer.status_code is None:
        raise _refusal(single, answer)
    if not single.streams:
        return Response(answer.response, media_type=JSON)
    try:
        events = events_of(answer.response, with_usage=single.with_usage)
    except ValueError as error:
        log.warning("single_without_events", model=single.model, error=str(error))
        raise _useless("invalid_response") from error
    return Response(events, media_type=EVENTS)


# What is no client's fault, and no business of its. One that repeats what an engine died of may kill the next one too.
_FAULTS: Final = {
    "unavailable": (503, "the engine could not answer now; try again", {"Retry-After": "2"}),
    ENGINE_DIED: (503, "the engine ended while it answered; it is started anew", {"x-should-retry": "false"}),
    "timeout": (504, "the engine did not answer in time; ask for less", {}),
    "internal_error": (500, "a defect of ours; it is in the worker's log", {}),
}


def _refusal(single: SingleRequest, answer: SingleAnswer) -> ApiError:
    """The error of a request that came to nothing; one that an endpoint refused is told in its words."""
    message = answer.message or "the engine gave no reason"
    if answer.code in _FAULTS:
        status, said, headers = _FAULTS[answer.code]
        return ApiError(status, said, kind="server_error", code=answer.code, headers=headers)
    if answer.code == BUDGET_EXCEEDED:
        return _unpaid(message)
    if answer.code in ("model_not_found", "trust_refused"):
        return ApiError(404 if answer.code == "model_not_found" else 403, message, code=answer.code)
    status = answer.status_code or 502
    if status == 501:  # llama.cpp's word for embeddings, where it generates
        message = f"{single.model!r} is served, but not at {single.path}: {_said(answer.response) or message}"
        return ApiError(400, message, param="model", code="invalid_value")
    if 400 <= status < 500 and status not in (401, 403, 407):
        kind: Any = "not_found_error" if status == 404 else "invalid_request_error"
        return ApiError(status, _said(answer.response) or message, kind=kind, code=answer.code)
    return _useless(answer.code)


def _useless(code: str | None) -> ApiError:
    return ApiError(
        502, "the engine's answer was of no use; its worker's log says more", kind="server_error", code=code
    )


def _said(response: str | None) -> str | None:
    """The message of an error as engines write it."""
    try:
        said = json.loads(response or "")
    except ValueError:
        return None
    error = said.get("error", said) if isinstance(said, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return message if isinstance(message, str) else None


def _unserved(single: SingleRequest, served: ServedModels) -> ApiError:
    if single.model in served.external:
        message = (
            f"only external endpoints serve {single.model!r}: "
            'allow them with {"stoker": {"trust": "external"}}, or name one of ours'
        )
    else:
        names = ", ".join(sorted(served.allowed(single.trust))) or "none"
        message = f"no worker serves {single.model!r}; those that are served: {names}"
    return ApiError(404, message, kind="not_found_error", param="model", code="model_not_found")


def _away(message: str) -> ApiError:
    return ApiError(503, message, kind="server_error", code="unavailable", headers=_soon())


def _soon() -> dict[str, str]:
    return {"Retry-After": "2"}
