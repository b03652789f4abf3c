"""Writes deploy/.env, the passwords that docker-compose.yml asks for: random, and never written over.

    python3 scripts/compose_env.py

It needs nothing but Python. The file is not `.env`, which Compose and Stoker itself read unasked.
"""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path

ENV_FILE = Path(__file__).resolve().parent.parent / "deploy" / ".env"
PASSWORDS = ("POSTGRES_PASSWORD", "RABBITMQ_PASSWORD", "REDIS_PASSWORD")
PASSWORD_BYTES = 32
EXIT_EXISTS = 2


def env_text() -> str:
    """Every password with a new random value: hexadecimal, so that it stands in a URL as it is."""
    lines = [
        "# Made by scripts/compose_env.py for: docker compose --env-file deploy/.env …",
        "# Postgres and RabbitMQ keep the passwords that their volumes were made with: keep this file.",
    ]
    lines += [f"{name}={secrets.token_hex(PASSWORD_BYTES)}" for name in PASSWORDS]
    return "\n".join(lines) + "\n"


def write_new(file: Path) -> None:
    """Write the file, readable by its owner alone; raises FileExistsError if there is one, whole or not.

    It appears by a link when it is complete, so a crash leaves none that lacks a password.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"{file.name}.{os.getpid()}")
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as opened:
            opened.write(env_text())
        os.link(unfinished, file)
    finally:
        unfinished.unlink()


def main() -> int:
    """Write the file; return 0, or 2 when it exists and is left as it is."""
    try:
        write_new(ENV_FILE)
    except FileExistsError:
        sys.stderr.write(
            f"compose_env: {ENV_FILE} exists and is left as it is; delete it for new passwords, "
            "together with the volumes that were made with the old ones\n"
        )
        return EXIT_EXISTS
    sys.stderr.write(f"written: {ENV_FILE}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
