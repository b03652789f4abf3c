"""One measurement of Ray Data: its driver is a process of its own environment, started and ended here."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path

import psycopg

from benchmarks.batch_lines import bodies, line
from benchmarks.legs import Leg, checkpoint, server_cpu_s
from benchmarks.place import Place
from benchmarks.static_endpoint import MODEL, StaticEndpoint

REPOSITORY = Path(__file__).parents[2]
PYTHON = REPOSITORY / ".venv-ray" / "bin" / "python"
PARTS = 16  # files: Ray reads one in one task and keeps its rows together
RUN_S = 600


def is_there() -> bool:
    """Whether `make ray-env` has been run."""
    return PYTHON.exists()


def write_parts(folder: Path, jobs: int) -> Path:
    """A folder of batch files with so many lines in all."""
    folder.mkdir()
    lines = [line(seq, body) for seq, body in enumerate(bodies(jobs, model=MODEL))]
    for part in range(PARTS):
        (folder / f"{part:02}.jsonl").write_text("".join(lines[part::PARTS]))
    return folder


def run_ray(place: Place, endpoint: StaticEndpoint, parts: Path, *, jobs: int) -> Leg:
    """Jobs a second from the first batch in an actor to the last COPY; CPU only of the servers, which it is spared."""
    database = place.settings.require_postgres()
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS peer_results (LIKE results INCLUDING ALL)")
    checkpoint(place.settings)
    command = [str(PYTHON), "-m", "benchmarks.peers.ray_data", "--folder", str(parts)]
    command += ["--database", database, "--endpoint", endpoint.url]
    before = server_cpu_s(place.servers, endpoint.pid)
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as temporary:
        ran = subprocess.run(
            [*command, "--temporary", temporary],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=RUN_S,
            check=False,
        )
    if ran.returncode:
        raise SystemExit(f"Ray Data ended with {ran.returncode}:\n{ran.stderr[-3000:]}")
    after = server_cpu_s(place.servers, endpoint.pid)
    found = json.loads(ran.stdout.splitlines()[-1])
    if found["jobs"] != jobs:
        raise SystemExit(f"Ray Data wrote {found['jobs']} of {jobs} results")
    return Leg.of(jobs, found["seconds"], {name: after[name] - before[name] for name in after})
