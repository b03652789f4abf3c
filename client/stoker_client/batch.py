"""A batch of one's rows: begun or found again by its content, followed to its end, its results beside the rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any, Final
from uuid import uuid4

from stoker_client.answers import Answer, answer_of, not_run, row_of
from stoker_client.asking import Asked, create_body
from stoker_client.errors import BatchFailed, JobsFailed, Problem, Refused
from stoker_client.forms import Form
from stoker_client.gateway import Gateway, Place
from stoker_client.lines import LineForm, Lines
from stoker_client.progress import Progress
from stoker_client.stopping import Stop
from stoker_client.tables import Column, Frame, Kind, Table, is_frame

FIRST_LOOK_S, LONGEST_LOOK_S = 0.25, 2.0
LOOKS_GROW: Final = 1.25
SHOWN: Final = 5
_ARGUMENTS: Final = {"body.model": "model", "body.temperature": "temperature", "body.max_tokens": "max_output_tokens"}
_GIVEN_UP: Final = frozenset({"failed", "cancelled", "cancelling", "expired"})


class Batch:
    """A batch that was submitted. The gateway has it: it goes on whoever waits for it, and whoever does not."""

    def __init__(
        self,
        batch_id: str,
        *,
        asked: Asked,
        table: Table,
        form: Form,
        lines: Lines,
        place: Callable[[], Place],
        stop: Stop,
        progress: Progress,
    ) -> None:
        self.id = batch_id
        self._asked = asked
        self._table = table
        self._form = form
        self._lines = lines
        self._place = place
        self._stop = stop
        self._progress = progress

    def __repr__(self) -> str:
        return f"Batch({self.id!r})"

    def results(self) -> Any:
        """Wait for the end, and give what run() gives. May be called again.

        Raises BatchFailed, JobsFailed with errors="raise", NoGateway, Refused.
        """
        try:
            with self._gateway() as gateway:
                form, lines = self._form, self._lines
                ended = _followed(gateway, self.id, form=form, lines=lines, stop=self._stop, progress=self._progress)
                answers = _answers(gateway, ended, table=self._table, form=form, lines=lines)
        except KeyboardInterrupt:
            say_left(self._progress, self.id)
            raise
        finally:
            self._progress.close()
        return self._given(answers)

    def cancel(self) -> None:
        """Cancel it: nothing new starts. Raises Refused if it has ended."""
        with self._gateway() as gateway:
            gateway.cancel(self.id)

    def _gateway(self) -> Gateway:
        return Gateway(self._place, stop=self._stop, progress=self._progress)

    def _given(self, answers: list[Answer]) -> Any:
        results: Any = answers
        if is_frame(self._asked.rows):
            table: Any = self._table
            results = _appended(table, answers, form=self._form, prefix=self._asked.result_prefix)
        skipped = {row for row, _ in self._lines.skipped}
        failed = [one for one in answers if one.error is not None and one.row not in skipped]
        if self._asked.errors == "raise" and failed:
            raise _jobs_failed(failed, results, total=self._lines.count, cache=self._asked.cache)
        return results


def say_left(progress: Progress, batch_id: str) -> None:
    """What to do with a batch that nobody here waits for any more."""
    progress.say(
        f"{batch_id} goes on at the gateway; the same call again follows it, submit(…) of the same with "
        f".cancel(), or `stoker cancel {batch_id[:18]}`, ends it"
    )


def begin(gateway: Gateway, asked: Asked, *, form: Form, shared: LineForm, lines: Lines, progress: Progress) -> str:
    """The id of the batch of these lines: the one that runs or has completed with the same content, else a new one."""
    body = create_body(asked, form=form, lines=shared)
    if not asked.resume:
        return _created(gateway, body, lines, key=f"stoker-client-{uuid4().hex}")
    content = json.dumps([lines.digest, body], sort_keys=True).encode()
    digest = hashlib.sha256(content).hexdigest()
    for number in count(1):
        key = f"stoker-client-{digest}-{number}"
        found = gateway.newest_batch(key)
        if found is not None and found["status"] in _GIVEN_UP:
            continue
        if found is None:
            return _created(gateway, body, lines, key=key)
        done = found["request_counts"]["completed"] + found["request_counts"]["failed"]
        progress.say(f"{found['id']} has these rows already: {done:,} of {lines.count:,} are done")
        return str(found["id"])
    raise AssertionError("numbers do not end")


def _created(gateway: Gateway, body: Mapping[str, Any], lines: Lines, *, key: str) -> str:
    """Upload and create. If somebody else created the same meanwhile, it is theirs."""
    file_id = gateway.upload(lines.file, name="rows.jsonl")
    try:
        return str(gateway.create({"input_file_id": file_id, **body}, key=key)["id"])
    except Refused as error:
        found = gateway.newest_batch(key) if error.code == "key_reused" else None
        if found is None:
            raise
        gateway.forget(file_id)
        return str(found["id"])


def _followed(
    gateway: Gateway, batch_id: str, *, form: Form, lines: Lines, stop: Stop, progress: Progress
) -> dict[str, Any]:
    """The batch once it has completed. Raises BatchFailed for every other end, and for a pause."""
    look_s = FIRST_LOOK_S
    while True:
        batch = gateway.batch(batch_id)
        progress.follow(batch, total=lines.count)
        if batch["status"] == "completed":
            return batch
        if batch["status"] in ("failed", "cancelled", "expired"):
            raise _failed(batch, lines, form)
        if batch["stoker"]["paused_reason"] is not None:
            raise BatchFailed(
                f"{batch_id} is paused: {batch['stoker']['paused_reason']}. Let it go on with `stoker resume "
                f"{batch_id[:18]}` and make the same call again, or end it with `stoker cancel {batch_id[:18]}`",
                batch_id=batch_id,
            )
        stop.wait(look_s)
        look_s = min(LONGEST_LOOK_S, look_s * LOOKS_GROW)


def _failed(batch: Mapping[str, Any], lines: Lines, form: Form) -> BatchFailed:
    batch_id, status, counts = batch["id"], batch["status"], batch["request_counts"]
    if status != "failed":
        why = "was cancelled" if status == "cancelled" else "has expired: its window was over"
        remedy = "" if status == "cancelled" else ", with a longer window,"
        return BatchFailed(
            f"{batch_id} {why}; {counts['completed']:,} of {lines.count:,} rows have answers (`stoker results "
            f"{batch_id[:18]}`). The same call again{remedy} is a new batch, whose first answers come from the cache",
            batch_id=batch_id,
        )
    problems = _problems((batch["errors"] or {"data": []})["data"], lines, form)
    shown = "\n".join(f"  {_where(one)}: {one.message} [{one.code}]" for one in problems[:SHOWN])
    more = f"\n  and {len(problems) - SHOWN:,} more in .problems" if problems[SHOWN:] else ""
    return BatchFailed(
        f"the gateway refused {batch_id} before anything ran; mend this and run again:\n{shown}{more}",
        batch_id=batch_id,
        problems=problems,
    )


def _problems(found: Sequence[Mapping[str, Any]], lines: Lines, form: Form) -> list[Problem]:
    """What validation found, by row. What it holds against what all lines share is one problem, of that argument.

    Then what it says of further problems is left out: every row has that one.
    """
    arguments = {**_ARGUMENTS, "body.response_format": form.argument}
    shared: dict[Problem, None] = {}
    others = []
    for one in found:
        field, message = one["param"], one["message"]
        if field in arguments:
            shared[Problem(None, one["code"], f"{arguments[field]}: {message.removeprefix('schema: ')}")] = None
        else:
            row = lines.row_of(one["line"]) if one["line"] else None
            others.append(Problem(row, one["code"], f"{field}: {message}" if field else message))
    return [*shared, *(one for one in others if one.row is not None or not shared)]


def _where(problem: Problem) -> str:
    return "all rows" if problem.row is None else f"row {problem.row:,}"


def _answers(gateway: Gateway, batch: Mapping[str, Any], *, table: Table, form: Form, lines: Lines) -> list[Answer]:
    """What every row ended with, in the rows' order."""
    found: list[Answer | None] = [None] * table.count
    for row, column in lines.skipped:
        found[row - 1] = not_run(row, f"null: the column {column} has no value in this row")
    for file_id in (batch["output_file_id"], batch["error_file_id"]):
        if file_id is None:
            continue
        for line in gateway.lines(file_id, line_of=lambda line: lines.line_of(row_of(line))):
            found[row_of(line) - 1] = answer_of(line, form)
    return [
        one if one is not None else not_run(row, "missing: the gateway has no result of this row; run it again")
        for row, one in enumerate(found, 1)
    ]


def _appended(table: Frame, answers: Sequence[Answer], *, form: Form, prefix: str) -> Any:
    """The user's table with its result columns."""
    parts = [_parts(one, form) for one in answers] if form.fields else []
    columns = [
        Column("answer", Kind.TEXT, [one.text for one in answers]),
        *(Column(name, kind, [row[at] for row in parts]) for at, (name, kind) in enumerate(form.fields)),
        Column("error", Kind.TEXT, [one.error for one in answers]),
        Column("prompt_tokens", Kind.INTEGER, [one.prompt_tokens for one in answers]),
        Column("completion_tokens", Kind.INTEGER, [one.completion_tokens for one in answers]),
        Column("source", Kind.TEXT, [one.source for one in answers]),
    ]
    return table.appended([Column(prefix + column.name, column.kind, column.values) for column in columns])


def _parts(answer: Answer, form: Form) -> list[Any]:
    """An answer's parts; all null where it is not of its form."""
    if answer.text is None or answer.value is None:
        return [None] * len(form.fields)
    return form.parts(answer.text)


def _jobs_failed(failed: Sequence[Answer], results: Any, *, total: int, cache: str | None) -> JobsFailed:
    shown = "\n".join(f"  row {one.row:,}: {one.error}" for one in failed[:SHOWN])
    more = f"\n  and {len(failed) - SHOWN:,} more" if failed[SHOWN:] else ""
    again = (
        'all rows again, since cache is "off": pass just the failed rows to ask no others'
        if cache == "off"
        else "them again, and takes the other rows' answers from the cache where it has them"
    )
    return JobsFailed(
        f"{len(failed):,} of {total:,} rows have no good answer; .results has all rows. The same call gives the same "
        f"again; with resume=False it asks {again}:\n{shown}{more}",
        failed=len(failed),
        results=results,
    )
