"""Commands that begin a batch: run, submit, retry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from uuid import UUID

import click

from models.lines import SubmitOptions
from models.names import batch_name, short_name
from models.states import CacheMode, Priority, Trust
from pipeline.again import retry_batch
from pipeline.cutting import for_workers
from pipeline.serving import served_models
from pipeline.submit import Submitted, Wishes, dry_run, submit_file
from runtime.settings import Settings
from runtime.tracing import start_tracing
from scripts.local import connected, ensure_node, local_services, prepare_schema
from scripts.lookup import TENANT, named_batch, opened_database
from scripts.shown_batch import exit_code, print_summary, say_failures, say_paused, summary, watch_batch
from scripts.skipped_lines import SkippedLines, skipped_file, skipped_lines
from scripts.source import Lines, Source, Terms
from scripts.sources import FileSource, seekable, with_source
from scripts.submit_options import (
    MONEY_OPTION,
    PRIORITY_OPTION,
    TRUST_OPTION,
    WEIGHT_OPTION,
    WINDOW_OPTION,
    How,
    IdempotencyKey,
    with_how,
    with_window,
)
from scripts.terminal import bar, emit, emit_json, emit_table, say
from store.batches import BatchProgress, latest_batches
from store.budget_tables import MONEY
from store.database import Database
from store.presence import PresenceBoard, WorkerPresence

NEWEST = 20  # batches that are looked through for unfinished ones
EXIT_DECLINED = 1  # after a preview: not all rows have an answer


@click.command()
@with_source
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="Where the results go, of a table with its columns; errors and the manifest are written beside it.",
)
@click.option(
    "--preview",
    type=click.IntRange(1, 1000),
    help="With --prompt: run so many rows first, drawn at random, show them, and ask before the rest.",
)
@click.option("--yes", is_flag=True, help="With --preview: show, and go on without asking.")
@with_how
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON to stdout.")
@click.pass_obj
def run(
    settings: Settings,
    source: Source,
    output: Path,
    preview: int | None,
    yes: bool,
    how: How,
    as_json: bool,
) -> int:
    """Submit FILE, a table's rows with a --prompt, or documents with a --recipe; work, wait and write the results.

    Uses the services that are set or that `stoker up` runs, else starts embedded ones for this run; starts a
    worker if none is live. Always makes a new batch.
    """
    source.check_output(output, previews=preview is not None)
    needs_chroma = how.cache_mode(settings) is CacheMode.SEMANTIC or source.needs_chroma
    with local_services(settings, with_chroma=needs_chroma) as served, ExitStack() as stack:
        prepare_schema(served)
        started = ensure_node(served, stack, "generation")
        begin = _Begin(served, stack.enter_context(opened_database(served)), source, how)
        check = started.expect_alive if started else None
        with begin.lines(sample=preview or 0, folder=output.parent) as lines:
            previewed = begin.preview(lines, check=check, yes=yes) if lines.sample else None
            if lines.sample and previewed is None:
                return EXIT_DECLINED
            submitted = begin.batch(lines, how.wishes() if previewed is None else begin.wishes_after(previewed))
        say(f"{batch_name(submitted.batch_id)}: {submitted.total:,} jobs stored{_following(submitted)}")
        _say_others(begin.database, submitted.batch_id)
        _say_all(submitted.notices)
        progress = watch_batch(begin.database, submitted.batch_id, tenant=TENANT, check=check)
        places = source.write_files(begin.database, progress, output)
        if as_json:
            emit_json(summary(progress) | {"files": {name: place for name, place in places}})
        print_summary(progress, places=places)
        say_failures(begin.database, progress, tenant=TENANT)
        say_paused(progress)
        return exit_code(progress)


@click.command()
@with_source
@with_how
@click.option("--dry-run", is_flag=True, help="Check every line and estimate tokens; store nothing.")
@click.option("--force", is_flag=True, help="A new batch although the same was submitted within the hour.")
@click.option(
    "--idempotency-key",
    "key",
    metavar="KEY",
    type=IdempotencyKey(),
    help="A second submit with KEY is the first one, whenever it comes and however that ended; of anything else it is "
    "refused.",
)
@click.option("--skip-bad", is_flag=True, help="Leave bad lines out and store the others.")
@click.option(
    "--skipped",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where --skip-bad lists the lines it left out; else FILE.skipped.jsonl.",
)
@click.option(
    "--reuse", metavar="BATCH", help="Lines with the custom_id and body of a succeeded job of BATCH take its result."
)
@click.option("--json", "as_json", is_flag=True)
@click.pass_obj
def submit(
    settings: Settings,
    source: Source,
    how: How,
    dry_run: bool,
    force: bool,
    key: str | None,
    skip_bad: bool,
    skipped: Path | None,
    reuse: str | None,
    as_json: bool,
) -> None:
    """Store FILE's jobs, one for each row of a table with a --prompt, or one for each document of a --recipe.

    Answers with the batch's id, and every job will end. The same file with the same options within an hour is the same
    batch, while it is live or completed.
    """
    if force and key is not None:
        raise click.UsageError("--force makes a new batch and --idempotency-key must not: leave one of them out")
    if not isinstance(source, FileSource) and (dry_run or skip_bad or skipped):
        raise click.UsageError(
            "--dry-run and --skip-bad are for a FILE of lines; `stoker run --preview N` tries a table"
        )
    with ExitStack() as stack:
        report = None
        if isinstance(source, FileSource) and (skip_bad or skipped is not None):
            report = stack.enter_context(skipped_lines(None if dry_run else skipped_file(source.file, skipped)))
        if dry_run and isinstance(source, FileSource):
            options = how.options(settings, common={}, validate_answers=False)
            _estimate(settings, source.file, options=options, report=report, as_json=as_json)
            return
        served = connected(settings)
        begin = _Begin(served, stack.enter_context(opened_database(served)), source, how)
        results_of = named_batch(begin.database, reuse) if reuse else None
        with begin.lines() as lines:
            submitted = begin.batch(lines, how.wishes(results_of=results_of), reuse=not force, report=report, key=key)
    if submitted.reused and key is not None:
        say(f"submitted with this key already: same batch ({submitted.total:,} jobs)")
    elif submitted.reused:
        again = "submitted within the last hour already, with these options: same batch"
        say(f"{again} ({submitted.total:,} jobs); --force makes a new one")
    else:
        taken = f", {submitted.taken:,} of them with the results of {reuse}" if reuse else ""
        _say_stored(submitted, taken)
        if how.cache_mode(settings) is CacheMode.SEMANTIC and served.cache.chroma_url is None:
            say(
                "note: no Chroma is known here; workers without it serve nothing semantically: set "
                "STOKER_CACHE__CHROMA_URL for them, or run `make cache` before `stoker up`"
            )
    _emit_batch(submitted, as_json=as_json)


@click.command()
@click.argument("batch")
@WINDOW_OPTION
@PRIORITY_OPTION
@WEIGHT_OPTION
@TRUST_OPTION
@MONEY_OPTION
@click.option("--force", is_flag=True, help="A new batch although BATCH was retried within the hour.")
@click.option("--json", "as_json", is_flag=True)
@click.pass_obj
def retry(
    settings: Settings,
    batch: str,
    window: float | None,
    priority: str | None,
    weight: float | None,
    trust: str | None,
    budget_nanos: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Run the failed lines of an ended BATCH again, as a new batch; answers with its id.

    Lines that a cancel or the window ended count as failed. Its prompts may go where BATCH's might, but what that was
    allowed to cost is not taken over. A second retry within an hour is the first one, while that is live or completed.
    """
    served = connected(settings)
    start_tracing(served, process="command")
    with opened_database(served) as database:
        submitted = retry_batch(
            database,
            named_batch(database, batch),
            settings=for_workers(with_window(served, window), _workers(served)),
            reuse=not force,
            priority=Priority(priority) if priority else None,
            weight=weight,
            tenant=TENANT,
            trust=Trust(trust) if trust else None,
            budget_nanos=budget_nanos,
        )
    if submitted.reused:
        say(f"retried within the last hour already: same batch ({submitted.total:,} jobs); --force makes a new one")
    else:
        _say_stored(submitted, f", the failed lines of {batch}")
    _emit_batch(submitted, as_json=as_json)


class _Begin:
    """Begins batches of one source."""

    def __init__(self, settings: Settings, database: Database, source: Source, how: How) -> None:
        start_tracing(settings, process="command")
        self.database = database
        self._source, self._how = source, how
        self._workers = _workers(settings)
        self._served = served_models(self._workers)
        self._settings = for_workers(with_window(settings, how.window), self._workers)
        self._options = how.options(
            settings,
            common=source.common(how.cache_mode(settings)),
            validate_answers=source.validates_answers,
        )
        if self._served is None:
            say("no worker is live: model names are checked when one runs the jobs")

    def lines(self, *, sample: int = 0, folder: Path | None = None) -> AbstractContextManager[Lines]:
        """The source's lines, for a while."""
        served = None if self._served is None else self._served.allowed(self._options.trust)
        terms = Terms(self._settings, self.database, self._how, served, sample, folder)
        return self._source.lines(terms)

    def batch(
        self,
        lines: Lines,
        wishes: Wishes,
        *,
        reuse: bool = False,
        report: SkippedLines | None = None,
        key: str | None = None,
    ) -> Submitted:
        """Store lines as a batch and set it going."""
        with bar("storing", total=lines.path.stat().st_size) as show:
            return submit_file(
                self.database,
                lines.path,
                input_name=self._source.title,
                options=self._options,
                settings=self._settings,
                served_models=self._served,
                wishes=wishes,
                reuse=reuse,
                about=lines.about,
                on_skipped=report,
                tenant=TENANT,
                on_progress=lambda done_bytes, _: show(done_bytes),
                key=key,
            )

    def wishes_after(self, previewed: BatchProgress) -> Wishes:
        """How the rest runs: with the preview's results, and what it has left of the budgets."""
        with self.database.transaction() as session:
            budgets = MONEY.of_batch(session, previewed.id)
        return self._how.wishes(
            results_of=previewed.id,
            spent_tokens=previewed.prompt_tokens + previewed.completion_tokens,
            spent_nanos=sum(budget.spent + budget.reserved for budget in budgets if budget.batch_id is not None),
        )

    def preview(self, lines: Lines, *, check: Callable[[], None] | None, yes: bool) -> BatchProgress | None:
        """Run the sample of a table and show it: its batch at its end, or None if the rest is not wanted."""
        with lines.sampled() as sample:
            submitted = self.batch(sample, self._how.wishes())
        ended = watch_batch(self.database, submitted.batch_id, tenant=TENANT, check=check)
        slots = sum(worker.children * worker.in_flight for worker in self._workers) or 1
        goes_on = self._source.ask_to_go_on(self.database, ended, of=lines, slots=slots, yes=yes)
        return ended if goes_on else None


def _say_stored(submitted: Submitted, more: str) -> None:
    name = short_name(submitted.batch_id)
    say(f"{submitted.total:,} jobs stored{more}{_following(submitted)}; follow them with `stoker watch {name}`")
    _say_all(submitted.notices)


def _say_others(database: Database, batch_id: UUID) -> None:
    """What else the workers have to do: batches of before, which an interrupted run may have left."""
    with database.transaction() as session:
        newest = latest_batches(session, tenant=TENANT, limit=NEWEST)
    others = [one for one in newest if not one.is_ended and one.id != batch_id]
    if others:
        left = sum(one.total - one.done for one in others)
        names = ", ".join(short_name(one.id) for one in others[:3])
        say(
            f"note: {len(others)} unfinished batches of before run too, {left:,} jobs: {names}; "
            "`stoker cancel` ends one"
        )


def _following(submitted: Submitted) -> str:
    return f", {submitted.followers:,} of them equal to another, which runs for them" if submitted.followers else ""


def _say_all(notices: Sequence[str]) -> None:
    for notice in notices:
        say(f"note: {notice}")


def _emit_batch(submitted: Submitted, *, as_json: bool) -> None:
    name = batch_name(submitted.batch_id)
    if not as_json:
        emit(name)
        return
    figures = {"batch": name, "jobs": submitted.total, "reused": submitted.reused}
    emit_json(
        figures | {"skipped": submitted.skipped, "results_reused": submitted.taken, "followers": submitted.followers}
    )


def _estimate(
    settings: Settings, file: Path, *, options: SubmitOptions, report: SkippedLines | None, as_json: bool
) -> None:
    with seekable(file) as path, bar("checking", total=path.stat().st_size) as show:
        found = dry_run(
            path,
            options=options,
            settings=settings,
            served_models=None,
            on_skipped=report,
            on_progress=lambda done_bytes, _: show(done_bytes),
        )
    _say_all([*found.notices, "whether a worker serves these models is checked when the file is submitted"])
    figures = {
        "lines": found.lines,
        "endpoint": found.endpoint,
        "models": dict(found.models),
        "estimated_prompt_tokens": found.prompt_tokens,
        "most_output_tokens": found.output_tokens,
        "skipped": found.skipped,
    }
    if as_json:
        emit_json(figures)
        return
    models = ", ".join(f"{name} ({lines:,} lines)" for name, lines in found.models.items())
    rows = [(name.replace("_", " "), value) for name, value in (figures | {"models": models}).items()]
    emit_table("dry run: nothing was stored", ("figure", "value"), rows)


def _workers(settings: Settings) -> list[WorkerPresence]:
    board = PresenceBoard(settings.require_redis())
    try:
        return board.workers()
    finally:
        board.close()
