"""The scripted endpoint's inside: finds the orders in a prompt, keeps the slots, counts what came."""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import random
import re
import time
from collections import Counter
from typing import Any

import msgspec
from aiohttp import web

from tests.support import scripted_streams
from tests.support.scripted_answers import completion, drawn_latency_s, embeddings, prompts_of
from tests.support.scripted_limits import Limits

MODEL = "scripted"
JSON = "application/json"
DIRECTIVE = re.compile(r"\[\[([^\]]*)\]\]")
ANSWERING_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/embeddings"})
GARBAGE = {
    "not json": b"<html>502 it says, with status 200</html>",
    "invalid utf-8": b'{"choices":[{"message":{"content":"caf\xe9"},"finish_reason":"stop"}]}',
}
QUOTA = {
    "message": "You exceeded your current quota, please check your plan and billing details.",
    "type": "insufficient_quota",
    "param": None,
    "code": "insufficient_quota",
}
HELD_POLL_S = 0.01
CLIENT_GONE = 499  # nginx's number for a client that closed its connection
ESCAPES = {"surrogate": b"\\ud83d", "nul": b"\\u0000"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """What a Script is told when it starts."""
    parser.add_argument("--latency-s", type=float, default=0.0, help="service time; the median with a sigma")
    parser.add_argument("--latency-sigma", type=float, default=0.0, help="lognormal, drawn from the prompt")
    parser.add_argument("--slots", type=int, default=0, help="requests served at once; 0: all")
    parser.add_argument("--api-key")
    parser.add_argument("--auth-header", default="Authorization", help="where the key is expected; there as a bearer")
    parser.add_argument("--without-health", action="store_true", help="as servers that have no /health")
    parser.add_argument("--models", default="", help="a,b: these, and 404 for others; unset: any")
    parser.add_argument("--requests-per-minute", type=float, default=0)
    parser.add_argument("--tokens-per-minute", type=float, default=0, help="prompt and answer, by what they truly are")
    parser.add_argument("--fail-share", type=float, default=0.0, help="of requests that are answered 500, by chance")
    parser.add_argument("--seed", type=int, default=0, help="of that chance")


class Script:
    """What the server has been told and what it has seen."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.latency_s: float = options.latency_s
        self.latency_sigma: float = options.latency_sigma
        self.models: list[str] = [name for name in options.models.split(",") if name]
        self.fail_share: float = options.fail_share
        self._chance = random.Random(options.seed)
        self.requests_per_minute: float = options.requests_per_minute
        self.tokens_per_minute: float = options.tokens_per_minute
        self._limits = self._new_limits()
        self.api_key: str | None = options.api_key
        self._auth_header: str = options.auth_header
        self._credential = f"Bearer {self.api_key}" if self._auth_header == "Authorization" else self.api_key
        self.slots = asyncio.Semaphore(options.slots or 2**31)
        self.has_health: bool = not options.without_health
        self.is_healthy = True
        self.overrides: dict[str, str] = {}
        self.prompts: Counter[str] = Counter()
        self.requests = self.running = self.most_running = self.waiting = self.generated_tokens = 0
        self.paths: Counter[str] = Counter()
        self.statuses: Counter[int] = Counter()
        self.answered: set[str] = set()
        self.repeats = 0
        self.first_at = self.last_at = self.slot_seconds = self.slot_seconds_at_last = 0.0
        self._counted_at = time.monotonic()

    def _new_limits(self) -> Limits:
        return Limits(requests_per_minute=self.requests_per_minute, tokens_per_minute=self.tokens_per_minute)

    def _count_slots(self) -> None:
        """Add up the time that slots were taken; called before their number changes."""
        now = time.monotonic()
        self.slot_seconds += self.running * (now - self._counted_at)
        self._counted_at = now

    def _count_arrival(self) -> None:
        self._count_slots()
        self.first_at = self.first_at or self._counted_at
        self.last_at, self.slot_seconds_at_last = self._counted_at, self.slot_seconds

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """One request, by path; a dictionary of routes is what makes 5,000 requests a second possible."""
        path = request.path
        if path in ANSWERING_PATHS:
            return await self._answer(request, path)
        handler = {
            "/health": self._health,
            "/_health": self._set_health,
            "/_script": self._set_script,
            "/_options": self._set_options,
            "/_calls": self._calls,
            "/v1/models": self._models,
            "/metrics": self._metrics,
            "/version": self._version,
        }.get(path)
        return await handler(request) if handler else _error(404, "no such path")

    async def _answer(self, request: web.BaseRequest, path: str) -> web.StreamResponse:
        try:
            response = await self._admitted(request, path)
        except asyncio.CancelledError:
            self.statuses[CLIENT_GONE] += 1
            raise
        self.statuses[response.status] += 1
        if self._limits and not response.prepared:
            response.headers.update(self._limits.headers())
        return response

    async def _admitted(self, request: web.BaseRequest, path: str) -> web.StreamResponse:
        if self.api_key and request.headers.get(self._auth_header) != self._credential:
            return _error(401, f"wrong key: {request.headers.get(self._auth_header)}")
        try:
            body = msgspec.json.decode(await request.content.read())  # request.read() stops at 1 MB
            prompts = prompts_of(body, path)
        except (ValueError, KeyError, TypeError) as error:
            return _error(400, f"bad request: {error!r}")
        if self.models and body.get("model") not in self.models:
            return _error(404, f"the model {body.get('model')} does not exist")
        if self._limits and (refusal := self._refusal(body, path, prompts)):
            return refusal
        self.requests += 1
        self._count_arrival()
        self.paths[path] += 1
        self.prompts.update(prompts)
        whole = "\n".join(prompts)
        extra = "".join(orders for match, orders in self.overrides.items() if match in whole)
        orders = DIRECTIVE.findall(whole + extra) if "[[" in whole or extra else []
        self.waiting += 1
        try:
            await self.slots.acquire()
        finally:
            self.waiting -= 1
        self._count_slots()
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            return await self._serve(request, path, body, prompts, orders)
        finally:
            self._count_slots()
            self.running -= 1
            self.slots.release()

    def _refusal(self, body: dict[str, Any], path: str, prompts: list[str]) -> web.Response | None:
        """429, if it is over a limit; else its tokens are taken."""
        if path == "/v1/embeddings":
            usage = embeddings(body, prompts, [])["usage"]
        else:
            usage = completion(body, path, prompts, DIRECTIVE.findall("\n".join(prompts)))[0]["usage"]
        wait_s = self._limits.take(usage["total_tokens"])
        if not wait_s:
            return None
        headers = {"retry-after": str(math.ceil(wait_s)), "retry-after-ms": str(math.ceil(wait_s * 1000))}
        return _error(429, "Rate limit reached", headers)

    async def _serve(
        self, request: web.BaseRequest, path: str, body: dict[str, Any], prompts: list[str], orders: list[str]
    ) -> web.StreamResponse:
        latency_s = self._latency_s(prompts, orders)
        if latency_s:
            await asyncio.sleep(latency_s)
        if "held" in orders:
            await self._released("\n".join(prompts))
        if self.fail_share and self._chance.random() < self.fail_share:
            return _error(500, "by chance")
        if orders and (trouble := await self._trouble(request, prompts, orders)):
            return trouble
        if prompts[0] in self.answered:
            self.repeats += 1
        self.answered.add(prompts[0])
        if path == "/v1/embeddings":
            return _json(embeddings(body, prompts, orders))
        if self.prompts[prompts[0]] > 1:
            orders = [order.replace("later answer ", "answer ", 1) for order in orders]
        answer, tokens = completion(body, path, prompts, orders)
        self.generated_tokens += tokens
        if scripted_streams.is_asked_for(body):
            return await scripted_streams.send(request, scripted_streams.pieces(answer, body), orders)
        encoded = msgspec.json.encode(answer)
        for order in orders:
            encoded = encoded.replace(b"echo: ", b"echo: " + ESCAPES.get(order, b""))
        return web.Response(body=encoded, content_type=JSON)

    async def _released(self, prompt: str) -> None:
        while any("[[held]]" in orders and match in prompt for match, orders in self.overrides.items()):
            await asyncio.sleep(HELD_POLL_S)

    def _latency_s(self, prompts: list[str], orders: list[str]) -> float:
        stated = next((float(order.split()[1]) for order in orders if order.startswith("latency ")), None)
        if stated is not None or not self.latency_s or not self.latency_sigma:
            return self.latency_s if stated is None else stated
        return drawn_latency_s(prompts[0], median_s=self.latency_s, sigma=self.latency_sigma)

    async def _trouble(
        self, request: web.BaseRequest, prompts: list[str], orders: list[str]
    ) -> web.StreamResponse | None:
        """The answer that is none, if the orders ask for one."""
        failures = next((int(order.split()[1]) for order in orders if order.startswith("fail ")), None)
        if failures is not None and max(self.prompts[prompt] for prompt in prompts) > failures:
            return None
        status = next((order.split() for order in orders if order.startswith("status ")), None)
        if status or failures is not None:
            words = status or ["status", "500"]
            values = [word.replace("_", " ") for word in words[3::2]]
            headers = dict(zip(words[2::2], values, strict=True))
            return _error(int(words[1]), "as the script says", headers)
        for order in orders:
            if order == "quota":
                return web.Response(status=429, body=msgspec.json.encode({"error": QUOTA}), content_type=JSON)
            if order in GARBAGE:
                return web.Response(body=GARBAGE[order], content_type=JSON)
            if order == "hang":
                await asyncio.Event().wait()
            if order == "die":
                os._exit(1)
            if order.startswith("drop ") or order == "huge":
                return await _broken(request, order)
        return None

    async def _health(self, _: web.BaseRequest) -> web.Response:
        if not self.has_health:
            return _error(404, "no such path")
        return web.Response(status=200 if self.is_healthy else 503)

    async def _set_health(self, request: web.BaseRequest) -> web.Response:
        self.is_healthy = msgspec.json.decode(await request.read())["ok"]
        return _json({})

    async def _set_script(self, request: web.BaseRequest) -> web.Response:
        change = msgspec.json.decode(await request.read())
        self.overrides[change["match"]] = change["orders"]
        return _json({})

    async def _set_options(self, request: web.BaseRequest) -> web.Response:
        """Change latency_s, latency_sigma, fail_share or a limit while it runs; a limit's bucket is full then."""
        for name, value in msgspec.json.decode(await request.read()).items():
            setattr(self, name, value)
        self._limits = self._new_limits()
        return _json({})

    async def _calls(self, _: web.BaseRequest) -> web.Response:
        return _json(
            {
                "count": self.requests,
                "prompts": self.prompts,
                "paths": self.paths,
                "statuses": {str(status): count for status, count in self.statuses.items()},
                "repeats": self.repeats,
                "tokens": self.generated_tokens,
                "running": self.running,
                "most_running": self.most_running,
                "first_at": self.first_at,
                "last_at": self.last_at,
                "slot_seconds": self.slot_seconds_at_last,
            }
        )

    async def _models(self, _: web.BaseRequest) -> web.Response:
        return _json({"object": "list", "data": [{"id": name, "object": "model"} for name in self.models or [MODEL]]})

    async def _version(self, _: web.BaseRequest) -> web.Response:
        return _json({"version": "scripted-1"})

    async def _metrics(self, _: web.BaseRequest) -> web.Response:
        figures = {
            "num_requests_running": self.running,
            "num_requests_waiting": self.waiting,
            "generation_tokens_total": self.generated_tokens,
        }
        return web.Response(
            text="".join(f'vllm:{name}{{model_name="{MODEL}"}} {n:.1f}\n' for name, n in figures.items())
        )


def _json(answer: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(answer), content_type=JSON)


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> web.Response:
    error = {"message": message, "type": "ScriptedError", "param": None, "code": status}
    return web.Response(status=status, body=msgspec.json.encode({"error": error}), content_type=JSON, headers=headers)


async def _broken(request: web.BaseRequest, order: str) -> web.StreamResponse:
    size_bytes = 2**40 if order == "huge" else 1000
    response = web.StreamResponse(headers={"Content-Length": str(size_bytes), "Content-Type": JSON})
    if order != "drop connection":
        await response.prepare(request)
        await response.write(b'{"choices":[')
    if order == "huge":
        await asyncio.Event().wait()
    if request.transport:
        request.transport.abort()
    return response
