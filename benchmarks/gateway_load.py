"""The clients of benchmarks/gateway.py, in a process of their own: `python -m benchmarks.gateway_load '{"url": …}'`.

Some ask for batches as the official client does while it waits; beside them, if told so, others upload, create, wait
until the validator is done, and download. Prints as JSON what each saw.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp
import uvloop

from benchmarks.batch_lines import documents, line
from benchmarks.submit_files import MODEL

LIST_EVERY: Final = 10  # of a client's questions one is for the list
PIECE_BYTES: Final = 1024 * 1024
MADE: Final = 1000


@dataclass(frozen=True, slots=True)
class Load:
    """What to do. `pause_s`: between a client's questions, 0: none; `transfers`: uploaders, and as many downloaders."""

    url: str
    keys: list[str]
    batches: list[str]
    output: str
    file: str
    seconds: float
    clients: int = 0
    pause_s: float = 0.0
    transfers: int = 0


@dataclass(slots=True)
class Seen:
    """What came of it. Of `uploads`: bytes, seconds to the answer, and until the batch was going."""

    polls_ms: list[float] = field(default_factory=list)
    uploads: list[dict[str, float]] = field(default_factory=list)
    downloads: list[dict[str, float]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


class Client:
    """One key's requests over one session; what goes wrong is counted, nothing is tried again."""

    def __init__(self, session: aiohttp.ClientSession, load: Load, seen: Seen, number: int) -> None:
        self._session, self._load, self._seen, self._number = session, load, seen, number
        self._headers = {"Authorization": f"Bearer {load.keys[number % len(load.keys)]}"}

    async def poll(self, end: float) -> None:
        """Ask for one batch, and now and then for the list, until then."""
        asked = self._number
        await asyncio.sleep(self._load.pause_s * self._number / max(1, self._load.clients))  # not all at once
        while time.perf_counter() < end:
            batch = (
                "?limit=20" if asked % LIST_EVERY == 0 else f"/{self._load.batches[asked % len(self._load.batches)]}"
            )
            asked += 1
            began = time.perf_counter()
            await self.ask("GET", f"/v1/batches{batch}")
            self._seen.polls_ms.append((time.perf_counter() - began) * 1000)
            await asyncio.sleep(max(0.0, self._load.pause_s - (time.perf_counter() - began)))

    async def upload(self, end: float) -> None:
        """Upload the file and create a batch of it, which is then waited for, until then; the last one is finished."""
        path = Path(self._load.file)
        while time.perf_counter() < end:
            began = time.perf_counter()
            with path.open("rb") as opened:  # noqa: ASYNC230
                answer = await self.ask("POST", "/v1/files", data=form_of(opened, path.name))
            seconds = time.perf_counter() - began
            await self.going(answer)
            going_s = time.perf_counter() - began
            self._seen.uploads.append({"bytes": path.stat().st_size, "seconds": seconds, "going_s": going_s})

    async def going(self, file: dict[str, Any]) -> dict[str, Any]:
        """A batch of a file, when its lines are jobs."""
        body = {"input_file_id": file.get("id"), "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        batch = await self.ask("POST", "/v1/batches", json=body)
        while batch.get("status") == "validating":
            await asyncio.sleep(0.1)
            batch = await self.ask("GET", f"/v1/batches/{batch['id']}")
        if batch.get("status") != "in_progress":
            self._seen.errors.append(f"a batch is {batch.get('status')}: {batch.get('errors')}")
        return batch

    async def download(self, end: float) -> None:
        """Read results of an ended batch until then; the last ones are finished."""
        while time.perf_counter() < end:
            began = time.perf_counter()
            size = await self.ask_bytes(f"/v1/files/{self._load.output}/content")
            self._seen.downloads.append({"bytes": size, "seconds": time.perf_counter() - began})

    async def ask(self, method: str, path: str, **sent: Any) -> dict[str, Any]:
        """What it answers; nothing where that is an error."""
        try:
            async with self._session.request(method, self._load.url + path, headers=self._headers, **sent) as answer:
                if answer.status == 200:
                    return dict(await answer.json())
                self._seen.errors.append(f"{method} {path}: {answer.status} {(await answer.text())[:200]}")
        except (aiohttp.ClientError, TimeoutError) as error:
            self._seen.errors.append(f"{method} {path}: {error!r}")
        return {}

    async def ask_bytes(self, path: str) -> int:
        """How many bytes it answers."""
        size = 0
        try:
            async with self._session.get(self._load.url + path, headers=self._headers) as answer:
                async for piece in answer.content.iter_chunked(PIECE_BYTES):
                    size += len(piece)
                if answer.status == 200:
                    return size
                self._seen.errors.append(f"GET {path}: {answer.status}")
        except (aiohttp.ClientError, TimeoutError) as error:
            self._seen.errors.append(f"GET {path}: {error!r}")
        return size


def form_of(file: Any, name: str) -> aiohttp.FormData:
    """A multipart body as the official client sends it."""
    form = aiohttp.FormData()
    form.add_field("purpose", "batch")
    form.add_field("file", file, filename=name, content_type="application/octet-stream")
    return form


async def run(load: Load) -> Seen:
    """Do all of it at once."""
    seen = Seen()
    end = time.perf_counter() + load.seconds
    limits = {"connector": aiohttp.TCPConnector(limit=0), "timeout": aiohttp.ClientTimeout(total=None, sock_read=120)}
    async with aiohttp.ClientSession(**limits) as session, asyncio.TaskGroup() as group:  # type: ignore[arg-type]
        for number in range(load.clients):
            group.create_task(Client(session, load, seen, number).poll(end))
        for number in range(load.transfers):
            group.create_task(Client(session, load, seen, number).upload(end))
            group.create_task(Client(session, load, seen, number).download(end))
    return seen


def summed_up(seen: Seen, load: Load) -> dict[str, Any]:
    """Latencies as percentiles: nobody reads a million of them."""
    found = asdict(seen)
    polls = sorted(found.pop("polls_ms"))
    if polls:
        cuts = statistics.quantiles(polls, n=100, method="inclusive")
        found |= {"polls": len(polls), "polls_s": len(polls) / load.seconds}
        found |= {"p50_ms": cuts[49], "p99_ms": cuts[98], "most_ms": polls[-1]}
    return found


async def batch_of(load: Load) -> dict[str, Any]:
    """A batch of the load's file, going."""
    async with as_client(load) as client:
        await client.upload(time.perf_counter() + 0.001)
        listed = await client.ask("GET", "/v1/batches?limit=1")
    return dict(listed["data"][0])


async def discarded_s(load: Load, size: int) -> float:
    """Seconds of one upload of as many zeros; the file is deleted again."""
    async with as_client(load) as client:
        began = time.perf_counter()
        file = await client.ask("POST", "/v1/files", data=form_of(_zeros(size), "a.jsonl"))
        seconds = time.perf_counter() - began
        if "id" in file:
            await client.ask("DELETE", f"/v1/files/{file['id']}")
    return seconds


async def there_and_back(load: Load, size: int) -> dict[str, Any]:
    """One large file, which is nowhere but on its way: up, into jobs, and down again."""
    sent = [0, 0]
    async with as_client(load) as client:
        began = time.perf_counter()
        file = await client.ask("POST", "/v1/files", data=form_of(_lines(size, sent), "big.jsonl"))
        up_s = time.perf_counter() - began
        began = time.perf_counter()
        batch = await client.going(file)
        going_s = time.perf_counter() - began
        began = time.perf_counter()
        came = await client.ask_bytes(f"/v1/files/{file['id']}/content")
        down_s = time.perf_counter() - began
    if [batch["request_counts"]["total"], came] != sent:
        raise SystemExit(f"{sent} lines and bytes went up, {came} bytes came down, the batch is {batch}")
    return {"lines": sent[0], "bytes": sent[1], "up_s": up_s, "going_s": going_s, "down_s": down_s}


@asynccontextmanager
async def as_client(load: Load) -> AsyncIterator[Client]:
    """One client. SystemExit if a request of its failed."""
    seen = Seen()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        yield Client(session, load, seen, 0)
    if seen.errors:
        raise SystemExit(seen.errors[0])


async def _zeros(size: int) -> AsyncIterator[bytes]:
    for _ in range(size // PIECE_BYTES):
        yield bytes(PIECE_BYTES)


async def _lines(size: int, sent: list[int]) -> AsyncIterator[bytes]:
    """Different lines of about 1 KB, `size` bytes together; `sent` counts lines and bytes."""
    made = documents(MADE, model=MODEL, about=MADE)
    bodies = [body.replace("%", "%%").replace(f'"{seq}: ', '"%d: ', 1) for seq, body in enumerate(made)]
    while sent[1] < size:
        piece = "".join(line(sent[0] + seq, body % (sent[0] + seq)) for seq, body in enumerate(bodies)).encode()
        sent[0], sent[1] = sent[0] + MADE, sent[1] + len(piece)
        yield piece


if __name__ == "__main__":
    wanted = Load(**json.loads(sys.argv[1]))
    print(json.dumps(summed_up(uvloop.run(run(wanted)), wanted)))
