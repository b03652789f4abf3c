"""Runs a command with the services that the tests need: those that answer already, else ones started for it.

    python -m tests.support.services pytest …

Looks at STOKER_TEST_POSTGRES, STOKER_TEST_REDIS and STOKER_TEST_RABBITMQ, by default the standard local ports. What
does not answer is started as a child: Postgres and Valkey from our wheels, RabbitMQ from the system's package
(installed by apt-get when root) on loopback only. Everything started is ended.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from urllib.parse import urlsplit

import psycopg

from scripts.embedded import default_home, embedded_services
from tests.support.own_services import OwnRabbitMQ, OwnRedis, server_folder
from tests.support.packages import install

POSTGRES = "postgresql://postgres@127.0.0.1:5432"
REDIS = "redis://127.0.0.1:6379"
RABBITMQ = "amqp://guest:guest@127.0.0.1:5672//"


def main() -> int:
    """The command's exit status."""
    with server_folder() as folder, ExitStack() as stack:
        env = dict(os.environ)
        env.pop("PYTHONDONTWRITEBYTECODE", None)  # else each of some hundred processes compiles our modules anew
        env.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads turn in circles where there are more than cores
        if not answers(env.setdefault("STOKER_TEST_POSTGRES", POSTGRES)):
            home = default_home({}).with_name("stoker-test")
            env["STOKER_TEST_POSTGRES"] = stack.enter_context(embedded_services(home)).postgres_url
            need_no_disk(env["STOKER_TEST_POSTGRES"])
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


def need_no_disk(postgres_url: str) -> None:
    """Let our own server wait for no disk: nothing outlives the tests, and those of its crashes start another one."""
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET fsync = off")
        connection.execute("SELECT pg_reload_conf()")


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
