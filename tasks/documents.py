"""The documents node's task."""

from __future__ import annotations

import asyncio
import time

from models.messages import Ingest
from pipeline.ingest import IngestContext, ingest
from runtime.logs import get_logger

log = get_logger(__name__)


def read_documents(context: IngestContext, runner: asyncio.Runner, message: Ingest) -> str:
    """Read the documents that are due, and tell Chroma what it lacks; says what it did.

    Safe to run twice and to die at any line: the message is only a hint, a document's fence guards its rows, and an
    unfinished one's lease runs out. Always ends so that the message is acknowledged.
    """
    started = time.monotonic()
    report = runner.run(ingest(context))
    log.info(
        "documents_read",
        documents=report.documents,
        failed=report.failed,
        passages=report.passages,
        seconds=round(time.monotonic() - started, 2),
    )
    return f"documents: {report.documents}, failed: {report.failed}, passages: {report.passages}"
