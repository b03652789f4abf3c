"""A connection whose request heads have bounds of bytes and time, which uvicorn sets neither of.

It comes before keys are looked at, so anybody who reaches the port meets it.
"""

from __future__ import annotations

import asyncio
from typing import Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_BYTES: Final = 65_536  # and what one read brings beyond it; ours and the official client's have some 600
HEAD_S: Final = 20.0  # from the first byte, or the connection, to the head's end; as nginx's 60 s, but for programs


class BoundedHeads(HttpToolsProtocol):
    """Uvicorn's protocol, which would keep a head that does not end until the memory is full."""

    head_s = HEAD_S
    _unread = 0  # bytes of a head, or of what follows a body
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Wait for the first head."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on, unless what is neither head nor body has become too long."""
        if self._late is None and (self.cycle is None or self.cycle.response_complete):
            self._await_head()
        self._unread += len(data)
        super().data_received(data)
        if self._unread > HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"the head of a request may have {HEAD_BYTES} bytes")

    def on_headers_complete(self) -> None:
        """The head is here."""
        self._stop_waiting()
        self._unread = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of the body, of which its reader knows the bounds."""
        self._unread = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The next head may follow."""
        self._unread = 0
        super().on_message_complete()

    def _await_head(self) -> None:
        self._late = self.loop.call_later(self.head_s, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
