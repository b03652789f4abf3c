"""A connection whose request heads have bounds of bytes and time, and bodies after their answer: uvicorn sets none.

It comes before keys are looked at, so anybody who reaches the port meets it.
"""

from __future__ import annotations

import asyncio
from typing import Final, Literal

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_BYTES: Final = 65_536  # and what one read brings beyond it; ours and the official client's have some 600
HEAD_S: Final = 20.0  # from the first byte, or the connection, to the head's end; as nginx's 60 s, but for programs
REST_S: Final = 60.0  # for the rest of a body whose answer, such as a refusal, did not wait for it; nginx: 30 s


class BoundedHeads(HttpToolsProtocol):
    """Uvicorn's protocol, which would keep a head that does not end until the memory is full."""

    head_s = HEAD_S
    rest_s = REST_S
    _unread = 0  # bytes of a head, or of what follows a body
    _part: Literal["head", "body", "none"] = "head"  # of a message, which is being read
    _bounded: str | None = None  # the part whose time runs
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Wait for the first head."""
        super().connection_made(transport)
        self._bound()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on, unless what is neither head nor body has become too long."""
        self._unread += len(data)
        super().data_received(data)
        if self._unread > HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"the head of a request may have {HEAD_BYTES} bytes")
        self._bound()

    def on_message_begin(self) -> None:
        """A head begins."""
        self._part = "head"
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The head is here."""
        self._part = "body"
        self._unread = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of the body, of which its reader knows the bounds."""
        self._unread = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The next head may follow."""
        self._part = "none"
        self._unread = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """What is left of the body, or of the next head, was read meanwhile and has its time from here on."""
        super().on_response_complete()
        self._bound()

    def _bound(self) -> None:
        """Let the time run of the part that is being read; not while a request is answered, which reads its body."""
        answers = self.cycle is not None and not self.cycle.response_complete
        part = None if answers else self._part
        if part != self._bounded:
            self._stop_waiting()
            self._bounded = part
            seconds = {"head": self.head_s, "body": self.rest_s, "none": float(self.timeout_keep_alive)}
            if part is not None and not self.transport.is_closing():
                self._late = self.loop.call_later(seconds[part], self.transport.close)

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
