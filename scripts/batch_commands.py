"""Commands about batches: run, submit, status, watch, results, cancel, resume."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from uuid import UUID

import click

from models.lines import SubmitOptions, parse_sets
from models.names import batch_hex, batch_name
from models.states import Outcome
from pipeline.export import follow_lines, manifest, write_lines
from pipeline.submit import Submitted, dry_run, submit_file
from runtime.errors import BadInput, NotFound
from runtime.settings import Settings
from scripts.local import LocalWorker, connected, local_services, local_worker, prepare_schema
from scripts.terminal import bar, emit, emit_json, emit_table, print_summary, say, seconds_of, summary, watch_batch
from store.batches import BatchProgress, batch_progress, find_batches, latest_batches, request_cancel
from store.batches import resume as resume_batch
from store.database import Database
from store.presence import PresenceBoard

TENANT = "local"
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
    click.option("--window", type=Window(), help="Completion window, e.g. 24h; unfinished jobs then expire."),
)


def _with_submit_options(command: Any) -> Any:
    for option in reversed(_submit_options):
        command = option(command)
    return command


@click.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False, allow_dash=True))
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
    file: Path,
    output: Path,
    sets: tuple[str, ...],
    model: str | None,
    max_output_tokens: int | None,
    window: float | None,
    as_json: bool,
) -> int:
    """Submit FILE, work, wait and write the results: the main job in one command.

    Uses the services that are set or that `stoker up` runs, else starts embedded ones for this run; starts a
    worker if none is live. Always makes a new batch.
    """
    _check_writable(output)
    with local_services(settings) as served, ExitStack() as stack:
        prepare_schema(served)
        started = _ensure_worker(served, stack)
        database = stack.enter_context(_database(served))
        submitted = _submit(
            served,
            database,
            file,
            options=_options(settings, sets, model, max_output_tokens),
            window_s=window,
            reuse=False,
        )
        say(f"{batch_name(submitted.batch_id)}: {submitted.total:,} jobs stored")
        progress = watch_batch(
            database, submitted.batch_id, tenant=TENANT, check=started.expect_alive if started else None
        )
        places = _write_files(database, progress, output)
        if as_json:
            emit_json(summary(progress) | {"files": {name: place for name, place in places}})
        print_summary(progress, places=places)
        _say_paused(progress)
        return _exit_code(progress)


@click.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False, allow_dash=True))
@_with_submit_options
@click.option("--dry-run", is_flag=True, help="Check every line and estimate tokens; store nothing.")
@click.option("--json", "as_json", is_flag=True)
@click.pass_obj
def submit(
    settings: Settings,
    file: Path,
    sets: tuple[str, ...],
    model: str | None,
    max_output_tokens: int | None,
    window: float | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Store FILE's jobs and answer with the batch's id; from then on every job ends with one result.

    The same file with the same options within an hour is the same batch, while it is live or completed.
    """
    options = _options(settings, sets, model, max_output_tokens)
    if dry_run:
        _estimate(settings, file, options=options, as_json=as_json)
        return
    served = connected(settings)
    with _database(served) as database:
        submitted = _submit(served, database, file, options=options, window_s=window, reuse=True)
    name = batch_name(submitted.batch_id)
    if submitted.reused:
        say(f"submitted within the last hour already, with these options: same batch ({submitted.total:,} jobs)")
    else:
        say(f"{submitted.total:,} jobs stored; follow them with `stoker watch {name[:18]}`")
    if as_json:
        emit_json({"batch": name, "jobs": submitted.total, "reused": submitted.reused})
    else:
        emit(name)


@click.command()
@click.argument("batch", required=False)
@click.option("-n", "--limit", type=click.IntRange(1, 1000), default=20, show_default=True)
@click.option("--json", "as_json", is_flag=True)
@click.pass_obj
def status(settings: Settings, batch: str | None, limit: int, as_json: bool) -> None:
    """Show BATCH, or the newest batches."""
    with _database(connected(settings)) as database:
        if batch is not None:
            progress = _progress(database, batch)
            if as_json:
                emit_json(summary(progress))
            else:
                print_summary(progress)
                _say_paused(progress)
            return
        with database.transaction() as session:
            batches = latest_batches(session, tenant=TENANT, limit=limit)
    if as_json:
        emit_json([summary(progress) for progress in batches])
        return
    emit_table(
        "batches",
        ("batch", "state", "jobs", "done", "failed", "truncated", "tokens out", "seconds", "input"),
        [
            (
                batch_name(p.id)[:18],
                "paused" if p.paused_reason else p.state.value,
                p.total,
                p.done,
                p.failed,
                p.truncated,
                p.completion_tokens,
                f"{seconds_of(p):.1f}",
                Path(p.input_name).name,
            )
            for p in batches
        ],
    )


@click.command()
@click.argument("batch")
@click.option("--json", "as_json", is_flag=True)
@click.pass_obj
def watch(settings: Settings, batch: str, as_json: bool) -> int:
    """Follow BATCH until it has ended."""
    with _database(connected(settings)) as database:
        progress = watch_batch(database, _resolve(database, batch), tenant=TENANT)
    if as_json:
        emit_json(summary(progress))
    else:
        print_summary(progress)
    _say_paused(progress)
    return _exit_code(progress)


@click.command()
@click.argument("batch")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="A file; stdout without it.")
@click.option("--errors", is_flag=True, help="The error file: the jobs that failed, and why.")
@click.option("--follow", is_flag=True, help="Go on, in input order, until the batch has ended.")
@click.pass_obj
def results(settings: Settings, batch: str, output: Path | None, errors: bool, follow: bool) -> None:
    """Write BATCH's result lines in input order, those that there are by now; a manifest goes beside a file."""
    if output is not None:
        _check_writable(output)
    with _database(connected(settings)) as database, ExitStack() as stack:
        batch_id = _resolve(database, batch)
        sink = sys.stdout.buffer if output is None else stack.enter_context(_replacing(output))
        if follow:
            count = _follow(database, batch_id, sink, errors=errors)
        else:
            answered, failed = write_lines(
                database, batch_id, output=None if errors else sink, errors=sink if errors else None
            )
            count = failed if errors else answered
        progress = _progress(database, batch)
        if output is not None:
            _write_manifest(database, progress, output)
    say(
        f"{count:,} lines; {progress.done:,} of {progress.total:,} jobs done, {progress.failed:,} failed"
        + (" (see --errors)" if progress.failed and not errors else "")
    )


@click.command()
@click.argument("batch")
@click.pass_obj
def cancel(settings: Settings, batch: str) -> None:
    """Cancel BATCH: nothing new starts, finished jobs keep their results, the others end as batch_cancelled."""
    with _database(connected(settings)) as database:
        batch_id = _resolve(database, batch)
        with database.transaction() as session:
            changed = request_cancel(session, batch_id)
        progress = _progress(database, batch)
    if not changed:
        raise BadInput(f"{batch_name(batch_id)} is {progress.state.value} and cannot be cancelled")
    say(f"{batch_name(batch_id)} is being cancelled; {progress.done:,} of {progress.total:,} jobs have their results")


@click.command()
@click.argument("batch")
@click.pass_obj
def resume(settings: Settings, batch: str) -> None:
    """Let a paused BATCH go on; it is not paused again."""
    with _database(connected(settings)) as database:
        batch_id = _resolve(database, batch)
        with database.transaction() as session:
            changed = resume_batch(session, batch_id)
    if not changed:
        raise BadInput(f"{batch_name(batch_id)} is not paused")
    say(f"{batch_name(batch_id)} goes on")


@contextmanager
def _database(settings: Settings) -> Iterator[Database]:
    database = Database(settings.require_postgres())
    try:
        yield database
    finally:
        database.close()


def _resolve(database: Database, name: str) -> UUID:
    with database.transaction() as session:
        found = find_batches(session, batch_hex(name), tenant=TENANT)
    if not found:
        raise NotFound(f"no batch {name}; `stoker status` lists them")
    if len(found) > 1:
        raise BadInput(f"{name} is the beginning of several batches; write more of it")
    return found[0]


def _progress(database: Database, name: str) -> BatchProgress:
    batch_id = _resolve(database, name)
    with database.transaction() as session:
        return batch_progress(session, batch_id, tenant=TENANT)


def _options(settings: Settings, sets: tuple[str, ...], model: str | None, limit: int | None) -> SubmitOptions:
    return SubmitOptions(
        sets=parse_sets(sets), model=model, max_output_tokens=limit or settings.limits.max_output_tokens
    )


def _submit(
    settings: Settings, database: Database, file: Path, *, options: SubmitOptions, window_s: float | None, reuse: bool
) -> Submitted:
    if window_s is not None:
        settings = settings.model_copy(update={"limits": settings.limits.model_copy(update={"window_s": window_s})})
    served = _served_models(settings)
    if served is None:
        say("no worker is live: model names are checked when one runs the jobs")
    with _seekable(file) as path, bar("storing", total=path.stat().st_size) as show:
        return submit_file(
            database,
            path,
            input_name=str(file),
            options=options,
            settings=settings,
            served_models=served,
            reuse=reuse,
            tenant=TENANT,
            on_progress=lambda done_bytes, _: show(done_bytes),
        )


def _estimate(settings: Settings, file: Path, *, options: SubmitOptions, as_json: bool) -> None:
    with _seekable(file) as path, bar("checking", total=path.stat().st_size) as show:
        found = dry_run(
            path,
            options=options,
            settings=settings,
            served_models=None,
            on_progress=lambda done_bytes, _: show(done_bytes),
        )
    figures = {
        "lines": found.lines,
        "endpoint": found.endpoint,
        "models": dict(found.models),
        "estimated_prompt_tokens": found.prompt_tokens,
        "max_output_tokens": found.output_tokens,
    }
    if as_json:
        emit_json(figures)
    else:
        emit_table("dry run: nothing was stored", ("figure", "value"), list(figures.items()))


def _served_models(settings: Settings) -> frozenset[str] | None:
    board = PresenceBoard(settings.require_redis())
    try:
        workers = board.workers()
    finally:
        board.close()
    # One queue feeds all workers: only what every one of them serves is sure to be answered.
    return frozenset.intersection(*(frozenset(worker.models) for worker in workers)) if workers else None


def _ensure_worker(settings: Settings, stack: ExitStack) -> LocalWorker | None:
    """Start a worker for this run unless one is live; None if one is."""
    if _served_models(settings) is not None:
        return None
    with bar("starting the engine", total=None) as show:
        return stack.enter_context(local_worker(settings, on_wait=show))


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


def _check_writable(output: Path) -> None:
    if not output.parent.is_dir():
        raise BadInput(f"-o {output}: the folder {output.parent} does not exist")


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the block ends well; until then `path` stays as it was."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as opened:
        yield opened
    part.replace(path)


def _write_files(database: Database, progress: BatchProgress, output: Path) -> list[tuple[str, str]]:
    errors = output.with_suffix(".errors" + output.suffix)
    with _replacing(output) as good, _replacing(errors) as bad:
        _, failed = write_lines(database, progress.id, output=good, errors=bad)
    places = [("results", str(output))]
    if failed:
        places.append(("errors", str(errors)))
    else:
        errors.unlink()
    return [*places, ("manifest", str(_write_manifest(database, progress, output)))]


def _write_manifest(database: Database, progress: BatchProgress, output: Path) -> Path:
    path = output.with_suffix(".manifest.json")
    path.write_text(json.dumps(manifest(database, progress), indent=2) + "\n")
    return path


def _follow(database: Database, batch_id: UUID, sink: BinaryIO, *, errors: bool) -> int:
    count = 0
    for outcome, text in follow_lines(database, batch_id, tenant=TENANT):
        if (outcome is Outcome.FAILED) is errors:
            sink.write(text)
            sink.flush()
            count += 1
    return count


def _say_paused(progress: BatchProgress) -> None:
    if progress.paused_reason is not None:
        name = batch_name(progress.id)[:18]
        say(
            f"paused: {progress.paused_reason}\nlook with `stoker results {name} --errors`, then "
            f"`stoker resume {name}` or `stoker cancel {name}`"
        )


def _exit_code(progress: BatchProgress) -> int:
    return 0 if progress.is_ended and progress.failed == 0 and progress.done == progress.total else 1
