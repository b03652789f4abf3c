"""A batch as the commands show it: its progress while it runs, its figures, what failed and why it waits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from uuid import UUID

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from models.money import money, shown
from models.names import batch_name, short_name
from models.states import Priority
from runtime.clock import utc_now
from scripts.terminal import PLAIN_LINE_EVERY_S, say, stderr
from store.batches import BatchProgress, batch_progress
from store.database import Database
from store.inspection import failures_of

POLL_S = 0.25
FAILURE_KINDS, FAILURE_CHARACTERS = 3, 300


def watch_batch(
    database: Database, batch_id: UUID, *, tenant: str, check: Callable[[], None] | None = None
) -> BatchProgress:
    """Show a batch's progress until it has ended or is paused; its last state. `check` may raise at each look."""
    show = _watch_on_terminal if stderr.is_terminal else _watch_plainly
    return show(_snapshots(database, batch_id, tenant=tenant, check=check))


def _snapshots(
    database: Database, batch_id: UUID, *, tenant: str, check: Callable[[], None] | None
) -> Iterator[BatchProgress]:
    while True:
        if check is not None:
            check()
        with database.transaction() as session:
            progress = batch_progress(session, batch_id, tenant=tenant)
        yield progress
        if progress.is_ended or progress.paused_reason is not None:
            return
        time.sleep(POLL_S)


def _watch_on_terminal(snapshots: Iterator[BatchProgress]) -> BatchProgress:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[detail]}"),
    )
    with Progress(*columns, console=stderr) as shown:
        task: TaskID | None = None
        for snapshot in snapshots:
            if task is None:
                task = shown.add_task(short_name(snapshot.id), total=snapshot.total, detail="")
            shown.update(task, completed=snapshot.done, total=snapshot.total, detail=detail(snapshot))
    return snapshot


def _watch_plainly(snapshots: Iterator[BatchProgress]) -> BatchProgress:
    next_line_at = 0.0
    for snapshot in snapshots:
        if time.monotonic() >= next_line_at:
            say(f"{short_name(snapshot.id)} {snapshot.done}/{snapshot.total} {detail(snapshot)}")
            next_line_at = time.monotonic() + PLAIN_LINE_EVERY_S
    return snapshot


def detail(progress: BatchProgress) -> str:
    """Rate and what did not go well, in one short text."""
    seconds = seconds_of(progress)
    rate = progress.completion_tokens / seconds if seconds else 0.0
    parts = [progress.state.value, f"{rate:.0f} tokens/s"]
    parts += [
        f"{count} {name}"
        for name, count in (("failed", progress.failed), ("truncated", progress.truncated), ("empty", progress.empty))
        if count
    ]
    return " · ".join(parts)


def seconds_of(progress: BatchProgress) -> float:
    """How long the batch has been in progress, to its end if it has one."""
    if progress.in_progress_at is None:
        return 0.0
    return ((progress.ended_at or utc_now()) - progress.in_progress_at).total_seconds()


def summary(progress: BatchProgress) -> dict[str, Any]:
    """The figures of a batch, as `--json` shows them."""
    seconds = seconds_of(progress)
    return {
        "batch": batch_name(progress.id),
        "state": progress.state.value,
        "priority": progress.priority.value,
        "weight": progress.weight,
        "retry_of": batch_name(progress.retry_of) if progress.retry_of else None,
        "skipped": progress.skipped,
        "reused": progress.options.get("reused", 0),
        "followers": progress.followers,
        "paused": progress.paused_reason,
        "jobs": progress.total,
        "done": progress.done,
        "succeeded": progress.succeeded,
        "failed": progress.failed,
        "truncated": progress.truncated,
        "empty": progress.empty,
        "tokens_in": progress.prompt_tokens,
        "tokens_out": progress.completion_tokens,
        "tokens_in_cached": progress.cached_tokens,
        "tokens_reasoning": progress.reasoning_tokens,
        "from_cache": progress.served,
        "tokens_saved": progress.saved_tokens,
        "lookups_lost": progress.unlooked,
        "cost": money(progress.cost),
        "currency": progress.currency if progress.cost else None,
        "seconds": round(seconds, 2),
        "tokens_per_s": round(progress.completion_tokens / seconds, 1) if seconds else 0.0,
        "input": progress.input_name,
    }


def print_summary(progress: BatchProgress, *, places: Sequence[tuple[str, str]] = ()) -> None:
    """The figures of a batch for people, to stderr; `places` says where its files lie."""
    figures = summary(progress)
    table = Table(show_header=False, box=None, padding=(0, 2))
    for name in ("batch", "state", "jobs", "succeeded", "failed", "truncated", "empty"):
        table.add_row(name, str(figures[name]))
    for name in ("skipped", "reused", "retry_of"):
        if figures[name]:
            table.add_row(name.replace("_", " "), str(figures[name]))
    if (progress.priority, progress.weight) != (Priority.NORMAL, 1.0):
        table.add_row("priority", f"{figures['priority']}, weight {progress.weight:g}")
    table.add_row("tokens in", f"{figures['tokens_in']:,} ({figures['tokens_in_cached']:,} from the prefix cache)")
    table.add_row("tokens out", f"{figures['tokens_out']:,}")
    if progress.served:
        table.add_row("from the cache", f"{progress.served:,} answers, {progress.saved_tokens:,} tokens saved")
    if progress.unlooked:
        table.add_row("lookups lost", f"{progress.unlooked:,}, as the semantic cache was away: see `stoker doctor`")
    if progress.cost:
        table.add_row("cost", f"{shown(progress.cost, progress.currency or '')}, asked by priced endpoints")
    table.add_row("tokens/s", f"{figures['tokens_per_s']:,}")
    table.add_row("seconds", str(figures["seconds"]))
    for name, place in places:
        table.add_row(name, place)
    stderr.print(table)
    if progress.truncated:
        say(f"{progress.truncated} answers were cut by their token limit; raise max_tokens or --max-output-tokens.")


def say_failures(database: Database, progress: BatchProgress, *, tenant: str) -> None:
    """If jobs failed: the most frequent kinds, each with what the first one said."""
    if not progress.failed:
        return
    with database.transaction() as session:
        found = failures_of(session, progress.id, tenant=tenant)
    for kind in found.kinds[:FAILURE_KINDS]:
        said = " ".join((kind.message or kind.response or "").split())
        say(f"failed: {kind.count:,} {kind.code}, such as: {said[:FAILURE_CHARACTERS]}")


def say_paused(progress: BatchProgress) -> None:
    """If the batch is paused: why, and the remedies."""
    if progress.paused_reason is not None:
        name = short_name(progress.id)
        say(
            f"paused: {progress.paused_reason}\nlook with `stoker results {name} --errors`, then "
            f"`stoker resume {name}` or `stoker cancel {name}`"
        )


def exit_code(progress: BatchProgress) -> int:
    """0 if the batch has ended and no job failed, else 1."""
    return 0 if progress.is_ended and progress.failed == 0 and progress.done == progress.total else 1
