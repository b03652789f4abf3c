"""Finding what comes twice in a file, with flat memory: 64-bit digests first, the things only on suspicion.

It must not read the batch file itself; the caller hands in the ids, a second time if a suspect exists.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Self

BUCKETS = 64  # 20 ns a line quicker than 256; a set of 150,000 when 10,000,000 digests are looked through
LOW_BITS = BUCKETS - 1
SPILL_AT = 2_000_000  # digests held in memory, 16 MB; measured: 10,000,000 ids end at 60 MB with them
SETTLE_LINES = 65_536  # how often a reader should settle: a mask of its line numbers, plus one
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
    """Digests of a file's lines by their low bits; many are spilled to a temporary folder.

    `appends` are the ways in, for a loop that cannot afford a call of ours: `appends[0][digest & LOW_BITS](digest)`,
    and so for each further column (array type codes), with `settle` now and then. Digests are Python's own hashes:
    they hold for this process only, and equal ones are suspects, no proof.
    """

    def __init__(self, columns: str = "q", *, spill_at: int = SPILL_AT) -> None:
        self._spill_at = spill_at
        self._columns = columns
        self._buckets = [tuple(array(code) for code in columns) for _ in range(BUCKETS)]
        self._folder: TemporaryDirectory[str] | None = None
        self.appends: Sequence[Sequence[Callable[[int], None]]] = [
            [bucket[column].append for bucket in self._buckets] for column in range(len(columns))
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def settle(self) -> None:
        """Spill what is held if it is much."""
        if sum(len(bucket[0]) for bucket in self._buckets) >= self._spill_at:
            self._spill()

    def suspects(self, *, most: int = MAX_SUSPECTS) -> Suspects:
        """The digests that were added more than once, `most` of them at most."""
        digests: set[int] = set()
        unchecked = 0
        for values, *_ in self.buckets():
            if len(set(values)) == len(values):
                continue
            for digest, count in Counter(values).items():
                if count > 1 and len(digests) < most:
                    digests.add(digest)
                elif count > 1:
                    unchecked += count - 1
        return Suspects(frozenset(digests), unchecked)

    def buckets(self) -> Iterator[tuple[array[int], ...]]:
        """The columns of each bucket, whole."""
        for number, held in enumerate(self._buckets):
            if self._folder is None:
                yield held
                continue
            whole = tuple(array(code) for code in self._columns)
            for column, (part, rest) in enumerate(zip(whole, held, strict=True)):
                part.frombytes(self._file(self._folder, number, column).read_bytes())
                part.extend(rest)
            yield whole

    def _spill(self) -> None:
        if self._folder is None:
            self._folder = TemporaryDirectory(prefix="stoker-digests-")
        for number, held in enumerate(self._buckets):
            for column, part in enumerate(held):
                with self._file(self._folder, number, column).open("ab") as file:
                    part.tofile(file)
                del part[:]

    @staticmethod
    def _file(folder: TemporaryDirectory[str], number: int, column: int) -> Path:
        return Path(folder.name) / f"{number:02}.{column}"


def duplicates(ids: Iterable[tuple[int, str]], suspects: Suspects) -> Iterator[Duplicate]:
    """Each line that repeats an id among the suspects, in the order of `ids`, which are (line, custom_id)."""
    first_lines: dict[str, int] = {}
    for line, custom_id in ids:
        if hash(custom_id) in suspects.digests:
            first_line = first_lines.setdefault(custom_id, line)
            if first_line != line:
                yield Duplicate(custom_id, first_line, line)
