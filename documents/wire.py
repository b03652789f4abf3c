"""What goes over the socket between a converter and the reader of one document: JSON, never pickles.

It must not import what reads documents.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from documents.kinds import Kind


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What to read, and within which limits; a line end and the document's bytes follow it."""

    name: str
    kind: Kind
    text_bytes: int
    unpacked_bytes: int
    memory_bytes: int
    convert_s: float


class Text(msgspec.Struct, frozen=True, tag=True):
    """The Markdown, and at which of its characters the pages begin."""

    markdown: str
    pages: tuple[int, ...]


class Fault(msgspec.Struct, frozen=True, tag=True):
    """Why there is no text; `code` and `message` as in runtime.errors.Permanent.

    The bounds are for a reader that its document has taken over.
    """

    code: Annotated[str, msgspec.Meta(pattern="^[a-z_]{1,40}$")]
    message: Annotated[str, msgspec.Meta(max_length=2000)]


def out_of_memory(order: Order) -> Fault:
    """The reader has met its limit of memory."""
    limit = f"the {order.memory_bytes:,} bytes of STOKER_DOCUMENTS__CONVERT_MEMORY_BYTES"
    message = f"{order.name} takes more memory than {limit} to read; split it, or raise the limit"
    return Fault("conversion_memory", message)


def out_of_time(order: Order) -> Fault:
    """The reader has met its limit of time, by the clock or of the processor."""
    limit = f"the {order.convert_s:g} s of STOKER_DOCUMENTS__CONVERT_S"
    return Fault("conversion_timeout", f"{order.name} takes longer than {limit} to read; split it, or raise the limit")


def too_much_text(order: Order) -> Fault:
    """The text is larger than a text may be."""
    limit = f"the {order.text_bytes:,} bytes of STOKER_DOCUMENTS__TEXT_BYTES"
    return Fault("too_much_text", f"{order.name} holds more text than {limit}; split it, or raise the limit")


def unreadable(order: Order, *, cause: str) -> Fault:
    """The parser gave up, or died."""
    title = order.kind.upper()
    return Fault("corrupt_document", f"{order.name} cannot be read as {title} ({cause}); open it and save it anew")
