"""One target in a process of its own: python -m tests.fuzz.child NAME FINDINGS fuzz|stretch SECONDS CORPUS [SEED]

`fuzz`: atheris over the instrumented code, by libFuzzer; a finding is written down, once a place, and it goes on.
`stretch`: members of the corpus with a part repeated, without instruments, so that time and memory say something.
"""

from __future__ import annotations

import json
import logging
import random
import sys
import time
import traceback
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final

from tests.fuzz.mutations import mutated, stretched
from tests.fuzz.registry import named
from tests.fuzz.target import Target

REPOSITORY: Final = Path(__file__).parents[2]
INSTRUMENTED: Final = ["models", "runtime", "inference", "cache", "documents", "tables", "pipeline", "api", "store"]
LEAST_S: Final = 1.0  # of CPU, that any input may take
MEMORY_BYTES: Final = 64 << 20  # that any input may take, and some for each of its bytes
MEMORY_A_BYTE: Final = 64
LONGEST_BYTES: Final = 8192  # of what libFuzzer makes; the stretched inputs are the long ones


@dataclass(slots=True)
class Watch:
    """Runs inputs, and writes down what is found, the first input of each kind."""

    target: Target
    folder: Path
    slowness: float
    ran: int = 0

    def run(self, data: bytes) -> None:
        """One input; an exception is a finding, and so are CPU time and memory beyond the target's bounds."""
        if len(data) < self.target.head_bytes:
            return
        self.ran += 1
        if self.slowness == 1:
            _forget_peak()
        before, began = _peak_bytes(), time.thread_time()
        try:
            self.target.run(data)
        except Exception as error:
            self._note(_place_of(error), f"{type(error).__name__}: {error}", data)
        took = time.thread_time() - began
        if took > LEAST_S + self.slowness * self.target.s_per_mb * len(data) / 1e6:
            self._note("slow", f"{took:.1f} s of CPU for {len(data):,} bytes", data)
        more = _peak_bytes() - before
        if self.slowness == 1 and more > MEMORY_BYTES + MEMORY_A_BYTE * len(data):
            self._note("memory", f"{more:,} bytes more for {len(data):,} bytes", data)

    def _note(self, kind: str, told: str, data: bytes) -> None:
        place = self.folder / f"finding-{sha256(kind.encode()).hexdigest()[:8]}"
        if place.exists():
            return
        place.write_bytes(data)
        place.with_suffix(".json").write_text(json.dumps({"kind": kind, "told": told[:500], "bytes": len(data)}))


def main() -> None:
    """As the module says; libFuzzer ends the process of `fuzz` itself."""
    name, folder, mode, seconds, corpus = sys.argv[1:6]
    seed = int(sys.argv[6]) if len(sys.argv) > 6 else 1
    logging.disable(logging.CRITICAL)  # python-multipart tells of every bad form
    (_stretch if mode == "stretch" else _fuzz)(name, Path(folder), float(seconds), Path(corpus), seed)


def _fuzz(name: str, folder: Path, seconds: float, corpus: Path, seed: int) -> None:
    import atheris  # noqa: PLC0415  # only `make fuzz` installs it

    with atheris.instrument_imports(include=INSTRUMENTED):
        target = named(name)
    watch = Watch(target, folder, slowness=20)  # what instruments cost, and a busy machine

    def mutator(data: bytes, most_bytes: int, number: int) -> bytes:
        rng = random.Random(number)
        if rng.random() < 0.4:
            return bytes(atheris.Mutate(data, most_bytes))
        return mutated(data, rng, head_bytes=target.head_bytes, is_json=target.is_json)[:most_bytes]

    options = [
        *(f"-max_total_time={seconds:.0f}", f"-max_len={LONGEST_BYTES}", f"-seed={seed}", "-print_final_stats=1"),
        *("-rss_limit_mb=2048", "-timeout=60", f"-artifact_prefix={folder}/dead-", "-verbosity=1"),
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], watch.run, custom_mutator=mutator)
    atheris.Fuzz()


def _stretch(name: str, folder: Path, seconds: float, corpus: Path, seed: int) -> None:
    target = named(name)
    watch, rng = Watch(target, folder, slowness=1), random.Random(seed)
    inputs = [path.read_bytes() for path in sorted(corpus.iterdir())]
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        watch.run(stretched(rng.choice(inputs), rng, head_bytes=target.head_bytes, most_bytes=target.most_bytes))
    print(watch.ran)


def _forget_peak() -> None:
    """From here on the most memory is counted anew: else only the first large input is seen."""
    Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split(maxsplit=1)[0]) * 1024


def _place_of(error: Exception) -> str:
    """Where it was raised, of our own code the last line: what is found twice is told once."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename.startswith(str(REPOSITORY)) and ".venv" not in frame.filename]
    last = own[-1]
    return f"{type(error).__name__} at {Path(last.filename).relative_to(REPOSITORY)}:{last.lineno}"


if __name__ == "__main__":
    main()
