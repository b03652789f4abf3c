"""A child process that is to run for as long as its parent does: started again whenever it ends.

It must not know what the child does; how it is started and ended is runtime/children.py's.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from runtime.children import spawn, stop
from runtime.logs import get_logger

log = get_logger(__name__)

POLL_S = 1.0  # also the least time between two starts
STEADY_S = 10.0  # one that ends sooner could not begin its work


class KeptProcess(threading.Thread):
    """Keeps one `python -m module`, with its arguments, running.

    It dies with this thread, which must not be that of a request. Without `log_file` it writes where this process does.
    One that ends again and again, before it can have begun, is started after pauses that double, `longest_pause_s` at
    most: a start costs a second of a core.
    """

    def __init__(
        self,
        module: str,
        *,
        name: str,
        env: Mapping[str, str],
        grace_s: float,
        arguments: Sequence[str] = (),
        log_file: Path | None = None,
        longest_pause_s: float = 0.0,
    ) -> None:
        super().__init__(name=f"{name}-watch", daemon=True)
        self._command = [sys.executable, "-m", module, *arguments]
        self._what = name
        self._env = dict(env)
        self._grace_s = grace_s
        self._log_file = log_file
        self._longest_pause_s = longest_pause_s
        self._stop_wanted = threading.Event()

    def run(self) -> None:
        pause_s = 0.0
        while not self._stop_wanted.wait(pause_s):
            began = time.monotonic()
            try:
                child = spawn(self._command, env=self._env, log=self._log_file, session=True)
            except OSError as error:
                log.error(f"{self._what}_start_failed", error=str(error))
                self._stop_wanted.wait(POLL_S)
                continue
            while child.poll() is None and not self._stop_wanted.wait(POLL_S):
                pass
            if self._stop_wanted.is_set():
                stop(child, grace_s=self._grace_s)
            else:
                log.error(f"{self._what}_restarts", status=child.returncode)
                is_steady = time.monotonic() - began >= STEADY_S
                pause_s = 0.0 if is_steady else min(self._longest_pause_s, max(POLL_S, 2 * pause_s))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the process and the thread."""
        self._stop_wanted.set()
        self.join()
