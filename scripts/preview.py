"""`--preview`: some rows run first and are shown, each answer beside its input, with what all would take."""

from __future__ import annotations

import sys

import click
import msgspec
from rich.markup import escape
from rich.table import Table

from inference.replies import said
from models.names import batch_name
from models.states import Outcome
from pipeline.preview import Range, forecast
from pipeline.table_lines import row_of
from pipeline.table_results import CHAT, asked_of
from scripts.shown_batch import seconds_of
from scripts.terminal import say, stderr
from store.batches import BatchProgress
from store.database import Database
from store.results import ResultRow, job_pages, result_pages

INPUT_CHARACTERS, ANSWER_CHARACTERS = 400, 300


class Preview:
    """The batch of a preview that has ended, of a table with `of` rows to run."""

    def __init__(self, database: Database, progress: BatchProgress, *, of: int, slots: int) -> None:
        self.batch_id = progress.id
        self._progress = progress
        self._rows = [row for page in result_pages(database, progress.id) for row in page]
        prompts = [_prompt(body) for page in job_pages(database, progress.id) for _, body, _ in page]
        self._prompts = {row.seq: prompts[row.seq] for row in self._rows}
        self._of, self._slots = of, slots

    def show(self) -> None:
        """The screen, to stderr."""
        asked = asked_of(self._progress)
        table = Table(title=f"preview: {len(self._rows)} of {self._of:,} rows, drawn at random", title_justify="left")
        table.add_column("row", justify="right")
        table.add_column("input", ratio=3, overflow="fold")
        table.add_column("answer", ratio=2, overflow="fold")
        for name in ("tokens in", "out", "s"):
            table.add_column(name, justify="right")
        for row in sorted(self._rows, key=lambda row: row_of(row.custom_id)):
            text = said(CHAT, row.response or "").text if row.outcome is not Outcome.FAILED else ""
            answer = text if asked.form is None else asked.form.read(text)[0]
            table.add_row(
                str(row_of(row.custom_id)),
                escape(_shortened(self._prompts[row.seq], INPUT_CHARACTERS)),
                escape(_shortened(answer, ANSWER_CHARACTERS)) + _trouble(row),
                str(row.prompt_tokens),
                str(row.completion_tokens),
                f"{row.duration_ms / 1000:.2f}",
            )
        stderr.print(table)
        if not self._rows:
            say(f"no row has a result: {batch_name(self.batch_id)} is {self._progress.state.value}")
            return
        found = forecast(self._rows, of=self._of, wall_s=seconds_of(self._progress), slots=self._slots)
        say(f"all {self._of:,} rows, estimated from these, with 95% ranges:")
        for name, shown in (
            ("tokens in", _counted(found.prompt_tokens)),
            ("tokens out", _counted(found.completion_tokens)),
            ("time", _timed(found.seconds)),
        ):
            say(f"  {name:10}  {shown}")
        say("rows that equal others, or that the cache answers, take none")


def ask_to_go_on(preview: Preview, *, yes: bool) -> bool:
    """Show it, and whether the rest is wanted. Where nobody can be asked it is not, unless `yes`."""
    preview.show()
    if yes:
        return True
    kept = f"these answers are kept in {batch_name(preview.batch_id)}"
    if not sys.stdin.isatty():
        say(f"nothing more is run, as nobody can be asked here: --yes goes on; {kept}")
        return False
    if click.confirm("Run the rest?", default=True, err=True):
        return True
    say(f"nothing more is run; {kept}")
    return False


class _Message(msgspec.Struct):
    content: str


class _Body(msgspec.Struct):
    messages: list[_Message]


def _prompt(body: str) -> str:
    return msgspec.json.decode(body, type=_Body).messages[-1].content


def _trouble(row: ResultRow) -> str:
    if row.outcome is Outcome.SUCCEEDED:
        return ""
    reason = f"{row.error_code}: {row.error_message}" if row.outcome is Outcome.FAILED else row.outcome.value
    return f"[red]{escape(_shortened(reason, ANSWER_CHARACTERS))}[/red]"


def _shortened(text: str, most: int) -> str:
    plain = " ".join(text.split())
    return plain if len(plain) <= most else plain[: most - 1] + "…"


def _counted(range_: Range) -> str:
    ends = "" if range_.least is None else f" ({range_.least:,.0f} to {range_.most:,.0f})"
    return f"{range_.estimate:,.0f}{ends}"


def _timed(range_: Range) -> str:
    ends = "" if range_.least is None else f" ({_span(range_.least)} to {_span(range_.most or 0.0)})"
    return _span(range_.estimate) + ends


def _span(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"
