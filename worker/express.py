"""The express node: `python -m worker.express NAME PAGE`, which a generation worker keeps beside itself.

A Celery node of its own queue, for single requests, on its worker's engine. PAGE is the file of what the two share.
"""

from __future__ import annotations

import asyncio
import sys
import threading

import msgspec
import uvloop

from inference.endpoint import Endpoint, Reply
from pipeline.express import Answering, ExpressContext
from pipeline.purse import KeyPurse
from runtime.children import die_with_parent
from runtime.settings import load_settings
from store.database import Database
from store.express import ExpressQueue
from worker.routing import Routing
from worker.shared import SharedState
from worker.steps import WorkerParts

PRIORITY = -1  # vLLM computes the lowest first; a batch's jobs have 0


class ExpressChild:
    """What the node's one child owns: a loop in a thread of its own, which answers while tasks come and go."""

    def __init__(self, parts: WorkerParts) -> None:
        die_with_parent()
        settings, shared = parts.settings, parts.shared
        self._grace_s = settings.worker.grace_s
        self._most_output = settings.limits.max_output_tokens
        self.loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="express", daemon=True)
        self._thread.start()
        self._database = Database(settings.require_postgres(), pool_size=1, by_key=True)
        self._queue = ExpressQueue(settings.require_redis())
        self._routing = Routing(
            self._database,
            settings,
            engine_url=parts.engine_url,
            places=parts.engine_slots,
            engine_kind=Prioritised if shared.is_prioritised() else Endpoint,
        )
        self.answering = Answering(
            ExpressContext(
                queue=self._queue,
                router=self._routing.router,
                seen=shared.saw_single,
                engine_id=shared.engine_id,
                purse=self._purse,
                refresh=self._routing.refresh,
            )
        )
        asyncio.run_coroutine_threadsafe(self._open(), self.loop).result()

    def _purse(self, key_id: str) -> KeyPurse:
        return KeyPurse(self._database, key_id, most_output=self._most_output)

    async def _open(self) -> None:
        await self._routing.open()
        await self.answering.begin()

    async def _close(self) -> None:
        await self.answering.end(grace_s=self._grace_s)
        await self._routing.close()
        await self._queue.close()

    def close(self) -> None:
        """Answer what runs, within the grace, give the rest back, and close every connection."""
        asyncio.run_coroutine_threadsafe(self._close(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()
        self._database.close()


class Prioritised(Endpoint):
    """An engine that computes first what says so, and these requests do."""

    async def post(self, path: str, body: bytes, *, request_id: str, model: str | None = None) -> Reply:
        """Send it with its priority, whatever it states."""
        return await super().post(path, prioritised(body), request_id=request_id, model=model)


def prioritised(body: bytes) -> bytes:
    """A body before those of batches."""
    fields = _FIELDS.decode(body)
    fields["priority"] = _PRIORITY
    return msgspec.json.encode(fields)


_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_PRIORITY = msgspec.Raw(str(PRIORITY).encode())


def main() -> None:
    """Run the node until SIGTERM."""
    from worker.celery_app import make_app  # noqa: PLC0415  # it knows this module

    name, page = sys.argv[1:]
    make_app(load_settings(), shared=SharedState.at(page)).worker_main(["worker", "-n", name])


if __name__ == "__main__":
    main()
