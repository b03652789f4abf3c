"""How busy an engine's GPUs are, as nvidia-smi says. It must never wait: a driver may hang."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from runtime.logs import get_logger

log = get_logger(__name__)

QUERY = ("nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits")


class GpuMeter:
    """Readings of the GPUs that an engine with this environment sees; none where there is no nvidia-smi or no GPU."""

    def __init__(self, env: Mapping[str, str], *, query: Sequence[str] = QUERY, hung_after_s: float = 4.0) -> None:
        seen = env.get("CUDA_VISIBLE_DEVICES")
        has_some = seen is None or seen.strip() not in ("", "-1")
        self._command = [*query, *([] if seen is None else [f"--id={seen}"])]
        self._is_usable = has_some and shutil.which(query[0]) is not None
        self._hung_after_s = hung_after_s
        self._child: subprocess.Popen[str] | None = None
        self._began = 0.0

    def read(self) -> float | None:
        """The mean use, 0 to 1, that the query begun by the call before found; it begins the next one."""
        if not self._is_usable:
            return None
        if self._child is not None and self._child.poll() is None:
            if time.monotonic() - self._began > self._hung_after_s:
                self._child.kill()  # it may hang all the same: no other is begun beside it
            return None
        use = None if self._child is None else parse_use(self._child.communicate()[0])
        self._began = time.monotonic()
        try:
            self._child = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        except OSError as error:
            log.warning("gpu_not_read", error=str(error))
            self._child, self._is_usable = None, False
        return use

    def close(self) -> None:
        """End a query that still runs."""
        child, self._child, self._is_usable = self._child, None, False
        if child is not None:
            child.kill()
            with suppress(subprocess.TimeoutExpired):
                child.communicate(timeout=1.0)


def parse_use(text: str) -> float | None:
    """The mean of the percentages of nvidia-smi's lines, 0 to 1; GPUs that do not tell theirs are left out."""
    found = [int(line) for line in text.split("\n") if line.strip().isdecimal()]
    return sum(found) / len(found) / 100 if found else None
