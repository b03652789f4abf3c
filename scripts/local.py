"""Services and a worker on this machine, as children of a command; found again by other commands.

`stoker up` and `stoker run` without any service set start embedded ones; while they run, every other
command on this machine finds them through a small file in the home folder.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from runtime.children import birth_of, spawn, stop
from runtime.errors import BadInput, ServiceUnreachable
from runtime.home import default_home
from runtime.kept_process import KeptProcess
from runtime.settings import Settings, environment_of
from scripts.embedded import embedded_services, is_answering
from scripts.metrics_places import with_metrics_of
from scripts.terminal import bar
from store.database import Database
from store.presence import PresenceBoard
from store.schema import migrate

Node = Literal["generation", "documents", "control"]

SHARED = ("trace", "metrics")  # settings of a `stoker up` that hold for commands in other terminals too
LONGEST_PAUSE_S = 60.0  # between starts of a worker that cannot run
STOP_MARGIN_S = 30.0  # beyond the grace: the pool's end, the engine's, the dispatcher's
GATEWAY_START_S = 60.0
LOG_TAIL_LINES = 15


def home_of(settings: Settings) -> Path:
    """The folder of embedded services, logs and run files."""
    return settings.home or default_home(os.environ)


def connected(settings: Settings) -> Settings:
    """Settings with the three services' addresses: the given ones, or those of a running `stoker up`.

    Raises ServiceUnreachable with the remedy if there are none.
    """
    if not settings.is_embedded:
        return settings
    found = _running_services(settings)
    if found is None:
        raise ServiceUnreachable(
            "no services: set STOKER_POSTGRES__URL, STOKER_BROKER__URL and STOKER_REDIS__URL (see .env.example), "
            "or start embedded ones with `stoker up`"
        )
    return found


@contextmanager
def local_services(settings: Settings, *, with_chroma: bool = False) -> Iterator[Settings]:
    """Settings with services that answer: given ones, running embedded ones, or new ones for this block.

    `with_chroma`: what the semantic cache needs must be among them, else BadInput says what is missing.
    """
    running = settings if not settings.is_embedded else _running_services(settings)
    if with_chroma:
        _expect_semantic(running or settings, runs=running is not None)
    if running is not None:
        yield running
        return
    home = home_of(settings)
    starts_chroma = with_chroma and settings.cache.chroma_url is None
    with embedded_services(home, with_chroma=starts_chroma) as services:
        addresses = {"postgres": services.postgres_url, "broker": services.broker_url, "redis": services.redis_url}
        if services.chroma_url is not None:
            addresses["chroma"] = services.chroma_url
        announcement = _announcement(settings)
        told = {group: getattr(settings, group).model_dump(mode="json") for group in SHARED}
        _announce(settings, {"pid": os.getpid(), "birth": birth_of(os.getpid()), "addresses": addresses, "told": told})
        _forget_workers(services.redis_url)
        try:
            yield _with_addresses(settings, addresses)
        finally:
            announcement.unlink(missing_ok=True)


def announce_gateway(settings: Settings, place: GatewayPlace | None) -> None:
    """Let other programs on this machine find the gateway, if the services here are this process's own.

    None: one is to come.
    """
    found = _announced(settings)
    if found is not None and found["pid"] == os.getpid():
        _announce(settings, found | {"gateway": None if place is None else asdict(place)})


def running_gateway(settings: Settings) -> GatewayPlace | None:
    """The gateway of a `stoker up` that has this home; None if it has none, or none yet."""
    found = _announced(settings)
    return None if found is None or found.get("gateway") is None else GatewayPlace(**found["gateway"])


def gateway_is_coming(settings: Settings) -> bool:
    """Whether who has this home is starting a gateway."""
    found = _announced(settings)
    return found is not None and "gateway" in found


def has_semantic_parts(settings: Settings) -> bool:
    """Whether the semantic cache can work on this machine: its libraries and its embedder are there."""
    has_embedder = settings.cache.embedder_url is not None or (settings.cache.embedder / "model.onnx").is_file()
    return has_embedder and all(importlib.util.find_spec(name) for name in ("chromadb", "onnxruntime", "tokenizers"))


def has_reading_parts(settings: Settings) -> bool:
    """Whether documents can be read on this machine: their libraries are there, and what the semantic cache needs."""
    libraries = ("markitdown", "semantic_text_splitter")
    return has_semantic_parts(settings) and all(importlib.util.find_spec(name) for name in libraries)


def _expect_reading(settings: Settings) -> None:
    if not has_reading_parts(settings):
        raise BadInput("reading documents needs its libraries and an embedder: run `make documents`")


@dataclass(frozen=True, slots=True)
class GatewayPlace:
    """Where a gateway answers, and the file that has a key for it."""

    url: str
    key_file: str


@dataclass(frozen=True, slots=True)
class LocalProcess:
    """A worker or gateway that this command started."""

    process: subprocess.Popen[bytes]
    log: Path
    what: str = "worker"

    def expect_alive(self) -> None:
        """Raise ServiceUnreachable with the end of its log if it has ended."""
        if self.process.poll() is not None:
            raise ServiceUnreachable(
                f"the {self.what} has ended (status {self.process.returncode}); start again, batches go on; "
                f"the end of {self.log}:\n{_tail(self.log)}"
            )


@contextmanager
def local_worker(
    settings: Settings,
    *,
    name: str = "local",
    node: Node = "generation",
    on_wait: Callable[[float], None] | None = None,
) -> Iterator[LocalProcess]:
    """A worker process of a node for this block, up and announced. Ended by SIGTERM, so it drains.

    Raises ServiceUnreachable with the end of its log if it does not come up.
    """
    log, environment = _worker_place(settings, name, node)
    command = [sys.executable, "-m", "celery", *_worker_arguments(name)]
    child = spawn(command, env=environment, log=log, session=True)
    try:
        _wait_announced(settings, child, name=_celery_name(name), log=log, on_wait=on_wait)
        yield LocalProcess(process=child, log=log)
    finally:
        stop(child, grace_s=settings.worker.grace_s + STOP_MARGIN_S)


@contextmanager
def kept_worker(settings: Settings, *, name: str, node: Node) -> Iterator[None]:
    """A worker of a node for this block, which is not waited for and is started again whenever it dies."""
    log, environment = _worker_place(settings, name, node)
    with KeptProcess(
        "celery",
        name=name,
        env=environment,
        grace_s=settings.worker.grace_s + STOP_MARGIN_S,
        arguments=_worker_arguments(name),
        log_file=log,
        longest_pause_s=LONGEST_PAUSE_S,
    ):
        yield


def _worker_place(settings: Settings, name: str, node: Node) -> tuple[Path, dict[str, str]]:
    """Its log and its environment."""
    log = home_of(settings) / "logs" / ("worker.log" if name == "local" else f"worker-{name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    return log, {**os.environ, **environment_of(with_metrics_of(settings, node)), "STOKER_WORKER__NODE": node}


def _worker_arguments(name: str) -> list[str]:
    return ["-A", "worker.main", "worker", "-n", _celery_name(name)]


def _celery_name(name: str) -> str:
    return f"{name}-{os.getpid()}@{os.uname().nodename}"


def has_gateway_parts() -> bool:
    """Whether a gateway can run here: its libraries are there."""
    return all(importlib.util.find_spec(name) for name in ("fastapi", "uvicorn", "python_multipart", "fsspec"))


def gateway_environment(settings: Settings) -> dict[str, str]:
    """What a gateway's process is given: the services, and a home for uploads unless they have a place."""
    return {**os.environ, **environment_of(settings), "STOKER_HOME": str(home_of(settings).absolute())}


@contextmanager
def local_gateway(settings: Settings) -> Iterator[LocalProcess]:
    """A gateway process for this block, answering. Raises ServiceUnreachable with the end of its log if it does not."""
    log = home_of(settings) / "logs" / "gateway.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "api.server"]
    child = spawn(command, env=gateway_environment(with_metrics_of(settings, "gateway")), log=log, session=True)
    gateway = LocalProcess(process=child, log=log, what="gateway")
    end = time.monotonic() + GATEWAY_START_S
    try:
        while not is_answering(settings.gateway.host, settings.gateway.port):
            gateway.expect_alive()
            if time.monotonic() > end:
                raise ServiceUnreachable(f"the gateway does not answer; the end of {log}:\n{_tail(log)}")
            time.sleep(0.05)
        yield gateway
    finally:
        stop(child, grace_s=STOP_MARGIN_S)


def ensure_node(settings: Settings, stack: ExitStack, node: Node) -> LocalProcess | None:
    """Start a worker of a node until the stack is left, unless one is live; None if one is."""
    board = PresenceBoard(settings.require_redis())
    try:
        if board.workers(node=node):
            return None
    finally:
        board.close()
    if node == "documents":
        _expect_reading(settings)
    with bar("starting the engine" if node == "generation" else "starting to read", total=None) as show:
        name = "local" if node == "generation" else node
        return stack.enter_context(local_worker(settings, name=name, node=node, on_wait=show))


def prepare_schema(settings: Settings) -> tuple[str | None, str | None]:
    """Bring the database's schema up to date; its revision before, None if it was empty, and after."""
    database = Database(settings.require_postgres())
    try:
        return migrate(database)
    finally:
        database.close()


def _wait_announced(
    settings: Settings,
    worker: subprocess.Popen[bytes],
    *,
    name: str,
    log: Path,
    on_wait: Callable[[float], None] | None,
) -> None:
    board = PresenceBoard(settings.require_redis())
    started = time.monotonic()
    try:
        while not any(found.name == name for found in board.workers(node=None)):
            waited_s = time.monotonic() - started
            if worker.poll() is not None or waited_s > settings.engine.start_timeout_s:
                raise ServiceUnreachable(f"the worker did not come up; the end of {log}:\n{_tail(log)}")
            if on_wait is not None:
                on_wait(waited_s)
            time.sleep(0.1)
    finally:
        board.close()


def _forget_workers(redis_url: str) -> None:
    """Workers of an earlier run died with its services; what they announced may outlive them by some seconds."""
    board = PresenceBoard(redis_url)
    for worker in board.workers(node=None):
        board.withdraw(worker.name)
    board.close()


def _running_services(settings: Settings) -> Settings | None:
    found = _announced(settings)
    return None if found is None else _with_addresses(_as_told(settings, found.get("told", {})), found["addresses"])


def _as_told(settings: Settings, told: dict[str, Any]) -> Settings:
    """With what was set where the services run, unless it is set here too."""
    groups = {group: getattr(settings, group) for group in told if group in SHARED}
    changed = {name: type(group).model_validate(told[name]) for name, group in groups.items() if group == type(group)()}
    return settings.model_copy(update=changed)


def _announced(settings: Settings) -> dict[str, Any] | None:
    """What the process that has this home says of itself; None if it is gone."""
    try:
        found: dict[str, Any] = json.loads(_announcement(settings).read_text())
    except (FileNotFoundError, ValueError):
        return None
    return found if birth_of(found["pid"]) == found["birth"] else None


def _expect_semantic(settings: Settings, *, runs: bool) -> None:
    if runs and settings.cache.chroma_url is None:
        raise BadInput(
            "the semantic cache needs Chroma, and the services that run have none: set STOKER_CACHE__CHROMA_URL, "
            "or start `stoker up` anew after `make embedder`"
        )
    if not has_semantic_parts(settings):
        raise BadInput(
            "the semantic cache needs its libraries and an embedder: run `make cache`, or run without --cache semantic"
        )


def _announcement(settings: Settings) -> Path:
    return home_of(settings) / "services.json"


def _announce(settings: Settings, found: dict[str, Any]) -> None:
    part = _announcement(settings).with_suffix(".part")
    part.write_text(json.dumps(found))
    part.chmod(0o600)
    part.replace(_announcement(settings))


def _with_addresses(settings: Settings, addresses: dict[str, str]) -> Settings:
    changed: dict[str, object] = {"home": home_of(settings)}
    for name, url in addresses.items():
        group, field = ("cache", "chroma_url") if name == "chroma" else (name, "url")
        changed[group] = getattr(settings, group).model_copy(update={field: url})
    return settings.model_copy(update=changed)


def _tail(log: Path) -> str:
    return "\n".join("  " + line for line in log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])
