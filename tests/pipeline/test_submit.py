"""Submit: all of a good file, nothing of a bad one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import pytest
from sqlalchemy import text

from models.lines import SubmitOptions
from models.states import Trust
from pipeline.serving import ServedModels
from pipeline.submit import FileEstimate, Submitted, Wishes, dry_run, submit_file
from runtime.clock import uuid7
from runtime.errors import BadInput, InvalidFile, LostFence, ServiceUnreachable
from runtime.settings import LimitSettings, Settings, ShardSettings
from store.database import Database
from store.submissions import NewBatch, delete_abandoned_batches, extend_lease, insert_validating
from tests.support.waiting import wait_until

REPOSITORY = Path(__file__).resolve().parents[2]
CHAT = "/v1/chat/completions"
OPTIONS = SubmitOptions(max_output_tokens=64)
SETTINGS = Settings(_env_file=None)
BODY_BYTES = 88  # of line(0) to line(9)


def line(number: int, /, *, url: str = CHAT, custom_id: str | None = None, **fields: Any) -> str:
    messages = [{"role": "user", "content": f"question {number}"}]
    body = {"model": "m", "messages": messages, "max_tokens": 8} | fields
    return json.dumps({"custom_id": custom_id or f"id-{number}", "method": "POST", "url": url, "body": body})


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(*lines: str | bytes, end: bytes = b"\n", newline: bytes = b"\n", start: bytes = b"") -> Path:
        path = tmp_path / "prompts.jsonl"
        encoded = (part.encode() if isinstance(part, str) else part for part in lines)
        path.write_bytes(start + newline.join(encoded) + end)
        return path

    return write


def submit(database: Database, path: Path, **changed: Any) -> Submitted:
    wishes: dict[str, Any] = {"options": OPTIONS, "settings": SETTINGS, "served_models": None, "reuse": True}
    return submit_file(database, path, **(wishes | changed))


def problems_of(path: Path, **changed: Any) -> InvalidFile:
    wishes: dict[str, Any] = {"options": OPTIONS, "settings": SETTINGS, "served_models": None}
    with pytest.raises(InvalidFile) as caught:
        dry_run(path, **(wishes | changed))
    return caught.value


def rows(database: Database, statement: str) -> list[Any]:
    with database.transaction() as session:
        return [tuple(row) for row in session.execute(text(statement))]


def stored(database: Database) -> tuple[int, int, int]:
    """(batches, jobs, shards) in the database."""
    counts = rows(
        database, "SELECT (SELECT count(*) FROM batches), (SELECT count(*) FROM jobs), (SELECT count(*) FROM shards)"
    )[0]
    return (counts[0], counts[1], counts[2])


def limited(**limits: Any) -> Settings:
    return SETTINGS.model_copy(update={"limits": LimitSettings(**limits)})


def test_every_line_becomes_a_job_in_the_files_order(database: Database, write: Callable[..., Path]) -> None:
    lines = [line(number) for number in range(150)]
    submitted = submit(database, write(*lines))
    assert (submitted.total, submitted.reused) == (150, False)
    jobs = rows(database, "SELECT batch_id, seq, custom_id, body FROM jobs ORDER BY seq")
    assert jobs == [
        (submitted.batch_id, seq, f"id-{seq}", json.dumps(json.loads(lines[seq])["body"])) for seq in range(150)
    ]


def test_the_batch_is_in_progress_with_its_totals_window_and_manifest(
    database: Database, write: Callable[..., Path]
) -> None:
    path = write(*(line(number) for number in range(130)))
    options = SubmitOptions(sets={"temperature": 0}, model="m", max_output_tokens=64)
    submit(database, path, options=options, settings=limited(window_s=3600), tenant="acme", input_name="-")
    [batch] = rows(
        database,
        """
        SELECT state, tenant, endpoint, input_name, total, shards_left, max_output_tokens, options, input_digest,
            lease_until, round(extract(epoch FROM expires_at - in_progress_at)) FROM batches""",
    )
    assert batch[:7] == ("in_progress", "acme", CHAT, "-", 130, 3, 64)
    assert batch[7] == {
        "sets": {"temperature": 0},
        "model": "m",
        "max_output_tokens": 64,
        "validate_answers": False,
        "trust": "own",
        "cache": "exact",
        "settings": {},
        "order": "file",
        "file_name": "-",
        "file_bytes": path.stat().st_size,
        "file_sha256": batch[8],
    }
    assert batch[9:] == (None, 3600)


def test_bodies_of_any_json_come_back_as_they_were(database: Database, write: Callable[..., Path]) -> None:
    contents = ["tab\t", r"back\slash", "\r\n", "\0", "émoji 😀", '"quoted"', r"\N", r"\.", "\x7f", "\u2028"]
    bodies = [
        json.dumps(
            {"model": "m", "messages": [{"role": "user", "content": content}], "max_tokens": 8},
            ensure_ascii=escaped,
            indent=indent,
        ).replace("\n", "\t\r")
        for content in contents
        for escaped in (True, False)
        for indent in (None, 1)
    ]
    ids = [f"{number}{contents[number % 3]}" for number in range(len(bodies))]
    submit(
        database,
        write(
            *(
                f'{{"custom_id": {json.dumps(custom_id)}, "method": "POST", "url": "{CHAT}", "body": {body}}}'
                for custom_id, body in zip(ids, bodies, strict=True)
            )
        ),
    )
    jobs = rows(database, "SELECT custom_id, body FROM jobs ORDER BY seq")
    assert [body for _, body in jobs] == bodies
    assert [custom_id for custom_id, _ in jobs] == ids


@pytest.mark.parametrize(
    ("bounds", "sizes"),
    [
        ({"max_jobs": 4}, [4, 4, 2]),
        ({"max_jobs": 10}, [10]),
        ({"max_tokens": 3 * (BODY_BYTES // 4 + 8)}, [3, 3, 3, 1]),
        ({"max_bytes": 2 * BODY_BYTES}, [2, 2, 2, 2, 2]),
        ({"max_bytes": 2 * BODY_BYTES - 1}, [1] * 10),
        ({"max_bytes": 1}, [1] * 10),
    ],
)
def test_a_shard_ends_at_its_jobs_tokens_or_bytes(
    database: Database, write: Callable[..., Path], bounds: dict[str, int], sizes: list[int]
) -> None:
    path = write(*(line(number) for number in range(10)))
    settings = SETTINGS.model_copy(update={"shard": ShardSettings(**bounds)})
    submit(database, path, settings=settings)
    shards = rows(database, "SELECT seqs, state FROM shards ORDER BY id")
    assert [len(seqs) for seqs, _ in shards] == sizes
    assert [seq for seqs, _ in shards for seq in seqs] == list(range(10))
    assert {state for _, state in shards} == {"pending"}


def test_a_file_of_several_chunks_is_whole(database: Database, write: Callable[..., Path]) -> None:
    submitted = submit(database, write(*(line(number) for number in range(100_100))))
    assert submitted.total == 100_100
    assert rows(database, "SELECT count(*), min(seq), max(seq), count(DISTINCT custom_id) FROM jobs") == [
        (100_100, 0, 100_099, 100_100)
    ]
    assert rows(database, "SELECT count(*) FROM shards") == rows(database, "SELECT shards_left FROM batches")
    assert rows(database, "SELECT count(DISTINCT seq), count(*) FROM shards, unnest(seqs) AS seq") == [
        (100_100, 100_100)
    ]


def test_dispatch_is_woken_when_the_batch_is_set_going(database: Database, write: Callable[..., Path]) -> None:
    with database.connection(autocommit=True) as connection:
        connection.execute("LISTEN stoker_dispatch")
        submit(database, write(line(1)))
        heard = list(connection.notifies(timeout=5, stop_after=1))
    assert [notification.channel for notification in heard] == ["stoker_dispatch"]


@pytest.mark.parametrize(
    "shape",
    [
        {"start": b"\xef\xbb\xbf"},
        {"newline": b"\r\n", "end": b"\r\n"},
        {"end": b""},
        {"end": b"\n\n \n"},
        {"newline": b"\n\n"},
        {"start": b"\xef\xbb\xbf\n"},
    ],
)
def test_byte_order_mark_crlf_missing_last_newline_and_blank_lines_are_accepted(
    write: Callable[..., Path], shape: dict[str, bytes]
) -> None:
    found = dry_run(write(line(1), line(2), **shape), options=OPTIONS, settings=SETTINGS, served_models=None)
    assert found.lines == 2


def test_blank_lines_count_in_the_numbers_of_lines(write: Callable[..., Path]) -> None:
    refused = problems_of(write(line(1), "", "  ", "nonsense"))
    assert [problem.line for problem in refused.problems] == [4]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf", b" "])
def test_a_file_without_a_line_is_refused(database: Database, write: Callable[..., Path], content: bytes) -> None:
    refused = problems_of(write(content, end=b""))
    assert [(problem.line, problem.code) for problem in refused.problems] == [(None, "empty_file")]
    with pytest.raises(InvalidFile):
        submit(database, write(content, end=b""))


def test_nothing_of_a_refused_file_stays_and_all_problems_are_counted(
    database: Database, write: Callable[..., Path]
) -> None:
    lines = [line(number) for number in range(60_000)]
    lines[55_000:55_030] = ["nonsense"] * 30
    lines[59_000] = line(59_000, temperature=9)
    with pytest.raises(InvalidFile) as caught:
        submit(database, write(*lines))
    assert caught.value.total == 31
    assert [problem.line for problem in caught.value.problems] == list(range(55_001, 55_021))
    assert stored(database) == (0, 0, 0)


def test_a_line_that_is_too_long_is_skipped_without_being_held(write: Callable[..., Path]) -> None:
    long = b'{"custom_id":"' + b"x" * 3_000_000 + b'"}'
    path = write(line(1), long, "nonsense", line(3), long, end=b"")
    refused = problems_of(path, settings=limited(line_bytes=400))
    assert [(problem.line, problem.code) for problem in refused.problems] == [
        (2, "invalid_request"),
        (3, "invalid_json_line"),
        (5, "invalid_request"),
    ]
    assert "400 bytes" in refused.problems[0].message


def test_a_truncated_upload_is_named_as_such(write: Callable[..., Path]) -> None:
    refused = problems_of(write(line(1), line(2)[:50], end=b""))
    assert "cut off" in refused.problems[0].message
    assert refused.problems[0].line == 2


def test_mixed_endpoints_are_refused(write: Callable[..., Path]) -> None:
    refused = problems_of(write(line(1), line(2, url="/v1/completions", prompt="x")))
    assert [(problem.line, problem.code) for problem in refused.problems] == [(2, "url_mismatch")]


def test_a_repeated_id_names_both_lines(database: Database, write: Callable[..., Path]) -> None:
    lines = [line(number) for number in range(200)]
    lines[150] = lines[3]
    lines[160] = line(7, custom_id="id-3")
    with pytest.raises(InvalidFile) as caught:
        submit(database, write(*lines))
    assert [(problem.line, problem.code, problem.field) for problem in caught.value.problems] == [
        (151, "duplicate_custom_id", "custom_id"),
        (161, "duplicate_custom_id", "custom_id"),
    ]
    assert "line 4 has" in caught.value.problems[1].message
    assert caught.value.total == 2
    assert stored(database) == (0, 0, 0)


def test_problems_of_all_kinds_are_listed_by_line(write: Callable[..., Path]) -> None:
    path = write(line(1), line(2, model="q"), "nonsense", line(1), line(5, model="q"), line(6, n=0))
    refused = problems_of(path, served_models=ServedModels(frozenset({"m"})))
    assert [(problem.line, problem.code) for problem in refused.problems] == [
        (2, "model_not_found"),
        (3, "invalid_json_line"),
        (4, "duplicate_custom_id"),
        (6, "invalid_request"),
    ]
    assert refused.total == 5


def test_a_model_that_is_not_served_is_one_problem_with_its_lines_counted(write: Callable[..., Path]) -> None:
    path = write(*(line(number, model="m" if number % 2 else "q") for number in range(100)))
    refused = problems_of(path, served_models=ServedModels(frozenset({"m", "n"})))
    [problem] = refused.problems
    assert (problem.line, problem.code, problem.field) == (1, "model_not_found", "body.model")
    assert '"q", not served (50 lines); served: m, n; ' in problem.message
    assert refused.total == 50


def test_a_model_of_external_endpoints_takes_a_batch_that_says_so(write: Callable[..., Path]) -> None:
    path, served = write(line(1, model="theirs")), ServedModels(frozenset({"m"}), frozenset({"theirs"}))
    [problem] = problems_of(path, served_models=served).problems
    assert "external endpoints only (1 line); to send prompts there, submit with --trust external" in problem.message
    options = OPTIONS.model_copy(update={"trust": Trust.EXTERNAL})
    assert dry_run(path, options=options, settings=SETTINGS, served_models=served).models == {"theirs": 1}


def test_many_missing_models_are_counted_but_not_kept(write: Callable[..., Path]) -> None:
    refused = problems_of(
        write(*(line(number, model=f"q{number}") for number in range(100))),
        served_models=ServedModels(frozenset({"m"})),
    )
    assert refused.total == 100
    assert len(refused.problems) == 20


def test_the_model_option_decides_which_model_must_be_served(write: Callable[..., Path]) -> None:
    options = SubmitOptions(model="m", max_output_tokens=64)
    found = dry_run(
        write(line(1, model="q")), options=options, settings=SETTINGS, served_models=ServedModels(frozenset({"m"}))
    )
    assert found.models == {"m": 1}


def test_a_dry_run_states_the_estimates(write: Callable[..., Path]) -> None:
    found = dry_run(
        write(line(1), line(2, model="q", n=3), line(3, max_tokens=1000)),
        options=OPTIONS,
        settings=SETTINGS,
        served_models=None,
    )
    assert found == FileEstimate(
        lines=3, prompt_tokens=found.prompt_tokens, output_tokens=8 + 24 + 64, models={"m": 2, "q": 1}, endpoint=CHAT
    )
    assert 60 <= found.prompt_tokens <= 75


def test_progress_ends_with_all_bytes(write: Callable[..., Path]) -> None:
    heard: list[tuple[int, int]] = []
    path = write(*(line(number) for number in range(10_000)))
    dry_run(
        path,
        options=OPTIONS,
        settings=SETTINGS,
        served_models=None,
        on_progress=lambda done, size: heard.append((done, size)),
    )
    assert heard == sorted(heard)
    assert len(heard) == 3
    assert heard[-1] == (path.stat().st_size, path.stat().st_size)


def test_the_same_file_and_options_are_the_same_batch(database: Database, write: Callable[..., Path]) -> None:
    path = write(line(1))
    first = submit(database, path)
    assert submit(database, path) == Submitted(first.batch_id, 1, reused=True)
    assert stored(database) == (1, 1, 1)


@pytest.mark.parametrize(
    "changed",
    [
        {"reuse": False},
        {"tenant": "other"},
        {"options": SubmitOptions(max_output_tokens=65)},
        {"options": SubmitOptions(max_output_tokens=64, sets={"n": 1})},
        {"options": SubmitOptions(max_output_tokens=64, trust=Trust.EXTERNAL)},
        {"wishes": Wishes(budget_nanos=5)},
        {"settings": limited(window_s=60)},
    ],
)
def test_another_tenant_option_or_window_is_another_batch(
    database: Database, write: Callable[..., Path], changed: dict[str, Any]
) -> None:
    path = write(line(1))
    first = submit(database, path)
    second = submit(database, path, **changed)
    assert not second.reused
    caps = [cap for (cap,) in rows(database, "SELECT cap FROM money_budgets")]
    assert caps == ([5] if "wishes" in changed else [])
    assert second.batch_id != first.batch_id


@pytest.mark.parametrize(
    "fate",
    [
        "state = 'cancelling', ending = 'cancelled'",
        "state = 'cancelled'",
        "state = 'failed'",
        "state = 'expired'",
        "state = 'finalizing', ending = 'expired'",
        "created_at = now() - interval '61 minutes'",
    ],
)
def test_a_batch_that_ended_badly_or_is_old_is_not_reused(
    database: Database, write: Callable[..., Path], fate: str
) -> None:
    path = write(line(1))
    submit(database, path)
    rows(database, f"UPDATE batches SET {fate} RETURNING 1")
    assert not submit(database, path).reused


@pytest.mark.parametrize("fate", ["state = 'completed', ending = 'completed'", "state = 'finalizing'"])
def test_a_batch_that_completed_is_reused(database: Database, write: Callable[..., Path], fate: str) -> None:
    path = write(line(1))
    submit(database, path)
    rows(database, f"UPDATE batches SET {fate} RETURNING 1")
    assert submit(database, path).reused


def test_a_key_is_one_batch_however_it_ended_and_whenever_it_was(
    database: Database, write: Callable[..., Path]
) -> None:
    path = write(line(1))
    first = submit(database, path, key="orders-1")
    rows(database, "UPDATE batches SET state = 'failed', created_at = now() - interval '3 days' RETURNING 1")
    again = submit(database, path, key="orders-1")
    assert (again.batch_id, again.reused) == (first.batch_id, True)
    assert not submit(database, path, key="orders-2").reused  # another key is another batch of the same file
    assert not submit(database, path).reused  # and so is none
    assert not submit(database, path, key="orders-1", tenant="acme").reused
    options = rows(database, "SELECT options ->> 'idempotency_key' FROM batches ORDER BY id LIMIT 1")
    assert options == [("orders-1",)]


def test_a_key_for_another_file_is_refused(database: Database, write: Callable[..., Path]) -> None:
    submit(database, write(line(1)), key="orders-1")
    with pytest.raises(BadInput, match="was submitted with this idempotency key"):
        submit(database, write(line(2)), key="orders-1")
    with pytest.raises(BadInput, match="use a new key"):
        submit(database, write(line(1)), key="orders-1", wishes=Wishes(weight=2))
    assert stored(database) == (1, 1, 1)


def test_of_racing_submits_with_a_key_one_makes_the_batch(database: Database, write: Callable[..., Path]) -> None:
    path = write(*(line(number) for number in range(300)))
    barrier = threading.Barrier(4)

    def race(_: int) -> Submitted:
        barrier.wait()
        return submit(database, path, key="orders-1")

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(race, range(4)))
    assert len({answer.batch_id for answer in answers}) == 1
    assert stored(database)[:2] == (1, 300)


def test_of_racing_submits_one_makes_the_batch(database: Database, write: Callable[..., Path]) -> None:
    path = write(*(line(number) for number in range(3000)))
    barrier = threading.Barrier(4)

    def race(_: int) -> Submitted:
        barrier.wait()
        return submit(database, path)

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(race, range(4)))
    assert len({answer.batch_id for answer in answers}) == 1
    assert sum(not answer.reused for answer in answers) == 1
    assert stored(database) == (1, 3000, 47)


def test_an_error_in_the_middle_leaves_nothing(database: Database, write: Callable[..., Path]) -> None:
    def break_off(done: int, size: int) -> NoReturn:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        submit(database, write(*(line(number) for number in range(60_000))), on_progress=break_off)
    assert stored(database) == (0, 0, 0)


def test_ctrl_c_leaves_nothing(database: Database, write: Callable[..., Path]) -> None:
    path = write(*(line(number) for number in range(150_000)))
    with _submitting(database, path) as child:
        wait_until(lambda: stored(database)[1] > 0, 30, "jobs of the first chunk")
        child.send_signal(signal.SIGINT)
        assert child.wait(30) != 0
    assert stored(database) == (0, 0, 0)


def test_what_a_kill_leaves_is_deleted_once_the_lease_is_over(database: Database, write: Callable[..., Path]) -> None:
    path = write(*(line(number) for number in range(150_000)))
    with _submitting(database, path) as child:
        wait_until(lambda: stored(database)[1] > 0, 30, "jobs of the first chunk")
        child.kill()
        child.wait(30)
    copies = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state <> 'idle' "
        "AND query ILIKE 'copy%'"
    )
    wait_until(lambda: rows(database, copies) == [(0,)], 30, "the end of its COPY")
    assert rows(database, "SELECT state, total FROM batches") == [("validating", 0)]
    with database.transaction() as session:
        assert delete_abandoned_batches(session) == []
    rows(database, "UPDATE batches SET lease_until = now() - interval '1 second' RETURNING 1")
    with database.transaction() as session:
        assert len(delete_abandoned_batches(session)) == 1
    assert stored(database) == (0, 0, 0)


def test_a_batch_that_is_being_written_is_never_deleted(database: Database) -> None:
    batch = _insert_validating(database, lease=timedelta(seconds=-1))
    with database.transaction() as writer:
        extend_lease(writer, batch, lease=timedelta(seconds=-1))
        with database.transaction() as recover:
            assert delete_abandoned_batches(recover) == []
    with database.transaction() as recover:
        assert delete_abandoned_batches(recover) == [batch.id]


def test_a_submit_whose_batch_was_deleted_stops(database: Database) -> None:
    batch = _insert_validating(database, lease=timedelta(seconds=-1))
    with database.transaction() as session:
        delete_abandoned_batches(session)
    with pytest.raises(LostFence, match="submit again"), database.transaction() as session:
        extend_lease(session, batch, lease=timedelta(seconds=60))


def test_a_file_that_changes_while_it_is_read_is_refused(database: Database, write: Callable[..., Path]) -> None:
    path = write(*(line(number) for number in range(5000)))

    def grow(done: int, size: int) -> None:
        with path.open("a") as file:
            file.write(line(done) + "\n")

    with pytest.raises(BadInput, match="changed while it was read"):
        submit(database, path, on_progress=grow)
    assert stored(database) == (0, 0, 0)


def test_a_path_that_cannot_be_read_says_why(tmp_path: Path, write: Callable[..., Path]) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path, words in (
        (tmp_path / "none", "No such file"),
        (tmp_path, "not a regular file"),
        (pipe, "standard input"),
        (write(line(1)) / "below", "Not a directory"),
    ):
        with pytest.raises(BadInput, match=words):
            dry_run(path, options=OPTIONS, settings=SETTINGS, served_models=None)


def test_without_postgres_the_error_names_its_address(write: Callable[..., Path]) -> None:
    database = Database("postgresql://postgres:secret@127.0.0.1:1/none")
    with pytest.raises(ServiceUnreachable, match=r"127\.0\.0\.1:1") as caught:
        submit(database, write(line(1)))
    assert "secret" not in str(caught.value)


_CHILD = """
import sys
from pathlib import Path
from models.lines import SubmitOptions
from pipeline.submit import submit_file
from runtime.settings import Settings
from store.database import Database
submit_file(Database(sys.argv[1]), Path(sys.argv[2]), options=SubmitOptions(max_output_tokens=64),
            settings=Settings(_env_file=None), served_models=None, reuse=True)
"""


@contextmanager
def _submitting(database: Database, path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that submits the file; stopped at the end if it still runs."""
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, database.address, str(path)], cwd=REPOSITORY, stderr=subprocess.DEVNULL
    )
    try:
        yield child
    finally:
        child.kill()
        child.wait()


def _insert_validating(database: Database, *, lease: timedelta) -> NewBatch:
    batch = NewBatch(
        id=uuid7(),
        tenant="local",
        endpoint=CHAT,
        input_name="x",
        input_digest="x",
        submit_digest="x",
        options={},
        max_output_tokens=64,
    )
    with database.transaction() as session:
        insert_validating(session, batch, lease=lease)
    return batch
