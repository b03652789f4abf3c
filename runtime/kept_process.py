"""A child process that is to run for as long as its parent does: started again whenever it ends.

It must not know what the child does; how it is started and ended is runtime/children.py's.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping, Sequence

from runtime.children import spawn, stop
from runtime.logs import get_logger

log = get_logger(__name__)

POLL_S = 1.0  # also the least time between two starts


class KeptProcess(threading.Thread):
    """Keeps one `python -m module`, with its arguments, running.

    It dies with this thread, which must not be that of a request.
    """

    def __init__(
        self, module: str, *, name: str, env: Mapping[str, str], grace_s: float, arguments: Sequence[str] = ()
    ) -> None:
        super().__init__(name=f"{name}-watch", daemon=True)
        self._command = [sys.executable, "-m", module, *arguments]
        self._what = name
        self._env = dict(env)
        self._grace_s = grace_s
        self._stop_wanted = threading.Event()

    def run(self) -> None:
        while not self._stop_wanted.is_set():
            try:
                child = spawn(self._command, env=self._env, log=None, session=True)
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

    def stop(self) -> None:
        """End the process and the thread."""
        self._stop_wanted.set()
        self.join()
