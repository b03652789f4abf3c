"""Spans of batches, and the ids that log lines carry (docs/decisions/0035-traces.md).

A batch's id is the id of its trace, and its root span's id follows from it: so any process can add to the trace, and
whether a batch is traced at all is decided everywhere alike. Off, every call here returns at once. OpenTelemetry's SDK,
which keeps and sends them, is runtime/trace_export.py's; it must not know what Stoker does between two of them.
"""

from __future__ import annotations

import contextvars
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Literal, Protocol, Self
from uuid import UUID

import structlog

from runtime.errors import BadInput, extra_remedy
from runtime.settings import Settings

Value = str | int | float | bool | Sequence[str]
Kind = Literal["internal", "server", "client", "producer", "consumer"]
BATCH_ID: Final = "stoker.batch.id"
SHARD_ID: Final = "stoker.shard.id"
TRACEPARENT: Final = "traceparent"  # W3C's header, also of messages
SESSION: Final = "session.id"  # OpenInference's name, by which receivers put a batch's traces together
_HEADER: Final = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_SAMPLED_BITS: Final = (1 << 48) - 1  # of a UUIDv7 the last 62 bits are random


@dataclass(frozen=True, slots=True)
class Place:
    """A span as others name it."""

    trace_id: int
    span_id: int

    @property
    def header(self) -> str:
        """As W3C's `traceparent` header."""
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-01"


class Recorded(Protocol):
    """A span of the SDK that is under way."""

    @property
    def place(self) -> Place: ...

    def set(self, attributes: Mapping[str, Value]) -> None: ...

    def end(self, *, error: str | None, ended_ns: int | None = None) -> None: ...


class Recorder(Protocol):
    """Begins spans, and takes those that have ended to where they go.

    `sessions`: what its receiver has for SESSION besides.
    """

    prompts: bool
    sample: float
    sessions: Sequence[str]

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
    ) -> Recorded: ...

    def stop(self) -> None: ...


class Span:
    """One span, which `with` begins and ends; what is begun in the block is under it. An error that leaves it is its.

    `begin` and `end` alone are for one that ends elsewhere. Its name may change until it begins.
    """

    __slots__ = ("_error", "_kind", "_links", "_parent", "_recorded", "_token", "attributes", "ids", "name")

    def __init__(
        self,
        name: str,
        *,
        kind: Kind = "internal",
        parent: Place | None = None,
        links: Sequence[Place] = (),
        ids: Mapping[str, Value],
        attributes: Mapping[str, Value] | None = None,
    ) -> None:
        """`ids`: attributes that every span under it has too."""
        self.name, self.ids = name, ids
        self.attributes: dict[str, Value] = {**ids, **(attributes or {})}
        self._kind, self._parent, self._links = kind, parent, links
        self._recorded: Recorded | None = None
        self._error: str | None = None
        self._token: contextvars.Token[Span | None] | None = None

    @property
    def is_recorded(self) -> bool:
        """Whether what is set here is kept: else it need not be found out."""
        return True

    @property
    def place(self) -> Place:
        """As others name it, once it has begun."""
        assert self._recorded is not None  # noqa: S101  # it has begun
        return self._recorded.place

    @property
    def header(self) -> str | None:
        """What a message carries so that its receiver goes on under this span."""
        return self.place.header

    def set(self, attributes: Mapping[str, Value]) -> None:
        """Add attributes."""
        self.attributes |= attributes
        if self._recorded is not None:
            self._recorded.set(attributes)

    def fail(self, kind: str, message: str = "") -> None:
        """It ends with an error of this kind."""
        self.set({"error.type": kind})
        self._error = message or kind

    def begin(self) -> Self:
        """It begins now."""
        if _recorders:
            self._recorded = _recorders[0].begin(
                self.name, kind=self._kind, parent=self._parent, links=self._links, attributes=self.attributes
            )
        return self

    def end(self) -> None:
        """It ends now, and is handed over."""
        if self._recorded is not None:
            self._recorded.end(error=self._error)

    def __enter__(self) -> Self:
        self._token = _current.set(self)
        return self.begin()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._token is not None:
            _current.reset(self._token)
        if kind is not None and self._error is None:
            self.fail(kind.__name__)
        self.end()


class _Nothing(Span):
    """What stands for a span where nothing is traced."""

    __slots__ = ()

    @property
    def is_recorded(self) -> bool:
        return False

    @property
    def header(self) -> str | None:
        return None

    def set(self, attributes: Mapping[str, Value]) -> None:
        return

    def fail(self, kind: str, message: str = "") -> None:
        return

    def begin(self) -> Self:
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return


NOTHING: Final[Span] = _Nothing("", ids={})
_current: contextvars.ContextVar[Span | None] = contextvars.ContextVar("stoker_span", default=None)
_recorders: list[Recorder] = []


def start_tracing(settings: Settings, *, process: str) -> None:
    """From now on record spans, if the settings ask for it; call it after the fork. Once more is harmless.

    Who calls it calls `stop_tracing` at the end: an exit handler could not, which may start no thread (Python 3.12).
    `process` says which part of Stoker this is. Raises BadInput that names a setting which is missing or wrong.
    """
    if settings.trace.to == "off" or _recorders:
        return
    _recorders.append(_export().SdkRecorder(settings, process=process))


def check_tracing(settings: Settings) -> None:
    """Raise BadInput if spans could not be recorded as the settings say; for a process whose children record them."""
    if settings.trace.to != "off":
        _export().receiver_of(settings).shutdown()


def ask_receiver(settings: Settings) -> tuple[str, str | None]:
    """(where spans go, why they would not be taken there now or None). Raises BadInput as `start_tracing`."""
    export = _export()
    receiver = export.receiver_of(settings)
    try:
        return receiver.name, export.fault_of(receiver, ())
    finally:
        receiver.shutdown()


def stop_tracing() -> None:
    """Hand over what was recorded, for two seconds at most; nothing more is recorded."""
    while _recorders:
        _recorders.pop().stop()


def shows_prompts() -> bool:
    """Whether prompts and answers may go into spans."""
    return bool(_recorders) and _recorders[0].prompts


def root_of(batch_id: UUID) -> Place:
    """The batch's root span, whoever writes it."""
    return Place(batch_id.int, int.from_bytes(hashlib.sha256(batch_id.bytes).digest()[:8]) or 1)


def is_traced(batch_id: UUID) -> bool:
    """Whether this batch's spans are recorded: by its id, so that all processes agree."""
    return bool(_recorders) and (batch_id.int & _SAMPLED_BITS) < _recorders[0].sample * (_SAMPLED_BITS + 1)


def span(name: str, *, kind: Kind = "internal", attributes: Mapping[str, Value] | None = None) -> Span:
    """A span under the one that is under way here; nothing where none is."""
    above = _current.get()
    if above is None or not _recorders:
        return NOTHING
    return Span(name, kind=kind, parent=above.place, ids=above.ids, attributes=attributes)


def batch_span(
    name: str,
    batch_id: UUID,
    *,
    kind: Kind = "internal",
    attributes: Mapping[str, Value] | None = None,
    header: str | None = None,
) -> Span:
    """A span of the batch's trace: under the one that a `traceparent` header names, else under its root."""
    if not is_traced(batch_id):
        return NOTHING
    above = _place_in(header)
    if above is None or above.trace_id != batch_id.int:
        above = root_of(batch_id)
    return Span(name, kind=kind, parent=above, ids=_ids_of(batch_id), attributes=attributes)


def own_trace(name: str, batch_id: UUID, *, attributes: Mapping[str, Value]) -> Span:
    """A span that begins a trace of its own, as one of a batch would be too large; links lead back to the batch's."""
    if not is_traced(batch_id):
        return NOTHING
    under_way = _current.get()
    links = [root_of(batch_id)] if under_way is None else [root_of(batch_id), under_way.place]
    return Span(name, links=links, ids=_ids_of(batch_id), attributes=attributes)


def record_root(
    batch_id: UUID, *, started_ns: int, ended_ns: int, attributes: Mapping[str, Value], error: str | None
) -> None:
    """Record the batch's root span, once it has ended."""
    if is_traced(batch_id):
        told = {**_ids_of(batch_id), **attributes, **({} if error is None else {"error.type": error})}
        root = _recorders[0].begin(
            "batch",
            kind="internal",
            parent=None,
            links=(),
            attributes=told,
            place=root_of(batch_id),
            started_ns=started_ns,
        )
        root.end(error=error, ended_ns=ended_ns)


def context_of(span: Span, **ids: str | int) -> contextvars.Context:
    """The context of work under this span, which has begun: log lines in it carry these ids, and the trace's."""
    context = contextvars.copy_context()
    if span.is_recorded:
        context.run(_current.set, span)
        ids["trace_id"] = f"{span.place.trace_id:032x}"
    context.run(structlog.contextvars.bind_contextvars, **ids)
    return context


def _ids_of(batch_id: UUID) -> dict[str, Value]:
    """What every span of a batch states: without its tenant's name, which stays here."""
    name = f"batch_{batch_id.hex}"
    return dict.fromkeys((BATCH_ID, SESSION, *_recorders[0].sessions), name)


def _place_in(header: str | None) -> Place | None:
    found = _HEADER.fullmatch(header or "")
    return None if found is None else Place(int(found[1], 16), int(found[2], 16))


def _export() -> Any:
    """Its module, which needs libraries that are an extra. Raises BadInput without them."""
    try:
        from runtime import trace_export  # noqa: PLC0415  # as above
    except ImportError as error:
        raise BadInput(f"STOKER_TRACE__TO needs OpenTelemetry's libraries: {extra_remedy('traces')}") from error
    return trace_export
