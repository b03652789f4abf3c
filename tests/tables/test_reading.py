"""What a path of a user's gives: rows in order, values of their own types, and words where it cannot be read."""

from __future__ import annotations

import datetime as dt
import json
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from runtime.errors import BadInput
from tables.reading import BATCH_BYTES, BATCH_ROWS, Table, open_table

ROWS = 10_000


def column(table: Table, name: str) -> list[Any]:
    return [value for batch in table.batches([name]) for value in batch.column(name)]


def written(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def as_parquet(path: Path, table: pa.Table) -> None:
    pq.write_table(table, path, row_group_size=3000)


def as_stream(path: Path, table: pa.Table) -> None:
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)


def as_arrow(path: Path, table: pa.Table) -> None:
    with pa.ipc.new_file(str(path), table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)


def as_csv(path: Path, table: pa.Table) -> None:
    path.write_text("id,text\n" + "".join(f"{row['id']},{row['text']}\n" for row in table.to_pylist()))


def as_lines(path: Path, table: pa.Table) -> None:
    path.write_text("\n".join(json.dumps(row) for row in table.to_pylist()))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("t.parquet", as_parquet),
        ("t.PQ", as_parquet),
        ("t.arrow", as_stream),
        ("t.feather", as_arrow),
        ("t.csv", as_csv),
        ("t.jsonl", as_lines),
    ],
    ids=["parquet", "upper_case", "stream", "feather", "csv", "jsonl"],
)
def test_rows_come_in_order_in_batches_of_a_bounded_size(
    tmp_path: Path, name: str, write: Callable[[Path, pa.Table], None]
) -> None:
    write(tmp_path / name, pa.table({"id": list(range(ROWS)), "text": [f"text {number}" for number in range(ROWS)]}))
    table = open_table(tmp_path / name)
    assert (table.rows, table.column_names) == (ROWS, ["id", "text"])
    assert table.size_bytes == (tmp_path / name).stat().st_size
    batches = list(table.batches(["text", "id"]))
    assert max(batch.num_rows for batch in batches) <= BATCH_ROWS
    assert [value for batch in batches for value in batch.column("text")] == [f"text {n}" for n in range(ROWS)]
    assert [int(value) for batch in batches for value in batch.column("id")] == list(range(ROWS))
    assert sum(batch.num_rows for batch in table.batches([])) == ROWS


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_batch_of_long_documents_has_fewer_rows(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"documents.{suffix}"
    texts = [f"{number} " + "x" * 200_000 for number in range(150)]
    (as_parquet if suffix == "parquet" else as_arrow)(path, pa.table({"text": texts}))
    sizes = [sum(map(len, batch.column("text"))) for batch in open_table(path).batches()]
    assert max(sizes) <= BATCH_BYTES
    assert sum(sizes) == sum(map(len, texts))


def test_values_keep_their_types(tmp_path: Path) -> None:
    zoned = dt.datetime(2026, 1, 2, 3, tzinfo=dt.UTC)
    table = pa.table(
        {
            "dictionary": pa.array(["a", None, "a"]).dictionary_encode(),
            "zoned": pa.array([zoned, None, zoned], pa.timestamp("us", "Europe/Berlin")),
            "nanoseconds": pa.array([1, None, 1000], pa.timestamp("ns")),
            "decimal": pa.array([Decimal("1.50"), None, Decimal("0.10")], pa.decimal128(9, 2)),
            "list": pa.array([[1, 2], [], None]),
            "struct": pa.array([{"a": 1, "b": "x"}, None, {"a": None, "b": None}]),
            "large": pa.array(["x", "", None], pa.large_string()),
            "binary": pa.array([b"\x00\xff", b"", None]),
            "date": pa.array([dt.date(2026, 1, 2), None, None]),
        }
    )
    as_parquet(tmp_path / "t.parquet", table)
    opened = open_table(tmp_path / "t.parquet")
    assert opened.schema.types == table.schema.types
    assert column(opened, "dictionary") == ["a", None, "a"]
    assert column(opened, "zoned")[0] == zoned
    assert column(opened, "zoned")[0].isoformat() == "2026-01-02T04:00:00+01:00"
    assert column(opened, "nanoseconds") == ["1970-01-01 00:00:00.000000001", None, "1970-01-01 00:00:00.000001000"]
    assert column(opened, "decimal")[0] == Decimal("1.50")
    assert column(opened, "list") == [[1, 2], [], None]
    assert column(opened, "struct") == [{"a": 1, "b": "x"}, None, {"a": None, "b": None}]
    assert column(opened, "large") == ["x", "", None]
    assert column(opened, "binary") == [b"\x00\xff", b"", None]
    assert column(opened, "date")[0] == dt.date(2026, 1, 2)


def test_pandas_nanoseconds_that_are_whole_microseconds_are_datetimes(tmp_path: Path) -> None:
    pd = pytest.importorskip("pandas")
    pd.DataFrame({"at": pd.to_datetime(["2026-01-02 03:04:05"]).astype("datetime64[ns]")}).to_parquet(
        tmp_path / "t.parquet"
    )
    (value,) = column(open_table(tmp_path / "t.parquet"), "at")
    assert type(value) is dt.datetime
    assert value.isoformat() == "2026-01-02T03:04:05"


def test_a_csv_cell_is_text_as_it_stands_and_only_an_unquoted_empty_one_is_null(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", '\ufeffid,text,when\r\n00123,"two\nlines, ""quoted""",2026-01-02\r\n,"",NA\r\n')
    table = open_table(path)
    assert table.column_names == ["id", "text", "when"]
    assert column(table, "id") == ["00123", None]
    assert column(table, "text") == ['two\nlines, "quoted"', ""]
    assert column(table, "when") == ["2026-01-02", "NA"]


def test_a_tsv_is_cut_at_tabs_and_an_unnamed_column_stays_unnamed(tmp_path: Path) -> None:
    table = open_table(written(tmp_path / "t.tsv", "\ttext\n0\ta, b\n"))
    assert (table.column_names, column(table, "text"), column(table, "")) == (["", "text"], ["a, b"], ["0"])


def test_a_csv_cell_longer_than_a_block_is_read_and_no_row_twice(tmp_path: Path) -> None:
    rows = [f"row {number}" for number in range(200_000)] + ["x" * 5_000_000, "last"]
    table = open_table(written(tmp_path / "t.csv", "text\n" + "".join(f'"{row}"\n' for row in rows)))
    assert column(table, "text") == rows
    assert table.rows == len(rows)


def test_jsonl_types_are_those_of_the_whole_file_and_text_is_never_made_a_date(tmp_path: Path) -> None:
    early = [{"n": number, "day": "2026-01-02", "more": {"a": number}} for number in range(25_000)]
    late = [{"n": 0.5, "day": "none", "more": {"b": ["x"]}, "new": True}, {"day": "2026-01-02T03:04:05Z"}]
    lines = [json.dumps(row) for row in [*early, *late]]
    path = written(tmp_path / "t.jsonl", "\ufeff\n" + "\n".join(lines[:10]) + "\r\n \n" + "\n".join(lines[10:]))
    table = open_table(path)
    assert table.rows == len(lines)
    assert table.column_names == ["n", "day", "more", "new"]
    assert column(table, "n")[-3:] == [24_999.0, 0.5, None]
    assert column(table, "day")[-3:] == ["2026-01-02", "none", "2026-01-02T03:04:05Z"]
    assert column(table, "more")[-3:] == [{"a": 24_999, "b": None}, {"a": None, "b": ["x"]}, None]
    assert column(table, "new")[-3:] == [None, True, None]


@pytest.mark.parametrize(
    "text",
    [
        *("null", "null\n", " \n\tnull\n", "null]"),  # the first of a block, at which pyarrow ends the process
        '{"a":1}\nnull\n{"a":2}\n',
        '{"a":1} {"a":2}\n\n',
        '{"a":1}{"a":2}\n{"a":\n3}\n',
        '{"a":1}\r\n{"a":2}{"a":3}\r\n {"a":\r\n4}\r\n',
        '{"a":1}\n\ufeff',
        "1" * 5000,
    ],
)
def test_a_jsonl_line_that_is_no_one_object_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(BadInput, match=r"line [12]"):
        open_table(written(tmp_path / "t.jsonl", text))


def test_a_table_of_many_columns_takes_a_time_that_follows_their_number(tmp_path: Path) -> None:
    names = [f"c{number}" for number in range(10_000)]
    began = time.thread_time()
    table = open_table(written(tmp_path / "t.csv", f"{','.join(names)}\n{',' * 9_999}\n"))
    assert sum(batch.num_rows for batch in table.batches(["c0", "c9999"])) == 1
    assert time.thread_time() - began < 4  # 0.3 s; by looking for each name in a list, 8 s

    with pytest.raises(BadInput, match="10,001 columns"):
        open_table(written(tmp_path / "t.csv", "c," * 10_000 + "\n"))


def test_an_arrow_file_whose_offsets_lead_beyond_it_is_refused_and_not_read(tmp_path: Path) -> None:
    file = tmp_path / "t.arrow"
    batch = pa.record_batch({"a": ["x", "yz"]})
    with pa.ipc.new_file(str(file), batch.schema) as writer:
        writer.write_batch(batch)
    offsets = b"".join(number.to_bytes(4, "little") for number in (0, 1, 3))
    content = file.read_bytes()
    assert content.count(offsets) == 1
    file.write_bytes(content.replace(offsets, offsets[:-1] + b"\x7f"))
    with pytest.raises(BadInput, match="damaged"):
        list(open_table(file).batches())


def test_an_arrow_stream_without_columns_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "t.arrow"
    with pa.ipc.new_stream(str(file), pa.schema({})) as writer:
        writer.write_batch(pa.record_batch({}))
    with pytest.raises(BadInput, match="has no rows"):
        open_table(file)


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n", "\n  ", "\n \n"])
def test_blank_lines_of_a_jsonl_file_are_no_rows(tmp_path: Path, end: str) -> None:
    assert open_table(written(tmp_path / "t.jsonl", '\n{"a":1}\n\n{"a":null}' + end)).rows == 2


def test_a_jsonl_line_longer_than_a_block_is_read(tmp_path: Path) -> None:
    texts = ["short", "ü" * 3_000_000, "short"]
    table = open_table(
        written(tmp_path / "t.ndjson", "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts))
    )
    assert column(table, "text") == texts


def test_a_folder_is_one_table_whose_files_may_lack_columns(tmp_path: Path) -> None:
    folder = tmp_path / "out.parquet"
    (folder / "z").mkdir(parents=True)
    as_parquet(folder / "part-1.parquet", pa.table({"text": ["b"], "n": [0.5], "s": [{"x": 1}]}))
    as_parquet(folder / "part-0.parquet", pa.table({"n": pa.array([1], pa.int32()), "text": ["a"]}))
    as_parquet(folder / "z" / "part-0.parquet", pa.table({"text": pa.array(["c"], pa.large_string())}))
    for name in ("_SUCCESS", ".part-0.parquet.crc", "README.md", "_metadata", "empty.parquet"):
        written(folder / name, "" if name == "empty.parquet" else "x")
    table = open_table(folder)
    assert [file.relative_to(folder).as_posix() for file in table.files] == [
        "part-0.parquet",
        "part-1.parquet",
        "z/part-0.parquet",
    ]
    assert (table.rows, table.column_names) == (3, ["n", "text", "s"])
    assert column(table, "text") == ["a", "b", "c"]
    assert column(table, "n") == [1.0, 0.5, None]
    assert column(table, "s") == [None, {"x": 1}, None]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_folder_of_text_files_may_lack_columns_too(tmp_path: Path, suffix: str) -> None:
    content = {"csv": ("a\n1\n", "b,a\nx,2.5\n"), "jsonl": ('{"a":1}', '{"b":"x","a":2.5}')}[suffix]
    for number, text in enumerate(content):
        written(tmp_path / "in" / f"{number}.{suffix}", text)
    table = open_table(tmp_path / "in")
    assert column(table, "a") == (["1", "2.5"] if suffix == "csv" else [1.0, 2.5])
    assert column(table, "b") == [None, "x"]


def hugging_face(folder: Path, shards: list[pa.Table]) -> Path:
    """A dataset as `datasets` 5.2 saves it with save_to_disk."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05}-of-{len(shards):05}.arrow" for number in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        features = {"info": {"features": {"text": {"dtype": "string", "_type": "Value"}}}}
        as_stream(folder / name, shard.replace_schema_metadata({"huggingface": json.dumps(features)}))
    written(folder / "dataset_info.json", "{}")
    state = {"_data_files": [{"filename": name} for name in names], "_split": None, "_format_type": None}
    written(folder / "state.json", json.dumps(state))
    return folder


def test_a_saved_hugging_face_dataset_is_read_in_the_order_of_its_shards(tmp_path: Path) -> None:
    shards = [pa.table({"text": [f"{shard}-{row}" for row in range(1500)]}) for shard in range(11)]
    table = open_table(hugging_face(tmp_path / "ds", shards))
    assert table.rows == 16_500
    assert column(table, "text") == [text for shard in shards for text in shard.column("text").to_pylist()]


def test_a_missing_shard_and_a_dataset_of_splits_are_refused_with_the_way_out(tmp_path: Path) -> None:
    folder = hugging_face(tmp_path / "dd" / "train", [pa.table({"text": ["x"]})] * 2)
    written(tmp_path / "dd" / "dataset_dict.json", '{"splits": ["train", "test"]}')
    with pytest.raises(BadInput, match=r"with the splits train, test; name one: .*dd/train$"):
        open_table(tmp_path / "dd")
    (folder / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(BadInput, match=r"data-00001-of-00002.arrow: missing"):
        open_table(folder)


def test_the_digest_is_of_the_bytes_and_of_where_files_end(tmp_path: Path) -> None:
    one = open_table(written(tmp_path / "one" / "a.csv", "a\n1\n2\n").parent)
    written(tmp_path / "two" / "a.csv", "a\n1\n")
    two = open_table(written(tmp_path / "two" / "b.csv", "a\n2\n").parent)
    seen: list[int] = []
    assert one.digest(on_progress=seen.append) == open_table(tmp_path / "one" / "a.csv").digest()
    assert sum(seen) == one.size_bytes
    assert one.digest() != two.digest()


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    table = open_table(written(tmp_path / "t.csv", "a,b\n1,2\n"))
    with pytest.raises(BadInput, match=r"has no column 'c'; it has a, b"):
        next(table.batches(["c"]))


def test_rows_of_a_few_long_texts_are_read_a_few_at_a_time(tmp_path: Path) -> None:
    """Parquet keeps each text once: the file is small, and says so."""
    texts = ["a" * 100_000, "b" * 100_000]
    pq.write_table(pa.table({"x": [texts[n % 2] for n in range(1_000)]}), tmp_path / "t.parquet")
    assert (tmp_path / "t.parquet").stat().st_size < 100_000
    table = open_table(tmp_path / "t.parquet")
    sizes = [batch.record.nbytes for batch in table.batches()]
    assert max(sizes) <= 2 * BATCH_BYTES
