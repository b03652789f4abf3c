"""Documents through the command line and real workers of their node: read, searched, changed, removed, killed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import chromadb
import psycopg
import pytest

from tests.support import hostile_documents as made
from tests.support.own_services import OwnChroma, server_folder
from tests.support.processes import WorkerProcess, marked, stoker
from tests.support.waiting import wait_until

DOCUMENTS = 30
GOOD = 4
HOSTILE = {
    "bomb.docx": "archive_bomb",
    "cut.pdf": "corrupt_document",
    "empty.txt": "empty_document",
    "encrypted.docx": "encrypted_document",
    "large.pdf": "too_large",
    "password.pdf": "encrypted_document",
    "picture.pdf": "unsupported_document",
    "scan.pdf": "no_text",
}


@pytest.fixture
def chroma() -> Iterator[OwnChroma]:
    with server_folder() as folder, OwnChroma(folder / "chroma") as server:
        yield server


@pytest.fixture
def reading_env(env: dict[str, str], chroma: OwnChroma) -> dict[str, str]:
    return env | {"STOKER_CACHE__CHROMA_URL": chroma.url, "STOKER_WORKER__NODE": "documents"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Good documents of four kinds, one of them with a wrong name, and eight that cannot be read."""
    place = tmp_path / "documents"
    place.mkdir()
    (place / "furnace.md").write_text("# The furnace\n\nThe stoker keeps the furnace fed with coal.\n")
    (place / "ships.txt").write_bytes(made.pdf([["The Albatross sails at dawn."], ["The Bellerophon stays in port."]]))
    (place / "letter.docx").write_bytes(made.docx("Dear captain,", "the cargo of tea has arrived."))
    (place / "wages.xlsx").write_bytes(made.xlsx({"Wages": [["Name", "Shillings"], ["Fireman", 42]]}))
    (place / "bomb.docx").write_bytes(made.docx_bomb())
    (place / "cut.pdf").write_bytes(made.pdf([["cut"]])[:200])
    (place / "empty.txt").write_bytes(b"")
    (place / "encrypted.docx").write_bytes(made.ENCRYPTED_OFFICE)
    (place / "password.pdf").write_bytes(made.pdf([["secret"]], password="pass"))
    (place / "picture.pdf").write_bytes(made.PNG)
    (place / "scan.pdf").write_bytes(made.pdf([[]]))
    made.sparse_file(place / "large.pdf", 500 * 1024 * 1024)
    return place


def test_a_folder_is_read_searched_changed_and_emptied(
    reading_env: dict[str, str], folder: Path, tmp_path: Path, chroma: OwnChroma, postgres_url: str
) -> None:
    env = reading_env
    with WorkerProcess("reader", env=env, folder=tmp_path):
        added = stoker("documents", "add", folder, "-c", "ships", "--json", env=env)
        assert added.returncode == 1, added.stderr
        figures = json.loads(added.stdout)
        assert (figures["ready"], figures["failed"], figures["not_in_chroma"]) == (GOOD, len(HOSTILE), 0)
        failures = {Path(row["source"]).name: row["error_code"] for row in figures["failures"]}
        assert failures == HOSTILE
        assert all(Path(row["source"]).name in row["error_message"] for row in figures["failures"])
        for name in HOSTILE:
            (folder / name).unlink()

        again = json.loads(stoker("documents", "add", folder, "-c", "ships", "--prune", "--json", env=env).stdout)
        assert (again["unchanged"], again["removed"], again["passages"]) == (GOOD, len(HOSTILE), figures["passages"])
        [best, *_] = json.loads(
            stoker("documents", "search", "which ship stays?", "-c", "ships", "--json", env=env).stdout
        )
        assert (Path(best["source"]).name, best["page"]) == ("ships.txt", 1)
        assert "Bellerophon" in best["text"]
        shown = stoker("documents", "search", "who feeds the furnace", "-c", "ships", "--top-k", "1", env=env)
        assert "furnace.md" in shown.stdout and "The furnace" in shown.stdout

        (folder / "furnace.md").write_text("# The engine\n\nOil burns now, and nobody shovels.\n")
        changed = json.loads(stoker("documents", "add", folder, "-c", "ships", "--json", env=env).stdout)
        assert (changed["changed"], changed["unchanged"]) == (1, GOOD - 1)
        found = json.loads(
            stoker("documents", "search", "coal for the furnace", "-c", "ships", "--json", env=env).stdout
        )
        assert not any("shovel" not in hit["text"] for hit in found if hit["source"].endswith("furnace.md"))
        assert in_chroma(chroma) == passages_in(postgres_url)

        chroma.empty()
        chroma.start()
        before = [hit["id"] for hit in found]
        unaided = json.loads(
            stoker("documents", "search", "coal for the furnace", "-c", "ships", "--json", env=env).stdout
        )
        assert [hit["id"] for hit in unaided] == before
        rebuilt = stoker("documents", "rebuild", "-c", "ships", env=env)
        assert rebuilt.returncode == 0 and in_chroma(chroma) == passages_in(postgres_url), rebuilt.stderr

        removed = stoker("documents", "remove", folder, "-c", "ships", env=env)
        assert f"{GOOD} documents removed" in removed.stderr
        wait_until(lambda: not in_chroma(chroma), 20, "the vectors have left Chroma")
        assert passages_in(postgres_url) == set()


def test_a_killed_reader_leaves_nothing_undone_or_done_twice(
    reading_env: dict[str, str], tmp_path: Path, chroma: OwnChroma, postgres_url: str
) -> None:
    env = reading_env
    folder = tmp_path / "letters"
    folder.mkdir()
    for number in range(DOCUMENTS):
        text = "\n\n".join(
            f"Paragraph {place} of letter {number} is about cargo {number * place}." for place in range(30)
        )
        (folder / f"letter-{number}.md").write_text(f"# Letter {number}\n\n{text}\n")
    with WorkerProcess("killed", env=env, folder=tmp_path) as killed:
        added = stoker("documents", "add", folder, "-c", "letters", "--no-wait", "--json", env=env)
        assert added.returncode == 0, added.stderr
        wait_until(lambda: ready_in(postgres_url) >= DOCUMENTS // 4, 90, "some have been read")
        mark = killed.mark
        killed.kill9()
        wait_until(lambda: not marked(mark), 10, "all of it is gone, converters too")
    assert ready_in(postgres_url) < DOCUMENTS
    with WorkerProcess("next", env=env, folder=tmp_path):
        again = stoker("documents", "add", folder, "-c", "letters", "--json", env=env)
        assert again.returncode == 0, again.stderr
    figures = json.loads(again.stdout)
    assert (figures["ready"], figures["unchanged"], figures["not_in_chroma"]) == (DOCUMENTS, DOCUMENTS, 0)
    with psycopg.connect(postgres_url) as connection:
        rows = connection.execute(
            """
            SELECT d.passages, count(p.id), count(DISTINCT p.place) FROM documents d
            JOIN passages p ON p.document_id = d.id GROUP BY d.id"""
        ).fetchall()
    assert len(rows) == DOCUMENTS
    assert all(stated == there == places for stated, there, places in rows)
    assert in_chroma(chroma) == passages_in(postgres_url)


def in_chroma(chroma: OwnChroma) -> set[int]:
    """The ids of all passages that Chroma has."""
    client = chromadb.HttpClient(port=int(chroma.url.rpartition(":")[2]))
    return {int(one) for collection in client.list_collections() for one in collection.get(include=[])["ids"]}


def passages_in(postgres_url: str) -> set[int]:
    """The ids of all passages."""
    with psycopg.connect(postgres_url) as connection:
        return {row[0] for row in connection.execute("SELECT id FROM passages")}


def ready_in(postgres_url: str) -> int:
    """How many documents are ready."""
    with psycopg.connect(postgres_url) as connection:
        return len(connection.execute("SELECT id FROM documents WHERE state = 'ready'").fetchall())
