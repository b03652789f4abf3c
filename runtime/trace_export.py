"""OpenTelemetry's SDK behind runtime/tracing.py: spans wait in its bounded queue, and one thread hands them over.

A receiver that is away costs nothing: what does not fit into the queue is counted and forgotten, each export ends
within seconds, and the end of a process waits for two. It must not raise into the work that is traced.
"""

from __future__ import annotations

import contextvars
import logging
import os
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol, cast

import msgspec
import requests
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)

from runtime.logs import get_logger
from runtime.metrics import SPANS_LOST
from runtime.settings import Settings
from runtime.trace_file import append, folder_of
from runtime.trace_targets import Target, target_of
from runtime.tracing import Kind, Place, Value

log = get_logger(__name__)

QUEUED: Final = 8192  # chosen: some seconds of a busy child
QUEUED_WITH_PROMPTS: Final = 1024  # 32 KB each at the most
TOGETHER, TOGETHER_WITH_PROMPTS = 512, 64  # in one request: 2 MB at the most, which all receivers take
EVERY_MS: Final = 1000
EXPORT_S: Final = 3.0
STOP_S: Final = 2.0


class SdkRecorder:
    """Begins spans of the SDK, whose ids are ours where they follow from a batch's."""

    def __init__(self, settings: Settings, *, process: str) -> None:
        """Raises BadInput that names a setting which is missing or wrong."""
        self.prompts, self.sample = settings.trace.prompts, settings.trace.sample
        receiver = receiver_of(settings)
        self.sessions = receiver.sessions
        queued = QUEUED_WITH_PROMPTS if self.prompts else QUEUED
        self._exporter = Watched(receiver, queued=queued)
        processor = BatchSpanProcessor(
            self._exporter,
            max_queue_size=queued,
            schedule_delay_millis=EVERY_MS,
            max_export_batch_size=TOGETHER_WITH_PROMPTS if self.prompts else TOGETHER,
        )
        resource: dict[str, Value] = {
            "service.name": "stoker",
            "service.instance.id": f"{socket.gethostname()}:{os.getpid()}",
            "stoker.process": process,
            **receiver.resource,
        }
        self._provider = TracerProvider(
            resource=Resource(resource), sampler=ALWAYS_ON, id_generator=_Ids(), shutdown_on_exit=False
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("stoker")

    def begin(
        self,
        name: str,
        *,
        kind: Kind,
        parent: Place | None,
        links: Sequence[Place],
        attributes: Mapping[str, Value],
        place: Place | None = None,
        started_ns: int | None = None,
    ) -> _SdkSpan:
        """A span that is under way; `place`: as which."""
        above = Context() if parent is None else set_span_in_context(NonRecordingSpan(_context(parent)), Context())
        token = _wanted.set(place)
        try:
            begun = self._tracer.start_span(
                name,
                context=above,
                kind=SpanKind[kind.upper()],
                attributes=attributes,
                links=[Link(_context(link)) for link in links],
                start_time=started_ns,
            )
        finally:
            _wanted.reset(token)
        return _SdkSpan(begun, self._exporter)

    def stop(self) -> None:
        """Hand over what is left, for STOP_S at most."""
        self._exporter.receiver.give_up()
        ending = threading.Thread(target=self._provider.shutdown, name="spans-end", daemon=True)
        ending.start()
        ending.join(STOP_S)


class _SdkSpan:
    """A span under way."""

    __slots__ = ("_exporter", "_span")

    def __init__(self, span: Span, exporter: Watched) -> None:
        self._span, self._exporter = span, exporter

    @property
    def place(self) -> Place:
        context = self._span.get_span_context()
        return Place(context.trace_id, context.span_id)

    def set(self, attributes: Mapping[str, Value]) -> None:
        self._span.set_attributes(attributes)

    def end(self, *, error: str | None, ended_ns: int | None = None) -> None:
        if error is not None:
            self._span.set_status(Status(StatusCode.ERROR, error))
        self._exporter.ended += 1
        self._span.end(ended_ns)


class Watched(SpanExporter):
    """Counts the spans that are lost, and says once when that begins and once when it has ended.

    Of the `ended` spans those that were neither handed over nor can be in the queue have been pushed out of it.
    """

    def __init__(self, receiver: Receiver, *, queued: int) -> None:
        self.ended = 0
        self.receiver, self._queued = receiver, queued
        self._handed = self._pushed_out = 0
        self._fails = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Hand these over; never raises."""
        pushed_out = self.ended - self._handed - self._queued
        if pushed_out > self._pushed_out:
            SPANS_LOST.add(pushed_out - self._pushed_out)
            self._pushed_out = pushed_out
        self._handed += len(spans)
        fault = fault_of(self.receiver, spans)
        if fault is not None:
            SPANS_LOST.add(len(spans))
        if (fault is not None) != self._fails:
            self._fails = fault is not None
            if fault is None:
                log.warning("spans_taken_again", receiver=self.receiver.name)
            else:
                log.warning("spans_lost", receiver=self.receiver.name, reason=fault)
        return SpanExportResult.SUCCESS if fault is None else SpanExportResult.FAILURE

    def shutdown(self) -> None:
        """Nothing more comes."""
        self.receiver.shutdown()


class Receiver(Protocol):
    """Where spans go: an exporter of the SDK with a name that is fit for logs, and what its spans are to state.

    `status`: what it answered last, where it answers. `give_up`: the process ends, what refuses is not tried again.
    """

    name: str
    sessions: Sequence[str]
    resource: Mapping[str, Value]

    @property
    def status(self) -> int | None: ...

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult: ...

    def give_up(self) -> None: ...

    def shutdown(self) -> None: ...


class FileExporter(SpanExporter):
    """Each export is a line in the folder's file: a whole request of OTLP, as JSON."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.name = str(folder)
        self.sessions: Sequence[str] = ()
        self.resource: Mapping[str, Value] = {}
        self.status = None

    def give_up(self) -> None:
        """Nothing is tried twice."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Append one line, or none of no spans. Raises OSError, as where the disk is full."""
        append(self._folder, _line(spans) if spans else b"")
        return SpanExportResult.SUCCESS


class _Session(requests.Session):
    """A session that follows no redirect, as it would carry the key, and can give up."""

    def __init__(self) -> None:
        super().__init__()
        self.max_redirects = 0
        self.status: int | None = None
        self.gives_up: Callable[[], None] | None = None

    def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        """Send it and remember the answer's status; the exporter tries nothing again once it gives up."""
        try:
            answer = super().send(request, **options)
        except requests.ConnectionError:
            if self.gives_up is not None:
                self.gives_up()
            raise
        self.status = answer.status_code
        return answer


class OtlpExporter(OTLPSpanExporter):
    """OTLP over HTTP."""

    def __init__(self, target: Target) -> None:
        self.name, self.resource = target.name, target.resource
        self.sessions: Sequence[str] = target.sessions
        self._asked = _Session()
        super().__init__(endpoint=target.url, headers=dict(target.headers), timeout=EXPORT_S, session=self._asked)

    @property
    def status(self) -> int | None:
        """What the last request was answered; None if it was not."""
        return self._asked.status

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Post them."""
        self._asked.status = None
        return super().export(spans)

    def give_up(self) -> None:
        """If it refuses connections it is not asked again, as this process ends."""
        self._asked.gives_up = self.shutdown


def fault_of(receiver: Receiver, spans: Sequence[ReadableSpan]) -> str | None:
    """Hand spans over, none to ask whether any would be taken: why not, fit for logs, or None."""
    try:
        if receiver.export(spans) is SpanExportResult.SUCCESS:
            return None
    except Exception as error:  # such as a full disk; no defect of it may reach the work
        return f"{type(error).__name__}: {error}"[:200]
    status = receiver.status
    if status is None:
        return "it does not answer"
    setting = "STOKER_TRACE__URL" if status in (404, 405) else "STOKER_TRACE__API_KEY and STOKER_TRACE__URL"
    return f"it answered {status}; look at {setting}"


def receiver_of(settings: Settings) -> Receiver:
    """Where the settings let spans go. Raises BadInput that names what is missing."""
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL + 1)  # what it says is said here, and once
    if settings.trace.to == "file":
        return FileExporter(folder_of(settings))
    return OtlpExporter(target_of(settings.trace))


_wanted: contextvars.ContextVar[Place | None] = contextvars.ContextVar("stoker_place", default=None)


class _Ids(RandomIdGenerator):
    """Random ids, but for a span whose place is known."""

    def generate_span_id(self) -> int:
        """The wanted one, if one is."""
        place = _wanted.get()
        return super().generate_span_id() if place is None else place.span_id

    def generate_trace_id(self) -> int:
        """The same of its trace."""
        place = _wanted.get()
        return super().generate_trace_id() if place is None else place.trace_id


def _context(place: Place) -> SpanContext:
    return SpanContext(place.trace_id, place.span_id, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))


def _line(spans: Sequence[ReadableSpan]) -> bytes:
    scope = {"scope": {"name": "stoker"}, "spans": [_fields(span) for span in spans]}
    resource = {"attributes": _attributes(spans[0].resource.attributes)}
    return msgspec.json.encode({"resourceSpans": [{"resource": resource, "scopeSpans": [scope]}]})


def _fields(span: ReadableSpan) -> dict[str, Any]:
    """As OTLP's JSON has it: ids as hex, times and whole numbers as text."""
    is_error = span.status.status_code is StatusCode.ERROR
    return {
        **_ids(cast(SpanContext, span.get_span_context())),  # an ended one has it
        **({} if span.parent is None else {"parentSpanId": f"{span.parent.span_id:016x}"}),
        "name": span.name,
        "kind": span.kind.value + 1,  # the API counts from 0, the protocol from 1
        "startTimeUnixNano": str(span.start_time),
        "endTimeUnixNano": str(span.end_time),
        "attributes": _attributes(span.attributes or {}),
        "links": [_ids(link.context) for link in span.links],
        "status": {"code": 2, "message": span.status.description} if is_error else {},
    }


def _ids(context: SpanContext) -> dict[str, str]:
    return {"traceId": f"{context.trace_id:032x}", "spanId": f"{context.span_id:016x}"}


def _attributes(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"key": key, "value": _value(value)} for key, value in values.items()]


def _value(value: Any) -> dict[str, Any]:
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    if isinstance(value, float):
        return {"doubleValue": value}
    if isinstance(value, str):
        return {"stringValue": value}
    return {"arrayValue": {"values": [_value(one) for one in value]}}
