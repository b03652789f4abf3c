"""The gateway under load: 200 clients that poll, beside uploads of 100,000 lines: `python -m benchmarks.gateway`.

Postgres, Redis and the gateway with its validator are this run's own, with their defaults; the clients are one more
process (benchmarks/gateway_load.py); all share the cores. Beside it the same HTTP stack with nothing behind it
(benchmarks/gateway_bare.py), by turns. Then one file of 2 GB, which is nowhere but on its way: up, into jobs, and down
again. About 8 minutes and 12 GB of disk.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from benchmarks.batch_lines import write_batch
from benchmarks.cores import processes, tree, tree_cpu_s
from benchmarks.gateway_load import Load, batch_of, discarded_s, there_and_back
from benchmarks.paired import LOAD_BEFORE, PAIRS, Ratio, by_turns, keep_run, made_with
from benchmarks.rows import Row, at_most, bold
from benchmarks.submit_files import MODEL, fill_results
from models.states import Scope
from pipeline.keys import issue_key
from scripts.embedded import is_answering
from store.database import Database
from store.schema import migrate
from tests.support.gateway_process import GatewayProcess
from tests.support.own_services import OwnPostgres, OwnRedis, free_port, server_folder
from tests.support.waiting import wait_until

REPOSITORY: Final = Path(__file__).resolve().parents[1]
COMMAND: Final = "`make bench-gateway`"
CLIENTS: Final = 200
LINES: Final = 100_000
TRANSFERS: Final = 2
SMALL_BATCHES, SMALL_LINES = 40, 100
DISCARDED_BYTES: Final = 256 * 1024**2
BIG_BYTES: Final = 2 * 10**9
PEAK_MB: Final = 200.0  # of the gateway, as submit is held to
SHARED: Final = "In the gateway's load clients, servers and Postgres share the cores. Load of the minute before:"


@dataclass(frozen=True, slots=True)
class Parts:
    """What runs; `pids` of the gateway, its validator, and the root of Postgres."""

    load: Load
    bare: Load
    pids: dict[str, int]
    database: Database


def main() -> None:
    """Run the measurement, print its table, and write its JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="of every leg")
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--big-bytes", type=int, default=BIG_BYTES)
    wishes = parser.parse_args()
    with running() as parts:
        speeds = by_turns(
            {"bare": partial(_polls_s, parts, parts.bare), "gateway": partial(_polls_s, parts, parts.load)},
            pairs=wishes.pairs,
        )
        uploads = by_turns(
            {name: partial(_uploaded_s, load) for name, load in (("gateway", parts.load), ("bare", parts.bare))},
            pairs=wishes.pairs,
        )
        legs = {
            f"{pace}, {beside}": _leg(parts, pause_s=pause_s, transfers=transfers, seconds=wishes.seconds)
            for pace, pause_s in (("paced", 1.0), ("unpaced", 0.0))
            for beside, transfers in (("alone", 0), ("beside", TRANSFERS))
        }
        _forget_peaks(parts)
        big = {**asyncio.run(there_and_back(parts.load, wishes.big_bytes)), "peak_mb": _peaks_mb(parts)}
    report: dict[str, Any] = {
        "made_with": made_with("fastapi", "uvicorn", "psycopg", "aiohttp"),
        "note": f"{SHARED} {LOAD_BEFORE:.1f}.",
        "polls_s": speeds,
        "upload_s": uploads,
        "legs": legs,
        "big": big,
    }
    report["table"] = [row.as_json() for row in rows(report)]
    for row in rows(report):
        print(f"{row.figure}: {row.measured} {row.verdict}".replace("**", ""))
    keep_run("gateway", report, parser, wishes)


@contextmanager
def running() -> Iterator[Parts]:
    """A gateway with batches in it, its clients' keys, and the bare stack."""
    with (
        tempfile.TemporaryDirectory(prefix="stoker-bench-") as name,
        server_folder() as servers,
        OwnPostgres(servers / "postgres") as postgres,
        OwnRedis(servers / "redis") as redis,
    ):
        folder = Path(name)
        database = Database(postgres.url)
        migrate(database)
        urls = {"POSTGRES": postgres.url, "REDIS": redis.url, "BROKER": "amqp://127.0.0.1"}  # which it does not ask
        env = {f"STOKER_{name}__URL": url for name, url in urls.items()} | {"STOKER_HOME": str(folder)}
        with GatewayProcess(env=env, folder=folder) as gateway:
            keys = [_key(database, number) for number in range(CLIENTS)]
            file = write_batch(folder / "batch.jsonl", LINES, model=MODEL)
            load = Load(gateway.url, keys, [], "", str(file), seconds=0.0)
            small = write_batch(folder / "small.jsonl", SMALL_LINES, model=MODEL)
            batches = [asyncio.run(batch_of(replace(load, file=str(small)))) for _ in range(SMALL_BATCHES)]
            ended = asyncio.run(batch_of(load))
            fill_results(postgres.url, UUID(ended["id"].removeprefix("batch_")))
            (folder / "shown.json").write_text(json.dumps(batches))
            load = replace(
                load, batches=[one["id"] for one in [*batches, ended]], output=ended["stoker"]["output_file_id"]
            )
            with _bare(folder / "shown.json") as url:
                found = tree(gateway.process.pid, processes())
                validator = next(process.pid for process in found if "api.validator" in process.command)
                pids = {"gateway": gateway.process.pid, "validator": validator, "postgres": postgres.pid}
                yield Parts(load, replace(load, url=url), pids, database)
        database.close()


def rows(report: dict[str, Any]) -> list[Row]:
    """The rows of the table."""
    legs, big = report["legs"], report["big"]
    polls = Ratio.of(report["polls_s"]["gateway"], report["polls_s"]["bare"])
    uploads = Ratio.of(report["upload_s"]["bare"], report["upload_s"]["gateway"])
    polls_s = statistics.median(report["polls_s"]["gateway"])
    mb_s = DISCARDED_BYTES / 1e6 / statistics.median(report["upload_s"]["gateway"])
    quiet, busy = legs["unpaced, alone"], legs["unpaced, beside"]
    cpu = ", ".join(f"{name} {ms:.2f}" for name, ms in quiet["cpu_ms_a_poll"].items())
    sent = [one for name in ("paced, beside", "unpaced, beside") for one in legs[name]["uploads"]]
    going = statistics.median(LINES / one["going_s"] for one in legs["paced, beside"]["uploads"])
    errors = [error for leg in legs.values() for error in leg["errors"]]
    found = [
        Row(
            f"{CLIENTS} clients ask for batches without a pause: polls/s ÷ those of the same JSON from FastAPI with "
            "nothing behind it",
            f"{bold(polls)}; {polls_s:,.0f} polls/s; CPU ms a poll: {cpu}",
            COMMAND,
        ),
        Row(
            f"{CLIENTS} clients, each a poll a second: p50 and p99 alone; beside {TRANSFERS} uploads and {TRANSFERS} "
            f"downloads of {LINES:,} lines at a time",
            f"**{_latency(legs['paced, alone'])}**; **{_latency(legs['paced, beside'])}**",
            COMMAND,
            headline=True,
        ),
        Row(
            "the same clients without a pause: polls/s, p50 and p99 alone; beside those",
            f"{quiet['polls_s']:,.0f}, {_latency(quiet)}; {busy['polls_s']:,.0f}, {_latency(busy)}",
            COMMAND,
        ),
        Row(
            f"upload of {DISCARDED_BYTES / 1e6:.0f} MB, hashed and written ÷ one that is thrown away",
            f"{bold(uploads)}; {mb_s:,.0f} MB/s",
            COMMAND,
        ),
        Row(
            f"uploads of {LINES:,} lines beside a poll a second of each client: lines/s of each from its first byte "
            "until its batch is going",
            f"**{going:,.0f}**; {len(sent)} batches in both legs",
            COMMAND,
            headline=True,
        ),
        Row("requests that failed, of all these", f"**{len(errors)}**", COMMAND, **at_most(len(errors), 0)),
    ]
    for name in ("gateway", "validator"):
        peaks = [max(leg["peak_mb"][name] for leg in legs.values()), big["peak_mb"][name]]
        figure = (
            f"most memory of the {name} under this load; while {big['bytes'] / 1e9:.1f} GB in {big['lines']:,} lines "
            "went up, became jobs and came down, MB"
        )
        if name == "gateway":  # whose memory must not grow with a file; the validator's may, with the lines
            target, speed = (
                at_most(max(peaks), PEAK_MB, " MB"),
                f"{_mb_s(big, 'up_s')} MB/s up, {_mb_s(big, 'down_s')} down",
            )
        else:
            target, speed = {}, f"{big['lines'] / big['going_s']:,.0f} lines/s"
        found.append(Row(figure, f"**{peaks[0]:.0f}, {peaks[1]:.0f}**; {speed}", COMMAND, headline=True, **target))
    return found


def _latency(leg: dict[str, Any]) -> str:
    return f"{leg['p50_ms']:.0f} and {leg['p99_ms']:.0f} ms"


def _mb_s(big: dict[str, Any], name: str) -> str:
    return f"{big['bytes'] / 1e6 / big[name]:,.0f}"


def _polls_s(parts: Parts, load: Load) -> float:
    found = _loaded(replace(load, seconds=8.0, clients=CLIENTS))
    if found["errors"]:
        raise SystemExit(f"polls failed: {found['errors'][0]}")
    return float(found["polls_s"])


def _leg(parts: Parts, *, pause_s: float, transfers: int, seconds: float) -> dict[str, Any]:
    """One load's figures, with the most memory and the CPU that the server's processes took."""
    _forget_peaks(parts)
    before = _cpu_s(parts)
    found = _loaded(replace(parts.load, seconds=seconds, clients=CLIENTS, pause_s=pause_s, transfers=transfers))
    spent = {name: cpu_s - before[name] for name, cpu_s in _cpu_s(parts).items()}
    found["peak_mb"] = _peaks_mb(parts)
    if not transfers:
        found["cpu_ms_a_poll"] = {name: cpu_s * 1000 / found["polls"] for name, cpu_s in spent.items()}
    print(f"{pause_s=} {transfers=}: {found}", file=sys.stderr)
    return found


def _uploaded_s(load: Load) -> float:
    return asyncio.run(discarded_s(load, DISCARDED_BYTES))


def _loaded(load: Load) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.gateway_load", json.dumps(asdict(load))]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, check=True)
    return dict(json.loads(done.stdout))


@contextmanager
def _bare(shown: Path) -> Iterator[str]:
    """The address of the bare stack."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.gateway_bare", str(port), str(shown)]
    with subprocess.Popen(command, cwd=REPOSITORY) as child:
        try:
            wait_until(partial(is_answering, "127.0.0.1", port), 30.0, "the bare stack answers")
            yield f"http://127.0.0.1:{port}"
        finally:
            child.terminate()


def _key(database: Database, number: int) -> str:
    with database.transaction() as session:
        scopes = (Scope.SUBMIT, Scope.READ)
        return issue_key(
            session, tenant="bench", name=f"client {number}", scopes=scopes, requests_per_minute=10**6
        ).key.text


def _forget_peaks(parts: Parts) -> None:
    for name in ("gateway", "validator"):
        Path(f"/proc/{parts.pids[name]}/clear_refs").write_text("5")  # VmHWM begins anew


def _peaks_mb(parts: Parts) -> dict[str, float]:
    status = {name: Path(f"/proc/{parts.pids[name]}/status").read_text() for name in ("gateway", "validator")}
    return {name: int(text.partition("VmHWM:")[2].split()[0]) / 1024 for name, text in status.items()}


def _cpu_s(parts: Parts) -> dict[str, float]:
    everyone = processes()
    return {"gateway": everyone[parts.pids["gateway"]].own_s, "postgres": tree_cpu_s(parts.pids["postgres"], everyone)}


if __name__ == "__main__":
    main()
