"""deploy/backup: what a backup holds, which ones are refused, and that nobody of the time after it can write."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import make_url

from models.cost_rows import MoneyBudget
from models.document_rows import Document
from models.gateway_rows import StoredFile
from models.schedule_rows import ScheduleRun
from models.states import Missed, Overlap, RunState
from runtime.clock import utc_now
from store.budgets import lock_budgets, open_batch_budget, settle
from store.database import Database
from store.documents import DocumentClaim, NewDocument, add_document, claim_document, hold_document
from store.money import lock_money, open_batch_money, state_money
from store.schedules import ClaimedRun, NewSchedule, add_schedule, ask_run, claim_run, end_run, hold_schedule_of
from store.shards import Claim, close, extend_leases, write_results
from tests.conftest import empty_database
from tests.support.backups import (
    SCRIPTS,
    backed_up,
    command,
    empty_again,
    libpq_environment,
    restored,
    script,
    with_stand_in,
)
from tests.support.batches import (
    answers,
    chats,
    claimed,
    dispatch_all,
    results_of,
    rows,
    shards_of,
    store_batch,
)
from tests.support.waiting import wait_until

LEASE_S = 30.0


def claimed_batch(database: Database, folder: Path, *, shards: int) -> tuple[UUID, list[Claim]]:
    """A batch of shards with two jobs each, all of them running."""
    batch_id = store_batch(database, folder, chats(2 * shards), shard_jobs=2)
    with database.transaction() as session:
        open_batch_budget(session, batch_id, 1_000)
        open_batch_money(session, batch_id, 1_000)
    dispatch_all(database)
    return batch_id, [claimed(database, shard.id) for shard in shards_of(database, batch_id)]


def reserve(database: Database, claim: Claim) -> None:
    """100 tokens, and 100 nanos of which 10 are spent."""
    with database.transaction() as session:
        settle(session, claim, [budget.id for budget in lock_budgets(session, claim)], reserved=100, spent=0)
        ids = [budget.id for budget in lock_money(session, claim)]
        state_money(session, claim, ids, reserved=100, spent=10, requests=1)


def written(database: Database, claim: Claim, *, jobs: int) -> int | None:
    """The shard's finished jobs after its first `jobs` were answered; None if the fence is lost."""
    with database.transaction() as session:
        return write_results(session, claim, answers(claim.seqs[:jobs]), engine_id=None, lease_s=LEASE_S)


def claimed_document(database: Database) -> DocumentClaim:
    with database.transaction() as session:
        claim = claim_document(session, lease_s=LEASE_S)
    assert claim is not None
    return claim


def claimed_run(database: Database) -> ClaimedRun:
    ((run_id,),) = rows(database, "SELECT id FROM schedule_runs WHERE state = 'waiting' AND sent_at IS NULL")
    with database.transaction() as session:
        schedule = hold_schedule_of(session, run_id)
        assert schedule is not None
        run = claim_run(session, run_id, schedule, lease_s=LEASE_S)
    assert run is not None
    return run


def add_work(database: Database) -> None:
    """A document to be read, and a run that is due."""
    schedule = NewSchedule("local", "nightly", "0 2 * * *", "UTC", ["purge"], "/", Missed.ONCE, Overlap.SKIP)
    with database.transaction() as session:
        add_document(session, NewDocument("/one", b"one", "1"), tenant="local", collection_id=None)
        assert add_schedule(session, schedule)
        assert ask_run(session, "nightly", tenant="local")


def test_what_was_under_way_goes_on_at_once_and_whoever_held_it_finds_no_row(
    database: Database, postgres_url: str, tmp_path: Path
) -> None:
    batch_id, (held,) = claimed_batch(database, tmp_path, shards=1)
    reserve(database, held)
    assert written(database, held, jobs=1) == 1
    add_work(database)
    document, run = claimed_document(database), claimed_run(database)
    waiting = store_batch(database, tmp_path, chats(2))
    backup = backed_up(postgres_url, tmp_path)

    assert written(database, held, jobs=2) == 2
    other = claimed(database, *dispatch_all(database))
    _, (gone,) = claimed_batch(database, tmp_path, shards=1)
    before = results_of(database, batch_id)[:1]
    empty_again(postgres_url)
    restored(backup, url=postgres_url)

    assert rows(database, "SELECT spent, reserved FROM budgets") == [(0, 0)]
    assert rows(database, "SELECT spent, reserved FROM money_budgets") == [(110, 0)], "as of an attempt that died"
    assert results_of(database, batch_id) == before
    dispatch_all(database)
    (held_now,) = (claimed(database, shard.id) for shard in shards_of(database, batch_id))
    (other_now,) = (claimed(database, shard.id) for shard in shards_of(database, waiting))
    _, (new,) = claimed_batch(database, tmp_path, shards=1)
    assert (other_now.shard_id, new.shard_id > gone.shard_id) == (other.shard_id, True)
    assert (other_now.is_first, held_now.is_first, new.is_first) == (True, False, True)
    for zombie in (held, other, gone):
        assert written(database, zombie, jobs=2) is None
        with database.transaction() as session:
            assert extend_leases(session, dict([zombie.key]), lease_s=LEASE_S) == {}
    document_now, run_now = claimed_document(database), claimed_run(database)
    assert (document_now.id, run_now.id, run_now.tries) == (document.id, run.id, 1)
    with database.transaction() as session:
        assert not hold_document(session, document) and hold_document(session, document_now)
        ended = [
            end_run(session, one, RunState.SUCCEEDED, tries=1, exit_code=0, batch_id=None, told="")
            for one in (run, run_now)
        ]
    assert ended == [False, True]
    assert written(database, held_now, jobs=2) == 2
    with database.transaction() as session:
        assert close(session, held_now)
    assert results_of(database, batch_id)[:1] == before
    assert [(shard.state, shard.crashes) for shard in shards_of(database, batch_id)] == [("done", 0)]


def test_a_window_does_not_run_while_the_rows_lie_in_a_backup(
    database: Database, postgres_url: str, tmp_path: Path
) -> None:
    running, ended, validating, waiting = (store_batch(database, tmp_path, chats(1)) for _ in range(4))
    with psycopg.connect(postgres_url) as connection:
        connection.execute("UPDATE batches SET expires_at = now() - interval '1 h', validations = 2")
        connection.execute("UPDATE batches SET state = 'completed', ended_at = now() WHERE id = %s", [ended])
        connection.execute("UPDATE batches SET state = 'validating' WHERE id = ANY(%s)", [[validating, waiting]])
        connection.execute("UPDATE batches SET lease_until = now() - interval '23 h' WHERE id = %s", [validating])
        connection.execute("UPDATE batches SET lease_until = now() - interval '25 h' WHERE id = %s", [waiting])
        moment = connection.execute("SELECT (now() - interval '24 h')::text").fetchone()
    assert moment is not None
    psql = ["psql", "-X", "--single-transaction", "--set=ON_ERROR_STOP=1", f"--file={SCRIPTS / 'restored.sql'}"]
    env = libpq_environment(postgres_url)
    forgot = subprocess.run(psql, env=env, capture_output=True, text=True, check=False)
    assert (forgot.returncode, "state the moment" in forgot.stderr) == (3, True)
    subprocess.run([*psql, f"--set=moment={moment[0]}"], env=env, capture_output=True, check=True)
    left = "SELECT id, round(extract(epoch FROM expires_at - now()) / 3600)::int, validations FROM batches"
    assert {row[0]: row[1:] for row in rows(database, left)} == {
        running: (23, 2),
        ended: (-1, 2),
        validating: (23, 1),
        waiting: (23, 2),
    }


def test_every_lease_is_named_where_they_are_given_back() -> None:
    statements = (SCRIPTS / "restored.sql").read_text()
    metadata = Document.metadata  # of all of these: MoneyBudget, StoredFile, ScheduleRun
    assert {MoneyBudget.metadata, StoredFile.metadata, ScheduleRun.metadata} == {metadata}
    leases = {
        f"{table.name}.{column.name}"
        for table in metadata.sorted_tables
        for column in table.columns
        if re.fullmatch("(lease|counting|fitting)_until", column.name)
    }
    assert len(leases) >= 6
    assert [one for one in leases if not re.search(r"UPDATE {}\b[^;]*\b{}\b".format(*one.split(".")), statements)] == []


def test_files_are_copied_once_and_old_backups_go(postgres_url: str, tmp_path: Path) -> None:
    into, files, target = (tmp_path / name for name in ("backups", "files", "target"))
    for folder in (into, files, target):
        folder.mkdir()
    (files / "file-one").write_bytes(b"one")
    (files / "file-two.partial").write_bytes(b"tw")
    (into / "stoker-20990101T000000Z").mkdir()  # not a whole one, so it is not counted
    for name in ("stoker-20200101T000000Z.partial", "stoker-20200101T000001Z.partial"):
        (into / name / "database").mkdir(parents=True)
    os.utime(into / "stoker-20200101T000000Z.partial", (0, 0))
    made = []
    for number in range(3):
        made.append(backed_up(postgres_url, into, files, BACKUP_KEEP="2"))
        (files / f"file-{number}").write_bytes(b"more")
        wait_until(lambda: not (into / f"stoker-{utc_now():%Y%m%dT%H%M%SZ}").exists(), 5, "another second")
    assert names_in(into) == [
        "stoker-20200101T000001Z.partial",
        *(backup.name for backup in made[1:]),
        "stoker-20990101T000000Z",
    ]
    assert names_in(made[2] / "files") == ["file-0", "file-1", "file-one"]
    assert (made[1] / "files" / "file-one").stat().st_ino == (made[2] / "files" / "file-one").stat().st_ino
    assert made[2].stat().st_mode & 0o077 == 0
    assert script("restore.sh", "--check", made[2], url=postgres_url).returncode == 0
    refused = script("restore.sh", made[2], url=postgres_url)
    assert (refused.returncode, refused.stderr) == (2, "restore: the backup has files: state the gateway's folder\n")
    empty_again(postgres_url)
    no_room = with_stand_in(tmp_path, postgres_url, cp="exit 1")
    failed = script("restore.sh", made[2], target, url=postgres_url, **no_room)
    assert (failed.returncode, "could not be copied" in failed.stderr) == (1, True), failed.stderr
    empty_again(postgres_url)
    restored(made[2], target, url=postgres_url)
    assert names_in(target) == ["file-0", "file-1", "file-one"]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def cut_manifest(backup: Path) -> None:
    (backup / "MANIFEST").unlink()


def change_rows(backup: Path) -> None:
    rows_file = max((backup / "database").iterdir(), key=lambda file: file.stat().st_size)
    content = bytearray(rows_file.read_bytes())
    content[len(content) // 2] ^= 1
    rows_file.write_bytes(content)


def lose_rows(backup: Path) -> None:
    min((backup / "database").iterdir()).unlink()


def add_a_file(backup: Path) -> None:
    (backup / "files" / "file-of-nobody").touch()


def change_sums(backup: Path) -> None:
    (backup / "SHA256SUMS").write_text("")


def state_newer_server(backup: Path) -> None:
    manifest = backup / "MANIFEST"
    manifest.write_text(re.sub(r"^postgres=.*$", "postgres=990001", manifest.read_text(), flags=re.MULTILINE))


def leave_it(backup: Path) -> None:
    """The database is not empty."""


@pytest.fixture(scope="module")
def made_backup(postgres_template: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with empty_database(postgres_template) as url:
        return backed_up(url, tmp_path_factory.mktemp("backups"))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (cut_manifest, "has no MANIFEST"),
        (change_rows, "is not what the backup wrote"),
        (lose_rows, "is not what the backup wrote"),
        (add_a_file, "has more or fewer files"),
        (change_sums, "is not what the backup wrote"),
        (state_newer_server, "the backup is of 99"),
        (leave_it, "is not empty"),
    ],
)
def test_a_backup_that_cannot_be_trusted_is_refused_and_nothing_is_touched(
    made_backup: Path, postgres_url: str, tmp_path: Path, spoil: Callable[[Path], None], told: str
) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", made_backup, copy], check=True)
    spoil(copy)
    refused = script("restore.sh", copy, url=postgres_url)
    assert (refused.returncode, told in refused.stderr) == (1, True), refused.stderr
    with psycopg.connect(postgres_url) as connection:
        assert connection.execute("SELECT count(*) FROM batches").fetchone() == (0,)


@contextmanager
def mere_owner(url: str) -> Iterator[dict[str, str]]:
    """libpq's variables of a role that owns this database, may create others and is no superuser."""
    name = f"stoker_test_{uuid4().hex[:8]}"
    role, database = sql.Identifier(name), sql.Identifier(make_url(url).database or "")
    of_database = sql.SQL("ALTER DATABASE {} OWNER TO {}")
    with psycopg.connect(_elsewhere(url), autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE ROLE {} LOGIN CREATEDB PASSWORD 'x'").format(role))
        try:
            admin.execute(of_database.format(database, role))
            yield {"PGUSER": name, "PGPASSWORD": "x"}
        finally:
            admin.execute(of_database.format(database, sql.SQL("CURRENT_USER")))
            admin.execute(sql.SQL("DROP ROLE {}").format(role))


def test_why_the_database_cannot_be_taken_is_told_to_an_owner_who_is_no_superuser(
    made_backup: Path, postgres_url: str
) -> None:
    empty_again(postgres_url)
    with mere_owner(postgres_url) as owner:
        with psycopg.connect(postgres_url, application_name="stoker 7 on there"):
            used = script("restore.sh", made_backup, url=postgres_url, **owner)
        with psycopg.connect(_elsewhere(postgres_url), autocommit=True) as admin:
            admin.execute(sql.SQL("ALTER ROLE {} NOCREATEDB").format(sql.Identifier(owner["PGUSER"])))
        denied = script("restore.sh", made_backup, url=postgres_url, **owner)
    assert (used.returncode, "stop these: stoker 7 on there" in used.stderr) == (1, True), used.stderr
    assert (denied.returncode, "could not be renamed: ERROR:  permission denied" in denied.stderr) == (1, True), denied


def test_a_sum_that_cannot_be_made_makes_no_backup(postgres_url: str, tmp_path: Path) -> None:
    into, tools = tmp_path / "backups", tmp_path / "tools"
    into.mkdir()
    tools.mkdir()
    unread = with_stand_in(tools, postgres_url, sha256sum='[ $# = 0 ] && exec "$REAL"; "$REAL" "$1"; exit 1')
    failed = script("backup.sh", into, url=postgres_url, **unread)
    assert (failed.returncode, "the sums could not be made" in failed.stderr) == (1, True), failed.stderr
    assert names_in(into) == []


def test_a_backup_stands_though_an_older_one_stays_and_has_the_schema_of_its_rows(
    postgres_url: str, tmp_path: Path
) -> None:
    old, tools = tmp_path / "stoker-20200101T000000Z", tmp_path / "tools"
    old.mkdir()
    tools.mkdir()
    (old / "MANIFEST").touch()
    migrated = """psql -Xqc "UPDATE alembic_version SET version_num = '9999'"; exec "$REAL" "$@" """
    kept = f'case "$*" in *{old.name}*) exit 1;; esac; exec "$REAL" "$@"'
    beside = with_stand_in(tools, postgres_url, pg_dump=migrated, rm=kept)
    made = script("backup.sh", tmp_path, url=postgres_url, BACKUP_KEEP="1", **beside)
    assert (made.returncode, "could not be deleted" in made.stderr) == (0, True), made.stderr
    assert "\nschema=9999\n" in (Path(made.stdout.strip()) / "MANIFEST").read_text()


def _elsewhere(url: str) -> str:
    return make_url(url).set(database="postgres").render_as_string(hide_password=False)


def test_a_backup_that_is_interrupted_leaves_nothing(postgres_url: str, tmp_path: Path) -> None:
    with psycopg.connect(postgres_url) as connection:
        connection.execute("LOCK TABLE results IN ACCESS EXCLUSIVE MODE")
        process = subprocess.Popen(
            command("backup.sh", tmp_path), env=libpq_environment(postgres_url), stderr=subprocess.PIPE
        )
        waits = "SELECT 1 FROM pg_locks WHERE NOT granted AND mode = 'AccessShareLock'"
        wait_until(lambda: connection.execute(waits).fetchone(), 20, "pg_dump waits for the lock")
        assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]
        process.terminate()
        assert process.wait(10) == 1
    process.communicate()
    assert list(tmp_path.iterdir()) == []


def test_a_restore_that_is_interrupted_says_what_is_left_also_to_the_next_one(
    made_backup: Path, postgres_url: str, tmp_path: Path
) -> None:
    empty_again(postgres_url)
    seen = tmp_path / "pid"
    slow = with_stand_in(
        tmp_path, postgres_url, pg_restore=f"echo $$ > {seen}.new; mv {seen}.new {seen}; exec sleep 60"
    )
    process = subprocess.Popen(
        command("restore.sh", made_backup),
        env=libpq_environment(postgres_url) | slow,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(seen.exists, 20, "pg_restore runs")
    process.terminate()
    told = process.communicate(timeout=10)[1]
    name = make_url(postgres_url).database
    hint = f'DROP DATABASE "{name}_restoring"; CREATE DATABASE "{name}"'
    assert (process.returncode, hint in told) == (1, True), told
    assert not Path(f"/proc/{seen.read_text().strip()}").exists()
    again = script("restore.sh", made_backup, url=postgres_url)
    assert (again.returncode, f"{name} at" in again.stderr, hint in again.stderr) == (1, True, True), again.stderr
    empty_again(postgres_url)


def test_a_backup_that_may_not_be_read_is_not_called_broken(made_backup: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", made_backup, copy], check=True)
    copy.chmod(0)
    nobody = 65534 if os.geteuid() == 0 else None
    refused = subprocess.run(
        ["sh", "-s", "--", "--check", copy],
        input=(SCRIPTS / "restore.sh").read_text(),
        cwd="/",
        user=nobody,
        text=True,
        capture_output=True,
        check=False,
    )
    copy.chmod(0o700)
    remedy = f"chown -R {nobody or os.geteuid()}:"
    assert (refused.returncode, remedy in refused.stderr, "MANIFEST" in refused.stderr) == (1, True, False), refused


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("PGPORT", "1", "Connection refused"),
        ("PGUSER", "stoker_nobody", "stoker_nobody"),
        ("PGDATABASE", "none", "none"),
    ],
)
def test_that_postgres_cannot_be_asked_is_told_as_such(
    made_backup: Path, postgres_url: str, tmp_path: Path, variable: str, value: str, words: str
) -> None:
    for one in (
        script("backup.sh", tmp_path, url=postgres_url, **{variable: value}),
        script("restore.sh", made_backup, url=postgres_url, **{variable: value}),
    ):
        assert (one.returncode, words in one.stderr, "does not answer, or refuses" in one.stderr) == (1, True, True), (
            one
        )
        assert "no tables of Stoker" not in one.stderr
    assert list(tmp_path.iterdir()) == []


def test_wrong_use_is_told(postgres_url: str, tmp_path: Path) -> None:
    assert script("backup.sh", url=postgres_url).returncode == 2
    assert script("backup.sh", tmp_path, url=postgres_url, BACKUP_KEEP="0").returncode == 2
    nowhere = script("backup.sh", tmp_path / "none", url=postgres_url)
    assert (nowhere.returncode, "is no folder" in nowhere.stderr) == (1, True)
    assert script("restore.sh", url=postgres_url).returncode == 2


def test_a_database_without_tables_of_ours_makes_no_backup(postgres_url: str, tmp_path: Path) -> None:
    empty_again(postgres_url)
    refused = script("backup.sh", tmp_path, url=postgres_url)
    assert (refused.returncode, "no tables of Stoker" in refused.stderr) == (1, True)
    assert list(tmp_path.iterdir()) == []
