"""A server that costs nothing: nginx with one ready-made chat answer, over TCP and a unix socket, on a core of its own.

It listens on loopback only, with a configuration of its own in a temporary folder, logs no request, keeps connections
open, and dies with the process that started it. It says /health and /v1/models, so a worker takes it for an engine.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from benchmarks.cores import pin
from runtime.children import spawn, stop
from tests.support.own_services import free_port
from tests.support.packages import located

MODEL: Final = "static"
START_TIMEOUT_S: Final = 10.0
CONTENT: Final = "Shipping: the parcel left the warehouse on Friday, and the carrier has not scanned it since then."
# As vLLM writes it, all fields in; about 500 bytes.
ANSWER: Final = {
    "id": "chatcmpl-5f0c8a7e3d5b4b0f9b6c3f6d1c2e4a71",
    "object": "chat.completion",
    "created": 1764021600,
    "model": MODEL,
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": CONTENT, "tool_calls": [], "reasoning": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ],
    "usage": {"prompt_tokens": 96, "total_tokens": 120, "completion_tokens": 24, "prompt_tokens_details": None},
}


class StaticEndpoint:
    """`with StaticEndpoint(core=0) as endpoint: endpoint.url`; `core` None leaves it on all."""

    def __init__(self, *, core: int | None) -> None:
        self._core = core
        self._folder = tempfile.TemporaryDirectory(prefix="stoker-nginx-")
        self._child: subprocess.Popen[bytes] | None = None
        self.port = free_port()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def unix_url(self) -> str:
        return f"unix://{self._folder.name}/socket"

    @property
    def pid(self) -> int:
        if self._child is None:
            raise RuntimeError("it is used inside `with` only")
        return self._child.pid

    def __enter__(self) -> Self:
        folder = Path(self._folder.name)
        (folder / "nginx.conf").write_text(_configuration(folder, port=self.port))
        self._child = spawn(
            [_program(), "-e", "stderr", "-p", str(folder), "-c", "nginx.conf"],
            env=os.environ,
            log=folder / "log",
            session=True,
            death_signal=signal.SIGKILL,
        )
        self._wait_ready(folder / "log")
        if self._core is not None:
            pin(self.pid, {self._core})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._child is not None:
            stop(self._child, grace_s=5)
        self._folder.cleanup()

    def version(self) -> str:
        """What nginx calls itself."""
        said = subprocess.run([_program(), "-v"], capture_output=True, text=True, check=True).stderr
        return said.strip().rpartition("/")[2]

    def _wait_ready(self, log: Path) -> None:
        end = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            except OSError:
                if self._child is None or self._child.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"nginx did not start:\n{log.read_text(errors='replace')[-2000:]}") from None
                time.sleep(0.02)
            else:
                return


def _program() -> str:
    found = located("nginx")
    if found is None:
        raise SystemExit("nginx is missing: `make nginx` as root, or install your system's package `nginx-light`")
    return found


def _configuration(folder: Path, *, port: int) -> str:
    models = json.dumps({"object": "list", "data": [{"id": MODEL, "object": "model"}]})
    temporary = "\n".join(
        f"    {name}_temp_path {folder}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    return f"""
daemon off;
master_process off;  # one process: all of its CPU is seen
pid {folder}/pid;
error_log stderr crit;
events {{ worker_connections 8192; }}
http {{
    access_log off;
    default_type application/json;
    keepalive_requests 1000000000;
    keepalive_timeout 3600s;
    client_header_buffer_size 16k;  # a request of ours fits, so that one read takes it
{temporary}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        listen unix:{folder}/socket backlog=4096;
        location = /health {{ return 200 ''; }}
        location = /v1/models {{ return 200 '{models}'; }}
        location = /v1/chat/completions {{ return 200 '{json.dumps(ANSWER)}'; }}
        location = /v1/traces {{ return 200 ''; }}
    }}
}}
"""
