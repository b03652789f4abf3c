"""A tree of processes that count, in a process of its own: `python -m tests.support.counting_tree PORT`.

Prints a JSON object of what it saw at each stage. With `child` instead of a port it is one of those that it starts.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from api.counted import Counted
from pipeline.leading import Leading
from runtime.children import die_with_parent
from runtime.logs import configure_logs
from runtime.metrics import ENGINE_SLOTS, JOBS, SHARD_SECONDS, SHARDS_RUNNING, SLACK, open_metrics, serve_metrics
from runtime.metrics_folder import families_in
from runtime.settings import LogSettings, MetricsSettings
from tests.support.waiting import wait_until

STARTED = [sys.executable, "-m", "tests.support.counting_tree", "child"]
SHORT_LIVES = 12
OPEN_METRICS = "application/openmetrics-text;version=1.0.0,*/*;q=0.1"  # as Prometheus asks


def count(jobs: int, *, running: int) -> None:
    """What each process does; the jobs last, by which one sees that it has."""
    SHARDS_RUNNING.set(running)
    SHARD_SECONDS.observe(0.3)
    JOBS.add(jobs, outcome="succeeded", source="engine")


def forked(work: Callable[[], None]) -> int:
    """The pid of a child that works and then waits to be killed."""
    pid = os.fork()
    if pid == 0:
        die_with_parent()
        work()
        threading.Event().wait()
    return pid


def end(pid: int) -> None:
    """End a child as the kernel does."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def seen(folder: str) -> dict[str, float]:
    """The sum of each sample in a folder, by name, without buckets."""
    found: dict[str, float] = {}
    for family in families_in(folder):
        for sample in family.samples:
            if not sample.name.endswith("_bucket"):
                found[sample.name] = found.get(sample.name, 0) + sample.value
    return found


def jobs_in(folder: str) -> float:
    """How many jobs were counted."""
    return seen(folder).get("stoker_jobs_total", 0)


def main(port: int) -> dict[str, Any]:
    """What was seen."""
    configure_logs(LogSettings())
    settings = MetricsSettings(port=port)
    folder = open_metrics(settings)
    assert folder is not None and open_metrics(settings) is None
    told: dict[str, Any] = {"folder": folder.path}
    SLACK.set(7)
    pid = forked(lambda: count(2, running=1))
    with subprocess.Popen(STARTED, stdin=subprocess.PIPE) as started:
        wait_until(lambda: jobs_in(folder.path) == 5, 20, "both have counted")
        told["alive"] = seen(folder.path)
        end(pid)
        told["one killed"] = seen(folder.path)
        for _ in range(SHORT_LIVES):
            before = jobs_in(folder.path)
            pid = forked(lambda: count(1, running=1))
            wait_until(lambda before=before: jobs_in(folder.path) > before, 20, "it has counted")  # type: ignore[misc]
            end(pid)
        told["many killed"], told["files"] = seen(folder.path), len([*Path(folder.path).iterdir()])
        server = serve_metrics(settings, folder, refresh=lambda: ENGINE_SLOTS.set(8), foreign=lambda: told["foreign"])
        assert server is not None
        told["refused"] = serve_metrics(settings, folder)  # the port is taken
        for name, foreign in (("broken", "vllm:no number"), ("text", 'vllm:running{engine="0"} 3\nprocess_x 1\n')):
            told["foreign"] = foreign
            told[name] = scraped(port)
        told["as open metrics"] = scraped(port, accept=OPEN_METRICS)
        started.communicate(b"")
    asyncio.run(requests())
    leading = Leading()
    leading.end()
    told["never led"] = scraped(port)
    leading.begin()
    told["leads"] = scraped(port)
    leading.end()
    told["leads no more"] = scraped(port)
    server.stop()
    told["left"] = Path(folder.path).exists() or "PROMETHEUS_MULTIPROC_DIR" in os.environ
    return told


async def requests() -> None:
    """Each as it ends: answered, by a defect, by nothing; by its client who goes before or in the midst of the answer.

    And by a defect in the midst of it. One is of a method that nobody knows.
    """

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["route"] = SimpleNamespace(path="/v1/batches/{batch_id}")
        if scope["method"] == "HEAD":
            return
        if scope["method"] in {"PUT", "PATCH"}:
            await send({"type": "http.response.start", "status": 206})
        await receive()
        await send({"type": "http.response.start", "status": 200})

    async def receive() -> Message:
        return {"type": "http.request"}

    async def broken() -> Message:
        raise ValueError

    async def gone() -> Message:
        raise asyncio.CancelledError

    async def send(_: Message) -> None:
        return

    ends = {"GET": receive, "POST": broken, "HEAD": receive, "BREW": gone, "PUT": gone, "PATCH": broken}
    for method, received in ends.items():
        with suppress(ValueError, asyncio.CancelledError):
            await Counted(app)({"type": "http", "method": method, "path": "/v1/batches/secret"}, received, send)


def scraped(port: int, *, accept: str = "text/plain") -> str:
    """What is answered at /metrics."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=10) as answer:
        text: str = answer.read().decode()
    return text


def add_at_once(threads: int, seconds: float) -> None:
    """Count from many threads for a while, and fork meanwhile: a lock that a child inherits held would hang it."""
    until = time.monotonic() + seconds

    def work() -> None:
        while time.monotonic() < until:
            count(1, running=1)

    working = [threading.Thread(target=work) for _ in range(threads)]
    for thread in working:
        thread.start()
    while time.monotonic() < until:
        pid = os.fork()
        if pid == 0:
            signal.alarm(10)
            count(1, running=1)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        assert status == 0, "a child hangs"
    for thread in working:
        thread.join()


if __name__ == "__main__":
    if sys.argv[1] == "child":
        open_metrics(MetricsSettings())
        count(3, running=2)
        sys.stdin.read()
    else:
        result = main(int(sys.argv[1]))
        with_threads = open_metrics(MetricsSettings(port=int(sys.argv[1])))
        assert with_threads is not None
        add_at_once(4, 0.5)
        with_threads.remove()
        print(json.dumps(result))
