"""A submit of benchmarks/size.py in a process of its own: `python -m benchmarks.size_submit FILE WEEKS_AGO`.

Prints the batch's id, its seconds and the most memory of the process. WEEKS_AGO shifts the id alone: a batch's rows lie
in the partition of its id's week, and a benchmark cannot wait for a Monday.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from unittest.mock import patch
from uuid import UUID

from benchmarks.own_batch import stored
from runtime.clock import WEEK, uuid7
from runtime.settings import load_settings
from store.database import Database

_MILLISECOND = 1 << 80  # of a UUIDv7


def main(file: Path, weeks_ago: int) -> None:
    """Submit, and say what it took."""
    settings = load_settings()
    shifted = weeks_ago * int(WEEK.total_seconds()) * 1000 * _MILLISECOND
    database = Database(settings.require_postgres())
    began = time.monotonic()
    with patch("pipeline.submit.uuid7", lambda: UUID(int=uuid7().int - shifted)):
        batch_id = stored(database, file, settings)
    seconds = time.monotonic() - began
    database.close()
    peak_mb = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024
    print(json.dumps({"batch": str(batch_id), "seconds": round(seconds, 2), "peak_mb": round(peak_mb, 1)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
