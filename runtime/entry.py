"""How a process of Stoker that is no command begins: with settings and logs; what is expected to fail is one line."""

from __future__ import annotations

import sys
from collections.abc import Callable

from runtime.errors import StokerError, exit_code_of
from runtime.logs import configure_logs
from runtime.redaction import harmless, secrets_of
from runtime.settings import Settings, load_settings


def run_process(work: Callable[[Settings], None]) -> None:
    """Do the work of this process with its settings; an expected error is one line and an exit code."""
    try:
        settings = load_settings()
        configure_logs(settings.log, secrets=secrets_of(settings))
        work(settings)
    except StokerError as error:
        print(f"stoker: {harmless(str(error))}", file=sys.stderr)  # noqa: T201
        sys.exit(exit_code_of(error))
