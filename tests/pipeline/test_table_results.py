"""A batch's results as columns: each row its own, a retry over what failed, the table's own types kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.jobs import JobResult, Usage, failed
from models.lines import SubmitOptions
from models.states import Outcome, Source
from pipeline.again import retry_batch
from pipeline.answer_forms import AnswerForm, labels_form, schema_form
from pipeline.submit import submit_file
from pipeline.table_lines import Prompt, write_rows
from pipeline.table_results import TableAsked, asked_of, open_asked, write_table
from runtime.errors import BadInput
from runtime.settings import LimitSettings, Settings, ShardSettings
from store.batches import batch_progress
from store.database import Database
from store.shards import claim, write_and_tell
from tables.reading import open_table
from tests.support.batches import dispatch_all, execute, rows
from tests.support.conversing import answer

SCHEMA = {
    "type": "object",
    "properties": {
        "stars": {"type": "integer"},
        "score": {"type": ["number", "null"]},
        "good": {"type": "boolean"},
        "why": {"enum": ["a", "b"]},
        "tags": {"type": "array"},
        "due": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
    },
}
SETTINGS = Settings.model_construct(shard=ShardSettings(max_jobs=2), limits=LimitSettings(window_s=86_400.0))


def submitted(database: Database, folder: Path, table: pa.Table, prompt: Prompt, prefix: str = "") -> UUID:
    """A batch of this table, as the command makes it."""
    pq.write_table(table, folder / "in.parquet")
    read = open_table(folder / "in.parquet")
    with (folder / "in.jsonl").open("wb") as file:
        write_rows(read, prompt, file, model="m", skips_nulls=True)
    asked = TableAsked(str(read.path), read.digest(), prompt.template, prefix, prompt.form)
    return submit_file(
        database,
        folder / "in.jsonl",
        options=SubmitOptions(max_output_tokens=64),
        settings=SETTINGS,
        served_models=None,
        reuse=False,
        about=asked.stored(),
    ).batch_id


def end(database: Database, by_row: dict[str, JobResult]) -> None:
    """Write these results, by custom_id, for whichever batch has such jobs open."""
    for shard in dispatch_all(database):
        with database.transaction() as session:
            held = claim(session, shard, holder="test", lease_s=30.0)
        assert held is not None
        names = dict(rows(database, "SELECT seq, custom_id FROM jobs WHERE batch_id = :id", id=held.batch_id))
        results = [replace(by_row[names[seq]], seq=seq) for seq in held.seqs if names[seq] in by_row]
        with database.transaction() as session:
            write_and_tell(session, held, results, engine_id=None, lease_s=30.0)


def said(text: str, outcome: Outcome = Outcome.SUCCEEDED, source: Source = Source.ENGINE) -> JobResult:
    response = json.dumps(answer(text))
    return JobResult(0, outcome, source, status_code=200, response=response, usage=Usage(7, 3))


def written(database: Database, batch_id: UUID, output: Path, moved: Path | None = None) -> pa.Table:
    with database.transaction() as session:
        progress = batch_progress(session, batch_id, tenant="local")
    asked = asked_of(progress)
    write_table(database, progress, open_asked(asked, moved), output, asked=asked, tenant="local")
    return pq.read_table(output)


def prompted(form: AnswerForm | None = None) -> Prompt:
    return Prompt("{text}", form=form)


def test_rows_keep_their_order_and_types_and_get_their_own_answers(database: Database, tmp_path: Path) -> None:
    stamp = pa.array([1, 2, 3, 4, 5], pa.timestamp("us", tz="Europe/Berlin"))
    table = pa.table({"text": ["a", "b", None, "d", "e"], "at": stamp})
    batch_id = submitted(database, tmp_path, table, prompted(), prefix="llm_")
    cut, refused = said("half", Outcome.TRUNCATED), failed(0, code="bad", message="no")
    end(database, {"row-1": said("A"), "row-2": cut, "row-4": refused})
    out = written(database, batch_id, tmp_path / "out.parquet")
    assert out.column_names == [
        "text",
        "at",
        "llm_answer",
        "llm_error",
        "llm_prompt_tokens",
        "llm_completion_tokens",
        "llm_source",
    ]
    assert out.column("at").type == stamp.type and out.column("text").to_pylist() == ["a", "b", None, "d", "e"]
    assert out.column("llm_answer").to_pylist() == ["A", "half", None, None, None]
    assert out.column("llm_error").to_pylist() == [
        None,
        "truncated: the answer was cut by its limit of tokens",
        "null: the column text has no value in this row",
        "bad: no",
        "unfinished: there is no result yet",
    ]
    assert out.column("llm_prompt_tokens").to_pylist() == [7, 7, None, 0, None]
    assert out.column("llm_source").to_pylist() == ["engine", "engine", None, "none", None]


def test_fields_of_a_schema_are_columns_of_their_types(database: Database, tmp_path: Path) -> None:
    batch_id = submitted(database, tmp_path, pa.table({"text": ["a", "b"]}), prompted(schema_form(SCHEMA)))
    whole = '{"stars": 5, "score": 0.5, "good": true, "why": "a", "tags": ["x", 1]}'
    end(database, {"row-1": said(whole), "row-2": said('{"stars": 1e30, "score": null, "due": 3}')})
    out = written(database, batch_id, tmp_path / "out.parquet")
    fields = {name: out.column(name) for name in SCHEMA["properties"]}
    assert [str(column.type) for column in fields.values()] == ["int64", "double", "bool", "string", "string", "int64"]
    assert [column.to_pylist() for column in fields.values()] == [
        [5, None],
        [0.5, None],
        [True, None],
        ["a", None],
        ['["x",1]', None],
        [None, 3],
    ]
    assert out.column("answer").to_pylist()[0] == whole


def test_a_retry_is_laid_over_what_failed_before(database: Database, tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b", "c", "d"]})
    batch_id = submitted(database, tmp_path, table, prompted(labels_form(["yes", "no"])))
    yes, no, refused = said('{"label": "yes"}'), said('{"label": "no"}'), failed(0, code="bad", message="x")
    end(database, {"row-1": yes, "row-2": refused, "row-3": yes, "row-4": refused})
    execute(database, "UPDATE batches SET state = 'completed', ending = 'completed'")
    again = retry_batch(database, batch_id, settings=SETTINGS, reuse=False).batch_id
    end(database, {"row-2": no, "row-4": refused})
    newest = written(database, again, tmp_path / "out.parquet")
    assert newest.column("answer").to_pylist() == ["yes", "no", "yes", None]
    assert newest.column("error").to_pylist() == [None, None, None, "bad: x"]
    assert written(database, batch_id, tmp_path / "first.parquet").column("answer").to_pylist() == [
        "yes",
        None,
        "yes",
        None,
    ]


def test_a_table_that_has_changed_is_not_merged_with_answers_to_another(database: Database, tmp_path: Path) -> None:
    batch_id = submitted(database, tmp_path, pa.table({"text": ["a"]}), prompted())
    end(database, {"row-1": said("A")})
    moved = (tmp_path / "in.parquet").rename(tmp_path / "moved.parquet")
    with pytest.raises(BadInput, match="no such file"):
        written(database, batch_id, tmp_path / "out.parquet")
    assert written(database, batch_id, tmp_path / "out.parquet", moved).column("answer").to_pylist() == ["A"]
    pq.write_table(pa.table({"text": ["b"]}), moved)
    with pytest.raises(BadInput, match=r"has changed since the batch was made of it.*--table"):
        written(database, batch_id, tmp_path / "out.parquet", moved)


def test_a_field_with_the_name_of_a_result_column_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "in.parquet")
    form = schema_form({"type": "object", "properties": {"error": {"type": "string"}}})
    with pytest.raises(BadInput, match="--schema: its field error has the name of a result column"):
        TableAsked("in", "", "{text}", form=form).check(tmp_path / "out.csv", open_table(tmp_path / "in.parquet"))


def test_answers_of_a_batch_that_is_kept_no_longer_are_said_to_be_lost(database: Database, tmp_path: Path) -> None:
    batch_id = submitted(database, tmp_path, pa.table({"text": ["a", "b"]}), prompted())
    end(database, {"row-1": said("A"), "row-2": failed(0, code="bad", message="x")})
    execute(database, "UPDATE batches SET state = 'completed', ending = 'completed'")
    again = retry_batch(database, batch_id, settings=SETTINGS, reuse=False).batch_id
    end(database, {"row-2": said("B")})
    execute(database, "UPDATE batches SET deleted_at = clock_timestamp() WHERE id = :id", id=batch_id)
    out = written(database, again, tmp_path / "out.parquet")
    assert out.column("answer").to_pylist() == [None, "B"]
    assert str(out.column("error").to_pylist()[0]).startswith("lost: the batch that this one repeats is kept no longer")


def test_the_same_prompts_of_another_table_are_another_batch(database: Database, tmp_path: Path) -> None:
    def made(**about: Any) -> UUID:
        return submit_file(
            database,
            tmp_path / "in.jsonl",
            options=SubmitOptions(max_output_tokens=64),
            settings=SETTINGS,
            served_models=None,
            reuse=True,
            about={"table": about},
        ).batch_id

    submitted(database, tmp_path, pa.table({"text": ["a"]}), prompted())
    one = made(path="a", prefix="")
    assert made(path="a", prefix="") == one
    assert len({one, made(path="b", prefix=""), made(path="a", prefix="x_")}) == 3


def test_a_table_that_changes_while_it_is_written_leaves_no_output(database: Database, tmp_path: Path) -> None:
    batch_id = submitted(database, tmp_path, pa.table({"text": ["a"]}), prompted())
    end(database, {"row-1": said("A")})
    with database.transaction() as session:
        progress = batch_progress(session, batch_id, tenant="local")
    asked = asked_of(progress)
    table = open_asked(asked)

    def replaced(_: int) -> None:
        pq.write_table(pa.table({"text": ["other"]}), tmp_path / "new.parquet")
        (tmp_path / "new.parquet").replace(tmp_path / "in.parquet")

    with pytest.raises(BadInput, match=r"in\.parquet: changed while it was read"):
        write_table(database, progress, table, tmp_path / "out.csv", asked=asked, tenant="local", on_progress=replaced)
    assert not (tmp_path / "out.csv").exists() and not list(tmp_path.glob("*.part"))
