"""A real receiver of webhooks on the loopback, and ended batches that have something to tell it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from uuid import UUID

from runtime.clock import uuid7
from store.database import Database
from store.deliveries import announce_end
from tests.support.batches import execute
from tests.support.serving import serving


@dataclass(frozen=True, slots=True)
class Received:
    """A webhook as it came."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def name(self) -> str:
        return self.headers["webhook-id"]


class Receiver(ThreadingHTTPServer):
    """Answers `/status/N` with N and `headers`, `/silent` never, anything else with 200."""

    request_queue_size = 128  # many come at once

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.received: list[Received] = []
        self.headers: dict[str, str] = {}
        self.is_over = threading.Event()

    def url(self, path: str = "/", host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.server_port}{path}"


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.received.append(Received(self.path, headers, body))
        if self.path == "/silent":
            self.server.is_over.wait()
            return
        status = int(self.path.rpartition("/")[2]) if self.path.startswith("/status/") else 200
        self.send_response(status, "what\x00ever" if status == 500 else None)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@contextmanager
def receiving() -> Iterator[Receiver]:
    """A receiver for the block."""
    receiver = Receiver()
    with serving(receiver, receiver.is_over):
        yield receiver


def stored_request(database: Database, url: str | None, *, state: str, tenant: str = "local") -> UUID:
    """A batch in this state without jobs, whose creation named this webhook."""
    batch_id = uuid7()
    request = None if url is None else json.dumps({"endpoint": "/v1/embeddings", "stoker": {"webhook": {"url": url}}})
    execute(
        database,
        """
        INSERT INTO batches (id, tenant, state, endpoint, input_name, input_digest, submit_digest, options, request)
        VALUES (:id, :tenant, :state, '/v1/embeddings', 'in', '', '', '{}', CAST(:request AS jsonb))""",
        id=batch_id,
        tenant=tenant,
        state=state,
        request=request,
    )
    return batch_id


def ended_batch(database: Database, url: str, *, state: str = "completed", tenant: str = "local") -> UUID:
    """One that has ended and waits for its webhook to go out."""
    batch_id = stored_request(database, url, state=state, tenant=tenant)
    with database.transaction() as session:
        announce_end(session, batch_id)
    return batch_id


def make_due(database: Database) -> None:
    """Let every pending delivery be due now."""
    execute(database, "UPDATE deliveries SET next_at = clock_timestamp() WHERE state = 'pending'")
