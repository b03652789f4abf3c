"""Every target of the fuzzer in turn, then the HTTP contract; a table, and the counts in benchmarks/results/fuzz.json.

python -m tests.fuzz.run --minutes 45 [--target NAME …] [--seed 1]     (make fuzz MINUTES=45)

Each target has an equal share of the time: two thirds by atheris (coverage-guided), one third by long inputs. What it
found stands under --keep, and is replayed by `python -m tests.fuzz.run --replay NAME FILE`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from benchmarks.paired import keep_run, made_with
from tests.fuzz.registry import all_targets, named
from tests.fuzz.table import table_of
from tests.fuzz.test_contract import COUNTS, SECONDS, SEED

MINUTES: Final = 45.0
CONTRACT_SHARE: Final = 0.1
GUIDED_SHARE: Final = 2 / 3
STARTING_S: Final = 600.0  # that a child may take beside its seconds: what it imports is instrumented first
CONTRACT: Final = "tests/fuzz/test_contract.py"
_PULSE: Final = re.compile(r"^#(\d+)\s+\w+\s+cov: (\d+)", re.MULTILINE)  # libFuzzer's lines


@dataclass(slots=True)
class Counted:
    """What came of one target; `edges` are the places of our code that were reached."""

    name: str
    what: str
    seconds: float = 0.0
    guided_s: float = 0.0
    executions: int = 0
    edges: int = 0
    corpus: int = 0
    stretched: int = 0
    longest_bytes: int = 0
    findings: list[dict[str, Any]] = field(default_factory=list)


def main() -> int:
    """0 if nothing was found."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what it has made goes with it
    targets = list(all_targets())
    parser = argparse.ArgumentParser(description="Fuzz our parsers, and the HTTP contract.")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--target", action="append", choices=[*targets, "contract"])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="a folder for inputs that found something; default: a new one")
    parser.add_argument("--replay", nargs=2, metavar=("NAME", "FILE"))
    options = parser.parse_args()
    if options.replay:
        named(options.replay[0]).run(Path(options.replay[1]).read_bytes())
        return 0
    if options.keep and options.keep.is_dir() and any(options.keep.iterdir()):
        parser.error(f"{options.keep} is not empty: what is in it would count as found")
    names = options.target or [*targets, "contract"]
    kept = options.keep or Path(tempfile.mkdtemp(prefix="stoker-fuzz-findings-"))
    parsers = [name for name in names if name != "contract"]
    seconds = options.minutes * 60
    contract_s = 0.0 if "contract" not in names else seconds * CONTRACT_SHARE if parsers else seconds
    began = time.monotonic()
    counted = []
    for name in parsers:
        counted.append(_fuzzed(name, (seconds - contract_s) / len(parsers), kept / name, seed=options.seed))
        print(table_of([asdict(counted[-1])]).splitlines()[-1], file=sys.stderr, flush=True)
    contract = _contract(contract_s, kept, seed=options.seed) if contract_s else None
    report: dict[str, Any] = {
        "made_with": made_with("atheris", "hypothesis"),
        "seconds": round(time.monotonic() - began),
        "targets": [asdict(one) for one in counted],
        "contract": contract,
    }
    print(table_of(report["targets"], contract))
    found = sum(len(one.findings) for one in counted) + bool(contract and contract["findings"])
    if found:
        print(f"{found} findings: inputs in {kept}", file=sys.stderr)
    elif not options.keep:
        shutil.rmtree(kept)
    keep_run("fuzz", report, parser, options)
    return min(1, found)


def _fuzzed(name: str, seconds: float, folder: Path, *, seed: int) -> Counted:
    target = named(name)
    counted = Counted(name, target.what, longest_bytes=target.most_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="stoker-fuzz-") as temporary:
        corpus = Path(temporary, "corpus")
        corpus.mkdir()
        for content in target.seeds:
            (corpus / sha256(content).hexdigest()).write_bytes(content)
        guided_s = seconds * GUIDED_SHARE
        while (left := guided_s - (time.monotonic() - began)) > 1:  # it ends early where the process dies
            told = _child(name, folder, "fuzz", left, corpus, seed=seed).stderr
            if not (pulses := _PULSE.findall(told)):
                counted.findings.append({"kind": "did not start", "told": told[-500:]})
                break
            counted.executions += int(pulses[-1][0])
            counted.edges = max(counted.edges, int(pulses[-1][1]))
            seed += 1
        counted.guided_s = round(time.monotonic() - began, 1)
        counted.corpus = len(list(corpus.iterdir()))
        ended = _child(name, folder, "stretch", seconds - guided_s, corpus, seed=seed)
        if ended.returncode:
            counted.findings.append({"kind": "died", "told": f"of a long input: {ended.stderr[-300:]}"})
        counted.stretched = int(ended.stdout or 0)
    counted.seconds = round(time.monotonic() - began, 1)
    counted.findings += [json.loads(path.read_text()) for path in sorted(folder.glob("finding-*.json"))]
    counted.findings += [{"kind": "died", "told": path.name} for path in sorted(folder.glob("dead-*"))]
    return counted


def _child(
    name: str, folder: Path, mode: str, seconds: float, corpus: Path, *, seed: int
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.fuzz.child", name, str(folder), mode, str(seconds), str(corpus), str(seed)]
    try:
        return subprocess.run(
            command,
            env={**os.environ, "TMPDIR": str(corpus.parent)},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds + STARTING_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        return subprocess.CompletedProcess(command, 124, "", str(error)[-300:])


def _contract(seconds: float, folder: Path, *, seed: int) -> dict[str, Any]:
    """The counts of the test that is in the ordinary suite, run for so long; what it found is in its output.

    Without counts it did not start, which is a finding.
    """
    folder.mkdir(parents=True, exist_ok=True)
    counts = folder / "contract.json"
    ended = subprocess.run(
        [sys.executable, "-m", "tests.support.services", "pytest", CONTRACT, "-q", "--timeout", "0"],
        env={**os.environ, SECONDS: str(seconds), SEED: str(seed), COUNTS: str(counts)},
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode:
        (folder / "contract.txt").write_text(ended.stdout)
    told: dict[str, Any] = {"sequences": 0, "requests": 0, "statuses": {}, "seconds": 0.0}
    if counts.exists():
        told = json.loads(counts.read_text())
    return {"findings": int(ended.returncode != 0 or not told["sequences"]), **told}


if __name__ == "__main__":
    sys.exit(main())
