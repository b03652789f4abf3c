"""A real receiver of OpenTelemetry's spans on the loopback, which reads what it is sent."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as WireSpan

from tests.support.serving import serving


@dataclass(frozen=True, slots=True)
class ReceivedSpan:
    """One span; ids are hex, an attribute's value is what it was."""

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    kind: str
    seconds: float
    attributes: dict[str, Any]
    links: list[str]
    error: str | None
    resource: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ReceivedRequest:
    """One request as it came."""

    path: str
    headers: dict[str, str]
    spans: list[ReceivedSpan]


class OtlpReceiver(ThreadingHTTPServer):
    """Answers with `status`; while `hangs` it reads and never answers."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[ReceivedRequest] = []
        self.status = 200
        self.refused = 0
        self.hangs = False
        self.is_over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1/traces"

    @property
    def spans(self) -> list[ReceivedSpan]:
        """All that were taken."""
        return [span for request in list(self.requests) for span in request.spans]

    def named(self, name: str) -> list[ReceivedSpan]:
        """Those with this name that were taken, in the order of their coming."""
        return [span for span in self.spans if span.name == name]


class _Handler(BaseHTTPRequestHandler):
    server: OtlpReceiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.hangs:
            self.server.is_over.wait()
            return
        if self.server.status == 200:
            headers = {name.lower(): value for name, value in self.headers.items()}
            self.server.requests.append(ReceivedRequest(self.path, headers, spans_in(body)))
        else:
            self.server.refused += 1
        self.send_response(self.server.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@contextmanager
def receiving_spans() -> Iterator[OtlpReceiver]:
    """A receiver for the block."""
    receiver = OtlpReceiver()
    with serving(receiver, receiver.is_over):
        yield receiver


def spans_in(body: bytes) -> list[ReceivedSpan]:
    """The spans of one request."""
    return [
        _read(span, _values(resource.resource.attributes))
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


def _read(span: WireSpan, resource: dict[str, Any]) -> ReceivedSpan:
    return ReceivedSpan(
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        name=span.name,
        kind=WireSpan.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_").lower(),
        seconds=(span.end_time_unix_nano - span.start_time_unix_nano) / 1e9,
        attributes=_values(span.attributes),
        links=[link.span_id.hex() for link in span.links],
        error=span.status.message if span.status.code == span.status.STATUS_CODE_ERROR else None,
        resource=resource,
    )


def _values(attributes: Any) -> dict[str, Any]:
    found: list[KeyValue] = list(attributes)
    return {one.key: _plain(one.value) for one in found}


def _plain(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_plain(one) for one in value.array_value.values]
    return getattr(value, kind or "string_value")
