"""The real embedded servers: started, stopped, killed, found again. As root and as another user alike."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import kombu
import psycopg
import pytest
import redis

from runtime.children import RememberedChild, birth_of, end_remembered, remember, spawn, stop
from runtime.errors import BadInput, ServiceUnreachable
from runtime.home import default_home
from scripts.embedded import EmbeddedServices, HomeInUse, clear_leftovers, embedded_services

REPOSITORY = Path(__file__).resolve().parents[2]
TIMEOUT_S = 30.0
RUN_AND_TELL = """
import sys
from pathlib import Path
from scripts.embedded import embedded_services
with embedded_services(Path(sys.argv[1])):
    print("running", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Short, for the sockets, and open to pass through, for the account that the servers have under root."""
    with tempfile.TemporaryDirectory(prefix="stoker-", dir="/tmp") as path:
        Path(path).chmod(0o711)
        yield Path(path)


@pytest.fixture
def home(folder: Path) -> Path:
    """One home for all tests here, as setting up takes a second: each finds what the ones before left."""
    return folder / "home"


def run_in_another_process(home: Path) -> subprocess.Popen[str]:
    """A process that runs the services until it is killed or its stdin is closed."""
    run = subprocess.Popen(
        [sys.executable, "-c", RUN_AND_TELL, str(home)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    assert run.stdout.readline() == "running\n"
    return run


def end(run: subprocess.Popen[str]) -> None:
    """Kill -9, as by the kernel when memory runs out."""
    run.kill()
    run.communicate()


def remembered(home: Path) -> list[RememberedChild]:
    return [RememberedChild(**entry) for entry in json.loads((home / "children.json").read_text())]


def wait_until(predicate: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not predicate():
        assert time.monotonic() < deadline, f"not within {TIMEOUT_S} s: {what}"
        time.sleep(0.01)


def one(services: EmbeddedServices, statement: str) -> object:
    with psycopg.connect(services.postgres_url) as connection:
        row = connection.execute(statement.encode()).fetchone()
    assert row is not None
    return row[0]


def add_line(services: EmbeddedServices) -> None:
    with psycopg.connect(services.postgres_url) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS line (n int)")
        connection.execute("INSERT INTO line VALUES (1)")


def test_both_serve_and_keep_rows_and_messages_over_a_restart(home: Path) -> None:
    with embedded_services(home) as services:
        add_line(services)
        before = one(services, "SELECT count(*) FROM line")
        with kombu.Connection(services.broker_url) as broker, broker.SimpleQueue("kept") as queue:
            queue.put({"shard": 7})
    with embedded_services(home) as services:
        assert one(services, "SELECT count(*) FROM line") == before
        assert one(services, "SELECT current_database()") == "stoker"
        assert one(services, "SHOW server_encoding") == "UTF8"
        with kombu.Connection(services.broker_url) as broker, broker.SimpleQueue("kept") as queue:
            message = queue.get(timeout=5)
            message.ack()
        assert message.payload == {"shard": 7}
        with redis.Redis.from_url(services.redis_url) as client:
            assert client.config_get("appendonly") == {"appendonly": "yes"}
            assert client.dbsize() == 0, "the broker has a database of its own"


def test_no_one_else_may_connect_and_nothing_listens_on_a_port(home: Path) -> None:
    with embedded_services(home) as services:
        assert (home / "run").stat().st_mode & 0o077 == 0
        assert one(services, "SHOW listen_addresses") == ""
        with redis.Redis.from_url(services.redis_url) as client:
            assert client.config_get("port") == {"port": "0"}


def test_nothing_runs_after_the_block_also_when_it_raises(home: Path) -> None:
    children: list[RememberedChild] = []
    with pytest.raises(KeyError), embedded_services(home):
        children += remembered(home)
        raise KeyError
    assert sorted(child.name for child in children) == ["postgres", "valkey"]
    assert [birth_of(child.pid) for child in children] == [None, None]
    assert clear_leftovers(home) == []


def test_a_second_run_on_the_same_home_is_refused_and_told_whose_it_is(home: Path) -> None:
    run = run_in_another_process(home)
    with pytest.raises(HomeInUse, match=f"in use by process {run.pid}:"), embedded_services(home):
        pass
    with pytest.raises(HomeInUse, match=str(run.pid)):
        clear_leftovers(home)
    assert all(birth_of(child.pid) == child.birth for child in remembered(home))
    run.communicate("")
    assert run.returncode == 0
    assert not (home / "children.json").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
def test_killing_the_parent_ends_its_servers(home: Path) -> None:
    run = run_in_another_process(home)
    children = remembered(home)
    end(run)
    wait_until(lambda: all(birth_of(child.pid) is None for child in children), "the servers end")


def test_a_start_after_the_parent_was_killed_finds_all_rows_and_no_second_server(home: Path) -> None:
    with embedded_services(home) as services:
        add_line(services)
        before = one(services, "SELECT count(*) FROM line")
    for _ in range(3):
        run = run_in_another_process(home)
        children = remembered(home)
        end(run)
        with embedded_services(home) as services:  # at once, while the old servers may still be stopping
            assert all(birth_of(child.pid) != child.birth for child in children)
            assert one(services, "SELECT count(*) FROM line") == before


def test_children_that_outlived_their_parent_are_ended_also_when_they_ignore_sigterm(folder: Path) -> None:
    pid_file = folder / "children.json"
    sleeper = spawn(["sleep", "600"], env={}, log=None, session=True)
    is_deaf = folder / "is_deaf"
    script = 'trap "" TERM; : > "$1"; while :; do sleep 1; done'
    deaf = spawn(["sh", "-c", script, "sh", str(is_deaf)], env={}, log=None, session=True)
    wait_until(is_deaf.exists, "the shell ignores SIGTERM")
    remember(pid_file, name="sleeper", child=sleeper)
    remember(pid_file, name="deaf", child=deaf)
    ended = end_remembered(pid_file, grace_s=0.3)
    assert ended == [f"sleeper (pid {sleeper.pid})", f"deaf (pid {deaf.pid})"]
    assert (sleeper.wait(), deaf.wait()) == (-signal.SIGTERM, -signal.SIGKILL)
    assert end_remembered(pid_file, grace_s=0.3) == []


def test_a_process_that_has_the_pid_of_an_old_child_is_left_alone(folder: Path) -> None:
    pid_file = folder / "children.json"
    stranger = spawn(["sleep", "600"], env={}, log=None, session=True)
    remember(pid_file, name="postgres", child=stranger)
    pid_file.write_text(pid_file.read_text().replace(str(birth_of(stranger.pid)), "an earlier birth"))
    assert end_remembered(pid_file, grace_s=5) == []
    assert stranger.poll() is None
    assert stop(stranger, grace_s=5) == -signal.SIGTERM


def test_a_setup_that_was_cut_off_is_started_over(folder: Path) -> None:
    other = folder / "other"
    (other / "postgres.unfinished").mkdir(parents=True)
    other.chmod(0o711)
    (other / "postgres.unfinished" / "PG_VERSION").write_text("18")
    with embedded_services(other) as services:
        assert one(services, "SELECT 1") == 1


def test_a_server_that_cannot_start_is_reported_with_its_log_and_the_other_is_stopped(
    home: Path,
) -> None:
    with embedded_services(home):
        pass
    version = home / "postgres" / "PG_VERSION"
    version.write_text("9\n")
    refused = pytest.raises(ServiceUnreachable, match=r"postgres did not start.*incompatible")
    with refused, embedded_services(home):
        pass
    version.write_text("18\n")
    assert not (home / "children.json").exists()


def test_a_home_that_cannot_be_used_is_refused_with_the_remedy(folder: Path) -> None:
    refused = pytest.raises(BadInput, match="choose a shorter STOKER_HOME")
    with refused, embedded_services(folder / ("long" * 25)):
        pass
    if os.geteuid() == 0:
        closed = folder / "closed"
        closed.mkdir(mode=0o700)
        refused = pytest.raises(BadInput, match="closed is closed to the account")
        with refused, embedded_services(closed / "home"):
            pass
        assert closed.stat().st_mode & 0o077 == 0, "rights of a folder that is not ours were changed"


def test_the_default_home_follows_the_environment_that_is_given() -> None:
    assert default_home({"STOKER_HOME": "/srv/stoker"}) == Path("/srv/stoker")
    if os.geteuid() == 0:
        assert default_home({"XDG_DATA_HOME": "/x"}) == Path("/var/lib/stoker")
    else:
        assert default_home({"XDG_DATA_HOME": "/x"}) == Path("/x/stoker")
        assert default_home({}).parts[-3:] == (".local", "share", "stoker")


def test_clearing_a_home_that_does_not_exist_does_not_make_it(folder: Path) -> None:
    assert clear_leftovers(folder / "absent") == []
    assert not (folder / "absent").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
def test_a_child_dies_with_the_thread_that_started_it_not_with_the_process() -> None:
    started: list[subprocess.Popen[bytes]] = []
    thread_ends = threading.Event()

    def start_and_stay() -> None:
        started.append(spawn(["sleep", "600"], env={}, log=None, session=True, death_signal=signal.SIGINT))
        thread_ends.wait()

    thread = threading.Thread(target=start_and_stay)
    thread.start()
    wait_until(lambda: bool(started) and program_of(started[0].pid) == "sleep", "the child runs")
    thread_ends.set()
    thread.join()
    assert started[0].wait(TIMEOUT_S) == -signal.SIGINT


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
@pytest.mark.parametrize(("trap", "guard_s"), [('trap "" TERM;', 0.3), ("", 600)])
def test_a_guard_ends_the_childs_session_with_the_child_or_some_time_after_the_parent(
    folder: Path, trap: str, guard_s: float
) -> None:
    shell = trap + 'sleep 600 & echo $$ $! > "$1.new"; mv "$1.new" "$1"; while :; do sleep 0.1; done'
    note = folder / f"pids-{guard_s}"
    script = (
        "import sys, time\nfrom runtime.children import spawn\n"
        f"spawn(['sh', '-c', *sys.argv[1:]], env={{'PATH': '/bin'}}, log=None, session=True, guard_s={guard_s})\n"
        "time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, shell, "sh", str(note)])
    wait_until(note.exists, "the shell runs")
    births = [(int(pid), birth_of(int(pid))) for pid in note.read_text().split()]
    assert all(birth for _, birth in births)

    parent.kill()
    parent.wait()

    wait_until(lambda: all(birth_of(pid) != birth for pid, birth in births), "the session is gone")


def program_of(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def test_a_program_that_does_not_exist_is_an_error_of_the_caller() -> None:
    with pytest.raises(FileNotFoundError, match="no such program: no-such-server"):
        spawn(["no-such-server"], env={}, log=None, session=False)
