"""Finding custom_ids used twice, with flat memory: 64-bit digests first, the ids only on suspicion.

It must not read the batch file itself; the caller hands in the ids, a second time if a suspect exists.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Self

BUCKETS = 256
SPILL_AT = 2_000_000  # digests held in memory, 16 MB; measured: 10,000,000 ids end at 60 MB with them
MAX_SUSPECTS = 10_000  # digests whose ids are compared; a file with more is wrong as a whole


@dataclass(frozen=True, slots=True)
class Suspects:
    """Digests that came up more than once; `unchecked` counts the repeats of those beyond the most."""

    digests: frozenset[int]
    unchecked: int


@dataclass(frozen=True, slots=True)
class Duplicate:
    """A custom_id that line `line` uses although line `first_line` has it already."""

    custom_id: str
    first_line: int
    line: int


class DigestBuckets:
    """The digests of all custom_ids of a file by their low bits; many are spilled to a temporary folder.

    Digests are Python's own hashes: they hold for this process only, and equal ones are suspects, no proof.
    """

    def __init__(self, *, spill_at: int = SPILL_AT) -> None:
        self._spill_at = spill_at
        self._held = 0
        self._buckets = [array("q") for _ in range(BUCKETS)]
        self._folder: TemporaryDirectory[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def add(self, custom_id: str) -> None:
        """Remember the id of one line."""
        digest = hash(custom_id)
        self._buckets[digest & (BUCKETS - 1)].append(digest)
        self._held += 1
        if self._held >= self._spill_at:
            self._spill()

    def suspects(self, *, most: int = MAX_SUSPECTS) -> Suspects:
        """The digests that were added more than once, `most` of them at most."""
        digests: set[int] = set()
        unchecked = 0
        for values in self._all_buckets():
            if len(set(values)) == len(values):
                continue
            for digest, count in Counter(values).items():
                if count > 1 and len(digests) < most:
                    digests.add(digest)
                elif count > 1:
                    unchecked += count - 1
        return Suspects(frozenset(digests), unchecked)

    def _all_buckets(self) -> Iterator[array[int]]:
        for number, held in enumerate(self._buckets):
            if self._folder is None:
                yield held
            else:
                values = array("q", self._file(self._folder, number).read_bytes())
                values.extend(held)
                yield values

    def _spill(self) -> None:
        if self._folder is None:
            self._folder = TemporaryDirectory(prefix="stoker-digests-")
        for number, held in enumerate(self._buckets):
            with self._file(self._folder, number).open("ab") as file:
                held.tofile(file)
            del held[:]
        self._held = 0

    @staticmethod
    def _file(folder: TemporaryDirectory[str], number: int) -> Path:
        return Path(folder.name) / f"{number:03}"


def duplicates(ids: Iterable[tuple[int, str]], suspects: Suspects) -> Iterator[Duplicate]:
    """Each line that repeats an id among the suspects, in the order of `ids`, which are (line, custom_id)."""
    first_lines: dict[str, int] = {}
    for line, custom_id in ids:
        if hash(custom_id) in suspects.digests:
            first_line = first_lines.setdefault(custom_id, line)
            if first_line != line:
                yield Duplicate(custom_id, first_line, line)
