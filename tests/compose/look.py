"""What is seen of containers from outside: memory, open ports, whether the world is within reach, how they end."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.children import spawn, stop
from tests.compose.engine import Docker
from tests.support.waiting import wait_until

WORLD, WORLD_GATE = "198.51.100.2", "198.51.100.1"  # of the addresses that are for documentation
WORLD_PORT = 80
LISTEN = "0A"
_ASK = f"""
import socket, sys
try:
    socket.create_connection(("{WORLD}", {WORLD_PORT}), timeout=2).close()
except OSError:
    sys.exit(1)
"""


@dataclass(frozen=True, slots=True)
class Ending:
    """How long a container took from its stop signal, and with what it ended."""

    seconds: float
    exit_code: int


@contextmanager
def world() -> Iterator[None]:
    """A server in a network of its own, beyond this one's only way out; it knows no way back to our bridges."""
    command = ["unshare", "--net", sys.executable, "-m", "http.server", str(WORLD_PORT), "--bind", "0.0.0.0"]
    child = spawn(command, env={}, log=Path("/dev/null"), session=True)
    try:
        ours = Path("/proc/self/ns/net").readlink()
        wait_until(lambda: Path(f"/proc/{child.pid}/ns/net").readlink() != ours, 10, "another network")
        there = ["nsenter", "-t", str(child.pid), "-n", "ip"]
        for words in (
            ["ip", "link", "set", "lo", "up"],
            ["ip", "link", "add", "world", "type", "veth", "peer", "name", "eth0", "netns", str(child.pid)],
            ["ip", "address", "add", f"{WORLD_GATE}/24", "dev", "world"],
            ["ip", "link", "set", "world", "up"],
            [*there, "address", "add", f"{WORLD}/24", "dev", "eth0"],
            [*there, "link", "set", "eth0", "up"],
            ["ip", "route", "add", "default", "via", WORLD],
        ):
            subprocess.run(words, check=True)
        yield
    finally:
        stop(child, grace_s=5)


def reaches_world(pid: int) -> bool:
    """Whether a connection from that process's network to the world is answered."""
    asked = subprocess.run(["nsenter", "-t", str(pid), "-n", sys.executable, "-c", _ASK], check=False)
    return asked.returncode == 0


def listening(pid: int) -> list[tuple[str, int]]:
    """Address and port of every TCP socket that listens in that process's network, Docker's own resolver left out."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN:
                address, port = fields[1].split(":")
                found.add((_address(address), int(port, 16)))
    return sorted(one for one in found if one[0] != "127.0.0.11")


def _address(hexadecimal: str) -> str:
    if len(hexadecimal) == 8:
        return ".".join(str(byte) for byte in reversed(bytes.fromhex(hexadecimal)))
    if not int(hexadecimal, 16):
        return "[::]"
    return "[::1]" if hexadecimal.endswith("01000000") and not int(hexadecimal[:-8], 16) else hexadecimal


def memory_bytes(docker: Docker, container: str) -> int:
    """What its cgroup holds now, page cache that can be dropped left out."""
    shown = docker("stats", "--no-stream", "--format", "{{.MemUsage}}", container).split("/")[0].strip()
    number, unit = shown.rstrip("KMGiB"), shown.lstrip("0123456789.")
    return int(float(number) * {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}[unit])


def healthy_after_s(container: dict[str, Any], events: list[dict[str, Any]]) -> float | None:
    """From a container's first start to its first healthy answer."""
    mine = [event for event in events if event["Actor"]["ID"] == container["Id"]]
    started = next((event["timeNano"] for event in mine if event["Action"] == "start"), None)
    healthy = next((event["timeNano"] for event in mine if event["Action"] == "health_status: healthy"), None)
    return None if started is None or healthy is None else (healthy - started) / 1e9


def ending(container: dict[str, Any], events: list[dict[str, Any]]) -> Ending | None:
    """How it ended at the last signal that it was sent; None if it was sent none."""
    mine = [event for event in events if event["Actor"]["ID"] == container["Id"]]
    asked = next((event["timeNano"] for event in mine if event["Action"] == "kill"), None)
    died = next((event for event in reversed(mine) if event["Action"] == "die"), None)
    if asked is None or died is None:
        return None
    return Ending((died["timeNano"] - asked) / 1e9, int(died["Actor"]["Attributes"]["exitCode"]))


@contextmanager
def recorded(docker: Docker, file: Path) -> Iterator[Path]:
    """The file in which every start, healthy answer, signal and end of containers is written from now on.

    The engine itself remembers 256 events, and each healthcheck is three.
    """
    file.unlink(missing_ok=True)
    kinds = [word for kind in ("start", "health_status", "kill", "die") for word in ("--filter", f"event={kind}")]
    child = docker.spawned("events", *kinds, "--format", "{{json .}}", log=file)
    try:
        yield file
    finally:
        stop(child, grace_s=5)


def events_of(file: Path) -> list[dict[str, Any]]:
    """What has been recorded, in order."""
    return [json.loads(line) for line in file.read_text().splitlines()]
