"""Commands about documents: add, list, search, remove, rebuild."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape
from rich.table import Table

from models.states import DocumentState
from pipeline.adding import AddedDocuments, Gathered, add_documents, gather, is_url, remove_missing
from runtime.errors import BadInput
from runtime.settings import Settings
from scripts.local import LocalProcess, ensure_node, local_services, prepare_schema
from scripts.lookup import TENANT, opened_database
from scripts.terminal import PLAIN_LINE_EVERY_S, bar, emit_json, emit_table, say, stderr, stdout
from store.database import Database
from store.documents import (
    Added,
    DocumentRow,
    Tally,
    collection_named,
    list_collections,
    list_documents,
    made_collection,
    remove_collection,
    remove_documents,
    tally_of,
)
from worker.library import library_of
from worker.semantic import index_of

if TYPE_CHECKING:
    from pipeline.search import Hit

NO_CHROMA = "no Chroma is set: searches compare all vectors in Postgres one by one"
POLL_S = 0.3
INDEX_PATIENCE_S = 5.0
SHOWN_FAILURES = 50
MODES = ("fused", "dense", "text")

LONGEST_NAME = 200


class CollectionName(click.ParamType[str]):
    """A name that can be read and typed."""

    name = "NAME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        name = str(value).strip()
        if not name or len(name) > LONGEST_NAME or not name.isprintable():
            self.fail(f"{value!r:.80} is no name; write 1 to {LONGEST_NAME} letters, such as handbook", param, ctx)
        return name


collection_option = click.option(
    "--collection", "-c", required=True, type=CollectionName(), help="The collection; `add` makes it if there is none."
)


@click.group()
def documents() -> None:
    """Files and web pages as passages that jobs can draw on: add, list, search, remove."""


@documents.command()
@click.argument("names", nargs=-1, metavar="PATH|URL…")
@click.option("--from-file", type=click.File("r"), help="A list of paths and URLs, one a line; - for standard input.")
@collection_option
@click.option(
    "--prune", is_flag=True, help="Remove the collection's documents that are no longer in the folders given."
)
@click.option("--force", is_flag=True, help="Read also what has not changed.")
@click.option("--no-wait", is_flag=True, help="Only store; the documents node reads them whenever it runs.")
@click.option("--json", "as_json", is_flag=True)
@click.pass_obj
def add(
    settings: Settings,
    names: tuple[str, ...],
    from_file: Any,
    collection: str,
    prune: bool,
    force: bool,
    no_wait: bool,
    as_json: bool,
) -> int:
    """Read documents into a collection: PDF, DOCX, XLSX, PPTX, HTML, Markdown, text and CSV; folders with all in them.

    Unchanged ones are left alone, changed ones replace their passages. One that cannot be read stops no other.
    """
    wanted = [*names, *_listed(from_file)]
    if not wanted:
        raise click.UsageError("name a file, a folder or a URL, or a list of them with --from-file")
    found = gather(wanted)
    say_gathered(found)
    if not found.sources:
        raise BadInput("no document was found there; nothing was added or removed (`remove --all` removes all)")
    began = time.monotonic()
    with _opened(settings, with_chroma=True) as (served, database), ExitStack() as stack:
        added = _stored(database, served, found, collection=collection, force=force)
        if prune and not found.missing:
            added.removed = _pruned(database, wanted, found, collection=collection)
        if not no_wait:
            node = ensure_node(served, stack, "documents")
            await_documents(database, added.ids, node)
        seconds = time.monotonic() - began
        return _report(database, served, found, added, seconds=seconds, as_json=as_json)


@documents.command("list")
@click.option("--collection", "-c", metavar="NAME", help="The documents of this one; else all collections.")
@click.option("--failed", is_flag=True, help="Only documents that could not be read.")
@click.option("--json", "as_json", is_flag=True)
@click.pass_obj
def list_(settings: Settings, collection: str | None, failed: bool, as_json: bool) -> None:
    """Collections with their counts, or the documents of one."""
    with _opened(settings) as (_, database), database.transaction() as session:
        if collection is None and not failed:
            rows = list_collections(session, tenant=TENANT)
        else:
            if collection is not None:
                collection_named(session, TENANT, collection)
            found = list_documents(session, tenant=TENANT, collection=collection)
            _list_documents([row for row in found if not failed or row.state is DocumentState.FAILED], as_json=as_json)
            return
    if as_json:
        emit_json([{"collection": name, **asdict(tally)} for name, tally in rows])
        return
    emit_table(
        "collections",
        ("collection", "ready", "failed", "waiting", "passages", "not yet in Chroma"),
        [(name, t.ready, t.failed, t.pending + t.running, t.passages, t.unindexed) for name, t in rows],
    )


@documents.command()
@click.argument("query")
@collection_option
@click.option("--top-k", type=click.IntRange(1, 50), default=5, show_default=True)
@click.option(
    "--mode",
    type=click.Choice(MODES),
    help="dense: by meaning; text: by words; fused: both. Default: what finds most (docs/documents.md).",
)
@click.option("--json", "as_json", is_flag=True)
@click.pass_obj
def search(settings: Settings, query: str, collection: str, top_k: int, mode: str | None, as_json: bool) -> None:
    """The passages that QUERY is about, with their scores and where they stand; its words are marked."""
    if not query.strip():
        raise click.UsageError("say what to search for")
    with _opened(settings, with_chroma=True) as (served, database):
        hits = asyncio.run(_search(database, served, query, collection=collection, top_k=top_k, mode=mode))
        marked = _marked(database, hits, query)
    if as_json:
        emit_json([_figures(hit, rank) for rank, hit in enumerate(hits, 1)])
        return
    for rank, hit in enumerate(hits, 1):
        _show(rank, hit, marked.get(hit.passage.id) or hit.passage.text)
    if not hits:
        say(f"nothing in {collection} is like it")


@documents.command()
@click.argument("names", nargs=-1, metavar="PATH|URL…")
@collection_option
@click.option("--all", "everything", is_flag=True, help="The collection with all of its documents.")
@click.pass_obj
def remove(settings: Settings, names: tuple[str, ...], collection: str, everything: bool) -> None:
    """Take documents out of a collection, with their passages; of a folder all that lie in it."""
    if bool(names) == everything:
        raise click.UsageError("name documents or folders, or say --all")
    with _opened(settings) as (_, database), database.transaction() as session:
        stored = collection_named(session, TENANT, collection)
        if everything:
            count = remove_collection(session, tenant=TENANT, collection_id=stored.id)
        else:
            places = tuple(name if is_url(name) else str(Path(name).resolve()) for name in names)
            rows = list_documents(session, tenant=TENANT, collection=collection)
            inside = tuple(f"{place}/" for place in places)
            gone = [row.source for row in rows if row.source in places or row.source.startswith(inside)]
            count = len(remove_documents(session, gone, tenant=TENANT, collection_id=stored.id)) if gone else 0
    say(f"{count:,} documents removed from {collection}")
    if not count:
        say(f"nothing named is in it; `stoker documents list -c {collection}` shows what is")


@documents.command()
@collection_option
@click.pass_obj
def rebuild(settings: Settings, collection: str) -> None:
    """Make a collection's vectors in Chroma anew from Postgres; nothing is read or embedded again."""
    from pipeline.indexing import rebuild_index  # noqa: PLC0415  # its libraries are an extra

    with _opened(settings, with_chroma=True) as (served, database):
        if served.cache.chroma_url is None:
            raise BadInput(f"{NO_CHROMA}; name it in STOKER_CACHE__CHROMA_URL")
        with database.transaction() as session:
            stored = collection_named(session, TENANT, collection)
            total = dict(list_collections(session, tenant=TENANT))[collection].passages
        with bar("telling Chroma", total=total) as show:
            rebuild_index(database, index_of(served.cache), stored, on_progress=show)
    say(f"{total:,} passages of {collection} are in Chroma")


@contextmanager
def _opened(settings: Settings, *, with_chroma: bool = False) -> Iterator[tuple[Settings, Database]]:
    """Services that answer, embedded ones started for this block if none is set or runs, and their database."""
    with local_services(settings, with_chroma=with_chroma and settings.is_embedded) as served:
        prepare_schema(served)
        with opened_database(served) as database:
            yield served, database


def await_documents(database: Database, ids: Sequence[int], node: LocalProcess | None) -> Tally:
    """Show progress until all of them are ready or failed, and until Chroma has their passages or does not answer."""
    last_news, before = time.monotonic(), Tally()
    next_line_at, was_over = 0.0, False
    with bar("reading", total=len(ids)) as show:
        while True:
            if node is not None:
                node.expect_alive()
            with database.transaction() as session:
                tally = tally_of(session, ids)
            show(tally.ended)
            is_over = tally.ended == tally.total
            if not stderr.is_terminal and (is_over != was_over or time.monotonic() >= next_line_at):
                was_over = is_over
                next_line_at = time.monotonic() + PLAIN_LINE_EVERY_S
                say(f"{tally.ended:,}/{tally.total:,} documents read, {tally.failed:,} of them failed")
            if tally != before:
                last_news, before = time.monotonic(), tally
            if tally.ended == tally.total and (not tally.unindexed or time.monotonic() - last_news > INDEX_PATIENCE_S):
                return tally
            time.sleep(POLL_S)


def _listed(file: Any) -> list[str]:
    return [] if file is None else [line.strip() for line in file if line.strip() and not line.startswith("#")]


def say_gathered(found: Gathered) -> None:
    """What of the arguments is no document."""
    for problem in found.missing:
        say(problem)
    if found.left_out:
        kinds = ", ".join(f"{suffix} ({count:,})" for suffix, count in found.left_out.most_common(8))
        say(f"left out of the folders, as files of other kinds: {kinds}; name one itself to have it read")


def _stored(database: Database, settings: Settings, found: Gathered, *, collection: str, force: bool) -> AddedDocuments:
    with database.transaction() as session:
        collection_id = made_collection(session, TENANT, collection)
    with bar("storing", total=len(found.sources)) as show:
        return add_documents(
            database,
            found.sources,
            tenant=TENANT,
            collection_id=collection_id,
            limits=settings.documents,
            force=force,
            on_progress=show,
        )


def _pruned(database: Database, wanted: Sequence[str], found: Gathered, *, collection: str) -> int:
    with database.transaction() as session:
        stored = collection_named(session, TENANT, collection)
        gone = remove_missing(
            session, wanted, found.sources, tenant=TENANT, collection=collection, collection_id=stored.id
        )
    return len(gone)


def _report(
    database: Database,
    settings: Settings,
    found: Gathered,
    added: AddedDocuments,
    *,
    seconds: float,
    as_json: bool,
) -> int:
    """What became of them; the exit code: 1 if any failed or was missing."""
    with database.transaction() as session:
        tally = tally_of(session, added.ids)
        rows = list_documents(session, tenant=TENANT, ids=added.ids)
    failures = [row for row in rows if row.state is DocumentState.FAILED]
    figures = {
        "documents": len(added.ids),
        **{kind.value: added.done[kind] for kind in Added},
        "removed": added.removed,
        "ready": tally.ready,
        "failed": tally.failed,
        "waiting": tally.pending + tally.running,
        "missing": len(found.missing),
        "passages": tally.passages,
        "not_in_chroma": tally.unindexed,
        "seconds": round(seconds, 2),
    }
    if as_json:
        emit_json(figures | {"failures": [asdict(row) for row in failures]})
    else:
        emit_table(
            "documents", ("figure", "value"), [(name.replace("_", " "), value) for name, value in figures.items()]
        )
        for row in failures[:SHOWN_FAILURES]:
            say(f"{row.error_code}: {row.error_message}")
        for row in rows:
            if row.note and row.state is DocumentState.READY:
                say(f"note: {row.source}: {row.note}")
        if len(failures) > SHOWN_FAILURES:
            say(f"… and {len(failures) - SHOWN_FAILURES:,} more: `stoker documents list --failed`")
        if tally.unindexed and settings.cache.chroma_url is None:
            say(NO_CHROMA)
        elif tally.unindexed:
            say("Chroma does not have all passages yet; the documents node tells it when it answers")
    return 1 if failures or found.missing else 0


def _list_documents(rows: Sequence[DocumentRow], *, as_json: bool) -> None:
    if as_json:
        emit_json([asdict(row) for row in rows])
        return
    emit_table(
        "documents",
        ("id", "source", "state", "kind", "bytes", "passages", "note or error"),
        [
            (
                r.id,
                r.source,
                r.state.value,
                r.kind or "",
                r.size_bytes or "",
                r.passages,
                f"{r.error_code}: {r.error_message}" if r.error_code else r.note or "",
            )
            for r in rows
        ],
    )


async def _search(
    database: Database, settings: Settings, query: str, *, collection: str, top_k: int, mode: str | None
) -> list[Hit]:
    library, endpoints = library_of(database, settings)
    from pipeline.search import DEFAULT_MODE, SearchMode  # noqa: PLC0415

    async with AsyncExitStack() as stack:
        for endpoint in endpoints:
            await stack.enter_async_context(endpoint)
        how = DEFAULT_MODE if mode is None else SearchMode(mode)
        [hits] = await library.search([query], tenant=TENANT, collection=collection, top_k=top_k, mode=how)
    return hits


def _marked(database: Database, hits: Sequence[Hit], query: str) -> dict[int, str]:
    from store.passages import highlights  # noqa: PLC0415

    with database.transaction() as session:
        return highlights(session, [hit.passage.id for hit in hits], query)


def _figures(hit: Hit, rank: int) -> dict[str, Any]:
    passage = asdict(hit.passage) | {"digest": hit.passage.digest.hex()}
    return {"rank": rank, "score": hit.score, "cosine": hit.cosine, **passage}


def _show(rank: int, hit: Hit, marked: str) -> None:
    """One passage for people, to stdout; \\x02 and \\x03 enclose what is marked."""
    passage = hit.passage
    where = [f"page {passage.page}"] if passage.page else []
    where += [passage.heading] if passage.heading else []
    where.append(f"characters {passage.start:,} to {passage.end:,}")
    cosine = "" if hit.cosine is None else f", cosine {hit.cosine:.3f}"
    table = Table.grid(padding=(0, 1))
    table.add_row(
        f"[bold]{rank}[/bold]", f"[bold]{escape(passage.source)}[/bold]  [dim]score {hit.score:.4f}{cosine}[/dim]"
    )
    table.add_row("", f"[dim]{escape(' · '.join(where))}[/dim]")
    words = escape(" ".join(marked.split())).replace("\x02", "[bold yellow]").replace("\x03", "[/bold yellow]")
    table.add_row("", words)
    stdout.print(table)
