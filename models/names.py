"""How a batch is called outside: `batch_` and the 32 hex digits of its UUID; any unique beginning will do."""

from __future__ import annotations

import re
from uuid import UUID

PREFIX = "batch_"
_REQUEST = re.compile(r"batch_req_([0-9a-f]{32})_([0-9]{1,9})")


def batch_name(batch_id: UUID) -> str:
    """`batch_01a2…` of a batch id."""
    return PREFIX + batch_id.hex


def short_name(batch_id: UUID) -> str:
    """Its beginning, which stands for it: the millisecond that it was made in."""
    return batch_name(batch_id)[:18]


def batch_hex(name: str) -> str:
    """The hex digits that a whole or shortened name states; dashes and the prefix may be there or not."""
    return name.strip().lower().removeprefix(PREFIX).replace("-", "")


def request_name(batch_id: UUID, seq: int) -> str:
    """The id of a job's request: in its result line, in the engine's log and in the engine's response."""
    return f"batch_req_{batch_id.hex}_{seq}"


def read_request_name(name: str) -> tuple[UUID, int] | None:
    """The batch and seq that a request name states; None if it is none."""
    found = _REQUEST.fullmatch(name)
    return None if found is None else (UUID(found[1]), int(found[2]))
