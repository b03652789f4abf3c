"""stoker_client without a gateway: what it refuses, how values become text, what its wheel has and needs."""

from __future__ import annotations

import datetime as dt
import io
import json
import re
import subprocess
import sys
import warnings
import zipfile
from decimal import Decimal
from pathlib import Path
from typing import Any, Final, cast

import numpy
import pandas
import polars
import pyarrow
import pyarrow.parquet as parquet
import pytest
import stoker_client
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict
from stoker_client import BadInput
from stoker_client.answers import answer_of
from stoker_client.asking import Asked, checked_form, line_form, stated_place, template_for
from stoker_client.forms import Form, form_of
from stoker_client.gateway import Gateway
from stoker_client.lines import check_rows, write_lines
from stoker_client.progress import Progress
from stoker_client.prompts import SLOT, Template, is_null, text_of
from stoker_client.stopping import Stop
from stoker_client.tables import Column, Frame, Kind, table_of

from cache.payload import SLOT as SERVERS_SLOT
from cache.payload import declared
from pipeline.answer_forms import labels_form, regex_form, schema_form
from pipeline.table_lines import Prompt, write_rows
from tables.reading import open_table
from tests.support.processes import REPOSITORY

CLIENT: Final = REPOSITORY / "client"
FRAME: Final = pandas.DataFrame({"text": ["a"], "n": [1], "answer": ["b"]})


def object_of(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


PARTS: Final = st.sampled_from(["{a}", "{b_1}", "{ä}", "{1}", "{", "}", "{{", "{ a}", "{a.b}", "\\1", "\n", "text"])


@given(st.lists(PARTS, min_size=1).map("".join), st.text(), st.text(), st.text())
def test_a_template_gives_the_text_that_the_server_makes_of_it(template: str, a: str, b: str, c: str) -> None:
    assert SLOT.pattern == SERVERS_SLOT.pattern
    made = Template(template)
    values = {slot: {"a": a, "b_1": b}.get(slot, c) for slot in made.slots}
    filled = made.fill(list(values.values()))
    if made.slots:
        declared(filled, template=template, variables=values)  # raises where the server would make another text
    else:
        assert filled == template


def test_values_become_text_as_the_command_line_has_it() -> None:
    values: dict[str, Any] = {
        "as it is": "as it is",
        "true": True,
        "false": numpy.bool_(False),
        "7": numpy.int64(7),
        "1.5": numpy.float64(1.5),
        "0.10": Decimal("0.10"),
        "2026-01-02": dt.date(2026, 1, 2),
        "2026-01-02T03:04:05+00:00": dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC),
        "2026-01-02T00:00:00": pandas.Timestamp("2026-01-02"),
        '["ä",1,null,"2026-01-02"]': ["ä", 1, None, dt.date(2026, 1, 2)],
        '{"a":["0.1"]}': {"a": (Decimal("0.1"),)},
        "[1,2]": numpy.array([1, 2]),
    }
    assert {text: text_of(value) for text, value in values.items()} == {text: text for text in values}
    nulls = [None, float("nan"), pandas.NA, pandas.NaT, numpy.float64("nan"), Decimal("nan")]
    assert all(map(is_null, nulls)) and not any(map(is_null, ["", 0, False, [], "nan"]))


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "rows: there are none"),
        ("text", {}, r"rows: cannot be a builtins\.str; pass a pandas or polars DataFrame"),
        (FRAME["text"], {"prompt": "{text}"}, r"rows: cannot be a pandas\..*Series.*frame\[\['name'\]\]"),
        (["a", 1], {}, "rows: row 2 is a int; a list has either strings or dicts"),
        (FRAME, {}, r"prompt: is missing; write one with a column in it, such as \{text\}"),
        (FRAME, {"prompt": "Classify"}, r"prompt: has no slot.*\(text, n, answer\)"),
        (FRAME, {"prompt": "{tekst} {n}"}, "there is no column tekst; there are: text, n, answer"),
        (FRAME, {"prompt": "{text}"}, "there is a column answer already; pass result_prefix='llm_'"),
        (pandas.DataFrame([[1, 2]], columns=["a", "a"]), {"prompt": "{a}"}, "several columns called a; rename"),
        (["a"], {"prompt": "{a} {b}"}, "has the slots a, b, and each row is one text"),
        ([{"a": b"x"}], {"prompt": "{a}"}, "a of row 1 is a bytes, which has no text"),
        (["\ud83d"], {}, "text of row 1 has half of a surrogate pair"),
        ([None, None], {"skip_nulls": True}, r"none is left to run: text is null in 2 rows \(1, 2\)"),
        (["a"], {"labels": ["a", "b"], "regex": "a"}, "labels and regex: an answer can be held to one of them"),
        (["a"], {"labels": ["a", "b", "a"]}, "labels: 'a' is there twice"),
        (["a"], {"labels": "abc"}, "labels: must be a list of strings"),
        (["a"], {"labels": ["a"]}, "labels: has 1; give 2 to 500"),
        (["a"], {"labels": [str(number) for number in range(501)]}, "labels: has 501; give 2 to 500"),
        (["a"], {"regex": ""}, "regex: is ''; it must be a text that is not empty"),
        (["a"], {"regex": re.compile("a")}, r"regex: is re.compile\('a'\); it must be a text"),
        (["a"], {"schema": {"type": "array"}}, "schema: must be a JSON schema of an object"),
        (
            ["a"],
            {"schema": {"properties": {"a": {}}}},
            'schema: must be a .* of "type": "object", with the fields as its',
        ),
        (["a"], {"schema": {"type": "object", "properties": {"a": {1, 2}}}}, "schema: is no JSON"),
        (FRAME[["n"]], {"prompt": "{n}", "schema": object_of({"source": {}})}, "property source"),
        (["a"], {"cache": "on"}, "cache: is 'on'; it must be one of None, off, exact, semantic"),
        (["a"], {"errors": "ignore"}, "errors: is 'ignore'; it must be one of column, raise"),
        (["a"], {"window": "1 day"}, "window: is '1 day'; write 90m, 24h or 7d"),
        (["a"], {"budget_tokens": 0}, "budget_tokens: is 0; it must be a whole number of at least 1"),
        (["a"], {"base_url": None, "api_key": "sk-secret"}, "base_url: is missing beside api_key"),
        (["a"], {"base_url": "localhost:8080"}, "base_url: must be the gateway's address"),
        (["a"], {"api_key": None}, "api_key: is missing; pass it, or set STOKER_API_KEY"),
        (["a"], {"api_key": "sk-é"}, "api_key: is not a key; pass it, or set STOKER_API_KEY"),
    ],
)
def test_what_cannot_be_run_is_refused_with_the_remedy(
    rows: Any, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("STOKER_URL", raising=False)
    monkeypatch.delenv("STOKER_API_KEY", raising=False)
    with pytest.raises(BadInput, match=message) as raised:
        stoker_client.run(rows, **{"base_url": "http://127.0.0.1:9", "api_key": "sk-right"} | options)
    assert "sk-" not in str(raised.value)


@pytest.mark.parametrize("form", ["labels", "schema", "regex", None])
def test_a_row_is_the_same_request_as_the_command_line_makes_of_it(form: str | None, tmp_path: Path) -> None:
    columns: dict[str, list[Any]] = {
        "text": ['é "quoted"\n{n}', None, "\u2028", "\0"],
        "n": [1, 2, -3, 4],
        "x": [0.1, 1e300, 2.0, 1.5],
        "yes": [True, False, True, False],
        "day": [dt.date(2026, 1, 2)] * 4,
        "at": [dt.datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=dt.UTC)] * 4,
        "cost": [Decimal("1.10")] * 4,
        "deep": [{"ä": [1, None], "day": dt.date(2026, 1, 2), "cost": Decimal("0.1")}] * 4,
    }
    table = pyarrow.table(columns)
    parquet.write_table(table, tmp_path / "rows.parquet")
    prompt = "{text} {n} {x} {yes} {day} {at} {cost} {deep} {text} {not a slot}"
    schema = {"type": "object", "properties": {"ä": {"type": "string"}}}
    stated = {"labels": ["b", "c"], "schema": schema, "regex": "a+"}
    forms = {"labels": labels_form(["b", "c"]), "schema": schema_form(schema), "regex": regex_form("a+")}
    theirs = io.BytesIO()
    said = Prompt(prompt, "Be kind.", forms.get(form or ""))
    write_rows(open_table(tmp_path / "rows.parquet"), said, theirs, model="m", states_variables=True, skips_nulls=True)
    options = {} if form is None else {form: stated[form]}
    asked = Asked(table, prompt=prompt, system="Be kind.", cache="semantic", **options)  # type: ignore[arg-type]
    made = table_of(table)
    template = template_for(asked, made)
    shared = line_form(asked, model="m", form=checked_form(asked, made), template=template)
    skipped = check_rows(made, template, skip_nulls=True)
    lines = write_lines(made, shared, skipped=skipped, stop=Stop())
    with lines.file as file:
        file.seek(0)
        assert [json.loads(line) for line in file] == [json.loads(line) for line in theirs.getvalue().splitlines()]
    assert (lines.count, lines.skipped) == (3, ((2, "text"),))
    assert [lines.line_of(row) for row in (1, 3, 4)] == [1, 2, 3] and [lines.row_of(line) for line in (1, 2)] == [1, 3]


def test_columns_of_a_schema_have_its_types() -> None:
    class Part(BaseModel):
        size: float

    class Whole(BaseModel):
        name: str | None
        count: int = 0
        size: float | int | None = None
        is_new: bool
        part: Part
        parts: list[Part]

    form = form_of(labels=None, schema=Whole, regex=None)
    kinds = {"name": "TEXT", "count": "INTEGER", "size": "NUMBER", "is_new": "BOOLEAN", "part": "TEXT", "parts": "TEXT"}
    assert {name: kind.name for name, kind in form.fields} == kinds
    said = '{"name":"é","count":%d,"size":2,"is_new":true,"part":{"size":1},"parts":[]}'
    assert form.parts(said % 7) == ["é", 7, 2.0, True, '{"size":1}', "[]"]
    assert form.parts(said % 2**63)[1] is None, "it does not fit; the whole answer has it"
    odd = {"a": {"$ref": "#/$defs/x"}, "b": {"enum": [1, 2]}, "c": {}, "d": {"const": "x"}, "e": True}
    schema = object_of(odd) | {"$defs": {"x": {"type": "integer"}}}
    fields = form_of(labels=None, regex=None, schema=schema).fields
    assert [kind.name for _, kind in fields] == ["INTEGER", "INTEGER", "TEXT", "TEXT", "TEXT"]


BLOCKED: Final = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[2].split(","):
            raise ImportError(name + " is not there")
sys.meta_path.insert(0, Blocked())
sys.path.insert(0, sys.argv[1])
import stoker_client
assert stoker_client.__file__.startswith(sys.argv[1]), stoker_client.__file__
try:
    stoker_client.run([{"a": 1}], prompt="{b}")
except stoker_client.BadInput as error:
    print(error)
"""


def test_the_wheel_has_just_the_package_and_runs_without_any_library_of_tables(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "-w", tmp_path, CLIENT], check=True, timeout=60)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "unpacked")
        metadata = archive.read("stoker_client-0.1.0.dist-info/METADATA").decode()
    assert {name.split("/")[0] for name in names} == {"stoker_client", "stoker_client-0.1.0.dist-info"}
    assert "stoker_client/py.typed" in names and any(name.endswith("licenses/LICENSE") for name in names)
    assert sorted(re.findall(r"^Requires-Dist: (\w+)", metadata, re.MULTILINE)) == ["httpx", "tqdm"]
    absent = "pandas,polars,pyarrow,numpy,pydantic,msgspec,models,runtime,api,cache,pipeline,tasks,scripts,store"
    command = [sys.executable, "-W", "error", "-c", BLOCKED, str(tmp_path / "unpacked"), absent]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0 and "there is no column b; there are: a" in done.stdout, done.stderr


def test_a_strict_model_reads_what_json_can_say() -> None:
    class Strict(BaseModel):
        model_config = ConfigDict(strict=True)

        day: dt.date
        cost: Decimal

    form = form_of(labels=None, schema=Strict, regex=None)
    said = '{"day":"2026-01-02","cost":"1.10"}'
    assert form.read(said) == (said, Strict(day=dt.date(2026, 1, 2), cost=Decimal("1.10")))
    with pytest.raises(ValueError, match="day"):
        form.read('{"day":"never","cost":"1.10"}')


@pytest.mark.parametrize(
    ("stoker", "usage", "expected"),
    [
        ({"outcome": "succeeded", "source": "engine"}, {"prompt_tokens": 5, "completion_tokens": 2}, (5, 2)),
        ({"outcome": "succeeded", "source": "engine"}, {"prompt_tokens": None, "completion_tokens": "many"}, (0, 0)),
        ({"outcome": "succeeded", "source": "engine"}, None, (0, 0)),
        ({"outcome": "succeeded", "source": "exact"}, {"prompt_tokens": 5, "completion_tokens": 2}, (0, 0)),
        (
            {"outcome": "succeeded", "source": "engine", "usage": {"prompt_tokens": 9, "completion_tokens": 4}},
            {"prompt_tokens": 5, "completion_tokens": 2},
            (9, 4),
        ),
        (
            {"outcome": "failed", "source": "engine", "usage": {"prompt_tokens": 9, "completion_tokens": 4}},
            "no response",
            (9, 4),
        ),
        ({"outcome": "failed", "source": "engine"}, "no response", (0, 0)),
        ({"outcome": "failed", "source": "none"}, "no response", (0, 0)),
        ({"outcome": "failed", "source": "engine"}, None, (0, 0)),
    ],
)
def test_tokens_are_what_the_row_took(stoker: dict[str, Any], usage: Any, expected: tuple[int, int]) -> None:
    body = {"choices": [{"message": {"content": "said"}}], "usage": usage}
    response = None if usage == "no response" else {"status_code": 200, "body": body}
    error = {"code": "invalid_answer", "message": "is no JSON"}
    found = answer_of({"custom_id": "row-1", "response": response, "error": error, "stoker": stoker}, Form())
    assert (found.prompt_tokens, found.completion_tokens) == expected


def test_rows_are_those_of_the_call_whatever_becomes_of_the_callers_frame() -> None:
    columns: dict[str, list[Any]] = {"text": ["b", "a", "c"], "n": [2, 1, 3]}
    frame, other, texts = pandas.DataFrame(columns), polars.DataFrame(columns), ["b", "a", "c"]
    asked = [Asked(rows) for rows in (frame, other, texts)]
    with warnings.catch_warnings(action="ignore"):  # pandas 3.1 discourages what callers do
        frame.sort_values("text", inplace=True)
        frame.drop(index=2, inplace=True)
    frame.loc[0, "text"] = "changed"
    frame["n"] = 0
    del frame["n"]
    frame.columns = pandas.Index(["renamed"])
    other.extend(polars.DataFrame(columns))
    other[0, "text"] = "changed"
    other.replace_column(1, polars.Series("n", [0] * 6))
    texts.sort()
    texts.append("d")
    assert (len(frame), list(frame.columns), other.height, texts) == (2, ["renamed"], 6, ["a", "b", "c", "d"])
    kept = [table_of(one.rows) for one in asked]
    assert [list(table.values(["text"])) for table in kept] == [[("b",), ("a",), ("c",)]] * 3
    assert [list(table.values(["n"])) for table in kept[:2]] == [[(2,), (1,), (3,)]] * 2
    answers = [Column("answer", Kind.TEXT, ["B", "A", "C"])]
    mine, theirs = (cast("Frame", table).appended(answers) for table in kept[:2])
    pandas.testing.assert_frame_equal(mine[list(columns)], pandas.DataFrame(columns))
    assert theirs.to_dict(as_series=False) == {**columns, "answer": ["B", "A", "C"]}


def test_no_representation_shows_the_key() -> None:
    asked = Asked(["a"], base_url="http://127.0.0.1:9", api_key="sk-secret")
    place = stated_place(asked)
    assert place is not None and place.api_key == "sk-secret"
    gateway = Gateway(lambda: place, stop=Stop(), progress=Progress(shown=False))
    with gateway:
        assert "sk-secret" not in repr((asked, place, gateway))


def test_an_arrow_table_is_read_in_pieces_with_its_dictionaries_decoded() -> None:
    text = pyarrow.chunked_array([["a"], ["b", "a"]]).dictionary_encode()
    table = pyarrow.table({"text": text, "n": [1, 2, 3]})
    assert list(table_of(table).values(["n", "text"])) == [(1, "a"), (2, "b"), (3, "a")]


def test_the_readme_shows_the_script_that_the_tests_run() -> None:
    script = (REPOSITORY / "examples" / "table.py").read_text().partition("import annotations\n\n")[2]
    assert f"```python\n{script}```" in (REPOSITORY / "README.md").read_text()
