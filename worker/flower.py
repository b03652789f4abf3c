"""Flower on our Celery app: `python -m worker.flower`, started by `stoker flower` and `stoker up`.

What it does not see, or that it is down, costs no job. It may stop workers, which give back what they have, and
nothing that could harm a job. Its library is an extra, so nothing but the process itself may import this module.
Flower shows /metrics and error pages to anybody; here nothing but /healthcheck is answered without the password, and an
address that guesses it is not heard for as long as it does.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import math
import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from celery import Celery
from celery.events.state import Task
from flower.api.control import TaskRevoke
from flower.api.tasks import GetQueueLengths
from flower.app import Flower
from flower.urls import settings as flower_settings
from flower.views.broker import BrokerView
from flower.views.error import NotFoundErrorHandler
from tornado.httputil import HTTPHeaders, HTTPServerRequest
from tornado.options import options
from tornado.web import OutputTransform, RequestHandler, stream_request_body, url

from runtime.entry import run_process
from runtime.errors import BadInput
from runtime.logs import get_logger
from runtime.settings import FlowerSettings, Settings
from store.rate_limits import RateLimits
from worker.celery_app import make_app
from worker.queues import DEAD_QUEUE

log = get_logger(__name__)

OPEN = "/healthcheck"
ADDRESS_PREFIX = "stoker:limit:flower:"  # wrong passwords of an address, in Redis
PROXIES_VARIABLE, PROXIES = "FORWARDED_ALLOW_IPS", "127.0.0.1,::1"  # uvicorn's, which the gateway reads it with
TASKS_KEPT = 10_000  # in memory: 30 MB of shards that ended, the newest
# Doors of its API that could harm jobs: a time limit or a kill ends an attempt in its middle, and jobs whose attempts
# die again and again are taken for poison; a rate limit lets engines run empty, and so does a queue that is taken away;
# a task made by hand knows no shard; another node's queue holds hints that this one cannot follow.
HARMFUL = r"/api/(?:task/(?:timeout|rate-limit|apply|async-apply|send-task|abort)|worker/queue)/.*"
COLUMNS = "name,args,state,result,runtime,worker,received,uuid"


def run_flower(settings: Settings) -> None:
    """Serve Flower until SIGTERM or SIGINT. Raises BadInput if nobody could enter, or its port is taken."""
    limits = None if settings.redis.url is None else RateLimits(settings.redis.url, addresses=ADDRESS_PREFIX)
    app = make_flower(make_app(settings), settings.flower, limits=limits)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: app.io_loop.add_callback_from_signal(app.stop))
    try:
        port = app.start_http_server()
    except OSError as error:
        raise BadInput(
            f"Flower cannot listen on {settings.flower.host}:{settings.flower.port}: {error}; set STOKER_FLOWER__PORT"
        ) from error
    log.info("flower_serves", host=settings.flower.host, port=port)
    app.start()


def make_flower(celery: Celery, settings: FlowerSettings, *, limits: RateLimits | None = None) -> GuardedFlower:
    """Flower for an app; without `limits` passwords may be guessed as fast as it answers.

    Raises BadInput without a password: whoever enters can stop workers.
    """
    if not settings.password:
        raise BadInput("Flower needs a password: set STOKER_FLOWER__PASSWORD; `stoker up` makes one itself")
    if ":" in settings.user or not f"{settings.user}{settings.password}".isascii():
        raise BadInput("STOKER_FLOWER__USER and STOKER_FLOWER__PASSWORD must be ASCII, the user's name without a colon")
    options.address, options.port = settings.host, settings.port
    options.basic_auth = [f"{settings.user}:{settings.password}"]  # what its own checks look at, those of CSRF too
    options.max_tasks = TASKS_KEPT
    options.enable_events = False  # ours send them without being told
    options.tasks_columns = COLUMNS
    options.format_task = _readable
    app = GuardedFlower(options=options, capp=celery, **flower_settings)
    app.close_doors(settings, limits)
    return app


class GuardedFlower(Flower):  # type: ignore[misc]  # flower has no types
    """Flower that answers nobody without the password, and asks the broker for queues in the broker's own language."""

    _expected = b""
    _limits: RateLimits | None = None
    _proxies = ""

    def close_doors(self, settings: FlowerSettings, limits: RateLimits | None) -> None:
        """Set who may enter, and replace what is not fit to be shown."""
        login = base64.b64encode(f"{settings.user}:{settings.password}".encode()).decode()
        self._expected = f"Basic {login}".encode()
        self._limits = limits
        self._proxies = os.environ.get(PROXIES_VARIABLE, PROXIES)
        self.add_transform(Unframed)
        handlers = [
            (r"/metrics", NotFoundErrorHandler),  # of Flower's own process; ours are elsewhere and of everything
            url(r"/broker", Queues, name="broker"),
            (r"/api/queues/length", QueueLengths),
            (r"/api/task/revoke/(.+)", Revoke),
            (HARMFUL, Closed),
        ]
        self.add_handlers(r".*", handlers)

    def find_handler(self, request: HTTPServerRequest, **options: Any) -> Any:
        """Its handler; one that refuses for whoever does not show the password, whatever is asked for."""
        if request.path == OPEN:
            return super().find_handler(request, **options)
        shown = request.headers.get("Authorization", "").encode()
        digest = hashlib.sha256(shown).digest()
        address = asking(request.remote_ip, request.headers.get("X-Forwarded-For", ""), self._proxies)
        wait_s = self._limits.refused_s(address, digest) if self._limits is not None and shown else 0.0
        if wait_s > 0:
            return self.get_handler_delegate(request, NotHeard, {"wait_s": wait_s})
        if hmac.compare_digest(shown, self._expected):
            if self._limits is not None:
                self._limits.welcome(address, digest)
            return super().find_handler(request, **options)
        if shown:
            self._note_failure(address)
        return self.get_handler_delegate(request, Refusal)

    def _note_failure(self, address: str) -> None:
        log.warning("flower_password_wrong", address=address)
        if self._limits is not None:
            self._limits.failed(address)


def asking(address: str, forwarded: str, proxies: str) -> str:
    """Who asks: of a proxy among these (addresses, networks, `*`) whom it says, as the gateway reads it."""
    for named in reversed(forwarded.split(",")):
        if not _is_among(address, proxies) or not named.strip():
            break
        address = named.strip()
    return address


def _is_among(address: str, proxies: str) -> bool:
    for proxy in proxies.split(","):
        with suppress(ValueError):  # what is no address trusts nobody
            if proxy.strip() == "*" or ipaddress.ip_address(address) in ipaddress.ip_network(proxy.strip()):
                return True
    return False


@stream_request_body
class _DoesNothing(RequestHandler):  # type: ignore[misc]
    """A handler that only answers, whoever asks and from wherever, and keeps nothing of a body."""

    def data_received(self, chunk: bytes) -> None:
        """Forget it."""

    def check_xsrf_cookie(self) -> None:
        """Nothing to guard."""


class Refusal(_DoesNothing):
    """401, also for what does not exist."""

    def prepare(self) -> None:
        """Ask for the password."""
        self.set_status(401)
        self.set_header("WWW-Authenticate", 'Basic realm="Stoker\'s Flower", charset="UTF-8"')
        self.finish("a name and a password are needed: STOKER_FLOWER__USER and STOKER_FLOWER__PASSWORD\n")


class NotHeard(_DoesNothing):
    """429: this address showed too many wrong passwords, and whether this one is right is not said."""

    def initialize(self, wait_s: float) -> None:
        """Take how long it is not heard."""
        self._wait_s = wait_s

    def prepare(self) -> None:
        """Say when it is heard again."""
        self.set_status(429)
        self.set_header("Retry-After", str(math.ceil(self._wait_s)))
        self.finish("too many wrong passwords from this address; wait\n")


class Closed(_DoesNothing):
    """403 for what is not done here."""

    def prepare(self) -> None:
        """Say what to do instead."""
        refuse(self)


class Revoke(TaskRevoke):  # type: ignore[misc]
    """Revokes a hint that waits, as another one will be sent; never ends one that runs."""

    async def post(self, taskid: str) -> None:
        """As Flower does it, without `terminate`."""
        if self.get_argument("terminate", default=False, type=bool):
            refuse(self)
        else:
            await super().post(taskid)


def refuse(handler: RequestHandler) -> None:
    """Answer 403."""
    handler.set_status(403)
    handler.finish("closed, as it could harm jobs: `stoker cancel BATCH` ends a batch, stopping a worker its work\n")


class Unframed(OutputTransform):  # type: ignore[misc]
    """Lets no other site show these pages in a frame: a click there could stop a worker."""

    def transform_first_chunk(
        self, status_code: int, headers: HTTPHeaders, chunk: bytes, finishing: bool
    ) -> tuple[int, HTTPHeaders, bytes]:
        """The same answer with two more headers."""
        del finishing
        headers["X-Frame-Options"] = "DENY"
        headers["Content-Security-Policy"] = "frame-ancestors 'none'"
        return status_code, headers, chunk


class _Lengths:
    """A broker as Flower's pages ask it. Flower would ask RabbitMQ's management plugin, which need not be there."""

    def __init__(self, app: GuardedFlower) -> None:
        self._app = app

    async def queues(self, names: Iterable[str]) -> list[dict[str, Any]]:
        """What waits in each of these queues and in that of dead hints, as far as they exist."""
        found: list[dict[str, Any]] = await self._app.blocking_runner.run(
            "queue lengths",
            "broker",
            self._measure,
            sorted({*names, DEAD_QUEUE}),
            connection_errors=self._app.capp.connection_for_read().connection_errors,
        )
        return found

    def _measure(self, names: list[str]) -> list[dict[str, Any]]:
        found = []
        with self._app.capp.connection_for_read() as connection:
            has_consumers = connection.transport.driver_type == "amqp"  # on Redis an empty queue is none, too
            for name in names:
                try:
                    with connection.channel() as channel:
                        declared = channel.queue_declare(name, passive=True)
                    waits, consumers = declared.message_count, declared.consumer_count
                except connection.channel_errors:
                    if has_consumers:
                        continue
                    waits, consumers = 0, 0
                shown = consumers if has_consumers else None
                found.append({"name": name, "messages": waits, "messages_ready": waits, "consumers": shown})
        return found


class _AsksHere:
    """For a handler that asks for queues."""

    def get_broker(self) -> _Lengths:
        """Whom it asks."""
        app: GuardedFlower = self.application  # type: ignore[attr-defined]  # of the handler
        return _Lengths(app)


class Queues(_AsksHere, BrokerView):  # type: ignore[misc]
    """The page of queues."""


class QueueLengths(_AsksHere, GetQueueLengths):  # type: ignore[misc]
    """The same as JSON."""


def _readable(task: Task) -> Task:
    """A task whose result is the text that it is, not its representation."""
    if task.result:
        task.result = task.result.strip("'")
    return task


if __name__ == "__main__":
    run_process(run_flower)
