"""A table through real processes: one command, its preview, the rows that failed and their retry."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from store.database import Database
from tests.acceptance.chats import read_lines
from tests.support.batches import rows
from tests.support.processes import stoker
from tests.support.scripted_endpoint import ScriptedEndpoint

ROWS = 40
YES, NO = '[[answer {"label": "yes"}]]', '[[answer {"label": "no"}]]'
CLASSIFY = ("--prompt", "Is it good? {text}", "--labels", "yes,no")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Rows that are answered yes, but for the 7th (never valid), the 9th (valid at the repair) and the 11th (null)."""
    texts: list[str | None] = [f"{number} {YES}" for number in range(1, ROWS + 1)]
    texts[6], texts[8], texts[10] = "7 wrong", '[[answer {"label": "perhaps"}]]', None
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"id": pa.array(range(ROWS), pa.int16()), "text": texts}), path, row_group_size=16)
    return path


@pytest.mark.usefixtures("worker")
def test_a_table_comes_back_with_its_answers_and_a_retry_takes_only_what_failed(
    env: dict[str, str], tmp_path: Path, table: Path, endpoint: ScriptedEndpoint
) -> None:
    endpoint.script(NO, match="'perhaps' is not one of")
    output = tmp_path / "out.parquet"
    nulls = stoker("run", table, *CLASSIFY, "-o", output, env=env)
    assert nulls.returncode == 2 and "null: text in 1 rows (the first: row 11)" in nulls.stderr
    assert endpoint.calls().count == 0 and not output.exists()

    ran = stoker("run", table, *CLASSIFY, "--skip-nulls", "--json", "-o", output, env=env)
    assert ran.returncode == 1, ran.stderr
    figures = json.loads(ran.stdout)
    assert (figures["jobs"], figures["succeeded"], figures["failed"]) == (ROWS - 1, ROWS - 2, 1)
    out = pq.read_table(output)
    assert out.schema.field("id").type == pa.int16() and out.column("id").to_pylist() == list(range(ROWS))
    answers = out.column("answer").to_pylist()
    errors = [str(error or "") for error in out.column("error").to_pylist()]
    assert [number for number, one in enumerate(answers, 1) if one != "yes"] == [7, 9, 11]
    assert (answers[6], answers[8], answers[10]) == (None, "no", None)
    assert errors[6].startswith("invalid_answer: ") and errors[10] == "null: the column text has no value in this row"
    assert sum(not error for error in errors) == ROWS - 2
    [failed] = read_lines(Path(figures["files"]["errors"]))
    assert (failed["custom_id"], failed["error"]["code"]) == ("row-7", "invalid_answer")

    endpoint.script(YES, match="7 wrong")
    asked = endpoint.calls().count
    again = stoker("retry", figures["batch"], env=env).stdout.strip()
    assert stoker("watch", again, env=env).returncode == 0
    assert endpoint.calls().count == asked + 1
    merged = stoker("results", again, "-o", tmp_path / "all.csv", env=env)
    assert merged.returncode == 0, merged.stderr
    whole = (tmp_path / "all.csv").read_text().splitlines()
    assert len(whole) == ROWS + 1 and "yes" in whole[7] and "invalid_answer" not in whole[7]


@pytest.mark.usefixtures("worker")
def test_what_a_preview_ran_is_kept_and_not_run_again(
    env: dict[str, str], tmp_path: Path, table: Path, endpoint: ScriptedEndpoint, database: Database
) -> None:
    plain: list[str | Path] = [table, "--prompt", "Say {id}", "--preview", "6", "-o", tmp_path / "out.jsonl"]
    shown = stoker("run", *plain, env=env)
    assert shown.returncode == 1 and endpoint.calls().count == 6
    assert "preview: 6 of 40 rows, drawn at random" in shown.stderr and "echo: Say " in shown.stderr
    assert "all 40 rows, estimated from these, with 95% ranges:" in shown.stderr
    assert "nothing more is run, as nobody can be asked here: --yes goes on; these answers are kept" in shown.stderr
    assert not (tmp_path / "out.jsonl").exists()

    went_on = stoker("run", *plain, "--yes", "--cache", "off", env=env)
    assert went_on.returncode == 0, went_on.stderr
    assert endpoint.calls().count == 6 + ROWS
    out = read_lines(tmp_path / "out.jsonl")
    assert [line["answer"] for line in out] == [f"echo: Say {number}" for number in range(ROWS)]
    assert sorted(line["source"] for line in out) == ["engine"] * (ROWS - 6) + ["reused"] * 6
    assert rows(database, "SELECT count(*) FROM batches") == [(3,)]
