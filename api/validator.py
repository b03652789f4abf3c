"""`python -m api.validator`: one validator process of a gateway (pipeline/validate.py)."""

from __future__ import annotations

import signal
import threading
from contextlib import ExitStack

from api.server import open_gateway
from pipeline.validate import run_validator, start_aftercare
from runtime.entry import run_process
from runtime.metrics import metrics_served
from runtime.settings import Settings
from runtime.tracing import start_tracing, stop_tracing
from store.revisions import await_database


def validate(settings: Settings) -> None:
    """Validate and take care until SIGTERM; a batch that is being read is put back for the next validator."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with ExitStack() as stack:
        stack.enter_context(metrics_served(settings.metrics))  # with the gateway's
        start_tracing(settings, process="validator")
        stack.callback(stop_tracing)
        gateway = open_gateway(settings, stack)
        await_database(gateway.database, stop)
        start_aftercare(gateway.database, gateway.blobs, settings, stop)
        run_validator(gateway.database, gateway.blobs, gateway.board, settings, stop)


if __name__ == "__main__":
    run_process(validate)
