"""Commands that begin a batch: run, submit, retry."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import click

from models.lines import SubmitOptions, parse_sets
from models.names import batch_name
from models.states import CacheMode, JobOrder, Priority
from pipeline.again import retry_batch
from pipeline.cutting import for_workers
from pipeline.serving import served_models
from pipeline.submit import Submitted, Wishes, dry_run, submit_file
from runtime.settings import LEAST_WEIGHT, MOST_WEIGHT, Settings
from scripts.local import connected, ensure_node, local_services, prepare_schema
from scripts.lookup import TENANT, named_batch, opened_database
from scripts.recipe_lines import RecipeWish, recipe_lines, with_recipe_options
from scripts.result_files import check_writable, write_files
from scripts.skipped_lines import SkippedLines, skipped_file, skipped_lines
from scripts.terminal import (
    bar,
    emit,
    emit_json,
    emit_table,
    exit_code,
    print_summary,
    say,
    say_paused,
    summary,
    watch_batch,
)
from store.database import Database
from store.presence import PresenceBoard, WorkerPresence

_WINDOW_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class Window(click.ParamType[float]):
    """A duration such as 90m, 24h or 7d, in seconds."""

    name = "DURATION"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        number, unit = str(value)[:-1], str(value)[-1:]
        if unit not in _WINDOW_UNITS or not number.isdigit() or int(number) == 0:
            self.fail(f"{value!r} is no duration; write 90m, 24h or 7d", param, ctx)
        return float(int(number) * _WINDOW_UNITS[unit])


class Weight(click.ParamType[float]):
    """A share, within what the dispatcher can count with."""

    name = "NUMBER"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            weight = float(value)
        except ValueError:
            weight = 0.0
        if not LEAST_WEIGHT <= weight <= MOST_WEIGHT:
            self.fail(
                f"{value!r} is no weight; write a number from {LEAST_WEIGHT:g} to {MOST_WEIGHT:g}, such as 2 or 0.5",
                param,
                ctx,
            )
        return weight


_priority_option = click.option(
    "--priority",
    type=click.Choice([priority.value for priority in Priority]),
    help="Class of the batch: a higher class is dispatched first.",
)
_weight_option = click.option("--weight", type=Weight(), help="The batch's share among your batches of its class.")
_window_option = click.option(
    "--window", type=Window(), help="Completion window, e.g. 24h; unfinished jobs then expire."
)
_submit_options = (
    click.option(
        "--set",
        "sets",
        multiple=True,
        metavar="FIELD=VALUE",
        help="Set a field of every request, e.g. --set temperature=0. Repeatable.",
    ),
    click.option("--model", help="Replace the model that every line names."),
    click.option(
        "--max-output-tokens",
        type=click.IntRange(min=1),
        help="Hard limit of output tokens of one completion; larger wishes are clamped.",
    ),
    click.option(
        "--budget-tokens",
        type=click.IntRange(min=1, max=2**62),
        help="The most tokens that all jobs together may take, prompts and outputs; those that no longer fit end as "
        "budget_exceeded.",
    ),
    click.option(
        "--cache",
        type=click.Choice([mode.value for mode in CacheMode]),
        help="exact: an equal request that was answered before is not run again. semantic: nor is one that means the "
        "same, within a certified error. A line's own stoker.cache overrides it.",
    ),
    click.option(
        "--order",
        type=click.Choice([order.value for order in JobOrder]),
        default=JobOrder.PREFIX.value,
        show_default=True,
        help="In which jobs run: prefix puts prompts that begin alike together, long outputs first, if the file does "
        "not; prefix-short puts short outputs first; file keeps the file's. Results are in the file's order.",
    ),
    _window_option,
    _priority_option,
    _weight_option,
)


def _with_submit_options(command: Any) -> Any:
    for option in reversed(_submit_options):
        command = option(command)
    return command


_file_argument = click.argument(
    "file", required=False, type=click.Path(path_type=Path, exists=True, dir_okay=False, allow_dash=True)
)


@click.command()
@_file_argument
@with_recipe_options
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="Where the result lines go; errors and the manifest are written beside it.",
)
@_with_submit_options
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON to stdout.")
@click.pass_obj
def run(
    settings: Settings,
    file: Path | None,
    wish: RecipeWish | None,
    output: Path,
    sets: tuple[str, ...],
    model: str | None,
    max_output_tokens: int | None,
    budget_tokens: int | None,
    cache: str | None,
    order: str,
    window: float | None,
    priority: str | None,
    weight: float | None,
    as_json: bool,
) -> int:
    """Submit FILE, or documents with a --recipe, work, wait and write the results: the main job in one command.

    Uses the services that are set or that `stoker up` runs, else starts embedded ones for this run; starts a
    worker if none is live. Always makes a new batch.
    """
    check_writable(output, beside=file or output)
    options = _options(settings, sets, model, max_output_tokens, cache)
    needs_chroma = options.cache is CacheMode.SEMANTIC or wish is not None
    with local_services(settings, with_chroma=needs_chroma) as served, ExitStack() as stack:
        prepare_schema(served)
        started = ensure_node(served, stack, "generation")
        database = stack.enter_context(opened_database(served))
        submitted = _submit(
            served,
            database,
            file,
            wish,
            options=options,
            window_s=window,
            wishes=_wishes(priority, weight, order, budget_tokens),
            reuse=False,
        )
        say(f"{batch_name(submitted.batch_id)}: {submitted.total:,} jobs stored{_following(submitted)}")
        _say_all(submitted.notices)
        progress = watch_batch(
            database, submitted.batch_id, tenant=TENANT, check=started.expect_alive if started else None
        )
        places = write_files(database, progress, output)
        if as_json:
            emit_json(summary(progress) | {"files": {name: place for name, place in places}})
        print_summary(progress, places=places)
        say_paused(progress)
        return exit_code(progress)


@click.command()
@_file_argument
@with_recipe_options
@_with_submit_options
@click.option("--dry-run", is_flag=True, help="Check every line and estimate tokens; store nothing.")
@click.option("--force", is_flag=True, help="A new batch although the same was submitted within the hour.")
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
    file: Path | None,
    wish: RecipeWish | None,
    sets: tuple[str, ...],
    model: str | None,
    max_output_tokens: int | None,
    budget_tokens: int | None,
    cache: str | None,
    order: str,
    window: float | None,
    priority: str | None,
    weight: float | None,
    dry_run: bool,
    force: bool,
    skip_bad: bool,
    skipped: Path | None,
    reuse: str | None,
    as_json: bool,
) -> None:
    """Store FILE's jobs, or one for each document of a --recipe; answer with the batch's id, and every job will end.

    The same file with the same options within an hour is the same batch, while it is live or completed.
    """
    options = _options(settings, sets, model, max_output_tokens, cache)
    if wish is not None and (dry_run or skip_bad or skipped):
        raise click.UsageError("--dry-run and --skip-bad are for a FILE")
    with ExitStack() as stack:
        report = None
        if file is not None and (skip_bad or skipped is not None):
            report = stack.enter_context(skipped_lines(None if dry_run else skipped_file(file, skipped)))
        if dry_run and file is not None:
            _estimate(settings, file, options=options, report=report, as_json=as_json)
            return
        served = connected(settings)
        database = stack.enter_context(opened_database(served))
        results_of = named_batch(database, reuse) if reuse else None
        submitted = _submit(
            served,
            database,
            file,
            wish,
            options=options,
            window_s=window,
            wishes=_wishes(priority, weight, order, budget_tokens, results_of=results_of),
            reuse=not force,
            report=report,
        )
    if submitted.reused:
        again = "submitted within the last hour already, with these options: same batch"
        say(f"{again} ({submitted.total:,} jobs); --force makes a new one")
    else:
        taken = f", {submitted.taken:,} of them with the results of {reuse}" if reuse else ""
        _say_stored(submitted, taken)
        if options.cache is CacheMode.SEMANTIC and served.cache.chroma_url is None:
            say(
                "note: no Chroma is known here; workers without it serve nothing semantically: set "
                "STOKER_CACHE__CHROMA_URL for them, or run `make cache` before `stoker up`"
            )
    _emit_batch(submitted, as_json=as_json)


@click.command()
@click.argument("batch")
@_window_option
@_priority_option
@_weight_option
@click.option("--force", is_flag=True, help="A new batch although BATCH was retried within the hour.")
@click.option("--json", "as_json", is_flag=True)
@click.pass_obj
def retry(
    settings: Settings,
    batch: str,
    window: float | None,
    priority: str | None,
    weight: float | None,
    force: bool,
    as_json: bool,
) -> None:
    """Run the failed lines of an ended BATCH again, as a new batch; answers with its id.

    Lines that a cancel or the window ended count as failed. A second retry within an hour is the first one,
    while that is live or completed.
    """
    served = connected(settings)
    with opened_database(served) as database:
        submitted = retry_batch(
            database,
            named_batch(database, batch),
            settings=for_workers(_with_window(served, window), _workers(served)),
            reuse=not force,
            priority=Priority(priority) if priority else None,
            weight=weight,
            tenant=TENANT,
        )
    if submitted.reused:
        say(f"retried within the last hour already: same batch ({submitted.total:,} jobs); --force makes a new one")
    else:
        _say_stored(submitted, f", the failed lines of {batch}")
    _emit_batch(submitted, as_json=as_json)


def _say_stored(submitted: Submitted, more: str) -> None:
    name = batch_name(submitted.batch_id)[:18]
    say(f"{submitted.total:,} jobs stored{more}{_following(submitted)}; follow them with `stoker watch {name}`")
    _say_all(submitted.notices)


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


def _wishes(
    priority: str | None,
    weight: float | None,
    order: str,
    budget_tokens: int | None,
    *,
    results_of: UUID | None = None,
) -> Wishes:
    return Wishes(Priority(priority or Priority.NORMAL), weight or 1.0, results_of, JobOrder(order), budget_tokens)


def _with_window(settings: Settings, window_s: float | None) -> Settings:
    if window_s is None:
        return settings
    return settings.model_copy(update={"limits": settings.limits.model_copy(update={"window_s": window_s})})


def _options(
    settings: Settings, sets: tuple[str, ...], model: str | None, limit: int | None, cache: str | None
) -> SubmitOptions:
    return SubmitOptions(
        sets=parse_sets(sets),
        model=model,
        max_output_tokens=limit or settings.limits.max_output_tokens,
        cache=CacheMode(cache or settings.cache.mode),
    )


def _submit(
    settings: Settings,
    database: Database,
    file: Path | None,
    wish: RecipeWish | None,
    *,
    options: SubmitOptions,
    window_s: float | None,
    wishes: Wishes,
    reuse: bool,
    report: SkippedLines | None = None,
) -> Submitted:
    workers = _workers(settings)
    served = served_models(workers)
    if served is None:
        say("no worker is live: model names are checked when one runs the jobs")
    with ExitStack() as stack:
        if wish is None:
            path = stack.enter_context(_seekable(file or Path("-")))
        else:
            path = stack.enter_context(recipe_lines(settings, database, wish, model=options.model, served=served))
        show = stack.enter_context(bar("storing", total=path.stat().st_size))
        return submit_file(
            database,
            path,
            input_name=str(file) if wish is None else wish.title,
            options=options,
            settings=for_workers(_with_window(settings, window_s), workers),
            served_models=served,
            wishes=wishes,
            reuse=reuse,
            on_skipped=report,
            tenant=TENANT,
            on_progress=lambda done_bytes, _: show(done_bytes),
        )


def _estimate(
    settings: Settings, file: Path, *, options: SubmitOptions, report: SkippedLines | None, as_json: bool
) -> None:
    with _seekable(file) as path, bar("checking", total=path.stat().st_size) as show:
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


@contextmanager
def _seekable(file: Path) -> Iterator[Path]:
    """The file itself; standard input (`-`) as a temporary file."""
    if str(file) != "-":
        yield file
        return
    with tempfile.NamedTemporaryFile(prefix="stoker-", suffix=".jsonl") as spooled:
        shutil.copyfileobj(sys.stdin.buffer, spooled)
        spooled.flush()
        yield Path(spooled.name)
