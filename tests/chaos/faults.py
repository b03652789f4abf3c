"""The faults that chaos commits, each on a running system; what was killed is started again as a supervisor would."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import kombu
import psycopg
import redis

from store.notifications import LEADER_LOCK
from tests.chaos.system import LEASE_S, System, kill_all
from tests.support.processes import Command, WorkerProcess, stoker
from tests.support.waiting import wait_until

OUTAGE_S = LEASE_S + 1.5
SIDE_JOBS = 600  # some 4 s of work: on a busy machine a command takes a second to begin
ABANDONED_JOBS = 100_000

WATCH_S = 8.0
HINTS_HELD = 4  # by a worker: two in its children, two prefetched
RECEIVED = re.compile(r"\[(\d+-[0-9a-f]{8})\] received")

Fault = Callable[[System, random.Random], None]


def kill_worker(system: System, chance: random.Random) -> None:
    """kill -9 of a worker and all that it started, at once, as when a container is out of memory."""
    worker = _ready_worker(system, chance)
    holders = [f"%:{process.pid}" for process in worker.processes()]
    held = "SELECT id, fence FROM shards WHERE state = 'running' AND holder LIKE ANY(%s)"
    fences = {int(shard): int(fence) for shard, fence in system.query(held, holders)}
    kill_all(worker.processes())
    killed_at = time.monotonic()
    _reap(worker)
    wait_until(lambda: not worker.processes(), 5, "all of the killed worker is gone")
    system.replace(worker)
    _watch_recovery(system, fences, hints=RECEIVED.findall(worker.log)[-HINTS_HELD:], since=killed_at)


def kill_parent(system: System, chance: random.Random) -> None:
    """kill -9 of a worker's parent process alone; what it had started must end by itself."""
    worker = _ready_worker(system, chance)
    worker.kill9()
    wait_until(lambda: not worker.processes(), 15, "what the killed parent had started has ended")
    system.replace(worker)


def kill_child(system: System, chance: random.Random) -> None:
    """kill -9 of one prefork child."""
    worker = _ready_worker(system, chance)
    commands = {process.pid: process.command for process in worker.processes()}
    children = [pid for pid in worker.children() if "celery" in commands.get(pid, "")]
    os.kill(chance.choice(children), signal.SIGKILL)


def kill_engine(system: System, chance: random.Random) -> None:
    """kill -9 of one inference server; its worker starts another."""
    wait_until(system.engines, 60, "an engine runs")
    os.kill(chance.choice(system.engines()).pid, signal.SIGKILL)


def kill_dispatch_leader(system: System, _: random.Random) -> None:
    """kill -9 of the process that holds the dispatch lock."""
    wait_until(lambda: _leaders(system), 20, "one of the workers' dispatch processes leads")
    for pid in _leaders(system):
        os.kill(pid, signal.SIGKILL)


def kill_beat(system: System, _: random.Random) -> None:
    """kill -9 of beat."""
    assert system.beat is not None
    system.beat.kill()
    system.beat.wait()
    system.start_beat()


def kill_submitter(system: System, _: random.Random) -> None:
    """kill -9 of a submit in its middle: its batch stays validating, and no job of it ever runs."""
    file = system.write_file(f"abandoned{len(system.never_visible)}", ABANDONED_JOBS)
    before = _validating(system)
    with Command("submit", file, env=system.env) as command:
        wait_until(lambda: _validating(system) - before or command.process.poll() is not None, 30, "it validates")
    left = _validating(system) - before
    assert left, "the submit was quicker than its killer"
    system.never_visible |= left


def restart_rabbitmq(system: System, _: random.Random) -> None:
    """kill -9 of the broker, and its start."""
    system.rabbitmq.kill()
    system.rabbitmq.start()


def purge_queues(system: System, _: random.Random) -> None:
    """All hints that wait in the broker are gone."""
    with kombu.Connection(system.rabbitmq.url, connect_timeout=5) as connection:
        for queue in ("generation", "stoker.dead"):
            connection.default_channel.queue_purge(queue)


def restart_redis(system: System, _: random.Random) -> None:
    """kill -9 of Redis, which keeps nothing, and its start."""
    system.redis.kill()
    system.redis.start()


def flush_redis(system: System, _: random.Random) -> None:
    """FLUSHALL."""
    with redis.Redis.from_url(system.redis.url) as client:
        client.flushall()


def stop_postgres(system: System, _: random.Random) -> None:
    """An immediate stop of Postgres, for longer than a lease."""
    system.postgres.kill()
    time.sleep(OUTAGE_S)
    system.postgres.start()


def freeze_worker(system: System, chance: random.Random) -> None:
    """SIGSTOP of a worker and all that it started until its leases are over; SIGCONT."""
    worker = _ready_worker(system, chance)
    frozen = worker.processes()
    kill_all(frozen, signal.SIGSTOP)
    try:
        time.sleep(OUTAGE_S)
    finally:
        kill_all(frozen, signal.SIGCONT)


def cancel_batch(system: System, _: random.Random) -> None:
    """Cancel a batch in its middle."""
    batch = _side_batch(system)
    assert stoker("cancel", batch, env=system.env).returncode == 0


def expire_batch(system: System, _: random.Random) -> None:
    """End a batch's completion window in its middle."""
    batch = _side_batch(system)
    system.query("UPDATE batches SET expires_at = clock_timestamp() WHERE id = %s::uuid", batch)


def retry_batch(system: System, _: random.Random) -> None:
    """Cancel a batch in its middle; retry what it left."""
    batch = _side_batch(system)
    assert stoker("cancel", batch, env=system.env).returncode == 0
    is_over = "SELECT 1 FROM batches WHERE id = %s::uuid AND state = 'cancelled'"
    wait_until(lambda: system.query(is_over, batch), 120, "the cancelled batch has ended")
    system.begin("retry", batch, ids=system.ids_in_file(batch, "--errors"))


FAULTS: dict[str, Fault] = {
    "kill -9 worker": kill_worker,
    "kill -9 parent only": kill_parent,
    "kill -9 child": kill_child,
    "kill -9 engine": kill_engine,
    "kill -9 leader": kill_dispatch_leader,
    "kill -9 beat": kill_beat,
    "kill -9 submitter": kill_submitter,
    "RabbitMQ restart": restart_rabbitmq,
    "RabbitMQ purge": purge_queues,
    "Redis restart": restart_redis,
    "Redis FLUSHALL": flush_redis,
    "Postgres down": stop_postgres,
    "worker frozen": freeze_worker,
    "cancel": cancel_batch,
    "expiry": expire_batch,
    "retry": retry_batch,
}


def _watch_recovery(system: System, fences: dict[int, int], *, hints: list[str], since: float) -> None:
    """Note when the broker gave the dead worker's hints to others, and when its shards were free and ran again."""
    logs = {worker._log_file for worker in system.workers}
    waiting = {"free": set(fences), "running": set(fences)}
    until = since + WATCH_S
    redelivered: float | None = None
    while time.monotonic() < until and (redelivered is None or waiting["running"]):
        after = round(time.monotonic() - since, 2)
        texts = [log.read_text(errors="replace") for log in logs if log.exists()]
        if redelivered is None and any(hint in text for hint in hints for text in texts):
            redelivered = after
            system.recoveries.append(("broker redelivered a hint", after))
        rows = system.query("SELECT id, fence, state FROM shards WHERE id = ANY(%s)", list(fences))
        for shard, fence, state in rows:
            is_again = fence > fences[shard] and state in {"running", "done"}
            for what, is_so in (("free", fence > fences[shard] or state != "running"), ("running", is_again)):
                if is_so and shard in waiting[what]:
                    waiting[what].remove(shard)
                    system.recoveries.append((f"shard {what} again", after))
        time.sleep(0.05)


def _side_batch(system: System) -> str:
    """A small batch whose jobs have begun."""
    batch = system.submit(SIDE_JOBS)
    system.ended_early.add(batch)
    has_results = "SELECT 1 FROM results WHERE batch_id = %s::uuid LIMIT 1"
    wait_until(lambda: system.query(has_results, batch), 120, "the side batch is in its middle")
    return batch


def _ready_worker(system: System, chance: random.Random) -> WorkerProcess:
    """One of the workers that take hints now."""

    def ready() -> list[WorkerProcess]:
        return [
            worker for worker in system.workers if worker._log_file.exists() and f"{worker.name} ready" in worker.log
        ]

    wait_until(ready, 60, "a worker is ready")
    return chance.choice(ready())


def _leaders(system: System) -> list[int]:
    """The process that is the client of the backend with the dispatch lock; none for a moment after its death."""
    rows = system.query(
        "SELECT a.client_port FROM pg_locks l JOIN pg_stat_activity a USING (pid) "
        "WHERE l.locktype = 'advisory' AND l.objid = %s AND l.granted",
        LEADER_LOCK,
    )
    dispatchers = [pid for worker in system.workers if (pid := worker.dispatcher()) is not None]
    return [pid for pid in dispatchers if rows and _has_port(pid, int(rows[0][0]))]


def _reap(worker: WorkerProcess) -> None:
    try:
        worker._process.wait(5)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"{worker.name} survived kill -9") from None


def _validating(system: System) -> set[str]:
    return {str(row[0]) for row in system.query("SELECT id FROM batches WHERE state = 'validating'")}


def _has_port(pid: int, port: int) -> bool:
    """Whether this process holds the TCP connection with this local port."""
    inodes = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[1].rpartition(":")[2], 16) == port:
            inodes.add(f"socket:[{fields[9]}]")
    try:
        return any(str(link.readlink()) in inodes for link in Path(f"/proc/{pid}/fd").iterdir())
    except (FileNotFoundError, psycopg.Error):
        return False
