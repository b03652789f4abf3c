"""The steps of one upgrade, in the order that docs/upgrade.md tells people."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psycopg

from tests.chaos.system import System, kill_all
from tests.support.gateway_process import GatewayProcess
from tests.support.processes import MARK, WorkerProcess, code_environment, new_mark
from tests.support.waiting import wait_until
from tests.upgrade.client import Client
from tests.upgrade.code import Code
from tests.upgrade.waits import TableWaits

JOB_S: Final = 0.1
IN_FLIGHT: Final = 4  # a child
SHARD_JOBS: Final = 16
STEADY_S: Final = 8.0
MIXED_S: Final = 12.0
BLOCKED_S: Final = 2.0
DRAIN_S: Final = 30.0
LOOK_S: Final = 0.05
READY_S: Final = 180.0
EVERY_MINUTE: Final = "* * * * *"
LOCK_TIMEOUT: Final = "canceling statement due to lock timeout"


@dataclass(frozen=True, slots=True)
class Note:
    """What was looked at beside the phases, and what was seen."""

    what: str
    seen: str


class Dispatch:
    """`stoker dispatch` of one code."""

    def __init__(self, code: Code, *, env: dict[str, str], folder: Path) -> None:
        mark = new_mark()
        self._log_file = folder / f"dispatch-{mark[:4]}.log"
        with self._log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "worker.dispatcher"],
                cwd=code.folder,
                env={**code_environment(code.folder), **env, MARK: mark},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    @property
    def log(self) -> str:
        return self._log_file.read_text(errors="replace")


class Upgrade:
    """One run. `marks`: phases and when they began; `problems`: what did not go as it must."""

    def __init__(self, system: System, *, old: Code, new: Code) -> None:
        self.system, self.old, self.new = system, old, new
        self.marks: list[tuple[str, float]] = []
        self.notes: list[Note] = []
        self.problems: list[str] = []
        self.expected_errors: set[str] = {LOCK_TIMEOUT}
        self.migration_s, self.migration_tries = 0.0, 1
        self.client: Client | None = None
        self.waits = TableWaits(system.postgres.url)
        self._stack = ExitStack()
        self._gateways: list[GatewayProcess] = []
        self._dispatches: list[Dispatch] = []
        self._controls: list[WorkerProcess] = []
        self._starting: list[threading.Thread] = []

    def run(self) -> None:
        """All steps."""
        self._prepare()
        with self.waits, self._client() as self.client:
            wait_until(lambda: _works(self.system), READY_S, "the first batch is under way")
            self._phase("old code, old schema")
            time.sleep(STEADY_S)
            self._see_commands(self.new, "new", "old")
            self._start_too_early()
            self._migrate()
            self._phase("old code, new schema")
            time.sleep(STEADY_S)
            self._restart_old()
            self._see_commands(self.old, "old", "new")
            time.sleep(STEADY_S)
            self._phase("workers, dispatch: old and new together")
            self._see_ready()
            self._roll_first()
            time.sleep(MIXED_S)
            self._roll_rest()
            self._phase("new code; gateway last")
            self._roll_gateway()
            time.sleep(STEADY_S)
            self._phase("end")
            self.client.stop_submitting()
            wait_until(self.client.has_read_all, READY_S, "all results were read")
        self._see_schedule()

    def end(self) -> None:
        """Nothing runs afterwards."""
        with redirect_stdout(sys.stderr):  # a gateway prints its log
            self._stack.close()
        for dispatch in self._dispatches:
            dispatch.process.kill()
            dispatch.process.wait()

    def logs(self) -> Iterator[tuple[str, str]]:
        """Every process's log by name."""
        for worker in [*self.system.workers, *self.system.dead, *self._controls]:
            yield worker.name, worker.log
        for number, gateway in enumerate(self._gateways):
            yield f"gateway {number}", gateway.log
        for number, dispatch in enumerate(self._dispatches):
            yield f"dispatch {number}", dispatch.log

    def _prepare(self) -> None:
        """The old schema, and old processes on it."""
        for code in (self.old, self.new):
            found = code.place_of("store.schema")
            assert found.is_relative_to(code.folder), f"{code.commit} would run {found}"
        system = self.system
        # The disk is no part of what is tried, and others may use it.
        system.query("ALTER SYSTEM SET fsync = off")
        system.query("SELECT pg_reload_conf()")
        done = self.old.run("migrate", env=system.env)
        assert done.returncode == 0, done.stderr
        assert self._revision() == self.old.revision
        system.workers = [self._worker(f"old{slot}", self.old) for slot in range(2)]
        for worker in system.workers:
            self._stack.enter_context(worker)
        self._dispatches.append(Dispatch(self.old, env=system.env, folder=system.folder))
        gateway = GatewayProcess(env=system.env, folder=system.folder, ready_s=READY_S, code=self.old.folder)
        self._gateways.append(self._stack.enter_context(gateway))
        if self.old.has_schedules:
            self._controls.append(self._stack.enter_context(self._worker("old-control", self.old, node="control")))
            file = system.write_file("scheduled", SHARD_JOBS)
            command = ("submit", str(file))
            done = self.old.run("schedule", "add", "minutely", "--cron", EVERY_MINUTE, "--", *command, env=system.env)
            assert done.returncode == 0, done.stderr

    def _client(self) -> Client:
        made = self.old.run("keys", "create", "--json", env=self.system.env)
        assert made.returncode == 0, made.stderr
        return Client(self.system, code=self.old, url=self._gateways[0].url, key=json.loads(made.stdout)["key"])

    def _start_too_early(self) -> None:
        """New processes before the migration wait for it."""
        env, folder = self.system.env, self.system.folder
        worker = self._worker("new0", self.new)
        gateway = GatewayProcess(env=env, folder=folder, ready_s=READY_S, code=self.new.folder)
        for part in (worker, gateway):
            self._starting.append(threading.Thread(target=self._stack.enter_context, args=[part]))
            self._starting[-1].start()
        dispatch = Dispatch(self.new, env=env, folder=folder)
        self.system.workers.append(worker)
        self._gateways.append(gateway)
        self._dispatches.append(dispatch)
        wait_until(
            lambda: all(_waits(part) for part in (worker, gateway, dispatch)), READY_S, "all of the new code waits"
        )
        self.notes.append(Note("new worker, gateway and dispatch on the old schema", "log schema_waits, take nothing"))

    def _migrate(self) -> None:
        """With the new code, while somebody reads in a long transaction."""
        is_over = threading.Event()
        blocker = threading.Thread(target=self._hold_tables, args=[is_over])
        self._phase("migration")
        blocker.start()
        began = time.monotonic()
        done = self.new.run("migrate", env=self.system.env)
        self.migration_s = round(time.monotonic() - began, 1)
        is_over.set()
        blocker.join()
        assert done.returncode == 0, done.stderr
        assert self._revision() == self.new.revision
        self.migration_tries = 1 + done.stderr.count("migration_waits")
        seen = f"{self.migration_s} s with the command's start, {self.migration_tries} tries"
        self.notes.append(Note("`stoker migrate` beside a transaction that reads batches and results", seen))

    def _hold_tables(self, is_over: threading.Event) -> None:
        """Read what a migration may need alone, until it has waited for it for a while."""
        waits = "SELECT 1 FROM pg_locks WHERE locktype = 'relation' AND mode = 'AccessExclusiveLock' AND NOT granted"
        with psycopg.connect(self.system.postgres.url, application_name="a long reader") as connection:
            connection.execute("SELECT count(*) FROM (SELECT FROM batches, results LIMIT 1) AS read")
            while not is_over.wait(LOOK_S):
                if self.system.query(waits):
                    is_over.wait(BLOCKED_S)
                    return

    def _restart_old(self) -> None:
        """kill -9 of an old worker, and its start on the newer schema; old commands on it."""
        system = self.system
        worker = system.workers[1]
        kill_all(worker.processes())
        system.dead.append(worker)
        began = time.monotonic()
        system.workers[1] = self._stack.enter_context(self._worker("old1b", self.old))
        self.notes.append(
            Note(
                "kill -9 of an old worker, started again on the new schema",
                f"ready in {time.monotonic() - began:.1f} s",
            )
        )

    def _see_commands(self, code: Code, ours: str, its: str) -> None:
        """What commands of one code say on the other's schema."""
        words = ("status", "doctor", "migrate") if code is self.old else ("status", "doctor")
        for word in words:
            done = code.run(word, env=self.system.env)
            what = f"{ours} `stoker {word}` on the {its} schema"
            self._note_command(what, done)
            if "Traceback" in done.stderr and code.knows_of_others:
                self.problems.append(f"{what}: {done.stderr[-300:]}")

    def _note_command(self, what: str, done: subprocess.CompletedProcess[str]) -> None:
        """Its exit code, and what it says of the schema."""
        plain = re.sub(r"[│!]|/\S*/site-packages/", " ", done.stderr + done.stdout)
        told = [" ".join(line.split()) for line in plain.splitlines()]
        about = next((line for line in told if "revision" in line or "migrate" in line), "nothing of the schema")
        self.notes.append(Note(what, f"exit {done.returncode}; {about}"))

    def _see_ready(self) -> None:
        """Those that waited take part by themselves."""
        for thread in self._starting:
            thread.join(READY_S)
        worker, gateway = self.system.workers[-1], self._gateways[-1]
        assert f"{worker.name} ready" in worker.log, worker.log
        assert "gateway_up" in gateway.log, gateway.log
        self.notes.append(Note("those that waited", "went on by themselves after the migration"))

    def _roll_first(self) -> None:
        """One old worker and the old dispatch go, by SIGTERM."""
        self._stop_worker(self.system.workers[0])
        self._stop("dispatch", self._dispatches[0].process)

    def _roll_rest(self) -> None:
        """The other old worker by kill -9, the control worker by SIGTERM."""
        system = self.system
        system.workers.append(self._stack.enter_context(self._worker("new1", self.new)))
        last = next(worker for worker in system.workers if worker.name.startswith("old"))
        kill_all(last.processes())
        system.workers.remove(last)
        system.dead.append(last)
        if self._controls:
            old = self._controls[0]
            self._controls.append(self._stack.enter_context(self._worker("new-control", self.new, node="control")))
            self._stop("control worker", old._process)

    def _roll_gateway(self) -> None:
        assert self.client is not None
        self.client.url, self.client.code = self._gateways[-1].url, self.new
        self._stop("gateway", self._gateways[0].process)

    def _see_schedule(self) -> None:
        if not self.old.has_schedules:
            return
        marks = dict(self.marks)
        open_runs = "SELECT 1 FROM schedule_runs WHERE due_at < to_timestamp(%s) AND ended_at IS NULL"
        wait_until(lambda: not self.system.query(open_runs, marks["end"]), READY_S, "runs of the schedule have ended")
        rows = self.system.query(
            "SELECT state, batch_id, started_at > to_timestamp(%s) FROM schedule_runs WHERE due_at < to_timestamp(%s)",
            marks["old code, new schema"],
            marks["end"],
        )
        states = [str(row[0]) for row in rows]
        after = sum(bool(row[2]) for row in rows)
        for row in rows:
            if row[1] is not None:
                self.system.batches[row[1].hex] = [f"scheduled-{job}" for job in range(SHARD_JOBS)]
        self.notes.append(Note("runs of a schedule, one a minute", f"{states}, {after} of them after the migration"))
        if set(states) - {"succeeded"} or not states:
            self.problems.append(f"runs of the schedule: {states}")

    def _stop_worker(self, worker: WorkerProcess) -> None:
        self.system.workers.remove(worker)
        self.system.dead.append(worker)
        worker.processes()
        self._stop("worker", worker._process)

    def _stop(self, what: str, process: subprocess.Popen[bytes]) -> None:
        began = time.monotonic()
        process.terminate()
        try:
            status = process.wait(DRAIN_S)
        except subprocess.TimeoutExpired:
            self.problems.append(f"the old {what} was up {DRAIN_S:g} s after SIGTERM")
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            return
        self.notes.append(Note(f"SIGTERM of the old {what}", f"{time.monotonic() - began:.1f} s, status {status}"))

    def _phase(self, name: str) -> None:
        self.marks.append((name, time.time()))
        print(f"upgrade: {name}", file=sys.stderr, flush=True)

    def _revision(self) -> str:
        return str(self.system.query("SELECT version_num FROM alembic_version")[0][0])

    def _worker(self, name: str, code: Code, *, node: str = "generation") -> WorkerProcess:
        env = {**self.system.env, "STOKER_WORKER__NODE": node}
        return WorkerProcess(name, env=env, folder=self.system.folder, ready_s=READY_S, code=code.folder)


def _works(system: System) -> bool:
    """Whether results come."""
    return bool(system.query("SELECT 1 FROM results LIMIT 1"))


def _waits(part: WorkerProcess | GatewayProcess | Dispatch) -> bool:
    try:
        return "schema_waits" in part.log
    except FileNotFoundError:  # its thread has not begun
        return False
