"""Which endpoint a request goes to: the worker's own engine, and registered endpoints beside it (decision 0029).

One router a process, for the running loop. It balances, waits for limits, and tries another endpoint where the first
cannot have done the work; it never retries where that may still run and costs money: its error says so, and the
pipeline decides. It must not know of shards, and reads no more of a body than its model and its size.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Final

import msgspec

from inference.bodies import estimated_prompt_tokens, estimated_tokens, model_of
from inference.embeddings import PATH as EMBEDDINGS
from inference.endpoint import (
    EndpointDown,
    QuotaExhausted,
    Refused,
    Reply,
    ServerFault,
    Stalled,
    Throttled,
)
from inference.observed import Sending, billed
from inference.replies import usage_of
from inference.routes import Route
from inference.terms import PLAIN, Limits, Terms
from models.endpoints import Grant, RatesSeen
from models.jobs import Usage
from models.states import Trust
from runtime.errors import Permanent, StokerError, Stopped, Transient
from runtime.logs import get_logger

log = get_logger(__name__)

TICK_S: Final = 0.2  # how soon one that waits notices that it is to stop
MOST_THROTTLED: Final = 4  # 429s of one request by one endpoint, in spite of its rests; then it counts as a failure
UNPAID_S: Final = 1.0  # between two looks at a budget that has no room, or a batch that has nothing to spill
MODELS_KNOWN_S: Final = 60.0  # how long the engine's list of models is taken as known
MODELS_ASKED_S: Final = 1.0  # between two tries to learn it
# Bounded loads (Mirrokni, Thorup, Zadimoghaddam, arXiv 1608.01350): the endpoint that has a prompt's beginning in its
# prefix cache is kept to, until it has a quarter more to do than the one with the least.
SLACK: Final = 1.25
PREFIX_BYTES: Final = 1024


@dataclass(slots=True)
class _Wish:
    """One request on its way to an endpoint."""

    path: str
    body: bytes
    request_id: str
    terms: Terms
    model: str
    tokens: int
    failed: dict[Route, StokerError] = field(default_factory=dict)
    throttled: Counter[Route] = field(default_factory=Counter)
    unpaid_until: float = 0.0
    broken_since: float | None = None


class Router:
    """`engine` answers generation and, unless there is an `embedder`, embeddings; either may be None."""

    def __init__(self, *, engine: Route | None, embedder: Route | None = None, limits: Limits | None = None) -> None:
        self._engines = [route for route in (engine, embedder) if route is not None]
        self._by_kind = {
            "generation": engine,
            "embeddings": embedder if embedder is not None else engine,
        }
        self._routes: list[Route] = []
        self._limits = limits
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_at = 0.0

    @property
    def routes(self) -> Sequence[Route]:
        """The registered endpoints."""
        return self._routes

    def set_routes(self, routes: Iterable[Route]) -> None:
        """From now on these are the registered endpoints; what is under way on others goes on."""
        self._routes = list(routes)
        self._wake()

    def engine_for(self, path: str) -> Route | None:
        """The worker's own engine for this path."""
        return self._by_kind[_kind(path)]

    def places(self, trust: Trust, *, pays: bool = False) -> int:
        """How many requests are to be under way at once, of batches of this trust, which may `pay`."""
        generation = self._by_kind["generation"]
        own = 0 if generation is None else generation.size
        routes = (route for route in self._routes if _trusts(trust, route) and (pays or not route.is_priced))
        return own + sum(route.wanted for route in routes)

    async def is_down(self) -> bool:
        """Whether nothing answers: the engines refuse connections, and no registered endpoint is to be had."""
        for route in self._engines:
            if route.is_down and await route.endpoint.is_healthy():
                route.is_down = False
        if any(not route.is_down for route in self._engines):
            return False
        now = time.monotonic()
        return all(route.is_broken(now) and not route.is_ready(now) for route in self._routes)

    def is_idle_beside(self) -> bool:
        """Whether a registered endpoint could work and has nothing to do: jobs of another batch may be for it."""
        now = time.monotonic()
        return any(not route.running and route.is_ready(now) for route in self._routes)

    def served_by(self, model: str) -> list[Route]:
        """The registered endpoints that serve this model."""
        return [route for route in self._routes if route.spec is not None and model in route.spec.models]

    def registered(self, model: str) -> str | None:
        """What decides the answers for a model that registered endpoints alone serve; None: the engine, or nobody."""
        serving = self.served_by(model)
        if not serving or any(route.may_serve(model) for route in self._engines):
            return None
        deciders = sorted({route.spec.checkpoint(model) for route in serving if route.spec is not None})
        return ",".join(deciders)

    async def learn_models(self) -> None:
        """Ask the engines what they serve, where there are others that may serve the same."""
        if self._routes:
            for route in self._engines:
                await self._serves(route, "")

    async def post(self, path: str, body: bytes, *, request_id: str, terms: Terms = PLAIN) -> Reply:
        """Send one request to the endpoint that suits it best now, and wait for what it says.

        Raises what Endpoint.post raises; EndpointDown that says `was_sent` only of the worker's own engine; Stopped;
        Permanent where nothing may answer it; what `terms.payer` raises.
        """
        engine = self.engine_for(path)
        if engine is not None and (terms.alone or not self._routes):
            return await self._to_engine(engine, path, body, request_id=request_id)
        wish = _Wish(path, body, request_id, terms, model_of(body), estimated_tokens(body))
        while True:
            route, grant, paid = await self._turn(wish)
            try:
                return await self._send(route, wish, grant, paid)
            except Throttled as error:
                if wish.throttled[route] >= MOST_THROTTLED:  # others were answered: it may be too large for its limit
                    wish.failed[route] = error
            except (QuotaExhausted, Refused):
                continue  # it is closed: another does it, or it waits
            except (EndpointDown, ServerFault) as error:
                if route.spec is None and not (isinstance(error, EndpointDown) and not error.was_sent):
                    raise
                wish.failed[route] = error
                if paid and not _cannot_have_run(error):
                    raise Transient(f"{error}; it may have been done, and is not sent elsewhere at once") from error

    async def _to_engine(self, engine: Route, path: str, body: bytes, *, request_id: str) -> Reply:
        engine.running += 1
        try:
            with Sending(engine, path, body, request_id=request_id) as sending:
                return sending.answered(await engine.endpoint.post(path, body, request_id=request_id))
        except EndpointDown:
            engine.is_down = True
            raise
        finally:
            engine.running -= 1
            if self._waiting:
                self._wake()

    async def _turn(self, wish: _Wish) -> tuple[Route, Grant | None, int]:
        """Wait for an endpoint that takes it: that one, its leave, and the nanos that were reserved."""
        is_queued = bool(self._waiting)
        while True:
            if wish.terms.stopped():
                raise Stopped
            route = None
            if not is_queued:
                route = await self._choose(wish)
            if route is not None:
                entered = await self._enter(route, wish)
                if entered is not None:
                    self._wake()  # there may be room for one more
                    return route, *entered
                continue
            await self._wait()
            is_queued = False

    async def _choose(self, wish: _Wish) -> Route | None:
        """The endpoint to try now; None: wait. Raises the last failure when all of them have failed."""
        own, priced = await self._candidates(wish)
        now = time.monotonic()
        left = [route for route in own if route not in wish.failed]
        dear = [route for route in priced if route not in wish.failed]
        if not left and (not dear or (wish.failed and now < wish.unpaid_until)):
            raise self._exhausted(wish)
        if (route := self._best([one for one in left if one.is_ready(now)], wish)) is not None:
            return route
        if now >= wish.unpaid_until:
            ready = [one for one in dear if one.is_ready(now)]
            if ready:
                return min(ready, key=lambda one: _price(one, wish))
        self._be_patient(wish, [*left, *dear], now)
        self._arm([*left, *dear], now)
        return None

    async def _candidates(self, wish: _Wish) -> tuple[list[Route], list[Route]]:
        """(unpriced, priced) endpoints that may answer it."""
        serving = [route for route in self.served_by(wish.model) if route.serves == _kind(wish.path)]
        allowed = [route for route in serving if _trusts(wish.terms.trust, route)]
        engine = self.engine_for(wish.path)
        own = [route for route in allowed if not route.is_priced]
        priced = [route for route in allowed if route.is_priced]
        if engine is not None and (not serving or await self._serves(engine, wish.model)):
            own.insert(0, engine)
        if own and wish.terms.payer is None:
            priced = []
        if not own and not priced:
            raise _unserved(wish, is_external=bool(serving))
        return own, priced

    async def _serves(self, engine: Route, model: str) -> bool:
        """Whether the engine serves a model; asked again after a while, as one that is not ours may change.

        Until it was ever known it may: its answer will say.
        """
        now = time.monotonic()
        if now >= engine.models_until:
            engine.models_until = now + MODELS_ASKED_S
            with suppress(StokerError):
                engine.models = frozenset(await engine.endpoint.served_models())
                engine.models_until = now + MODELS_KNOWN_S
        return engine.may_serve(model)

    def _best(self, ready: Sequence[Route], wish: _Wish) -> Route | None:
        """The least loaded; or the one that is a prompt's own, unless it has too much more to do."""
        if len(ready) < 2:
            return ready[0] if ready else None
        least = min(ready, key=lambda route: route.load(wish.tokens))
        favourite = max(ready, key=lambda route: _rank(wish, route))
        bound = SLACK * least.load(wish.tokens) + wish.tokens / favourite.weight
        return favourite if favourite.is_own and favourite.load(wish.tokens) <= bound else least

    def _be_patient(self, wish: _Wish, routes: Sequence[Route], now: float) -> None:
        """Raise EndpointDown, as nothing was sent, when all have been broken for long."""
        if not all(route.is_broken(now) for route in routes):
            wish.broken_since = None
        elif all(route.is_closed(now) for route in routes):
            names = "; ".join(f"{route.name}: {route.closed_for}" for route in routes)
            raise EndpointDown(f"no endpoint for {wish.model} takes anything: {names}", was_sent=False)
        elif wish.broken_since is None:
            wish.broken_since = now
        elif now - wish.broken_since > wish.terms.patience_s:
            names = ", ".join(route.name for route in routes)
            raise EndpointDown(f"no endpoint for {wish.model} answers: {names}", was_sent=False)

    def _exhausted(self, wish: _Wish) -> StokerError:
        """What to say when every endpoint that may has failed."""
        failures = list(wish.failed.values())
        if refusals := [error for error in failures if isinstance(error, Permanent)]:
            return refusals[-1] if len(refusals) == len(failures) else Transient("; ".join(map(str, failures)))
        if all(isinstance(error, EndpointDown) and not error.was_sent for error in failures):
            return EndpointDown("; ".join(map(str, failures)), was_sent=False)
        return Transient("; ".join(map(str, failures)))

    async def _enter(self, route: Route, wish: _Wish) -> tuple[Grant | None, int] | None:
        """Take a place on it, with leave of the limits that all share, and the money; None: not now."""
        route.begin(wish.tokens)
        grant, paid, is_in = None, 0, False
        try:
            async with route.door:
                if not await self._admits(route):
                    return None
                if route.spec is not None and self._limits is not None:
                    grant = await self._limits.take(route.spec, tokens=wish.tokens)
                    if grant.wait_s > 0:
                        route.not_before = time.monotonic() + grant.wait_s
                        return None
            if route.is_priced:
                paid = await self._paid(route, wish)
                if not paid:
                    return None
            is_in = True
            return grant, paid
        finally:
            if not is_in:
                route.end(wish.tokens)
                if grant is not None and not grant.wait_s:
                    await self._settled(route, grant, tokens=0)

    async def _admits(self, route: Route) -> bool:
        """Whether it is still ready after the wait at its door; one that was broken must say that it is healthy."""
        now = time.monotonic()
        if now < route.not_before or route.running > route.size:
            return False
        if not route.is_broken(now):
            return True
        if route.running > 1:
            return False
        if not await route.endpoint.is_healthy():
            route.unhealthy(time.monotonic())
            return False
        route.is_down = False
        return True

    async def _paid(self, route: Route, wish: _Wish) -> int:
        """The nanos that were reserved for it; 0: not now."""
        assert route.spec is not None  # noqa: S101  # priced ones are registered
        try:
            if wish.terms.payer is None:
                message = "bills tokens, and nothing says how much this may cost: submit with --budget-money"
                raise Permanent(message, code="budget_exceeded")
            own, _ = await self._candidates(wish)
            nanos = await wish.terms.payer.pay(route.spec.prices, wish.path, wish.body, spills=bool(own))
        except Permanent as error:  # a cheaper one may do
            wish.failed[route] = Permanent(f"{route.name}: {error}", code=error.code)
            return 0
        if not nanos:
            wish.unpaid_until = time.monotonic() + UNPAID_S
        return nanos

    async def _send(self, route: Route, wish: _Wish, grant: Grant | None, paid: int) -> Reply:
        """Send it there, and tell all who count what became of it."""
        began = time.monotonic()
        used: int | None = None
        spent = paid  # unless it is known better: it may have run
        try:
            model = None if route.spec is None else route.spec.models[wish.model]
            with Sending(route, wish.path, wish.body, request_id=wish.request_id) as sending:
                reply = sending.answered(
                    await route.endpoint.post(wish.path, wish.body, request_id=wish.request_id, model=model)
                )
            usage = Usage() if route.spec is None else _usage_in(reply)  # of the engine nothing is counted here
            used = usage.prompt_tokens + usage.completion_tokens or None
            self._answered(route, usage, seconds=time.monotonic() - began)
            spent = _bill(route, reply, usage, most=paid)
            await self._learn(route, reply.seen, throttled=False)
            return replace(reply, engine_id=route.engine_id, cost=spent if paid else None)
        except StokerError as error:
            if _cannot_have_run(error):
                used = spent = 0
            self._failed(route, wish, error, seconds=time.monotonic() - began)
            is_news = isinstance(error, Throttled) and wish.throttled[route] == 1
            await self._learn(route, getattr(error, "seen", None), throttled=is_news)
            raise
        finally:
            route.end(wish.tokens)
            if paid and wish.terms.payer is not None:
                wish.terms.payer.ended(paid, spent=spent)
                billed(route, spent)
            self._wake()
            if grant is not None:
                await self._settled(route, grant, tokens=used)

    def _answered(self, route: Route, usage: Usage, *, seconds: float) -> None:
        if route.spec is not None:
            route.answered()
            route.window.ended(seconds, usage.completion_tokens or 1)

    def _failed(self, route: Route, wish: _Wish, error: StokerError, *, seconds: float) -> None:
        """What an error says of the endpoint; a request's own fault says nothing."""
        now = time.monotonic()
        if route.spec is None:
            route.is_down = route.is_down or isinstance(error, EndpointDown)
        elif isinstance(error, Throttled):
            wish.throttled[route] += 1
            if wish.throttled[route] > 1:  # it came again when the endpoint had rested: that may be its own fault
                return
            if wait_s := route.throttled(now, error.retry_after_s):
                log.info("endpoint_throttled", endpoint=route.name, wait_s=round(wait_s, 2))
        elif isinstance(error, QuotaExhausted | Refused):
            if not route.closed_for:
                log.error("endpoint_closed", endpoint=route.name, reason=str(error))
            route.close(now, str(error), error.retry_after_s)
        elif isinstance(error, Transient):
            route.breaker.failed(now, error.retry_after_s)
            if isinstance(error, ServerFault):
                route.window.ended(seconds, 0)  # it took a place for so long
            if isinstance(error, Stalled) or error.retry_after_s is not None:  # a plain 500 is no sign of load
                route.window.overloaded()
            log.info("endpoint_failed", endpoint=route.name, reason=str(error))

    async def _learn(self, route: Route, seen: RatesSeen | None, *, throttled: bool) -> None:
        if self._limits is not None and route.spec is not None and (throttled or seen is not None):
            await self._limits.learn(route.spec, seen, throttled=throttled)

    async def _settled(self, route: Route, grant: Grant, *, tokens: int | None) -> None:
        if self._limits is not None and route.spec is not None:
            await self._limits.settle(route.spec, grant, tokens=tokens)

    async def _wait(self) -> None:
        """Until something ends, in turn; a little at the longest."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            async with asyncio.timeout(TICK_S):
                await turn
        except TimeoutError:
            with suppress(ValueError):
                self._waiting.remove(turn)

    def _wake(self) -> None:
        """Let the one that has waited longest look again; it wakes the next when it has found a place."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return

    def _arm(self, routes: Sequence[Route], now: float) -> None:
        """Wake one that waits when the clock makes an endpoint ready."""
        moments = [moment for route in routes if (moment := route.ready_at(now)) is not None]
        if not moments:
            return
        at = min(moments)
        if self._alarm is not None and now < self._alarm_at <= at:
            return
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm_at = at
        self._alarm = asyncio.get_running_loop().call_later(at - now, self._wake)


class _WithUsage(msgspec.Struct):
    usage: msgspec.Raw = msgspec.Raw(b"{}")


_USAGE: Final = msgspec.json.Decoder(_WithUsage)


def _usage_in(reply: Reply) -> Usage:
    try:
        return usage_of(_USAGE.decode(reply.body).usage)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return Usage()


def _kind(path: str) -> str:
    return "embeddings" if path == EMBEDDINGS else "generation"


def _trusts(trust: Trust, route: Route) -> bool:
    return trust is Trust.EXTERNAL or route.is_own


def _price(route: Route, wish: _Wish) -> int:
    """What this request would cost there, for comparison: its tokens are estimated."""
    assert route.spec is not None  # noqa: S101  # priced ones are registered
    prompt_tokens = estimated_prompt_tokens(wish.body)
    return route.spec.prices.most_nanos(prompt_tokens=prompt_tokens, output_tokens=wish.tokens - prompt_tokens)


def _bill(route: Route, reply: Reply, usage: Usage, *, most: int) -> int:
    """What an answer costs; a refusal nothing, and one that does not say what it took the most that it may."""
    if not most or route.spec is None or not 200 <= reply.status_code < 300:
        return 0
    return route.spec.prices.cost_nanos(usage) if usage.prompt_tokens + usage.completion_tokens else most


def _cannot_have_run(error: StokerError) -> bool:
    """Whether nothing was computed, or nothing that is billed."""
    if isinstance(error, ServerFault):
        return not error.may_have_run
    is_refused = isinstance(error, Throttled | QuotaExhausted | Refused)
    return is_refused or (isinstance(error, EndpointDown) and not error.was_sent)


def _rank(wish: _Wish, route: Route) -> bytes:
    """Rendezvous hashing (Thaler and Ravishankar 1998): each prompt's beginning has its own order of endpoints."""
    start = max(wish.body.find(b'"messages"'), wish.body.find(b'"prompt"'), 0)
    prefix = wish.body[start : start + PREFIX_BYTES]
    return hashlib.blake2b(prefix + route.name.encode(), digest_size=8).digest()


def _unserved(wish: _Wish, *, is_external: bool) -> Permanent:
    if is_external:
        return Permanent(
            f"only external endpoints serve {wish.model}, and this may not leave own ones: submit with "
            "--trust external --budget-money N",
            code="trust_refused",
        )
    return Permanent(
        f"no endpoint serves {wish.model}; `stoker endpoints list` has those that are known", code="model_not_found"
    )
