"""Commands about the cache: stats, certify, clear, ttl."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from cache.keys import collection_name
from pipeline.namespace_figures import certificates, figures_of
from runtime.errors import BadInput, Deadlocked, NotFound, ServiceUnreachable
from runtime.settings import Settings
from scripts.local import connected
from scripts.lookup import TENANT, opened_database
from scripts.submit_options import Window
from scripts.terminal import emit, emit_json, emit_table, say
from store.cache_reports import (
    Cleared,
    NamespaceReport,
    cache_totals,
    clear_all,
    clear_checkpoint,
    clear_sources,
    clear_template,
    namespace_reports,
    set_ttl,
)
from store.database import Database, Session
from store.recent import RecentAnswers

if TYPE_CHECKING:
    from pipeline.certify import Certified

TEMPLATE_CHARACTERS = 48
DEADLOCKS_BORNE = 4  # each takes Postgres a second to see


@click.group()
def cache() -> None:
    """Answers that were given before: what they save, how wrong they are at most, and making them old."""


@cache.command()
@click.option("--json", "as_json", is_flag=True)
@click.pass_obj
def stats(settings: Settings, as_json: bool) -> None:
    """What the batches that are still there took from the cache, by tier; the semantic cache by namespace."""
    with opened_database(connected(settings)) as database, database.transaction() as session:
        totals = cache_totals(session, TENANT)
        reports = namespace_reports(session, TENANT)
    served = totals.exact + totals.duplicate + totals.semantic
    figures = {
        "entries": totals.entries,
        "jobs": totals.jobs,
        "exact": totals.exact,
        "duplicate": totals.duplicate,
        "semantic": totals.semantic,
        "share": round(served / totals.jobs, 4) if totals.jobs else 0.0,
        "tokens_saved": totals.saved_tokens,
        "audits": sum(report.audits for report in reports),
        "audit_tokens": sum(report.audit_tokens for report in reports),
        "lookups_lost_to_outages": totals.unlooked,
    }
    found = _certified(reports)
    namespaces = [figures_of(report, one) for report, one in zip(reports, found, strict=True)]
    if as_json:
        emit_json(figures | {"namespaces": namespaces})
        return
    emit_table("cache", ("figure", "value"), list(figures.items()))
    if namespaces:
        emit_table("namespaces", _COLUMNS, [_row(*both) for both in zip(namespaces, found, strict=True)])


@cache.command()
@click.argument("namespace", type=int, required=False)
@click.option("--json", "as_json", is_flag=True)
@click.pass_obj
def certify(settings: Settings, namespace: int | None, as_json: bool) -> None:
    """What can be said of wrong answers, for each namespace or for NAMESPACE: the sentence, its figures, and why."""
    with opened_database(connected(settings)) as database, database.transaction() as session:
        reports = [report for report in namespace_reports(session, TENANT) if namespace in (None, report.id)]
    found = _certified(reports)
    if namespace is not None and not found:
        raise NotFound(f"no namespace {namespace}; `stoker cache stats` lists them")
    if as_json:
        emit_json([one.figures() for one in found])
        return
    if not found:
        say("no namespace yet: nothing was looked up semantically (`--cache semantic`)")
    for one in found:
        emit(_statement(one))


@cache.command()
@click.option(
    "--checkpoint",
    metavar="DIGEST",
    help="Only answers of this checkpoint: checkpoint_digest in a manifest, or url where the engine is not ours.",
)
@click.option("--template", metavar="NAMESPACE", type=int, help="Only answers to the template of this namespace.")
@click.option("--source", "sources", multiple=True, help="Only answers whose lines name this source. Repeatable.")
@click.pass_obj
def clear(settings: Settings, checkpoint: str | None, template: int | None, sources: tuple[str, ...]) -> None:
    """Make answers of before old: equal requests run again. Results stay. Without an option: all of them.

    Namespaces go with them, and so do their certificates: the next lookups begin with a pilot. --source leaves them.
    """
    if sum((checkpoint is not None, template is not None, bool(sources))) > 1:
        raise click.UsageError("name one of --checkpoint, --template and --source, or none to clear all")

    def step(session: Session) -> Cleared:
        if checkpoint is not None:
            return clear_checkpoint(session, TENANT, checkpoint)
        if template is not None:
            return clear_template(session, TENANT, template)
        return clear_sources(session, TENANT, sources) if sources else clear_all(session, TENANT)

    gone = _carry_out(connected(settings), step)
    answers = f"{_counted(len(gone.keys), 'answer')} forgotten"
    if checkpoint is not None:  # those of the exact cache are not told apart by it: they are found no more
        answers = "the checkpoint's answers forgotten"
    certificates = f", and {_counted(len(gone.secrets), 'namespace')} with certificate" if gone.secrets else ""
    say(f"{answers}{certificates}; batches go on without")


@cache.command()
@click.argument("namespace", type=int)
@click.argument("time", type=Window())
@click.pass_obj
def ttl(settings: Settings, namespace: int, time: float) -> None:
    """Let the answers of NAMESPACE serve for TIME (such as 12h or 7d) after they were given."""
    changed = _carry_out(connected(settings), lambda session: set_ttl(session, TENANT, namespace, ttl_s=time))
    say(f"{_counted(len(changed.keys), 'answer')}, and those to come, serve for {time:,.0f} s")


def _certified(reports: Sequence[NamespaceReport]) -> list[Certified]:
    """The certificates; only who has namespaces needs the libraries of the semantic cache."""
    try:
        return certificates(reports)
    except ImportError as error:
        raise BadInput(f"to read certificates {error.name} is needed: run `make cache`") from error


def _carry_out(served: Settings, step: Callable[[Session], Cleared]) -> Cleared:
    """One transaction, then what it took away is taken from Redis and Chroma too."""
    with opened_database(served) as database:
        gone = _beside_batches(database, step)
    recent = RecentAnswers(served.require_redis())
    try:
        recent.forget(gone.keys)
    finally:
        recent.close()
    if gone.secrets and served.cache.chroma_url is not None:
        _drop_collections(served.cache.chroma_url, gone.secrets)
    return gone


def _beside_batches(database: Database, step: Callable[[Session], Cleared]) -> Cleared:
    """What the step took away; done again if a running batch's write stood against it: to clear twice is harmless."""
    for _ in range(DEADLOCKS_BORNE):
        with suppress(Deadlocked), database.transaction() as session:
            return step(session)
    with database.transaction() as session:
        return step(session)


def _drop_collections(url: str, secrets: list[bytes]) -> None:
    try:
        from cache.index import Index  # noqa: PLC0415  # 0.7 s that no other command needs

        index = Index(url)
        for secret in secrets:
            index.drop(collection_name(secret))
    except (ImportError, ServiceUnreachable) as error:
        say(f"{error}; the collections there stay as they are, nothing finds them any more")


_COLUMNS = ("id", "state", "lookups", "hits", "wrong at most", "saved", "audits", "their tokens")


def _row(one: dict[str, Any], found: Certified) -> tuple[object, ...]:
    hits = f"{one['hits']:,} ({one['share']:.1%})"
    return (
        one["namespace"],
        one["state"],
        one["lookups"],
        hits,
        found.at_most,
        one["tokens_saved"],
        one["audits"],
        one["audit_tokens"],
    )


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _statement(one: Certified) -> str:
    threshold = "none" if one.threshold is None else f"{one.threshold:.2f} log odds"
    known = one.self_disagreement
    lines = [
        f"namespace {one.namespace}  {one.alias}  {' '.join(one.template.split())[:TEMPLATE_CHARACTERS]}",
        f"  state       {one.state}: {'; '.join(one.why)}",
        f"  statement   {one.sentence}",
        f"  answers     {one.entries:,} that may serve"
        + ("" if one.ttl_s is None else f", each for {one.ttl_s:,.0f} s after it was given"),
        f"  threshold   {threshold}; {one.audit_rate:.0%} audited; {one.lookups - one.settled:,} lookups not settled",
        f"  engine      disagrees with itself in {known:.1%} of {one.asked_twice:,} jobs asked twice"
        if known is not None
        else f"  engine      asked twice {one.asked_twice:,} times so far",
    ]
    return "\n".join(lines)
