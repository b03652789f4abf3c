"""A gateway as it runs in production: `python -m api.server` with its validators, on a port of its own."""

from __future__ import annotations

import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.own_services import free_port
from tests.support.processes import MARK, REPOSITORY, code_environment, kill_marked, new_mark
from tests.support.waiting import wait_until

READY_S = 60.0


class GatewayProcess:
    """`with GatewayProcess(env=env, folder=tmp_path) as gateway: gateway.url`; nothing of it runs after the block."""

    def __init__(
        self, *, env: Mapping[str, str], folder: Path, ready_s: float = READY_S, code: Path = REPOSITORY
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.mark = new_mark()
        self._code, self._ready_s = code, ready_s
        self._env = {**code_environment(code), **env, "STOKER_GATEWAY__PORT": str(self.port), MARK: self.mark}
        self._log_file = folder / f"gateway-{self.mark[:4]}.log"

    def __enter__(self) -> Self:
        with self._log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "api.server"],
                cwd=self._code,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            wait_until(self._answers, self._ready_s, "the gateway answers")
        except BaseException:
            print(self.log)
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        print(f"--- gateway\n{self.log}")  # shown where a test fails

    @property
    def log(self) -> str:
        """What it wrote so far."""
        return self._log_file.read_text(errors="replace")

    def _answers(self) -> bool:
        assert self.process.poll() is None, f"the gateway ended:\n{self.log}"
        try:
            with urllib.request.urlopen(f"{self.url}/healthz", timeout=2.0) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        kill_marked(self.mark)
