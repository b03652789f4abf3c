"""Adding documents: files, folders and URLs become rows that the documents node reads; and those gone are removed.

It must not convert anything: what a file is shows when it is read. One that cannot be read is a failed document.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from documents.convert import check_size
from runtime.errors import Permanent
from runtime.settings import DocumentSettings
from store.database import Database, Session
from store.documents import Added, NewDocument, add_document, list_documents, remove_documents

CHUNK_DOCUMENTS: Final = 200  # in one transaction
MOST_SOURCE_BYTES: Final = 2_000  # of a path or URL: an index row of Postgres has 2.7 KB at most
CHUNK_BYTES: Final = 32 * 1024 * 1024
# What a folder is searched for. A file that is named itself is read whatever it is called.
EXTENSIONS: Final = frozenset(
    (".pdf", ".docx", ".xlsx", ".pptx", ".html", ".htm", ".xhtml", ".md", ".rst", ".txt", ".text", ".csv", ".tsv")
)


@dataclass(slots=True)
class Gathered:
    """What the arguments name: sources in order, names that are nothing, and how many files of other kinds there were.

    A source is a URL, or the absolute path of a file.
    """

    sources: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class AddedDocuments:
    """What adding did: the ids of all in the order of the sources, and how many were new, changed and so on."""

    ids: list[int] = field(default_factory=list)
    done: Counter[Added] = field(default_factory=Counter)
    removed: int = 0


def is_url(source: str) -> bool:
    """Whether it is to be fetched."""
    return source.lower().startswith(("http://", "https://"))


def gather(names: Sequence[str]) -> Gathered:
    """What paths, folders and URLs name; a folder's files in order, without hidden ones and links to folders."""
    found = Gathered()
    for name in names:
        if is_url(name):
            _take(name, found)
            continue
        try:
            path = Path(name).resolve()
            if path.is_dir():
                _gather_folder(path, found)
            elif path.exists():
                _take(str(path), found)
            else:
                found.missing.append(f"{name}: no such file or folder")
        except (OSError, ValueError) as error:  # such as a name that is too long, or a NUL in it
            found.missing.append(f"{name!r:.200}: {error}")
    found.sources = list(dict.fromkeys(found.sources))
    return found


def _take(source: str, found: Gathered) -> None:
    """Among the sources, if Postgres can store it."""
    if "\0" in source or source.encode(errors="ignore").decode() != source:
        found.missing.append(f"{source!a:.200}: its name is no text in UTF-8; rename it")
    elif len(source.encode()) > MOST_SOURCE_BYTES:
        found.missing.append(f"{source:.200}…: has more than {MOST_SOURCE_BYTES:,} bytes; use a shorter path or URL")
    else:
        found.sources.append(source)


def add_documents(
    database: Database,
    sources: Sequence[str],
    *,
    tenant: str,
    collection_id: int | None,
    limits: DocumentSettings,
    force: bool = False,
    on_progress: Callable[[int], None] = lambda _: None,
) -> AddedDocuments:
    """Store all of them, some hundred in a transaction; again after a crash it changes nothing that was stored."""
    added = AddedDocuments()
    ids: dict[str, int] = {}
    pending = iter(sorted(sources))  # in one order, or two commands would wait for each other
    while chunk := list(_chunk(pending, limits)):
        with database.transaction() as session:
            for document in chunk:
                identifier, done = add_document(
                    session, document, tenant=tenant, collection_id=collection_id, force=force
                )
                ids[document.source] = identifier
                added.done[done] += 1
        on_progress(len(ids))
    added.ids = [ids[source] for source in sources]
    return added


def remove_missing(
    session: Session,
    folders: Sequence[str],
    present: Sequence[str],
    *,
    tenant: str,
    collection: str,
    collection_id: int,
) -> list[str]:
    """Remove a collection's documents that lay in these folders and are there no more: their sources."""
    inside = tuple(str(Path(folder).resolve()) + os.sep for folder in folders if Path(folder).is_dir())
    known = set(present)
    gone = [
        row.source
        for row in list_documents(session, tenant=tenant, collection=collection)
        if row.source.startswith(inside) and row.source not in known and not Path(row.source).exists()
    ]
    return remove_documents(session, gone, tenant=tenant, collection_id=collection_id) if gone else []


def _gather_folder(folder: Path, found: Gathered) -> None:
    def unreadable(error: OSError) -> None:
        found.missing.append(f"{error.filename}: {error.strerror}; check its permissions")

    for place, folders, files in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            suffix = Path(name).suffix.lower()
            if name.startswith("."):
                continue
            path = Path(place) / name
            if path.is_symlink() and not path.resolve().is_relative_to(folder):
                found.left_out["links out of the folder"] += 1
            elif suffix in EXTENSIONS:
                _take(str(path), found)
            else:
                found.left_out[suffix or "no extension"] += 1


def _chunk(sources: Iterator[str], limits: DocumentSettings) -> Iterator[NewDocument]:
    size = 0
    for count, source in enumerate(sources, 1):
        document = NewDocument(source) if is_url(source) else _read(source, limits)
        yield document
        size += document.size_bytes or 0
        if count == CHUNK_DOCUMENTS or size >= CHUNK_BYTES:
            return


def _read(source: str, limits: DocumentSettings) -> NewDocument:
    path = Path(source)
    try:
        size = path.stat().st_size
        check_size(size, path.name, limits)
        if not path.is_file():
            return NewDocument(source, failure=("unreadable", f"{path.name}: is no regular file"))
        content = path.read_bytes()
    except Permanent as error:
        return NewDocument(source, size_bytes=size, failure=(error.code, str(error)))
    except OSError as error:
        return NewDocument(source, failure=("unreadable", f"{path.name}: {error.strerror}; check its permissions"))
    return NewDocument(source, content, hashlib.sha256(content).hexdigest(), len(content))
