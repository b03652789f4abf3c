"""A real OpenAI-compatible HTTP server whose answers are derived from the prompt: what a test sees is plain.

    python -m tests.support.scripted_endpoint --port 0 --port-file F [--latency-s 0.2] [--slots 8]

A chat is answered `echo: <last user message>`, tokens are words, vectors are hashes of their texts. Words in
double brackets anywhere in a prompt change the answer to it:

    [[status 429 retry-after 2]]  that status with that header; `_` in its value stands for a space
    [[fail 2 times]]              500, or the status beside it, the first times this prompt comes
    [[latency 1.5]]               seconds of service instead of --latency-s
    [[answer yes]] [[later answer no]]   this instead of the echo, and when the prompt comes again; the last one counts
    [[empty]] [[reasoning]]       no content; the thoughts apart from the content
    [[not json]] [[surrogate]] [[nul]] [[invalid utf-8]]   bodies that are hard to read
    [[held]]                      no answer until `script(…, match=…)` holds this prompt no more
    [[hang]] [[drop connection]] [[drop mid-body]]   no answer, or half of one
    [[huge]] [[die]]              a body said to be 1 TB; the end of the server
    [[plain floats]] [[swap]]     embeddings: base64 ignored; vectors in reverse order, with their indices
    [[quota]]                     429 insufficient_quota, as OpenAI says that an account is spent
    [[stall 5]] [[cut stream]] [[error-event 503]]   in the middle of a stream (`"stream": true`): seconds of silence,
                                  its end without [DONE], an error

Over --requests-per-minute or --tokens-per-minute (true tokens; a second's worth may come at once) it answers 429 with
Retry-After, retry-after-ms and OpenAI's x-ratelimit headers; --fail-share 0.2 of requests get 500 by a seeded chance.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
import uvloop
from aiohttp import web

from tests.support.scripted_server import Script, add_options

START_TIMEOUT_S = 20.0


class ScriptedEndpoint:
    """The server as a process of its own: `with ScriptedEndpoint(slots=8) as server: server.url`.

    It ends with the `with` block, or soon after the process that started it. `unix_url` reaches the same
    server over a unix socket.
    """

    def __init__(
        self,
        *,
        latency_s: float = 0.0,
        latency_sigma: float = 0.0,
        slots: int | None = None,
        api_key: str | None = None,
        auth_header: str = "Authorization",
        without_health: bool = False,
        models: Sequence[str] = (),
        requests_per_minute: float = 0,
        tokens_per_minute: float = 0,
        fail_share: float = 0.0,
        seed: int = 0,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="scripted-")
        self._port_file = Path(self._folder.name) / "port"
        self._socket = Path(self._folder.name) / "socket"
        self._flags = ["--port-file", str(self._port_file), "--socket", str(self._socket)]
        self._flags += ["--latency-s", str(latency_s), "--latency-sigma", str(latency_sigma)]
        self._flags += ["--slots", str(slots or 0), "--exit-with", str(os.getpid())]
        self._flags += ["--api-key", api_key] if api_key else []
        self._flags += ["--auth-header", auth_header, "--models", ",".join(models), "--seed", str(seed)]
        self._flags += ["--requests-per-minute", str(requests_per_minute)]
        self._flags += ["--tokens-per-minute", str(tokens_per_minute), "--fail-share", str(fail_share)]
        self._flags += ["--without-health"] if without_health else []
        self._scripted: set[str] = set()
        self.port = 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def start(self) -> None:
        """Start the server; after `kill` at the same address, its memory and orders gone."""
        self._port_file.unlink(missing_ok=True)
        self._socket.unlink(missing_ok=True)
        command = [sys.executable, "-m", "tests.support.scripted_endpoint", *self._flags]
        command += ["--port", str(self.port)]
        self._process = subprocess.Popen(command, cwd=Path(__file__).parents[2])
        end = time.monotonic() + START_TIMEOUT_S
        while not self._port_file.exists():
            if self._process.poll() is not None or time.monotonic() > end:
                self.kill()
                raise RuntimeError(f"the scripted endpoint did not start (status {self._process.returncode})")
            time.sleep(0.01)
        self.port = int(self._port_file.read_text())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self._folder.cleanup()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def unix_url(self) -> str:
        return f"unix://{self._socket}"

    def kill(self) -> None:
        """End the server as kill -9 does: connections break in the middle of their requests."""
        self._process.kill()
        self._process.wait()

    def has_died(self) -> bool:
        """Whether the server ended by itself, as `[[die]]` makes it."""
        return self._process.poll() is not None

    def calls(self) -> Calls:
        """What has arrived so far."""
        return msgspec.json.decode(self._ask("/_calls"), type=Calls)

    def script(self, orders: str, *, match: str = "") -> None:
        """From now on treat prompts that contain `match` as if they held these orders; "" ends it."""
        self._ask("/_script", {"match": match, "orders": orders})
        self._scripted.add(match)

    def forget(self) -> None:
        """End all that it was told by `script`."""
        while self._scripted:
            self._ask("/_script", {"match": self._scripted.pop(), "orders": ""})

    def set(self, **options: float) -> None:
        """From now on: latency_s, latency_sigma, fail_share, requests_per_minute, tokens_per_minute."""
        self._ask("/_options", options)

    def set_health(self, ok: bool) -> None:
        """What /health says from now on."""
        self._ask("/_health", {"ok": ok})

    def _ask(self, path: str, body: object = None) -> bytes:
        content = None if body is None else msgspec.json.encode(body)
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", content, timeout=10) as response:
            answer: bytes = response.read()
            return answer


class Calls(msgspec.Struct, frozen=True):
    """`count` requests came; `prompts` says how often each text did, `paths` how often each path.

    Those that a limit or a wrong key kept out are in `statuses` only, which has how many got which ("499": the client
    went away). `repeats`: answers to a prompt that had been answered before. `tokens`: all that were generated.
    From the first arrival to the last, moments of time.monotonic(), slots were taken for `slot_seconds` in all.
    """

    count: int
    prompts: dict[str, int]
    paths: dict[str, int]
    running: int
    most_running: int
    first_at: float = 0.0
    last_at: float = 0.0
    slot_seconds: float = 0.0
    statuses: dict[str, int] = {}
    repeats: int = 0
    tokens: int = 0


async def _serve_forever(options: argparse.Namespace) -> None:
    server = web.Server(Script(options).handle, access_log=None, handler_cancellation=True)
    loop = asyncio.get_running_loop()
    listener = await loop.create_server(server, "127.0.0.1", options.port, backlog=1024)
    listeners = [listener]  # uvloop closes a listener that nobody holds
    if options.socket:
        listeners.append(await loop.create_unix_server(server, options.socket, backlog=1024))
    if options.port_file:
        new = options.port_file.with_suffix(".new")
        new.write_text(str(listener.sockets[0].getsockname()[1]))
        new.replace(options.port_file)
    while options.exit_with in {None, os.getppid()}:
        await asyncio.sleep(0.5)


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description="An OpenAI-compatible server that follows its prompts.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--port-file", type=Path, help="the port is written here once it listens")
    parser.add_argument("--socket", help="a unix socket to listen on as well")
    add_options(parser)
    parser.add_argument("--exit-with", type=int, metavar="PID", help="end when this parent has ended")
    uvloop.run(_serve_forever(parser.parse_args()))


if __name__ == "__main__":
    main()
