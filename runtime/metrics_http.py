"""The HTTP server behind /metrics: Prometheus's plain text, to anybody who can reach it.

Not the client's own, which writes an engine's names, such as vllm:num_requests_running, otherwise for who asks for
OpenMetrics, as Prometheus does; and which looks up its host's name before it answers.
"""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from runtime.logs import get_logger

log = get_logger(__name__)

PATH = "/metrics"
SILENT_S = 10.0  # of somebody who connects and asks nothing
_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class MetricsHttp(ThreadingHTTPServer):
    """Answers with what `text` gives, from daemon threads. Raises OSError if it cannot listen there."""

    daemon_threads = True

    def __init__(self, host: str, port: int, text: Callable[[], bytes]) -> None:
        self.text = text
        if ":" in host:
            self.address_family = socket.AF_INET6
        super().__init__((host, port), _Handler)
        threading.Thread(target=self.serve_forever, name="metrics", daemon=True).start()

    def server_bind(self) -> None:
        """Listen; the name of the host is nobody's business."""
        socketserver.TCPServer.server_bind(self)


class _Handler(BaseHTTPRequestHandler):
    server: MetricsHttp
    timeout = SILENT_S

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != PATH:
            self._answer(HTTPStatus.NOT_FOUND, f"metrics are at {PATH}\n".encode())
            return
        try:
            body = self.server.text()
        except Exception:  # a defect of ours; who asks again may have an answer
            log.exception("metrics_defect")
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, b"a defect of ours; it is in the log\n")
            return
        self._answer(HTTPStatus.OK, body)

    def _answer(self, status: HTTPStatus, body: bytes) -> None:
        try:
            self.send_response(status)
            self.send_header("Content-Type", _TYPE)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except OSError as error:  # it went before it had it all
            log.debug("metrics_not_read", error=str(error))

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a line for each scrape would be most of the log."""
