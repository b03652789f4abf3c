"""structlog set up once per process: JSON lines, or colours on a terminal; always stderr.

Never log a prompt, a response or a secret: ids, counts and durations only. What others log goes through
runtime/redaction.py, and so do texts of exceptions.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable

import structlog

from runtime.redaction import Redaction, harmless_fields
from runtime.settings import LogSettings

Logger = structlog.stdlib.BoundLogger


def configure_logs(settings: LogSettings, *, secrets: Iterable[str] = ()) -> None:
    """Route structlog and the standard library's logging to stderr in one format, without these secrets."""
    human = settings.format == "human" or (settings.format == "auto" and sys.stderr.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    # No pretty traceback on a terminal either: it would show what the variables hold.
    renderers: list[structlog.typing.Processor] = (
        [harmless_fields, structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
        if human
        else [structlog.processors.JSONRenderer()]
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                Redaction(secrets),
                *renderers,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.level.upper())
    for name in ("amqp", "kombu", "celery.redirected", "alembic", "httpx", "tornado.access"):
        logging.getLogger(name).setLevel(logging.WARNING)


def get_logger(name: str) -> Logger:
    """A logger bound to a module's name."""
    logger: Logger = structlog.stdlib.get_logger(name)
    return logger
