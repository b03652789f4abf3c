"""Every table that cannot be used is refused in words: the file, the place in it, the remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from runtime.errors import BadInput
from tables.reading import open_table

MANY = "".join(f'{{"a": {number}}}\n' for number in range(200_000))

REFUSED: dict[str, tuple[str, bytes | str, str]] = {
    "empty": ("t.csv", "", "t.csv: is empty"),
    "blank_csv": ("t.csv", "\n\n", "is empty; the first row must name the columns"),
    "only_a_header": ("t.csv", "a,b\n", "t.csv: has no rows"),
    "blank_jsonl": ("t.jsonl", "\n \n", "t.jsonl: has no rows"),
    "empty_objects": ("t.jsonl", "{}\n{}\n", "t.jsonl: has no columns"),
    "twice_in_csv": ("t.csv", "a,b,a\n1,2,3\n", "t.csv: has two columns named 'a'; rename one"),
    "ragged": ("t.csv", 'a,b\n"1\n1",2\n\n3,4\n5,6,7\n', "row 3 has 3 cells, the header 2: '5,6,7'; put a cell"),
    "short_row": ("t.tsv", "a\tb\n1\t2\n3\n", "row 2 has 1 cells, the header 2: '3'"),
    "latin_1_cell": (
        "t.csv",
        b"a,b\n1,2\n1,caf\xe9\n",
        "line 3 is not UTF-8 (byte 0xe9); save the file as UTF-8 (`iconv",
    ),
    "latin_1_header": ("t.csv", b"a,caf\xe9\n1,2\n", "line 1 is not UTF-8 (byte 0xe9)"),
    "utf_16": ("t.tsv", "a\tb\n1\t2\n".encode("utf-16"), "line 1 is not UTF-8 (byte 0xff)"),
    "open_quote": (
        "t.csv",
        'a,b\n1,"x\n2,y\n',
        "a quote is not closed before the end of the file, in the cell that begins",
    ),
    "no_json": ("t.jsonl", '{"a": 1}\n\n{"a": 1,}\n', "line 3 is no JSON ("),
    "far_away": ("t.jsonl", MANY + "oops\n", "line 200001 is no JSON ("),
    "an_array": (
        "t.jsonl",
        '[{"a": 1}]\n',
        "line 1 is no JSON object; a file that is one JSON array becomes lines with `jq",
    ),
    "spread_out": ("t.jsonl", '{\n"a": 1\n}\n', "line 1 is no JSON ("),
    "two_a_line": ("t.jsonl", '{"a": 1} {"a": 2}\n', "line 1 is no JSON (Extra data"),
    "two_types": (
        "t.jsonl",
        '{"a": 1}\n{"a": "x"}\n',
        "line 2: the field a is text here and a number in a line before",
    ),
    "two_types_far": ("t.jsonl", MANY + '{"a": [1]}', "line 200001: the field a is a list here and a number in a line"),
    "two_types_within": (
        "t.jsonl",
        '{"a": {"b": 1}}\n{"a": {"b": "x"}}',
        "line 2: the field a.b is text here and a number in",
    ),
    "mixed_list": ("t.jsonl", '{"a": [1, "x"]}\n', "line 1: the list in field a holds a number and a string"),
    "field_twice": ("t.jsonl", '{"a": 1, "a": 2}\n', "line 1: the field a stands twice in it"),
    "half_a_pair": ("t.jsonl", '{"a": "\\ud800"}\n', "line 1: The surrogate pair in string is invalid."),
    "latin_1_line": ("t.jsonl", b'{"a": 1}\n{"b": "\xe9"}\n', "line 2 is not UTF-8 (byte 0xe9); write it as UTF-8"),
    "long_integer": (
        "t.jsonl",
        '{"a": 12345678901234567890}\n',
        "line 1: the integer 12345678901234567890 does not fit",
    ),
    "endless_integer": ("t.jsonl", '{"a": ' + "9" * 4_000 + "}\n", "99… of 4,000 digits does not fit in 64 bits"),
    "long_within": (
        "t.jsonl",
        '{"a": [{"b": 0.5}, {"b": -12345678901234567890}]}\n',
        "line 1: the integer -1234567890123",
    ),
    "no_parquet": ("t.parquet", "hello", "t.parquet: cannot be read as Parquet ("),
    "no_arrow": ("t.arrow", "hello", "t.arrow: cannot be read as Arrow ("),
    "cut_arrow": ("t.arrow", b"ARROW1\x00\x00cut", "t.arrow: cannot be read as Arrow ("),
    "json": (
        "t.json",
        "[]",
        "t.json: .json is no known kind of table (.parquet, .pq, .csv, .tsv, .jsonl, .ndjson, .arrow",
    ),
    "excel": ("t.xlsx", "x", "save the sheet as CSV"),
    "packed": ("t.csv.gz", "x", "unpack it first (`gunzip -k t.csv.gz`)"),
    "no_suffix": ("table", "x", "a name without a suffix is no known kind of table"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_is_no_table_is_refused_with_its_place_and_the_remedy(tmp_path: Path, case: str) -> None:
    name, content, words = REFUSED[case]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput) as refused:
        open_table(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert words in str(refused.value)


def test_integers_at_the_end_of_64_bits_are_read(tmp_path: Path) -> None:
    largest = (1 << 63) - 1
    (tmp_path / "t.jsonl").write_text(f'{{"a": {largest}, "b": ": 12345678901234567890"}}\n{{"a": {-largest}}}')
    (tmp_path / "float.jsonl").write_text('{"a": 1e300, "b": NaN}\n')
    assert open_table(tmp_path / "float.jsonl").rows == 1
    values = [value for batch in open_table(tmp_path / "t.jsonl").batches() for value in batch.column("a")]
    assert values == [largest, -largest]


def test_what_the_suffixes_do_not_tell_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"gone\.csv: no such file or folder"):
        open_table(tmp_path / "gone.csv")
    with pytest.raises(BadInput, match="no table in this folder"):
        open_table(tmp_path)
    twice = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(BadInput, match="has two columns named 'a'"):
        open_table(tmp_path / "twice.parquet")
    pq.write_table(pa.table({"a": pa.array([], pa.int64())}), tmp_path / "none.parquet")
    with pytest.raises(BadInput, match="has no rows"):
        open_table(tmp_path / "none.parquet")
    with pa.ipc.new_file(str(tmp_path / "no_columns.arrow"), pa.schema([])):
        pass
    with pytest.raises(BadInput, match="has no rows"):
        open_table(tmp_path / "no_columns.arrow")


def test_a_damaged_page_is_told_when_it_is_reached(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"a": [f"text {number}" for number in range(50_000)]}), path)
    damaged = bytearray(path.read_bytes())
    damaged[1000:200_000] = bytes(199_000)
    path.write_bytes(damaged)
    with pytest.raises(BadInput, match=r"t\.parquet: cannot be read as Parquet .*it is damaged or not whole"):
        list(open_table(path).batches())


def test_a_folder_of_what_is_no_one_table_is_refused(tmp_path: Path) -> None:
    def folder(name: str, **files: str) -> Path:
        for file, content in files.items():
            path = tmp_path / name / file.replace("__", "/").replace("_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return tmp_path / name

    with pytest.raises(BadInput, match=r"several kinds: CSV \(a\.csv\), JSONL \(b\.jsonl\)"):
        open_table(folder("kinds", a_csv="a\n1\n", b_jsonl='{"a": 1}'))
    with pytest.raises(BadInput, match=r"b\.jsonl: column a is string here and int64 in the files before"):
        open_table(folder("types", a_jsonl='{"a": 1}', b_jsonl='{"a": "x"}'))
    with pytest.raises(BadInput, match=r"b\.log: \.log is no known kind of table"):
        open_table(folder("stray", a_csv="a\n1\n", b_log="x"))
    with pytest.raises(BadInput, match=r"year=2026: a column that is the name of a folder is not read"):
        open_table(folder("years", **{"year=2026__a_csv": "a\n1\n"}))
    (folder("delta", a_csv="a\n1\n") / "_delta_log").mkdir()
    with pytest.raises(BadInput, match="a Delta table"):
        open_table(tmp_path / "delta")
    big = folder("inexact", a_jsonl=json.dumps({"a": (1 << 60) + 1}), b_jsonl='{"a": 0.5}')
    pq.write_table(pa.table({"a": [(1 << 60) + 1]}), big / "a.parquet")
    pq.write_table(pa.table({"a": [0.5]}), big / "b.parquet")
    for name in ("a.jsonl", "b.jsonl"):
        (big / name).unlink()
    with pytest.raises(BadInput, match=r"a\.parquet: column a does not become double, as other files have it"):
        list(open_table(big).batches())
