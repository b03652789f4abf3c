"""A table's rows as lines: what stands in a prompt, what is refused before anything runs, which rows a sample has."""

from __future__ import annotations

import datetime as dt
import io
import json
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.lines import SubmitOptions
from models.states import CacheMode
from pipeline.answer_forms import AnswerForm, labels_form, regex_form, schema_form
from pipeline.submit import dry_run
from pipeline.table_lines import Prompt, Written, row_of, write_rows
from runtime.errors import BadInput
from runtime.settings import Settings
from tables.reading import Table, open_table


def table_of(folder: Path, **columns: Any) -> Table:
    pq.write_table(pa.table(columns), folder / "in.parquet")
    return open_table(folder / "in.parquet")


def lines_of(table: Table, prompt: Prompt, **options: Any) -> tuple[list[dict[str, Any]], Written]:
    file = io.BytesIO()
    written = write_rows(table, prompt, file, model="m", **options)
    return [json.loads(line) for line in file.getvalue().splitlines()], written


def test_a_row_becomes_a_line_with_its_values_in_the_slots(tmp_path: Path) -> None:
    table = table_of(tmp_path, text=["good", "bad"], stars=[5, 1])
    [first, second], written = lines_of(table, Prompt("{text} has {stars} of {5}, {text}?", system="{text} stays"))
    assert first == {
        "custom_id": "row-1",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": "m",
            "messages": [
                {"role": "system", "content": "{text} stays"},
                {"role": "user", "content": "good has 5 of {5}, good?"},
            ],
            "temperature": 0,
        },
    }
    assert second["body"]["messages"][1]["content"] == "bad has 1 of {5}, bad?"
    assert (written.rows, written.lines, row_of(second["custom_id"])) == (2, 2, 2)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("{text}", "{text}"),
        (True, "true"),
        (2.5, "2.5"),
        (Decimal("1.10"), "1.10"),
        (dt.date(2026, 11, 29), "2026-11-29"),
        (dt.datetime(2026, 11, 29, 1, 2, tzinfo=dt.UTC), "2026-11-29T01:02:00+00:00"),
        ([1, None], "[1,null]"),
        ({"a": dt.date(2026, 1, 1)}, '{"a":"2026-01-01"}'),
    ],
    ids=str,
)
def test_a_value_stands_in_a_prompt_as_people_write_it(tmp_path: Path, value: Any, text: str) -> None:
    [line], _ = lines_of(table_of(tmp_path, x=[value]), Prompt("{x}"))
    assert line["body"]["messages"][0]["content"] == text


@pytest.mark.parametrize(
    ("form", "told", "schema"),
    [
        (
            labels_form(["a", "b c"]),
            'Answer with JSON, {"label": L}, where L is one of: a, b c.',
            {"label": {"type": "string", "enum": ["a", "b c"]}},
        ),
        (
            regex_form(r"\d+"),
            r'Answer with JSON, {"answer": A}, where A is a text that matches this regular expression: \d+',
            {"answer": {"type": "string", "pattern": r"^(?:\d+)$"}},
        ),
        (
            schema_form({"type": "object", "properties": {"ü": {}}}),
            'Answer with JSON of this schema: {"type":"object","properties":{"ü":{}}}',
            {"ü": {}},
        ),
    ],
    ids=["labels", "regex", "schema"],
)
def test_a_form_is_told_in_the_system_message_and_held_in_the_response_format(
    tmp_path: Path, form: AnswerForm, told: str, schema: dict[str, Any]
) -> None:
    [line], _ = lines_of(table_of(tmp_path, x=["1"]), Prompt("{x}", system="Be brief.", form=form))
    assert line["body"]["messages"][0]["content"] == f"Be brief.\n\n{told}"
    stated = line["body"]["response_format"]["json_schema"]
    assert (stated["strict"], stated["schema"]["properties"]) == (True, schema)


@given(values=st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=5))
def test_the_prompt_is_the_template_of_the_semantic_cache(
    values: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("table")
    prompt = Prompt("Of {a}: {b}, {a}")
    table = table_of(folder, a=[a for a, _ in values], b=[b for _, b in values])
    with (folder / "in.jsonl").open("wb") as file:
        write_rows(table, prompt, file, model="m", states_variables=True)
    options = SubmitOptions(max_output_tokens=64, cache=CacheMode.SEMANTIC, settings={"template": prompt.template})
    found = dry_run(folder / "in.jsonl", options=options, settings=Settings.model_construct(), served_models=None)
    assert found.lines == len(values)


def test_what_has_no_text_is_refused_and_nan_is_a_null(tmp_path: Path) -> None:
    table = table_of(tmp_path, x=[1.5, float("nan")], y=[b"a", b"b"])
    [only], _ = lines_of(table, Prompt("{x}"), skips_nulls=True)
    assert only["custom_id"] == "row-1"
    with pytest.raises(BadInput, match=r"^y of row 1 is of the type bytes, which has no text; make it a string"):
        lines_of(table, Prompt("{y}"))


def test_nulls_are_counted_and_named_or_skipped(tmp_path: Path) -> None:
    table = table_of(tmp_path, a=["x", None, "y", None], b=[1, 2, None, None], c=[None] * 4)
    with pytest.raises(
        BadInput, match=r"^null: a in 2 rows, b in 2 rows \(the first: row 2, 3, 4\); fill them, or lea"
    ):
        lines_of(table, Prompt("{a} {b}"))
    [only], written = lines_of(table, Prompt("{a} {b}"), skips_nulls=True)
    assert only["custom_id"] == "row-1" and (written.rows, written.lines) == (4, 1)
    with pytest.raises(BadInput, match="no row to run"):
        lines_of(table, Prompt("{c}"), skips_nulls=True)


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        ("no slot", "--prompt: has no slot; write {column} where a row's value stands: the table has text, id"),
        ("{text} {Text} {no}", "--prompt: no column Text, no; the table has text, id"),
        ("{text} \udcff", "--prompt: is no valid UTF-8; write it as text"),
    ],
)
def test_a_prompt_that_the_table_does_not_fit_is_refused(template: str, fault: str) -> None:
    with pytest.raises(BadInput) as caught:
        Prompt(template).check(["text", "id"])
    assert str(caught.value) == fault


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda: labels_form(["a"]), "--labels: has 1; give 2 to 500"),
        (lambda: labels_form(["a", "b", "a"]), "--labels: 'a' is there twice"),
        (lambda: regex_form("(?=a)"), "--regex: the pattern '(?=a)' is refused (invalid perl operator: (?=)"),
        (lambda: schema_form([1]), '--schema: must be of "type": "object"'),
        (lambda: schema_form({"type": "object", "required": 1}), "--schema: 1 is not of type 'array'; write a JSON"),
    ],
    ids=["one label", "twice", "regex", "no object", "schema"],
)
def test_a_form_that_nothing_can_be_held_to_is_refused(make: Any, fault: str) -> None:
    with pytest.raises(BadInput) as caught:
        make()
    assert str(caught.value).startswith(fault)


def test_a_sample_has_each_row_as_likely_as_any_other(tmp_path: Path) -> None:
    table, drawn = table_of(tmp_path, x=[str(n) for n in range(12)]), Counter[int]()
    for _ in range(600):
        _, written = lines_of(table, Prompt("{x}"), sample=3)
        rows = [row_of(json.loads(line)["custom_id"]) for line in written.sample]
        assert len(set(rows)) == 3
        drawn.update(rows)
    # Each is drawn 150 times on average with a deviation of 10.6: 6 of them happen once in 10^8 runs of this test.
    assert set(drawn) == set(range(1, 13)) and all(abs(count - 150) < 64 for count in drawn.values())
