"""Services of a test's own that it may press: a RabbitMQ node under an alarm, a Postgres without room.

They run beside the shared ones, which no test may stop or change.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from runtime.children import spawn, stop
from tests.support.waiting import wait_until

START_S = 60.0
RABBITMQ_PROGRAMS = Path("/usr/lib/rabbitmq/bin")


class OwnRabbit:
    """A RabbitMQ node of our own."""

    def __init__(self, url: str, environment: dict[str, str]) -> None:
        self.url = url
        self._environment = environment

    def raise_alarm(self) -> None:
        """Memory counts as short: publishers are blocked."""
        self._control("set_vm_memory_high_watermark", "absolute", "1MB")
        wait_until(lambda: "alarm" in self._control("status"), START_S, "the alarm")

    def end_alarm(self) -> None:
        """Memory is enough again."""
        self._control("set_vm_memory_high_watermark", "0.9")

    def answers(self) -> bool:
        """Whether it has started."""
        return (
            subprocess.run(
                [RABBITMQ_PROGRAMS / "rabbitmq-diagnostics", "-q", "check_port_connectivity"],
                env=self._environment,
                capture_output=True,
                check=False,
            ).returncode
            == 0
        )

    def _control(self, *arguments: str) -> str:
        return subprocess.run(
            [RABBITMQ_PROGRAMS / "rabbitmqctl", "-q", *arguments],
            env=self._environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout


@contextmanager
def own_rabbit() -> Iterator[OwnRabbit]:
    """A node in a folder of its own; gone at the end, with its folder."""
    if not (RABBITMQ_PROGRAMS / "rabbitmq-server").exists():
        pytest.skip("no RabbitMQ to start here")
    folder = Path(tempfile.mkdtemp(prefix="stoker-rabbit-"))
    port = free_port()
    (folder / "rabbitmq.conf").write_text(f"listeners.tcp.1 = 127.0.0.1:{port}\nloopback_users = none\n")
    (folder / "enabled_plugins").write_text("[].\n")
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "LC_ALL": "C.UTF-8",
        "RABBITMQ_NODENAME": f"stoker{secrets.token_hex(4)}@localhost",
        "RABBITMQ_DIST_PORT": str(free_port()),
        "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
        "RABBITMQ_MNESIA_BASE": str(folder / "rows"),
        "RABBITMQ_LOG_BASE": str(folder / "logs"),
    }
    child = spawn([str(RABBITMQ_PROGRAMS / "rabbitmq-server")], env=environment, log=folder / "log", session=True)
    try:
        rabbit = OwnRabbit(f"amqp://guest:guest@127.0.0.1:{port}//", environment)
        wait_until(rabbit.answers, START_S, f"RabbitMQ starts: {(folder / 'log').read_text()}")
        yield rabbit
    finally:
        stop(child, grace_s=10)
        shutil.rmtree(folder, ignore_errors=True)


class OwnPostgres:
    """A Postgres server of our own, with an empty database `stoker`."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.url = f"postgresql://postgres@127.0.0.1:{port}/stoker"

    def execute(self, statement: str) -> None:
        """One statement in the database `postgres`, outside any transaction."""
        with psycopg.connect(self.url.replace("/stoker", "/postgres"), autocommit=True) as connection:
            connection.execute(statement)


@contextmanager
def own_postgres(*, max_connections: int = 40, tablespace: Path | None = None) -> Iterator[OwnPostgres]:
    """A server in a folder of its own; its database lies in the tablespace, if one is named."""
    programs = Path(os.path.realpath(shutil.which("initdb") or pytest.skip("no Postgres to start here"))).parent
    account = "postgres" if os.geteuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="stoker-postgres-"))
    _give(folder, account)
    rows, port = folder / "rows", free_port()
    subprocess.run(
        [str(programs / "initdb"), "-D", str(rows), "-U", "postgres", "--no-sync", "-A", "trust"],
        check=True,
        capture_output=True,
        cwd="/",
        user=account,
    )
    command = [str(programs / "postgres"), "-D", str(rows), "-k", str(folder), "-p", str(port)]
    for setting in (f"max_connections={max_connections}", "superuser_reserved_connections=0", "fsync=off"):
        command += ["-c", setting]
    child = spawn(
        command, env={"PATH": os.environ["PATH"], "LC_ALL": "C"}, log=folder / "log", session=True, account=account
    )
    try:
        postgres = OwnPostgres(folder, port)
        wait_until(lambda: _listens(port), START_S, "Postgres starts")
        wait_until(lambda: "ready to accept" in (folder / "log").read_text(), START_S, "Postgres is ready")
        if tablespace is not None:
            _give(tablespace, account)
            postgres.execute(f"CREATE TABLESPACE small LOCATION '{tablespace}'")
        postgres.execute("CREATE DATABASE stoker" + (" TABLESPACE small" if tablespace else ""))
        yield postgres
    finally:
        stop(child, grace_s=10)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def small_disk(size_mb: int) -> Iterator[Path]:
    """A folder on a file system of this size; skips where we may not mount."""
    folder = Path(tempfile.mkdtemp(prefix="stoker-disk-"))
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_mb}m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    try:
        if made.returncode != 0:
            pytest.skip("a small file system needs the right to mount")
        folder.chmod(0o755)  # Postgres runs as another account
        (folder / "tablespace").mkdir()
        yield folder
    finally:
        if made.returncode == 0:
            subprocess.run(["umount", "-l", str(folder)], check=True)
        folder.rmdir()


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _give(folder: Path, account: str | None) -> None:
    if account is not None:
        entry = pwd.getpwnam(account)
        os.chown(folder, entry.pw_uid, entry.pw_gid)


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
