"""What one prefork child of the control node owns, and how it runs a schedule's command: as a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Final
from uuid import UUID

from celery import Celery

from models.names import PREFIX
from pipeline.schedules import Ran, TakenRun
from runtime.children import die_with_parent, spawn, stop
from runtime.metrics_folder import FOLDER_VARIABLE
from runtime.settings import Settings, environment_of
from store.database import Database
from store.looks import LookBoard
from tasks.control import ControlContext
from worker.queues import HintPublisher
from worker.steps import WorkerParts

# Not `python -m`: that would put the schedule's folder first on the path, whose modules would hide ours.
STOKER: Final = Path(sys.executable).with_name("stoker")
LOOK_S: Final = 0.2
END_GRACE_S: Final = 10.0  # for a command that is asked to end
TOLD_LINES: Final = 20
LINE_BYTES: Final = 2_000
TIMED_OUT: Final = 124  # as coreutils' timeout exits
NO_FOLDER: Final = 2

_TAKEN_OVER: Final = "ended: another worker has this run"
_DRAINED: Final = "ended: its worker stops"

_BATCH = re.compile(rf"\b{PREFIX}([0-9a-f]{{32}})\b")


class ControlChild:
    """The parts that a child's tasks share, from `worker_process_init` to its end."""

    def __init__(self, parts: WorkerParts, app: Celery) -> None:
        die_with_parent()
        settings = parts.settings
        self._database = Database(settings.require_postgres(), pool_size=settings.postgres.pool_size)
        self._board = LookBoard(settings.require_redis())
        self._publisher = HintPublisher(app, delivery_limit=settings.broker.delivery_limit)
        self.context = ControlContext(
            database=self._database,
            settings=settings.schedule,
            publish=self._publisher.run_schedules,
            execute=Commands(settings, is_draining=parts.shared.is_draining).run,
            note_look=self._board.note,
        )

    def close(self) -> None:
        """Close every connection."""
        self._publisher.close()
        self._board.close()
        self._database.close()


class Commands:
    """Runs commands of `stoker`, each in the schedule's folder with this worker's settings."""

    def __init__(self, settings: Settings, *, is_draining: Callable[[], bool]) -> None:
        self._most_s = settings.schedule.run_s
        self._grace_s = settings.worker.grace_s
        self._is_draining = is_draining
        self._env = {**os.environ, **environment_of(settings)}
        self._env.pop(FOLDER_VARIABLE, None)  # the numbers of a command are not this worker's

    def run(self, taken: TakenRun, is_ours: Callable[[], bool]) -> Ran:
        """Run it to its end, which comes early when it is no longer ours, takes too long or the worker goes down.

        A drained worker lets it go on for its grace, ends it and gives the run back. Call it in a thread that lives as
        long as the process: the command dies with it, and all that it has started.
        """
        if not Path(taken.folder).is_dir():
            told = f"there is no folder {taken.folder} where this worker runs: it must see the one that was scheduled"
            return Ran(exit_code=NO_FOLDER, told=told)
        try:
            child = spawn(
                [str(STOKER), *taken.command],
                env=self._env,
                log=None,
                session=True,
                guard_s=END_GRACE_S,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                folder=Path(taken.folder),
            )
        except OSError as error:
            return Ran(exit_code=NO_FOLDER, told=f"it could not begin: {error}")
        output = _Output(child)
        why = self._wait(child, is_ours)
        status = stop(child, grace_s=END_GRACE_S)
        with suppress(ProcessLookupError):  # its guard, and what it may have left
            os.killpg(child.pid, signal.SIGTERM)
        output.join()
        batch_id = output.batch_id if taken.command[0] == "submit" else None
        if why is None:
            return Ran(exit_code=status, told=output.told(), batch_id=batch_id)
        return Ran(exit_code=TIMED_OUT, told=output.told(why), batch_id=batch_id, given_back=why == _DRAINED)

    def _wait(self, child: subprocess.Popen[bytes], is_ours: Callable[[], bool]) -> str | None:
        """Until it has ended (None), or why it is to be ended."""
        until, drained_at = time.monotonic() + self._most_s, None
        while child.poll() is None:
            now = time.monotonic()
            if not is_ours():
                return _TAKEN_OVER
            if now > until:
                return f"ended: it ran for longer than STOKER_SCHEDULE__RUN_S, {self._most_s:g} s"
            if self._is_draining():
                drained_at = drained_at or now
                if now > drained_at + self._grace_s:
                    return _DRAINED
            with suppress(subprocess.TimeoutExpired):
                child.wait(LOOK_S)
        return None


class _Output:
    """Reads what a command says, so that it never waits for a reader, and keeps the end of it."""

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        self.batch_id: UUID | None = None
        self._lines: deque[str] = deque(maxlen=TOLD_LINES)
        assert child.stdout is not None and child.stderr is not None  # noqa: S101
        self._threads = [
            threading.Thread(target=self._read, args=[child.stdout, self._find_batch], daemon=True),
            threading.Thread(target=self._read, args=[child.stderr, lambda line: None], daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        """Until both ends are read."""
        for thread in self._threads:
            thread.join(END_GRACE_S)

    def told(self, *more: str) -> str:
        """Its last lines."""
        return "\n".join([*self._lines, *more])

    def _read(self, stream: IO[bytes], look: Callable[[str], None]) -> None:
        with stream:
            for raw in iter(lambda: stream.readline(LINE_BYTES), b""):
                line = raw.decode(errors="replace").rstrip().replace("\0", "")
                look(line)
                if line:
                    self._lines.append(line)

    def _find_batch(self, line: str) -> None:
        if found := _BATCH.search(line):
            self.batch_id = UUID(found[1])
