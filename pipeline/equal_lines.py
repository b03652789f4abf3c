"""Finding lines of a batch that may share one answer: 64-bit digests of their bodies in flat memory.

The caller keeps the digests, `hash` of a body, in buckets of columns "qi", with the line's seq beside each, and
`~hash` of a semantic line's body: what only an equal request may serve must not follow what a similar one may.

What this gives are suspects; whoever stores them compares the bodies by SHA-256. Equal are equal bytes of one mode:
lines that differ in the order of their fields or in a default that is given have one key in the exact cache, which
finds them when they run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Final

from pipeline.duplicates import DigestBuckets

# Rows that one leader's write inserts beside its own, in one transaction: some 10 MB of short answers.
MOST_FOLLOWERS: Final = 10_000


def suspects(digests: DigestBuckets) -> Iterator[tuple[int, int]]:
    """(leader, seq) of every line whose digest others have, the leaders' own rows included.

    The leader is the first of at most MOST_FOLLOWERS + 1.
    """
    for values, seqs in digests.buckets():
        if len(set(values)) == len(values):
            continue
        repeated = {digest for digest, times in Counter(values).items() if times > 1}
        groups: dict[int, tuple[int, int]] = {}
        for digest, seq in zip(values, seqs, strict=True):
            if digest in repeated:
                leader, left = groups.get(digest, (seq, 0))
                groups[digest] = leader, left = (leader, left - 1) if left else (seq, MOST_FOLLOWERS)
                yield leader, seq
