"""How files are called outside: `file-` and 32 hex digits; those made of a batch's rows by its digits and the part."""

from __future__ import annotations

import re
from uuid import UUID

from models.names import batch_name
from models.states import Part

_UPLOAD = re.compile(r"file-[0-9a-f]{32}")
_MADE = re.compile(r"file-([0-9a-f]{32})-(input|output|errors)")


def upload_name(file_id: UUID) -> str:
    """`file-01a2…` of an upload."""
    return f"file-{file_id.hex}"


def is_upload(name: str) -> bool:
    """Whether it is the id of an upload, there or not."""
    return _UPLOAD.fullmatch(name) is not None


def made_name(batch_id: UUID, part: Part) -> str:
    """The id of the file with this part of a batch, known before it is complete."""
    return f"file-{batch_id.hex}-{part.value}"


def made_filename(batch_id: UUID, part: Part) -> str:
    """What that file is called where it is saved."""
    return f"{batch_name(batch_id)}_{part.value}.jsonl"


def read_made_name(name: str) -> tuple[UUID, Part] | None:
    """The batch and part that a file's id states; None if it is an upload's."""
    found = _MADE.fullmatch(name)
    return None if found is None else (UUID(found[1]), Part(found[2]))
