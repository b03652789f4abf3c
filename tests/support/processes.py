"""Real processes for acceptance tests: workers, commands, and a search for what they left behind.

Every process started here carries a mark in its environment, which its descendants inherit whatever session
they are in; so an orphan is found also when it has left its parent's session, as engines and dispatchers do.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from runtime.children import birth_of
from tests.support.waiting import wait_until

REPOSITORY = Path(__file__).resolve().parents[2]
STOKER = Path(sys.executable).parent / "stoker"
MARK = "STOKER_TEST_MARK"
READY_S = 90.0
COMMAND_S = 120.0


@dataclass(frozen=True, slots=True)
class SeenProcess:
    """A process as /proc shows it; `birth` is its own, also when its pid is used again."""

    pid: int
    parent: int
    session: int
    birth: str | None
    command: str
    mark: str | None


def new_mark() -> str:
    """A value for the environment variable MARK that no other process has."""
    return secrets.token_hex(8)


def seen_processes() -> list[SeenProcess]:
    """Every process that runs now; zombies are none."""
    found = (_seen(int(entry.name)) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [process for process in found if process is not None]


def marked(mark: str) -> list[SeenProcess]:
    """Every process that was started with this mark, or descends from one that was."""
    everyone = seen_processes()
    found = {process.pid: process for process in everyone if process.mark == mark}
    grows = True
    while grows:  # a program that rewrote its title has overwritten its environment too: follow the parents
        more = {process.pid: process for process in everyone if process.parent in found}
        grows = not more.keys() <= found.keys()
        found |= more
    return list(found.values())


class Command:
    """`stoker …` in the background: `with Command("watch", batch, env=env) as command: command.wait()`."""

    def __init__(self, *arguments: str | Path, env: Mapping[str, str], mark: str | None = None) -> None:
        self._arguments = [str(argument) for argument in arguments]
        self.mark = mark or new_mark()
        self._env = {**clean_environment(), **env, MARK: self.mark}

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            [str(STOKER), *self._arguments],
            cwd=REPOSITORY,
            env=self._env,
            text=True,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.communicate()
        kill_marked(self.mark)

    def wait(self, timeout_s: float = COMMAND_S) -> subprocess.CompletedProcess[str]:
        """Its exit status, stdout and stderr, once it has ended."""
        stdout, stderr = self.process.communicate(timeout=timeout_s)
        return subprocess.CompletedProcess(self._arguments, self.process.returncode, stdout, stderr)


def stoker(
    *arguments: str | Path, env: Mapping[str, str], stdin: str | None = None, timeout_s: float = COMMAND_S
) -> subprocess.CompletedProcess[str]:
    """Run `stoker …` to its end."""
    return subprocess.run(
        [str(STOKER), *(str(argument) for argument in arguments)],
        cwd=REPOSITORY,
        input=stdin or "",
        env={**clean_environment(), **env},
        text=True,
        capture_output=True,
        check=False,
        timeout=timeout_s,
    )


class WorkerProcess:
    """A worker, `celery -A worker.main worker -n NAME`, and all that it starts.

    `with WorkerProcess("one", env=env, folder=tmp_path) as worker:` waits until it takes hints; at the end of
    the block, however that came, nothing of it runs.
    """

    def __init__(
        self, name: str, *, env: Mapping[str, str], folder: Path, ready_s: float = READY_S, code: Path = REPOSITORY
    ) -> None:
        self.name = f"{name}@{os.uname().nodename}"
        self.mark = new_mark()
        self._code = code
        self._env = {**code_environment(code), **env, MARK: self.mark}
        self._log_file = folder / f"{name}-{self.mark[:4]}.log"
        self._ready_s = ready_s
        self._known: list[SeenProcess] = []

    def __enter__(self) -> Self:
        with self._log_file.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "celery", "-A", "worker.main", "worker", "-n", self.name],
                cwd=self._code,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            wait_until(self._is_ready, self._ready_s, f"{self.name} is ready")
        except BaseException:
            print(self.log)
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        if kind is not None:
            print(f"--- {self.name}\n{self.log}")

    @property
    def pid(self) -> int:
        """The parent process, Celery's consumer."""
        return self._process.pid

    @property
    def status(self) -> int | None:
        """The exit status; None while it runs."""
        return self._process.poll()

    @property
    def log(self) -> str:
        """What it wrote so far."""
        return self._log_file.read_text(errors="replace")

    def children(self) -> list[int]:
        """The prefork children, oldest first."""
        return sorted(
            process.pid for process in seen_processes() if process.parent == self.pid and process.session == self.pid
        )

    def dispatcher(self) -> int | None:
        """The dispatch process that it started, if that runs."""
        running = (process for process in self.processes() if "worker.dispatcher" in process.command)
        return next((process.pid for process in running), None)

    def processes(self) -> list[SeenProcess]:
        """Itself and all its descendants that run now, those whose parents have died included."""
        now = {process.pid: process for process in marked(self.mark)}
        now |= {process.pid: process for process in self._known if birth_of(process.pid) == process.birth}
        self._known = list(now.values())
        return self._known

    def kill9(self) -> None:
        """End the parent process as the kernel does when memory is short; its children are left alone."""
        self.processes()
        self._process.kill()
        self._process.wait()

    def terminate(self, timeout_s: float) -> int:
        """SIGTERM, so that it drains; its exit status once it has ended."""
        self.processes()
        self._process.terminate()
        return self._process.wait(timeout_s)

    def _is_ready(self) -> bool:
        assert self.status is None, f"{self.name} ended with status {self.status}:\n{self.log}"
        return f"{self.name} ready" in self.log

    def _end(self) -> None:
        self.processes()
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        kill_marked(self.mark)
        for process in self._known:
            if birth_of(process.pid) == process.birth:
                _kill(process.pid)


def kill_marked(mark: str) -> None:
    """End everything with this mark; returns when it is gone."""
    end = time.monotonic() + READY_S
    while left := marked(mark):
        assert time.monotonic() < end, f"these do not end: {left}"
        for process in left:
            _kill(process.pid)
        time.sleep(0.02)


def code_environment(code: Path) -> dict[str, str]:
    """A clean environment for `python -m …` in the folder of this code, which may be another commit's."""
    clean = clean_environment()
    return clean if code == REPOSITORY else {**clean, "PYTHONPATH": str(code)}


def clean_environment() -> dict[str, str]:
    """This process's environment without its settings of Stoker."""
    return {name: value for name, value in os.environ.items() if not name.startswith("STOKER_")}


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _seen(pid: int) -> SeenProcess | None:
    folder = Path(f"/proc/{pid}")
    try:
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
        command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        variables = (folder / "environ").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    if fields[0] in "ZX":
        return None
    start = f"{MARK}=".encode()
    mark = next((entry[len(start) :].decode() for entry in variables if entry.startswith(start)), None)
    return SeenProcess(pid, int(fields[1]), int(fields[3]), birth_of(pid), command, mark)
