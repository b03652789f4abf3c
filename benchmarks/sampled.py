"""Where a Python process spends its CPU: py-spy looks at it from outside, 200 times a second."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, Final

RATE: Final = 200
TOP: Final = 15
FRAME: Final = re.compile(r"^.* \((?P<file>[^()]*)\)$")
OURS: Final = frozenset({"runtime", "models", "store", "inference", "cache", "pipeline", "tasks", "worker"})
FAMILIES: Final = {
    "uvloop": "asyncio, uvloop",
    "asyncio": "asyncio, uvloop",
    "sqlalchemy": "sqlalchemy, psycopg",
    "psycopg": "sqlalchemy, psycopg",
    "psycopg_binary": "sqlalchemy, psycopg",
    "psycopg_pool": "sqlalchemy, psycopg",
    "celery": "celery, kombu",
    "kombu": "celery, kombu",
    "billiard": "celery, kombu",
    "amqp": "celery, kombu",
    "yarl": "aiohttp",
    "multidict": "aiohttp",
    "propcache": "aiohttp",
    "frozenlist": "aiohttp",
}


def sampled(pid: int, *, seconds: int) -> dict[str, Any]:
    """Shares of the samples in which it ran: the top functions by their own time, and packages.

    Only threads that run or wait for the core count; that shows only while the process is not stopped to be looked at,
    so a few looks fail. What C does counts to the Python function that called it: uvloop's loop to `Runner.run`, a
    system call to whoever made it. `why_not` instead where py-spy is missing or may not look.
    """
    program = shutil.which("py-spy") or shutil.which("py-spy", path=str(Path(sys.executable).parent))
    if program is None:
        return {"why_not": "py-spy is missing: `make .venv/.dev`"}
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw"
        command = [program, "record", "--pid", str(pid), "--duration", str(seconds), "--rate", str(RATE)]
        command += ["--format", "raw", "--function", "--nonblocking", "--output", str(raw)]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode or not raw.exists():
            return {"why_not": f"py-spy: {(ran.stderr or ran.stdout).strip()[-300:]}"}
        return folded(raw.read_text())


def folded(stacks: str) -> dict[str, Any]:
    """The same from py-spy's raw text: `frame;frame;frame count` a line."""
    functions: Counter[str] = Counter()
    packages: Counter[str] = Counter()
    for stack in stacks.splitlines():
        frames, _, count = stack.rpartition(" ")
        package, function = _innermost(frames.split(";"))
        functions[function] += int(count)
        packages[package] += int(count)
    total = max(functions.total(), 1)
    return {
        "samples": functions.total(),
        "functions": {name: round(count / total, 4) for name, count in functions.most_common(TOP)},
        "packages": {name: round(count / total, 4) for name, count in packages.most_common()},
    }


def _innermost(frames: list[str]) -> tuple[str, str]:
    """(package, function) of the innermost frame that is somebody's."""
    for frame in reversed(frames):
        found = FRAME.match(frame)
        if found is not None:
            return _package(found["file"]), frame
    return "other", frames[-1]


def _package(file: str) -> str:
    """Whose a file is; py-spy writes its path from the folder that it was imported from."""
    first = "other" if file.startswith("<") else file.lstrip("/").partition("/")[0].partition(".")[0]
    if first in OURS:
        return "ours"
    return FAMILIES.get(first, "standard library" if first in sys.stdlib_module_names else first)
