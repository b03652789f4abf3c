"""`python -m api.server`: the gateway, and the validators that belong to it; `stoker gateway` starts it."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack, suppress
from pathlib import Path

import uvicorn

from api.app import create_app
from api.connections import BoundedHeads
from api.gateway import Gateway
from api.uploads import UploadSlots
from runtime.entry import run_process
from runtime.errors import BadInput, ServiceUnreachable
from runtime.kept_process import KeptProcess
from runtime.logs import get_logger
from runtime.metrics import metrics_served
from runtime.settings import Settings
from runtime.tracing import start_tracing, stop_tracing
from store.blobs import Blobs
from store.database import Database
from store.presence import PresenceBoard
from store.rate_limits import RateLimits
from store.revisions import await_schema
from worker.inviting import Inviter

log = get_logger(__name__)

GRACE_S = 30
IDLE_S = 75  # longer than proxies keep a connection, so that they end it and not we


def open_gateway(settings: Settings, stack: ExitStack) -> Gateway:
    """A gateway's parts, closed with the stack."""
    database = Database(settings.require_postgres(), pool_size=settings.gateway.pool_size)
    stack.callback(database.close)
    board = PresenceBoard(settings.require_redis())
    limits = RateLimits(settings.require_redis(), wrong_keys_per_minute=settings.gateway.wrong_keys_per_minute)
    stack.callback(board.close)
    stack.callback(limits.close)
    inviter = None
    if settings.broker.url is not None:
        inviter = Inviter(settings)
        inviter.start()
        stack.callback(inviter.stop)
    return Gateway(
        settings=settings,
        database=database,
        blobs=Blobs(files_url(settings)),
        limits=limits,
        board=board,
        upload_slots=UploadSlots(settings.gateway),
        invite=None if inviter is None else inviter.invite,
    )


def files_url(settings: Settings) -> str:
    """Where uploads are kept. Raises BadInput if neither a place nor a home is set."""
    if settings.gateway.files is not None:
        return settings.gateway.files
    if settings.home is None:
        raise BadInput("STOKER_GATEWAY__FILES is not set: name a folder or URL for uploads, or set STOKER_HOME")
    return str(Path(settings.home) / "files")


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; requests under way may end."""
    with ExitStack() as stack:
        stack.enter_context(metrics_served(settings.metrics))
        start_tracing(settings, process="gateway")
        stack.callback(stop_tracing)
        gateway = open_gateway(settings, stack)
        with suppress(ServiceUnreachable):  # until Postgres is there it answers 503
            await_schema(gateway.database)
        app = create_app(gateway)
        for _ in range(settings.gateway.validators):
            stack.enter_context(KeptProcess("api.validator", name="validator", env=os.environ, grace_s=GRACE_S))
        for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises them again once it has ended; then we clean up
            signal.signal(number, lambda *_: None)
        log.info("gateway_up", url=f"http://{settings.gateway.host}:{settings.gateway.port}")
        uvicorn.run(
            app,
            host=settings.gateway.host,
            port=settings.gateway.port,
            loop="uvloop",
            http=BoundedHeads,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=True,  # of a proxy on this machine, or of those that FORWARDED_ALLOW_IPS names
            limit_concurrency=settings.gateway.connections,
            timeout_keep_alive=IDLE_S,
            timeout_graceful_shutdown=GRACE_S,
        )


if __name__ == "__main__":
    run_process(serve)
