"""Batches of conversations, a worker child for them in this process, and an endpoint that shows what it was sent."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event
from typing import Any
from uuid import UUID, uuid4

import redis
from sqlalchemy import text

from inference.endpoint import Endpoint
from inference.router import Router
from inference.routes import Route
from models.lines import SubmitOptions
from pipeline.cached import ExactCache
from pipeline.feed import FeedContext, FeedReport, feed
from pipeline.heartbeat import Heartbeat
from pipeline.pace import Pace
from pipeline.steps import Recipes
from pipeline.submit import Wishes, submit_file
from runtime.settings import EngineSettings, LimitSettings, Settings, ShardSettings, WorkerSettings
from store.database import Database
from store.step_states import StepStates
from store.steps import steps_of
from tests.support.batches import CHAT, dispatch_all, execute

FEED_TIMEOUT_S = 20.0
NEVER = Event()
NOBODY = "redis://127.0.0.1:1/0"  # nothing listens there


def talk(*turns: str, body: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    """A line with these turns; `settings` go beside them."""
    return {"body": {"model": "scripted", **(body or {})}, "stoker": {"turns": list(turns), **settings}}


def store_lines(
    database: Database,
    folder: Path,
    lines: Sequence[dict[str, Any]],
    *,
    tenant: str = "local",
    of: UUID | None = None,
    budget_tokens: int | None = None,
    **options: Any,
) -> UUID:
    """Submit a file of such lines, with these options, and dispatch its shards; return the batch."""
    file = folder / f"{uuid4().hex}.jsonl"
    heads = ({"custom_id": f"id-{seq}", "method": "POST", "url": CHAT} for seq in range(len(lines)))
    file.write_text("".join(json.dumps(head | line) + "\n" for head, line in zip(heads, lines, strict=True)))
    batch_id = submit_file(
        database,
        file,
        options=SubmitOptions(max_output_tokens=64, **options),
        settings=Settings.model_construct(shard=ShardSettings(max_jobs=64), limits=LimitSettings(window_s=86_400.0)),
        served_models=None,
        reuse=False,
        tenant=tenant,
        wishes=Wishes(results_of=of, budget_tokens=budget_tokens),
    ).batch_id
    dispatch_all(database)
    return batch_id


class Child:
    """What a worker child has; `feed` is one call of its task. Without a Redis it has Postgres alone."""

    def __init__(self, database: Database, url: str, *, redis_url: str | None = None) -> None:
        self.database = database
        self.url = url
        self.redis_url = redis_url
        self.pace = Pace()
        self.cache: ExactCache | None = None
        self.engine_id: int | None = None

    def feed(
        self,
        *,
        in_flight: int = 8,
        heartbeat_s: float = 5.0,
        grace_s: float = 10.0,
        drain: Event = NEVER,
        context_tokens: int = 2048,
        recipes: Recipes | None = None,
    ) -> FeedReport:
        """What one call of feed does; an error if it takes longer than FEED_TIMEOUT_S."""
        settings = Settings.model_construct(
            worker=WorkerSettings(heartbeat_s=heartbeat_s, grace_s=grace_s),
            limits=LimitSettings(),
            engine=EngineSettings(context_tokens=context_tokens),
        )
        states = None if self.redis_url is None else StepStates(self.redis_url)

        async def run() -> FeedReport:
            connections = Endpoint(self.url, api_key=None, timeout_s=10.0, connections=in_flight)
            async with asyncio.timeout(FEED_TIMEOUT_S), connections as server:
                return await feed(
                    FeedContext(
                        database=self.database,
                        heartbeat=heartbeat,
                        router=Router(engine=Route(server, places=in_flight)),
                        settings=settings,
                        holder="test",
                        engine="engine",
                        worker="worker",
                        draining=drain.is_set,
                        engine_id=lambda: self.engine_id,
                        cache=self.cache,
                        steps=states,
                        recipes=recipes,
                        pace=self.pace,
                    )
                )

        try:
            with Heartbeat(self.database, lease_s=settings.worker.lease_s, interval_s=heartbeat_s) as heartbeat:
                return asyncio.run(run())
        finally:
            if states is not None:
                states.close()

    @contextmanager
    def feeding(self, **options: Any) -> Iterator[Future[FeedReport]]:
        """`feed` in a thread of its own."""
        with ThreadPoolExecutor(1) as pool:
            yield pool.submit(lambda: self.feed(**options))

    def feed_again(self, **options: Any) -> FeedReport:
        """`feed` once what waits for a later try is due."""
        execute(self.database, "UPDATE job_tries SET not_before = clock_timestamp()")
        execute(self.database, "UPDATE shards SET not_before = clock_timestamp() WHERE not_before IS NOT NULL")
        dispatch_all(self.database)
        return self.feed(**options)


def empty_redis(url: str) -> None:
    """FLUSHDB, but for the mark that this database is ours."""
    with redis.Redis.from_url(url, decode_responses=True) as client:
        if keys := [key for key in client.scan_iter(count=1000) if not key.startswith("stoker:test:")]:
            client.delete(*keys)


def kept_steps(database: Database, batch_id: UUID, seq: int = 0) -> set[str]:
    """The steps of a job that Postgres has, without the digests of what they asked."""
    with database.transaction() as session:
        return {name.rpartition("-")[0] for name in steps_of(session, batch_id, [seq]).get(seq, {})}


def told_of(database: Database, batch_id: UUID, seq: int = 0) -> dict[str, Any]:
    """What a result says under `stoker.conversation`."""
    with database.transaction() as session:
        stoker = session.execute(
            text("SELECT stoker FROM results WHERE batch_id = :id AND seq = :seq"), {"id": batch_id, "seq": seq}
        ).scalar_one()
    conversation: dict[str, Any] = json.loads(stoker)["conversation"]
    return conversation


def said(conversation: dict[str, Any]) -> list[str]:
    """The texts of a history in order."""
    return [message["content"] for message in conversation["messages"]]


def answer(text: str, *, finish: str = "stop", prompt_tokens: int = 10, **message: Any) -> dict[str, Any]:
    """A chat's answer."""
    return {
        "choices": [{"finish_reason": finish, "message": {"role": "assistant", "content": text} | message}],
        "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": 2},
    }


class ShownEndpoint:
    """An endpoint in this process: `bodies` is what it was sent, `reply` what it answers to one, with its number."""

    def __init__(self, reply: Callable[[int, dict[str, Any]], dict[str, Any]]) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.request_ids: list[str] = []
        lock, shown = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._send(b"{}")

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    shown.bodies.append(body)
                    shown.request_ids.append(self.headers["X-Request-Id"])
                    number = len(shown.bodies)
                self._send(json.dumps(reply(number, body)).encode())

            def log_message(self, format: str, *arguments: Any) -> None:
                return

            def _send(self, content: bytes) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def texts(self, number: int = -1) -> list[str]:
        """The messages of one request."""
        return [message["content"] for message in self.bodies[number]["messages"]]

    def __enter__(self) -> ShownEndpoint:
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
