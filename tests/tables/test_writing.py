"""What is written: the input's columns as they were, the appended ones after them, whole or not at all."""

from __future__ import annotations

import csv
import datetime as dt
import json
import subprocess
import sys
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import BadInput
from tables.reading import Table, open_table
from tables.writing import AddedColumn, ColumnKind, check_output, writer_for

ANSWER = AddedColumn("answer", ColumnKind.TEXT)
SUFFIXES = ["parquet", "csv", "tsv", "jsonl", "arrow"]


def write_through(table: Table, path: Path, answers: Sequence[Any], added: AddedColumn = ANSWER) -> Table:
    """`table` at `path` with one column appended, opened again."""
    start = 0
    with writer_for(path, table, [added]) as writer:
        for batch in table.batches():
            writer.write(batch, {added.name: answers[start : start + batch.num_rows]})
            start += batch.num_rows
    return open_table(path)


def values(table: Table, name: str) -> list[Any]:
    return [value for batch in table.batches([name]) for value in batch.column(name)]


def parquet(path: Path, columns: dict[str, Any], *, group: int = 1 << 20) -> Table:
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return open_table(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_rows_keep_their_order_and_get_their_own_answers(tmp_path: Path, suffix: str) -> None:
    table = parquet(tmp_path / "in.parquet", {"text": [f"text {number}" for number in range(70_000)]}, group=30_000)
    out = write_through(table, tmp_path / f"out.{suffix}", [f"answer {number}" for number in range(70_000)])
    assert out.column_names == ["text", "answer"]
    assert values(out, "text") == values(table, "text")
    assert values(out, "answer") == [f"answer {number}" for number in range(70_000)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.parquet", f"out.{suffix}"]


ODD = st.one_of(st.none(), st.text(st.characters(exclude_categories=["Cs"]), max_size=20))


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.tuples(ODD, ODD), min_size=1, max_size=8))
def test_texts_and_nulls_come_back_from_every_format_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str | None, str | None]]
) -> None:
    folder = tmp_path_factory.mktemp("odd")
    texts, answers = [text for text, _ in rows], [answer for _, answer in rows]
    table = parquet(folder / "in.parquet", {"number": list(range(len(rows))), "text": pa.array(texts, pa.string())})
    for suffix in SUFFIXES:
        table = write_through(
            table, folder / f"out.{suffix}", answers, AddedColumn(f"answer_{suffix}", ColumnKind.TEXT)
        )
    assert values(table, "text") == texts
    assert [values(table, f"answer_{suffix}") for suffix in SUFFIXES] == [answers] * len(SUFFIXES)


RICH = {
    "dictionary": pa.array(["a", None]).dictionary_encode(),
    "zoned": pa.array([dt.datetime(2026, 1, 2, 3, tzinfo=dt.UTC), None], pa.timestamp("us", "Europe/Berlin")),
    "nanoseconds": pa.array([1, None], pa.timestamp("ns")),
    "date": pa.array([dt.date(2026, 1, 2), None]),
    "time": pa.array([dt.time(3, 4), None]),
    "decimal": pa.array([Decimal("1.50"), None], pa.decimal128(9, 2)),
    "list": pa.array([[1, 2], None]),
    "struct": pa.array([{"a": dt.date(2026, 1, 2), "b": b"\xff"}, None]),
    "large": pa.array(["x", ""], pa.large_string()),
    "binary": pa.array([b"\x00\xff", None]),
    "number": pa.array([float("nan"), None]),
    "boolean": pa.array([True, None]),
    "null": pa.nulls(2),
}


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_types_and_values_stay_as_they_were(tmp_path: Path, suffix: str) -> None:
    table = parquet(tmp_path / "in.parquet", RICH)
    out = write_through(table, tmp_path / f"out.{suffix}", ["yes", None])
    assert out.schema.types == [*(array.type for array in RICH.values()), pa.string()]
    (batch,) = out.batches()
    for name, array in RICH.items():
        assert batch.record.column(name).to_pylist()[1:] == array.to_pylist()[1:]
        assert str(batch.column(name)[0]) == str(next(table.batches()).column(name)[0])


WORDS: dict[str, tuple[Any, str | None]] = {
    "dictionary": ("a", "a"),
    "zoned": ("2026-01-02T04:00:00+01:00", "2026-01-02T04:00:00+01:00"),
    "nanoseconds": ("1970-01-01 00:00:00.000000001", "1970-01-01 00:00:00.000000001"),
    "date": ("2026-01-02", "2026-01-02"),
    "time": ("03:04:00", "03:04:00"),
    "decimal": ("1.50", "1.50"),
    "list": ([1, 2], "[1,2]"),
    "struct": ({"a": "2026-01-02", "b": "/w=="}, '{"a":"2026-01-02","b":"/w=="}'),
    "large": ("x", "x"),
    "binary": ("AP8=", "AP8="),
    "number": (None, "nan"),
    "boolean": (True, "true"),
    "null": (None, None),
}


def test_jsonl_and_csv_say_in_words_what_they_have_no_type_for(tmp_path: Path) -> None:
    table = parquet(tmp_path / "in.parquet", RICH)
    write_through(table, tmp_path / "out.jsonl", ["yes", None])
    first, second = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert first == {name: told for name, (told, _) in WORDS.items()} | {"answer": "yes"}
    assert second == dict.fromkeys([*WORDS, "answer"]) | {"large": ""}
    out = write_through(table, tmp_path / "out.csv", ["yes", None])
    for name, (_, cell) in WORDS.items():
        assert values(out, name) == [cell, "" if name == "large" else None]
    with (tmp_path / "out.csv").open(newline="") as opened:
        assert [len(row) for row in csv.reader(opened)] == [len(WORDS) + 1] * 3


def test_pandas_gets_its_index_and_its_categories_back(tmp_path: Path) -> None:
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame(
        {"text": ["a", "b"], "kind": pd.Categorical(["x", "y"], categories=["y", "x"])},
        index=pd.Index([7, 9], name="id"),
    )
    frame.to_parquet(tmp_path / "in.parquet")
    table = open_table(tmp_path / "in.parquet")
    write_through(table, tmp_path / "out.parquet", ["1", "2"])
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "out.parquet").drop(columns="answer"), frame)
    write_through(table, tmp_path / "out.feather", ["1", "2"])
    pd.testing.assert_frame_equal(pd.read_feather(tmp_path / "out.feather").drop(columns="answer"), frame)


def test_an_arrow_file_gets_one_dictionary_of_those_of_all_batches(tmp_path: Path) -> None:
    rows = [f"kind {number // 50}" for number in range(20_000)]
    array = pa.array(rows).dictionary_encode().cast(pa.dictionary(pa.int16(), pa.string()))
    with pa.ipc.new_stream(str(tmp_path / "in.arrow"), pa.schema([("kind", array.type)])) as writer:
        for start in range(0, len(rows), 1000):
            part = pa.array(rows[start : start + 1000]).dictionary_encode().cast(pa.dictionary(pa.int16(), pa.string()))
            writer.write_batch(pa.record_batch({"kind": part}))
    out = write_through(open_table(tmp_path / "in.arrow"), tmp_path / "out.arrow", ["x"] * len(rows))
    assert out.schema.field("kind").type == array.type
    assert values(out, "kind") == rows


def test_added_columns_are_typed_and_what_they_cannot_hold_is_null(tmp_path: Path) -> None:
    table = parquet(tmp_path / "in.parquet", {"text": ["a"] * 6})
    given = [3, 3.0, 3.5, True, "x", 1 << 70]
    expected: dict[ColumnKind, list[Any]] = {
        ColumnKind.INTEGER: [3, 3, None, None, None, None],
        ColumnKind.NUMBER: [3.0, 3.0, 3.5, None, None, float(1 << 70)],
        ColumnKind.BOOLEAN: [None, None, None, True, None, None],
        ColumnKind.TEXT: [None, None, None, None, "x", None],
    }
    for kind, wanted in expected.items():
        assert values(write_through(table, tmp_path / f"{kind}.parquet", given, AddedColumn("a", kind)), "a") == wanted
    out = write_through(table, tmp_path / "huge.jsonl", ["\ud83d half", 10**400, "é", None, "", "\x00"])
    assert values(out, "answer") == ["? half", None, "é", None, "", "\x00"]


def test_what_fails_leaves_the_file_as_it_was_and_no_part(tmp_path: Path) -> None:
    table = parquet(tmp_path / "in.parquet", {"text": ["a"]})
    for suffix in SUFFIXES:
        out = tmp_path / f"out.{suffix}"
        out.write_text("before")
        with pytest.raises(KeyboardInterrupt), writer_for(out, table, [ANSWER]) as writer:
            writer.write(next(table.batches()), {"answer": ["x"]})
            assert out.read_text() == "before"
            raise KeyboardInterrupt
        assert out.read_text() == "before"
    assert not list(tmp_path.glob("*.part"))


def test_an_output_that_cannot_be_is_refused_before_anything_is_run(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    table = _odd_table(folder / "in.arrow")
    text = AddedColumn("text", ColumnKind.TEXT)

    def refused(path: Path, *added: AddedColumn, table: Table = table) -> str:
        with pytest.raises(BadInput) as raised:
            check_output(path, table, added)
        return str(raised.value)

    assert "out.xlsx: results are written as .parquet, .pq, .csv, .tsv, " in refused(tmp_path / "out.xlsx")
    assert f"the folder {tmp_path / 'no'} does not exist" in refused(tmp_path / "no" / "out.csv")
    assert "is the input itself; name another file" in refused(folder / "in.arrow")
    assert "is in the input's folder" in refused(folder / "out.arrow", table=open_table(folder))
    assert refused(tmp_path / "out.csv", ANSWER, text).endswith(
        "in.arrow: has a column 'text' already, which the result would be called; "
        'give the result columns a prefix: --result-prefix llm_ (Python: result_prefix="llm_")'
    )
    assert "two result columns would be called 'answer'" in refused(tmp_path / "out.csv", ANSWER, ANSWER)
    assert "Parquet cannot hold column empty (struct<>)" in refused(tmp_path / "out.parquet", ANSWER)
    assert "column nested" in refused(tmp_path / "out.arrow", ANSWER)
    for suffix in ("csv", "jsonl"):
        out = write_through(table, tmp_path / f"out.{suffix}", ["x"])
        assert values(out, "nested") == ['["a"]' if suffix == "csv" else ["a"]]


def _odd_table(path: Path) -> Table:
    nested = pa.array([["a"]]).cast(pa.list_(pa.dictionary(pa.int8(), pa.string())))
    table = pa.table({"text": ["a"], "empty": pa.array([{}], pa.struct([])), "nested": nested})
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)
    return open_table(path)


THROUGH = """
import sys
from pathlib import Path
from tables.reading import open_table
from tables.writing import AddedColumn, ColumnKind, writer_for
table = open_table(Path(sys.argv[1]))
with writer_for(Path(sys.argv[2]), table, [AddedColumn("answer", ColumnKind.TEXT)]) as writer:
    for batch in table.batches():
        writer.write(batch, {"answer": batch.column("text")})
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """One row group of 8 times the rows; held whole, the larger table would take 60 MB more, and its answers as much.

    The kernel's high-water mark is asked, because getrusage counts what the parent held before the exec.
    """
    peaks_kb = []
    for rows in (100_000, 800_000):
        text = pa.array([f"the parcel number {number} came late and its box was open" for number in range(1000)])
        texts = pa.concat_arrays([text] * (rows // 1000))
        ids = pa.array(range(rows))
        pq.write_table(pa.table({"id": ids, "text": texts}), tmp_path / "in.parquet", row_group_size=rows)
        command = [sys.executable, "-c", THROUGH, str(tmp_path / "in.parquet"), str(tmp_path / "out.parquet")]
        peaks_kb.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    assert peaks_kb[1] - peaks_kb[0] < 32_000
