"""A Docker engine of our own, for a machine that has none: Debian's, in a folder, in namespaces of its own.

It needs root, debootstrap and a network to Debian's packages, once; nothing is installed on the machine. Its bridges,
firewall rules and published ports are in a network namespace that ends with it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runtime.children import spawn, stop
from tests.support.processes import REPOSITORY
from tests.support.waiting import wait_until

HOME = REPOSITORY / ".docker-engine"
ROOT = HOME / "debian"
STATE = HOME / "docker"
SUITE = "trixie"  # the first Debian whose engine (26) knows a healthcheck's start_interval
PACKAGES = ("docker.io", "docker-cli", "containerd", "runc", "iptables", "ca-certificates")
PROGRAMS = ("debootstrap", "unshare", "nsenter", "ip", "pivot_root", "mount")
START_S = 60.0
STOP_S = 30.0

# What the engine sees: its own folders, and this repository at its place, as compose binds files of it. By pivot_root,
# as after a chroot what is run in a container later would begin in this machine's root.
_START = """
set -e
mount --make-rprivate /
mount --bind "$0" "$0"
mount -t proc proc "$0/proc"
for tree in sys dev; do mount --rbind "/$tree" "$0/$tree"; done
mount -t tmpfs run "$0/run"
cat /etc/resolv.conf > "$0/run/resolv.conf" && ln -sf /run/resolv.conf "$0/etc/resolv.conf"
mkdir -p "$0$1" && mount --bind "$1" "$0$1"
cd "$0"; shift
mkdir -p before && pivot_root . before
umount -l /before
exec dockerd "$@"
"""
CGROUPS = Path("/sys/fs/cgroup")
WEIGHT = 10 * 1024  # of all containers together, where one process has 1,024; theirs would be that of one process
# Images are made in this machine's own network, which the engine then leaves as it is.
_BUILDING = ("--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false")


class Docker:
    """The engine's client."""

    def __init__(self, socket: Path) -> None:
        self.env = {**os.environ, "DOCKER_HOST": f"unix://{socket}", "DOCKER_BUILDKIT": "0"}
        self.env["PATH"] = f"{Path(sys.executable).parent}:{self.env.get('PATH', os.defpath)}"
        self._program = str(ROOT / "usr" / "bin" / "docker")

    def __call__(self, *words: str, check: bool = True, folder: Path = REPOSITORY) -> str:
        """What `docker WORDS` prints."""
        return run([self._program, *words], env=self.env, check=check, folder=folder)

    def spawned(self, *words: str, log: Path) -> subprocess.Popen[bytes]:
        """It runs, and goes on; what it prints goes into the log."""
        return spawn([self._program, *words], env=self.env, log=log, session=True)

    def inspect(self, container: str) -> dict[str, Any]:
        """Everything that is known of a container."""
        found: dict[str, Any] = json.loads(self("inspect", container))[0]
        return found

    def imported(self, root: Path, tag: str) -> None:
        """Make an image of a Debian's folder, unless it was made of it: what is built on it is built once then."""
        made_of = root.with_suffix(".complete").read_text().strip()
        if self("image", "inspect", "--format", "{{.Comment}}", tag, check=False).strip() == made_of:
            return
        left_out = [f"--exclude=./{folder}/*" for folder in ("proc", "sys", "var/cache/apt")]
        tar = subprocess.Popen(["tar", "-C", str(root), *left_out, "-c", "."], stdout=subprocess.PIPE)
        command = [self._program, "import", "--message", made_of, "-", tag]
        subprocess.run(command, env=self.env, stdin=tar.stdout, check=True, capture_output=True)
        assert tar.wait() == 0


def run(words: Sequence[str], *, env: dict[str, str], check: bool = True, folder: Path = REPOSITORY) -> str:
    """What a command prints; SystemExit with what it said if it fails."""
    done = subprocess.run(words, env=env, cwd=folder, capture_output=True, text=True, check=False)
    if check and done.returncode:
        sys.exit(f"{' '.join(words)}: exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done.stdout


def missing() -> str | None:
    """What this machine lacks for it; None if it can be tried."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "it needs Linux and root: it makes namespaces and mounts"
    if lacking := [program for program in PROGRAMS if shutil.which(program) is None]:
        return f"not installed: {', '.join(lacking)}"
    tried = subprocess.run(["unshare", "--mount", "--net", "--pid", "--fork", "true"], check=False, capture_output=True)
    return None if tried.returncode == 0 else f"no namespaces here: {tried.stderr.decode().strip()}"


def debian(folder: Path, suite: str, packages: Sequence[str]) -> None:
    """Make the folder a Debian with these packages, unless it is one."""
    stamp = folder.with_suffix(".complete")
    made_of = f"{suite} {' '.join(packages)}\n"
    if stamp.exists() and stamp.read_text() == made_of:
        return
    print(f"a Debian in {folder} (a minute)", file=sys.stderr)
    stamp.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    env = {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    run(["debootstrap", "--variant=minbase", f"--include={','.join(packages)}", suite, str(folder)], env=env)
    stamp.write_text(made_of)


@contextmanager
def engine(*, building: bool) -> Iterator[Docker]:
    """The engine, ended at the end of the block with all its containers.

    `building`: it makes images, in this machine's network, and runs no service. Else the caller is in a network
    namespace of its own (`in_namespaces`).
    """
    debian(ROOT, SUITE, PACKAGES)
    STATE.mkdir(parents=True, exist_ok=True)
    socket, log = STATE / "docker.sock", HOME / "dockerd.log"
    socket.unlink(missing_ok=True)
    options = [
        "-H",
        f"unix://{socket}",
        "--data-root",
        str(STATE / "data"),
        "-l",
        "warn",
        *(_BUILDING if building else ()),
    ]
    child = spawn(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", _START, str(ROOT), str(REPOSITORY), *options],
        env=dict(os.environ),
        log=log,
        session=True,
        guard_s=STOP_S,
    )
    docker = Docker(socket)
    _weigh()
    try:
        wait_until(lambda: docker("version", check=False) != "" and socket.exists(), START_S, "the Docker engine")
        if building:
            docker("network", "prune", "-f")  # bridges of a run that was killed would be made anew, and here
        yield docker
    finally:
        stop(child, grace_s=STOP_S, stop_signal=signal.SIGTERM)
        for folder in CGROUPS.glob("*/docker"):
            folder.rmdir()


def _weigh() -> None:
    """Let containers have their part of the CPUs, where cgroups are of the first version."""
    cpu = CGROUPS / "cpu"
    if cpu.is_dir():
        (cpu / "docker").mkdir(exist_ok=True)
        (cpu / "docker" / "cpu.shares").write_text(str(WEIGHT))


def in_namespaces(module: str, *words: str) -> int:
    """Run a module in network, mount and process namespaces of its own; its exit code. What it began ends with it."""
    command = [
        "unshare",
        "--net",
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
        sys.executable,
        "-m",
        module,
    ]
    child = spawn([*command, *words], env=dict(os.environ), log=None, session=False, death_signal=signal.SIGKILL)
    return child.wait()
