"""Submit that leaves bad lines out: each is reported, the good ones are stored, the first of equal ids stays."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from models.lines import SubmitOptions
from models.states import Priority
from pipeline.batch_file import SKIPPED_SUSPECTS
from pipeline.serving import ServedModels
from pipeline.submit import Submitted, Wishes, dry_run, submit_file
from runtime.errors import BadInput, InvalidFile, Problem
from runtime.settings import Settings
from store.database import Database

CHAT = "/v1/chat/completions"
OPTIONS = SubmitOptions(max_output_tokens=64)
SETTINGS = Settings.model_construct()


def line(custom_id: str, *, url: str = CHAT, prompt: str = "x", **fields: Any) -> str:
    body = {"model": "m", "messages": [{"role": "user", "content": prompt}], "max_tokens": 8} | fields
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


def write(folder: Path, lines: Sequence[str]) -> Path:
    file = folder / "in.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


def submit(
    database: Database, file: Path, skipped: list[Problem], *, served: ServedModels | None = None, **more: Any
) -> Submitted:
    wishes: dict[str, Any] = {"options": OPTIONS, "settings": SETTINGS, "served_models": served, "reuse": True}
    return submit_file(database, file, **(wishes | {"on_skipped": skipped.append} | more))


def rows(database: Database, statement: str) -> list[Any]:
    with database.transaction() as session:
        return [tuple(row) for row in session.execute(text(statement))]


MIXED = [
    "nonsense",
    line("a", prompt="first"),
    line("b", temperature=9),
    line("c", url="/v1/completions"),
    line("a", prompt="second"),
    line("d", model="other"),
    line("e"),
    line("a", prompt="third"),
]


def test_bad_lines_are_left_out_and_each_is_reported_in_order(database: Database, tmp_path: Path) -> None:
    skipped: list[Problem] = []
    submitted = submit(database, write(tmp_path, MIXED), skipped, served=ServedModels(frozenset({"m"})))
    assert (submitted.total, submitted.skipped) == (2, 6)
    assert [(problem.line, problem.code, problem.field) for problem in skipped] == [
        (1, "invalid_json_line", None),
        (3, "invalid_request", "body.temperature"),
        (4, "url_mismatch", "url"),
        (5, "duplicate_custom_id", "custom_id"),
        (6, "model_not_found", "body.model"),
        (8, "duplicate_custom_id", "custom_id"),
    ]
    assert "line 2 has" in skipped[5].message
    jobs = rows(database, "SELECT seq, custom_id, body FROM jobs ORDER BY seq")
    assert [(seq, custom_id) for seq, custom_id, _ in jobs] == [(0, "a"), (1, "e")]
    assert "first" in jobs[0][2], "the first of equal ids stays"
    assert rows(database, "SELECT skipped, total, state FROM batches") == [(6, 2, "in_progress")]


def test_the_same_submit_again_is_the_same_batch_and_one_that_refuses_bad_lines_is_another(
    database: Database, tmp_path: Path
) -> None:
    file = write(tmp_path, MIXED)
    first = submit(database, file, [])
    again = submit(database, file, [])
    assert again == Submitted(first.batch_id, first.total, reused=True, skipped=first.skipped)
    with pytest.raises(InvalidFile):
        submit(database, file, [], on_skipped=None)
    assert not submit(database, file, [], reuse=False).reused


def test_a_file_without_a_good_line_is_refused(database: Database, tmp_path: Path) -> None:
    with pytest.raises(InvalidFile) as caught:
        submit(database, write(tmp_path, ["nonsense"] * 30), [])
    assert (caught.value.total, len(caught.value.problems)) == (30, 20)
    with pytest.raises(InvalidFile, match="1 problem"):
        submit(database, write(tmp_path, [""]), [])
    assert rows(database, "SELECT count(*) FROM batches") == [(0,)]


def test_a_line_that_repeats_the_id_of_a_bad_line_is_stored(database: Database, tmp_path: Path) -> None:
    skipped: list[Problem] = []
    submitted = submit(database, write(tmp_path, [line("a", temperature=9), line("a"), line("b")]), skipped)
    assert (submitted.total, [problem.line for problem in skipped]) == (2, [1])


def test_a_dry_run_reports_what_would_be_left_out(tmp_path: Path) -> None:
    skipped: list[Problem] = []
    found = dry_run(
        write(tmp_path, MIXED), options=OPTIONS, settings=SETTINGS, served_models=None, on_skipped=skipped.append
    )
    assert (found.lines, found.skipped, len(skipped)) == (3, 5, 5)


def test_too_many_repeated_ids_are_refused_in_words(tmp_path: Path) -> None:
    ids = [f"id-{number // 2}" for number in range(2 * SKIPPED_SUSPECTS + 2)]
    file = write(tmp_path, [line(custom_id) for custom_id in ids])
    with pytest.raises(BadInput, match="several lines"):
        dry_run(file, options=OPTIONS, settings=SETTINGS, served_models=None, on_skipped=lambda _: None)


def test_memory_does_not_grow_with_the_lines_left_out(tmp_path: Path) -> None:
    def peak(lines: int) -> int:
        file = write(tmp_path, [line("a"), *["nonsense"] * lines])
        tracemalloc.start()
        dry_run(file, options=OPTIONS, settings=SETTINGS, served_models=None, on_skipped=lambda _: None)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert peak(20_000) < peak(500) + 200_000


def test_priority_weight_and_the_shards_estimated_tokens_are_stored(database: Database, tmp_path: Path) -> None:
    file = write(tmp_path, [line(f"id-{number}") for number in range(70)])
    plain = submit(database, file, [])
    wished = submit(database, file, [], wishes=Wishes(priority=Priority.HIGH, weight=2.5))
    assert plain.batch_id != wished.batch_id
    assert rows(database, "SELECT priority, weight FROM batches ORDER BY id") == [("normal", 1.0), ("high", 2.5)]
    found = dry_run(file, options=OPTIONS, settings=SETTINGS, served_models=None)
    assert (
        rows(database, "SELECT sum(tokens) FROM shards GROUP BY batch_id")
        == [(found.prompt_tokens + found.output_tokens,)] * 2
    )
