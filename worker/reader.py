"""What one prefork child of the documents node owns: its loop, connections, embedder, and the process that converts."""

from __future__ import annotations

import asyncio
from functools import partial

import uvloop

from documents.convert import Converter
from documents.fetch import fetch
from documents.passages import Splitter
from pipeline.heartbeat import Heartbeat
from pipeline.ingest import IngestContext
from runtime.children import die_with_parent
from store.database import Database
from store.documents import extend_document_leases
from worker.semantic import embedder_of, index_of
from worker.steps import WorkerParts


class Reader:
    """The parts that a child's tasks share, from `worker_process_init` to its end."""

    def __init__(self, parts: WorkerParts) -> None:
        die_with_parent()
        settings = parts.settings
        limits = settings.documents
        self.runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self._database = Database(settings.require_postgres(), pool_size=settings.postgres.pool_size, by_key=True)
        self._heartbeat = Heartbeat(
            self._database,
            lease_s=settings.worker.lease_s,
            interval_s=settings.worker.heartbeat_s,
            extend=extend_document_leases,
        )
        self._converter = Converter(limits)
        embed, self._endpoints = embedder_of(settings.cache, threads=1)  # the pool has a child for each core
        tokenizer = None if settings.cache.embedder_url else settings.cache.embedder / "tokenizer.json"
        self.runner.run(self._open())
        self._converter.__enter__()
        self._heartbeat.__enter__()
        self.context = IngestContext(
            database=self._database,
            heartbeat=self._heartbeat,
            convert=self._converter.convert,
            fetch=partial(fetch, most_bytes=limits.file_bytes, timeout_s=limits.fetch_s),
            splitter=Splitter(tokenizer, most_tokens=limits.passage_tokens),
            embed=embed,
            index=None if settings.cache.chroma_url is None else index_of(settings.cache),
            settings=settings,
            draining=parts.shared.is_draining,
        )

    async def _open(self) -> None:
        for endpoint in self._endpoints:
            await endpoint.__aenter__()

    async def _close_endpoints(self) -> None:
        for endpoint in self._endpoints:
            await endpoint.__aexit__(None, None, None)

    def close(self) -> None:
        """End the heartbeat and the converter, and close every connection."""
        self._heartbeat.__exit__(None, None, None)
        self._converter.__exit__(None, None, None)
        self.runner.run(self._close_endpoints())
        self.runner.close()
        self._database.close()
