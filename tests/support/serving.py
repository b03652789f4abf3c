"""A real HTTP server of a test's own in a thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from typing import TypeVar

Server = TypeVar("Server", bound=ThreadingHTTPServer)


@contextmanager
def serving(server: Server, is_over: threading.Event) -> Iterator[Server]:
    """The server, which answers in this block; at its end `is_over` is set first, for answers that wait."""
    thread = threading.Thread(target=server.serve_forever, args=[0.01])
    thread.start()
    try:
        yield server
    finally:
        is_over.set()
        server.shutdown()
        thread.join()
        server.server_close()
