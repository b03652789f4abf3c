"""`python -m api.validator`: one validator process of a gateway (pipeline/validate.py)."""

from __future__ import annotations

import signal
import threading
from contextlib import ExitStack

from api.server import open_gateway
from pipeline.validate import run_aftercare, run_validator
from runtime.logs import configure_logs
from runtime.settings import load_settings


def main() -> None:
    """Validate and take care until SIGTERM; a batch that is being read is left to the next validator."""
    settings = load_settings()
    configure_logs(settings.log)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with ExitStack() as stack:
        gateway = open_gateway(settings, stack)
        aftercare = threading.Thread(
            target=run_aftercare, args=(gateway.database, gateway.blobs, settings, stop), name="aftercare", daemon=True
        )
        aftercare.start()
        run_validator(gateway.database, gateway.blobs, gateway.board, settings, stop)
        aftercare.join(timeout=15.0)


if __name__ == "__main__":
    main()
