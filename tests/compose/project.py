"""docker-compose.yml as a user has it: its files in a folder, with secrets made for it, and its containers."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.compose.engine import HOME, Docker, run
from tests.support.processes import REPOSITORY

FOLDER = HOME / "project"
COPIED = ("docker-compose.yml", "deploy", "examples", "scripts/compose_env.py")
PROFILES = ("cpu", "gpu", "observability", "cli")
VLLM = REPOSITORY / ".venv-vllm" / "lib"
# There vLLM for CPUs of this machine's environment lies, in place of the image's.
DIST_PACKAGES = "/usr/local/lib/python3.11/dist-packages"


class Project:
    """The services of one folder, by `docker compose`."""

    def __init__(self, docker: Docker) -> None:
        self.docker = docker
        program = str(Path(sys.executable).with_name("docker-compose"))
        profiles = [word for name in PROFILES for word in ("--profile", name)]
        files = ["-f", "docker-compose.yml", "-f", "dry.yml"]
        self._command = [program, "--env-file", "deploy/.env", *files, *profiles]
        self._env = {name: value for name, value in docker.env.items() if not name.startswith("STOKER_")}
        self.config: dict[str, Any] = json.loads(self("config", "--format", "json"))

    def __call__(self, *words: str, check: bool = True) -> str:
        """What `docker compose WORDS` prints."""
        return run([*self._command, *words], env=self._env, check=check, folder=FOLDER)

    def cli(self, *words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """`docker compose run --rm -T cli WORDS`, as a user types it."""
        command = [*self._command, "run", "--rm", "-T", "cli", *words]
        return subprocess.run(command, env=self._env, cwd=FOLDER, input=stdin, capture_output=True, check=False)

    @property
    def services(self) -> dict[str, dict[str, Any]]:
        """Every service as compose understands it."""
        found: dict[str, dict[str, Any]] = self.config["services"]
        return found

    def container(self, service: str) -> dict[str, Any]:
        """All that is known of a service's container."""
        return self.docker.inspect(self(*f"ps -a -q {service}".split()).strip())

    def password(self, name: str) -> str:
        """A password that compose_env.py made."""
        lines = (line.split("=", 1) for line in (FOLDER / "deploy" / ".env").read_text().splitlines() if "=" in line)
        return dict((line[0], line[1]) for line in lines)[name]


@contextmanager
def project(docker: Docker) -> Iterator[Project]:
    """The project in a folder of its own; its containers, networks and volumes are gone after the block."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    for name in COPIED:
        source, target = REPOSITORY / name, FOLDER / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns(".env*"))
        else:
            shutil.copy(source, target)
    (FOLDER / "dry.yml").write_text(_changes())
    run([sys.executable, "scripts/compose_env.py"], env=dict(os.environ), folder=FOLDER)
    with (FOLDER / "deploy" / ".env").open("a") as file:
        file.write(f"CHECKPOINTS={REPOSITORY / '.checkpoints'}\n")
        file.write(f"GPU_WORKER_CPUS={min(8, os.cpu_count() or 1)}\n")  # more than there are is refused
    made = Project(docker)
    made("down", "--volumes", "--timeout", "1")  # what a run that was killed has left has other passwords
    try:
        yield made
    finally:
        made("down", "--volumes", "--timeout", "10", check=False)


def _changes() -> str:
    """What this machine cannot give, as compose reads it: a GPU, and more open files than its own limit."""
    packages = next(iter(sorted(VLLM.glob("python3.11/site-packages"))), None)
    volumes = [] if packages is None else [f"{packages}:{DIST_PACKAGES}:ro"]
    most_files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return f"""
services:
  worker-gpu:
    deploy: {{resources: {{reservations: !reset null}}}}
    volumes: {json.dumps(volumes)}
  rabbitmq:
    ulimits: {{nofile: {min(most_files, 65536)}}}
"""
