"""Where the processes of one tree keep their counts: a folder of small files, made and removed by the first of them.

It must not know what is counted. A process that is killed leaves its files: gauges of it are dropped, counts of it are
put together into one file, so that a child which dies every second for a week costs nothing.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from runtime.children import birth_of
from runtime.logs import get_logger

log = get_logger(__name__)

FOLDER_VARIABLE: Final = "PROMETHEUS_MULTIPROC_DIR"  # the client's own: children that are started find it there

_PREFIX: Final = "stoker-metrics-"
_OWNER: Final = "owner"
_NEW_S: Final = 60.0  # so young a folder may not have its lock yet
_THE_DEAD: Final = 0  # no process has this id
_READS: Final = 3  # of a file that is being made at that moment


class MetricsFolder:
    """A folder of this process, which holds a lock in it; those of processes that were killed are removed."""

    def __init__(self) -> None:
        _sweep(Path(tempfile.gettempdir()))
        self._folder = tempfile.TemporaryDirectory(prefix=_PREFIX)
        self._pid = os.getpid()
        self._lock = os.open(Path(self.path) / _OWNER, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    @property
    def path(self) -> str:
        """Where it is."""
        return self._folder.name

    def remove(self) -> None:
        """Remove it, if this is the process that made it and not a fork of it; once more is harmless."""
        if self._pid != os.getpid():
            return
        self._pid = 0
        if os.environ.get(FOLDER_VARIABLE) == self.path:
            del os.environ[FOLDER_VARIABLE]
        self._folder.cleanup()
        os.close(self._lock)


def is_metrics_folder(path: str | None) -> bool:
    """Whether a path is that of such a folder, and not of another program that uses the same library."""
    return path is not None and Path(path).name.startswith(_PREFIX)


def families_in(folder: str) -> list[Any]:
    """What all processes counted, as the library's metric families."""
    from prometheus_client.multiprocess import MultiProcessCollector  # noqa: PLC0415  # after the folder is known

    _forget_dead(Path(folder))
    for left in reversed(range(_READS)):
        # One that is empty was just opened, or its process was killed then.
        files = [str(file) for file in Path(folder).glob("*.db") if file.stat().st_size]
        try:
            return list(MultiProcessCollector.merge(files))  # type: ignore[no-untyped-call]
        except (struct.error, RuntimeError):
            if not left:
                raise
    return []


def _forget_dead(folder: Path) -> None:
    by_pid: dict[int, list[Path]] = {}
    for file in folder.glob("*.db"):
        by_pid.setdefault(int(file.stem.rpartition("_")[2]), []).append(file)
    for pid, files in by_pid.items():
        if pid != _THE_DEAD and birth_of(pid) is None:
            _bury(folder, files)


def _bury(folder: Path, files: Iterable[Path]) -> None:
    """Drop a dead process's gauges, and add its counts to those of the dead; without room for that, they stay."""
    for file in files:
        kind = file.stem.partition("_")[0]
        if kind != "gauge" and file.stat().st_size:
            try:
                _add(file, folder / f"{kind}_{_THE_DEAD}.db")
            except OSError as error:
                log.warning("metrics_of_dead_stay", file=file.name, error=str(error))
                continue
        file.unlink()


def _add(file: Path, dead: Path) -> None:
    from runtime.metrics_files import ReservedFile  # noqa: PLC0415

    kept = ReservedFile(str(dead))
    try:
        added = [*ReservedFile.read_all_values_from_file(str(file))]  # type: ignore[no-untyped-call]
        sums = {key: kept.read_value(key)[0] + value for key, value, *_ in added}  # type: ignore[no-untyped-call]
        for key, value in sums.items():  # each has its place by now: all are added, or none
            kept.write_value(key, value, 0.0)  # type: ignore[no-untyped-call]
    finally:
        kept.close()  # type: ignore[no-untyped-call]


def _sweep(parent: Path) -> None:
    """Remove the folders whose owners were killed: nobody holds their locks."""
    for folder in parent.glob(f"{_PREFIX}*"):
        try:
            if time.time() - folder.stat().st_mtime < _NEW_S:
                continue
            lock = os.open(folder / _OWNER, os.O_RDWR)
        except OSError:  # another account's, or somebody else removes it
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue
        finally:
            os.close(lock)
