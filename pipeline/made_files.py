"""Files that are made of a batch's rows while they are read: its results, and its lines where no upload was.

Memory does not grow with the batch. A part of a batch that runs has what is there by now.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Final
from uuid import UUID

from models.file_names import read_made_name
from models.states import Outcome, Part
from pipeline.export import input_line, line
from runtime.errors import NotFound
from store.batches import BatchProgress, batch_progress
from store.database import Database
from store.files import FileEntry, find_file, set_size, uncounted
from store.results import first_unfinished, job_pages, result_pages

COUNT_LEASE: Final = timedelta(hours=1)  # much longer than 10,000,000 lines take


@dataclass(frozen=True, slots=True)
class MadeFile:
    """A file made of rows. `entry` is None while its batch runs, and for a batch's input.

    `last_line`: the line of the input up to which every job has ended; a later reading may go on from there.
    """

    id: str
    progress: BatchProgress
    part: Part
    entry: FileEntry | None
    last_line: int

    @property
    def is_complete(self) -> bool:
        """Whether nothing will be added to it."""
        return self.part is Part.INPUT or self.progress.is_ended


def find_made_file(database: Database, name: str, *, tenant: str, after_line: int = 0) -> MadeFile | None:
    """The file of this id; None if it is an upload's. Raises NotFound, also for one that was deleted."""
    named = read_made_name(name)
    if named is None:
        return None
    batch_id, part = named
    with database.transaction() as session:
        try:
            progress = batch_progress(session, batch_id, tenant=tenant)
        except NotFound as error:
            raise NotFound(f"no file {name}") from error
        if part is Part.INPUT:
            if progress.input_file_id is not None:
                raise NotFound(f"no file {name}")
            return MadeFile(name, progress, part, None, progress.total)
        entry = find_file(session, name, tenant=tenant) if progress.is_ended else None
        total = progress.total
        last_line = total if progress.is_ended else first_unfinished(session, batch_id, first=after_line, total=total)
    return MadeFile(name, progress, part, entry, last_line)


def pieces(database: Database, file: MadeFile, *, after_line: int = 0) -> Iterator[bytes]:
    """Its bytes, some thousand lines at a time; of results those after a line of the input."""
    if file.part is Part.INPUT:
        for jobs in job_pages(database, file.progress.id):
            yield b"".join(input_line(file.progress.endpoint, *job) for job in jobs)
        return
    yield from _results(database, file.progress.id, file.part, after_line=after_line)


def count_next(database: Database) -> bool:
    """Count the size of one results file that nobody has counted; false if there is none. It may be repeated."""
    with database.transaction() as session:
        entry = uncounted(session, lease=COUNT_LEASE)
    if entry is None:
        return False
    size = _size(database, entry)
    with database.transaction() as session:
        set_size(session, entry.id, size)
    return True


def _size(database: Database, entry: FileEntry) -> int:
    assert entry.batch_id is not None  # noqa: S101  # a row without a blob has one
    assert entry.part is not None  # noqa: S101
    return sum(map(len, _results(database, entry.batch_id, entry.part, after_line=0)))


def _results(database: Database, batch_id: UUID, part: Part, *, after_line: int) -> Iterator[bytes]:
    wants_failed = part is Part.ERRORS
    for page in result_pages(database, batch_id, after_seq=after_line - 1):
        piece = b"".join(line(batch_id, row) for row in page if (row.outcome is Outcome.FAILED) == wants_failed)
        if piece:
            yield piece
