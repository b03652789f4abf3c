"""custom_ids that two lines share."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.duplicates import LOW_BITS, MAX_SUSPECTS, DigestBuckets, Duplicate, Suspects, duplicates


def suspects_of(ids: list[str], *, spill_at: int, most: int = MAX_SUSPECTS) -> Suspects:
    with DigestBuckets(spill_at=spill_at) as digests:
        for custom_id in ids:
            digest = hash(custom_id)
            digests.appends[0][digest & LOW_BITS](digest)
            digests.settle()
        return digests.suspects(most=most)


@given(st.lists(st.text(max_size=2)), st.integers(1, 40))
def test_every_repeated_id_is_named_with_the_line_that_had_it_first(ids: list[str], spill_at: int) -> None:
    found = list(duplicates(enumerate(ids, 1), suspects_of(ids, spill_at=spill_at)))
    expected = [
        Duplicate(custom_id, ids.index(custom_id) + 1, line)
        for line, custom_id in enumerate(ids, 1)
        if ids.index(custom_id) + 1 < line
    ]
    assert found == expected


def test_distinct_ids_leave_no_suspects() -> None:
    assert suspects_of([f"id-{number}" for number in range(10_000)], spill_at=999) == Suspects(frozenset(), 0)


def test_equal_digests_of_different_ids_are_no_duplicates() -> None:
    assert list(duplicates([(1, "a"), (2, "b")], Suspects(frozenset({hash("a"), hash("b")}), 0))) == []


def test_beyond_the_most_suspects_repeats_are_only_counted() -> None:
    ids = [f"id-{number}" for number in range(100)] * 3
    suspects = suspects_of(ids, spill_at=50, most=10)
    named = list(duplicates(enumerate(ids, 1), suspects))
    assert len(suspects.digests) == 10
    assert Counter(repeat.custom_id for repeat in named).most_common()[0][1] == 2
    assert len(named) + suspects.unchecked == 200


def test_the_spilled_files_are_removed_also_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def break_off() -> None:
        with DigestBuckets(spill_at=1) as digests:
            digests.appends[0][0](1)
            digests.settle()
            assert list(tmp_path.iterdir())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    assert not list(tmp_path.iterdir())
