"""Finding lines of a batch that may share one answer: 64-bit digests of their bodies in flat memory.

What it gives are suspects; whoever stores them compares the bodies. Equal are equal bytes of one mode: lines that
differ in the order of their fields or in a default that is given have one key in the exact cache, which finds them
when they run.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Final, Self

from models.lines import ParsedLine
from models.states import CacheMode

BUCKETS: Final = 256
SPILL_AT: Final = 2_000_000  # lines held in memory, 12 bytes each, twice that while a bucket is read
# Rows that one leader's write inserts beside its own, in one transaction: some 10 MB of short answers.
MOST_FOLLOWERS: Final = 10_000


class EqualLines:
    """The digests of the lines that may share an answer, each with its seq; many are spilled to a temporary folder.

    Digests are Python's own hashes: they hold for this process only, and equal ones are suspects, no proof.
    """

    def __init__(self, *, spill_at: int = SPILL_AT) -> None:
        self._spill_at = spill_at
        self._held = 0
        self._digests, self._seqs = array("q"), array("i")
        self._buckets = [(array("q"), array("i")) for _ in range(BUCKETS)]
        self._folder: TemporaryDirectory[str] | None = None
        self._keep_digest, self._keep_seq = self._digests.append, self._seqs.append

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def add(self, line: ParsedLine, seq: int) -> None:
        """Remember a line that may share its answer; `settle` must follow before long."""
        digest = hash(line.body)
        # A line that only an equal request may serve must not follow one that is served by a similar request's.
        self._keep_digest(~digest if line.cache is CacheMode.SEMANTIC else digest)
        self._keep_seq(seq)

    def settle(self) -> None:
        """Sort what was added by the digests' low bits, and spill it if it is much."""
        buckets = self._buckets
        for digest, seq in zip(self._digests, self._seqs, strict=True):
            digests, seqs = buckets[digest & (BUCKETS - 1)]
            digests.append(digest)
            seqs.append(seq)
        self._held += len(self._digests)
        del self._digests[:], self._seqs[:]
        if self._held >= self._spill_at:
            self._spill()

    def suspects(self) -> Iterator[tuple[int, int]]:
        """(leader, seq) of every line whose digest others have, the leaders' own rows included.

        The leader is the first of at most MOST_FOLLOWERS + 1.
        """
        self.settle()
        for digests, seqs in self._all_buckets():
            if len(set(digests)) == len(digests):
                continue
            repeated = {digest for digest, count in Counter(digests).items() if count > 1}
            groups: dict[int, tuple[int, int]] = {}
            for digest, seq in zip(digests, seqs, strict=True):
                if digest in repeated:
                    leader, left = groups.get(digest, (seq, 0))
                    leader, left = (leader, left - 1) if left else (seq, MOST_FOLLOWERS)
                    groups[digest] = leader, left
                    yield leader, seq

    def _all_buckets(self) -> Iterator[tuple[array[int], array[int]]]:
        for number, held in enumerate(self._buckets):
            if self._folder is None:
                yield held
            else:
                whole = array("q"), array("i")
                for kind, part, rest in zip("qi", whole, held, strict=True):
                    part.frombytes(self._file(self._folder, kind, number).read_bytes())
                    part.extend(rest)
                yield whole

    def _spill(self) -> None:
        if self._folder is None:
            self._folder = TemporaryDirectory(prefix="stoker-equal-lines-")
        for number, held in enumerate(self._buckets):
            for kind, part in zip("qi", held, strict=True):
                with self._file(self._folder, kind, number).open("ab") as file:
                    part.tofile(file)
                del part[:]
        self._held = 0

    @staticmethod
    def _file(folder: TemporaryDirectory[str], kind: str, number: int) -> Path:
        return Path(folder.name) / f"{kind}{number:03}"
