"""Runs a command with the services that the tests need: a Postgres of its own, and what does not answer already.

    python -m tests.support.services pytest …

Looks at STOKER_TEST_REDIS and STOKER_TEST_RABBITMQ, by default the standard local ports. What does not answer is
started as a child: Valkey from our wheel, RabbitMQ from the system's package (installed by apt-get when root), on
loopback only. Postgres is, unless STOKER_TEST_POSTGRES states one: each test has a database of its own, for which a
server on a disk needs 0.3 s of CPU, and one in memory a tenth of that. Everything started is ended.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

from tests.support.own_services import OwnPostgres, OwnRabbitMQ, OwnRedis, server_folder
from tests.support.packages import install

MEMORY = Path("/dev/shm")
ROOM_BYTES = 2 * 2**30
REDIS = "redis://127.0.0.1:6379"
RABBITMQ = "amqp://guest:guest@127.0.0.1:5672//"


def main() -> int:
    """The command's exit status."""
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # what it has started, and what lies in memory, goes with it
    with server_folder() as folder, server_folder(under=memory()) as rows, ExitStack() as stack:
        env = dict(os.environ)
        env.pop("PYTHONDONTWRITEBYTECODE", None)  # else each of some hundred processes compiles our modules anew
        env.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads turn in circles where there are more than cores
        if not env.get("STOKER_TEST_POSTGRES"):
            postgres = OwnPostgres(rows / "postgres", durable=False)
            env["STOKER_TEST_POSTGRES"] = stack.enter_context(postgres).url.removesuffix("/postgres")
            print("services: started Postgres", file=sys.stderr)
        if not answers(env.setdefault("STOKER_TEST_REDIS", REDIS)):
            env["STOKER_TEST_REDIS"] = stack.enter_context(OwnRedis(folder / "redis")).url.removesuffix("/0")
            print("services: started Redis", file=sys.stderr)
        if not answers(env.setdefault("STOKER_TEST_RABBITMQ", RABBITMQ)):
            install("rabbitmq-server")
            broker = stack.enter_context(OwnRabbitMQ(folder / "rabbitmq"))
            env |= {"STOKER_TEST_RABBITMQ": broker.url, "RABBITMQ_NODENAME": broker.node}  # as rabbitmqctl finds it
            print("services: started RabbitMQ", file=sys.stderr)
        return subprocess.run(sys.argv[1:], env=env, check=False).returncode


def memory() -> Path | None:
    """A file system in memory with room for the databases of all tests that run at once; None if there is none."""
    try:
        free = os.statvfs(MEMORY)
    except FileNotFoundError:
        return None
    return MEMORY if free.f_bavail * free.f_frsize >= ROOM_BYTES and os.access(MEMORY, os.W_OK) else None


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


if __name__ == "__main__":
    sys.exit(main())
