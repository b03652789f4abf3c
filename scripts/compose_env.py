"""Writes deploy/.env, the passwords that docker-compose.yml asks for: random, and never written over.

    python3 scripts/compose_env.py

Passwords that a later version asks for are added to a file that is there. It needs nothing but Python. The file is not
`.env`, which Compose and Stoker itself read unasked.
"""

from __future__ import annotations

import os
import re
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

ENV_FILE = Path(__file__).resolve().parent.parent / "deploy" / ".env"
PASSWORDS = ("POSTGRES_PASSWORD", "RABBITMQ_PASSWORD", "REDIS_PASSWORD", "FLOWER_PASSWORD", "GRAFANA_PASSWORD")
PASSWORD_BYTES = 32
HEAD = (
    "# Made by scripts/compose_env.py for: docker compose --env-file deploy/.env …\n"
    "# Postgres, RabbitMQ and Grafana keep the passwords that their volumes were made with: keep this file.\n"
)


def random_lines(names: Sequence[str]) -> str:
    """Every password with a new random value: hexadecimal, so that it stands in a URL as it is."""
    return "".join(f"{name}={secrets.token_hex(PASSWORD_BYTES)}\n" for name in names)


def missing_from(text: str) -> list[str]:
    """The passwords that a file's text does not state."""
    return [name for name in PASSWORDS if not re.search(rf"^{name}=.", text, re.MULTILINE)]


def write_new(file: Path) -> None:
    """Write the file, readable by its owner alone; raises FileExistsError if there is one, whole or not.

    It appears by a link when it is complete, so a crash leaves none that lacks a password.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _written_beside(file, HEAD + random_lines(PASSWORDS))
    try:
        os.link(unfinished, file)
    finally:
        unfinished.unlink()


def add_missing(file: Path) -> list[str]:
    """Add the passwords that the file lacks, and change no other line; which they were."""
    text = file.read_text(encoding="utf-8")
    names = missing_from(text)
    if names:
        text += "" if text.endswith("\n") or not text else "\n"
        _written_beside(file, text + random_lines(names)).replace(file)
    return names


def _written_beside(file: Path, text: str) -> Path:
    unfinished = file.with_name(f"{file.name}.{os.getpid()}")
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as opened:
            opened.write(text)
    except BaseException:
        unfinished.unlink()
        raise
    return unfinished


def main() -> int:
    """Write the file, or add to it; 0, also when it exists and has all it needs."""
    try:
        write_new(ENV_FILE)
    except FileExistsError:
        if added := add_missing(ENV_FILE):
            sys.stderr.write(f"added to {ENV_FILE}: {', '.join(added)}\n")
            return 0
        sys.stderr.write(
            f"compose_env: {ENV_FILE} exists and is left as it is; delete it for new passwords, "
            "together with the volumes that were made with the old ones\n"
        )
        return 0
    sys.stderr.write(f"written: {ENV_FILE}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
