"""The dispatch leader: Postgres decides which shards go out next, the broker delivers hints.

One leader a database, by advisory lock; every worker runs a standby. It keeps only a short window of hints
with the broker, so that order and fairness stay Postgres's; it also recovers dead leases, winds down cancelled
and expired batches, finishes batches, and sends lost hints again. All of it may be repeated or cut off anywhere.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Protocol
from uuid import UUID

from models.states import Ending
from pipeline.counting import count_ended
from pipeline.fairness import FairShare, to_recall
from pipeline.finishing import Finisher
from pipeline.leading import Leading
from pipeline.spill import SpillWatch
from runtime.clock import utc_now
from runtime.errors import ServiceUnreachable
from runtime.logs import get_logger
from runtime.metrics import HINTS_READY, HINTS_RESENT, LEASES_RECOVERED, SWEEP_SECONDS, is_counting
from runtime.settings import Settings
from store.answers import delete_expired
from store.batches import (
    end_unfinished,
    mark_expired,
    screen,
    shards_to_wind_down,
)
from store.database import Database
from store.dispatching import (
    Candidates,
    candidates,
    mark_dispatched,
    recall,
    stale_dispatched,
    touch_dispatched,
    unclaimed_count,
)
from store.documents import recover_documents, waiting_documents
from store.notifications import leadership
from store.presence import PresenceBoard, WorkerPresence
from store.retention import delete_past_retention
from store.revisions import await_schema
from store.schema import make_partitions
from store.shards import (
    CRASHES_TO_HALVE,
    CRASHES_TO_POISON,
    Recovered,
    claim,
    close,
    give_back,
    halve,
    recover_dead_leases,
)
from store.submissions import delete_abandoned_batches

log = get_logger(__name__)

SWEEP_S = 1.0
WAKE_REST_S = 0.02  # least time between two fills: notifications of one moment are answered once
LOST_AFTER_S = 10.0  # a hint that was sent needlessly is refused by the claim; a lost one leaves workers idle
MOST_BESIDE = 4  # chosen: batches that have a shard at hand beyond the window, for registered endpoints
BLIND_WINDOW = 2  # hints in the broker when no worker's presence is known
WIND_DOWN_S = 0.5  # in one sweep, so that other batches' dispatch never waits long
WIND_DOWN_SHARDS = 100
HOUSE_EVERY_S = 60.0
LEADER_SILENT_LEASES = 2  # a leader silent for so many leases is frozen, and another takes over
HOLDER = "dispatch"

_ENDINGS = {
    Ending.CANCELLED: ("batch_cancelled", "the batch was cancelled before this job ran"),
    Ending.EXPIRED: ("batch_expired", "the batch's completion window ended before this job ran"),
}


class Publisher(Protocol):
    """Sends hints through the broker. Every method raises ServiceUnreachable."""

    def publish(self, shards: Sequence[tuple[int, UUID]]) -> None:
        """Send one hint for each (shard, batch), confirmed by the broker; routable or an error."""

    def ready_count(self) -> int:
        """How many hints wait in the broker's queue, not delivered to any worker."""

    def invite(self, readers: int) -> None:
        """Let so many hints wait in the queue of the documents node, those that are there included."""


def dispatch_until(
    stop: threading.Event, *, database: Database, publisher: Publisher, board: PresenceBoard, settings: Settings
) -> None:
    """Lead, or stand by to lead, until `stop` is set. Outages of Postgres or the broker are waited out."""
    dispatcher = Dispatcher(database, publisher, board, settings)
    silent_s = LEADER_SILENT_LEASES * settings.worker.lease_s
    while not stop.is_set():
        try:
            await_schema(database, stop)
            with leadership(database) as lead:
                while not stop.is_set():
                    if not lead.acquire(silent_s=silent_s):
                        dispatcher.stand_by()
                        stop.wait(SWEEP_S)
                        continue
                    dispatcher.leading.begin()
                    goes_on = dispatcher.tick()
                    stop.wait(WAKE_REST_S)
                    lead.wait(0.0 if goes_on else SWEEP_S)
        except ServiceUnreachable as error:
            dispatcher.stand_by()
            log.warning("dispatch_waits", error=str(error))
            stop.wait(SWEEP_S)
    dispatcher.stand_by()


class Dispatcher:
    """The leader's work; `tick` does what is due. Holds no state that another leader would miss for long."""

    def __init__(self, database: Database, publisher: Publisher, board: PresenceBoard, settings: Settings) -> None:
        self._database = database
        self._publisher = publisher
        self._board = board
        self._settings = settings
        self._fairness = FairShare(settings.dispatch.tenant_weights)
        self._spill = SpillWatch()
        self._finisher = Finisher(database)
        self.leading = Leading()
        self._window = self._readers = BLIND_WINDOW
        self._beside = 0
        self._unsent: list[tuple[int, UUID]] = []
        self._sweep_at = 0.0
        self._house_at = 0.0

    def stand_by(self) -> None:
        """It does not lead, or may not: it states nothing more and forgets what another may have changed."""
        self.leading.end()
        self._finisher.forget()

    def tick(self) -> bool:
        """Finish what has ended, fill the window, and once a second sweep for what needs care.

        Whether something is left to be done at once.
        """
        now = time.monotonic()
        if now >= self._sweep_at:
            self._sweep_at = now + SWEEP_S
            self.sweep()
            SWEEP_SECONDS.observe(time.monotonic() - now)
        goes_on = self.finish_batches()
        self.fill_window()
        return goes_on

    def fill_window(self) -> None:
        """Dispatch shards until the hints nobody has claimed are as many as the live children."""
        with self._database.transaction() as session:
            batches = candidates(session, limit=self._window)
            recalled = to_recall(batches)
            if recalled and recall(session, recalled):
                batches = candidates(session, limit=self._window)
            free = self._window - sum(len(batch.unclaimed) for batch in batches)
            chosen = self._fairness.choose(batches, places=free) if free > 0 else []
            chosen += self._for_endpoints_beside(batches, most=free + self._beside - len(chosen), but=chosen)
            marked = mark_dispatched(session, chosen) if chosen else []
        self._send(marked)

    def _for_endpoints_beside(self, batches: Sequence[Candidates], *, most: int, but: Sequence[int]) -> list[int]:
        """The next shards of batches that have none out, where workers have endpoints beside their engine.

        The window may be full of shards that wait for the engine, and these be for another endpoint.
        """
        if not self._beside:
            return []
        alone = [batch.shards[0][0] for batch in batches if batch.shards and not (batch.unclaimed or batch.running)]
        return [shard_id for shard_id in alone if shard_id not in but][: max(0, most)]

    def finish_batches(self) -> bool:
        """End the batches whose last shard is closed and whose results are counted; whether some have more to count."""
        return self._finisher.finish_some()

    def sweep(self) -> None:
        """Once a second: presence, dead leases, expiry, winding down, screening, spilling, lost hints, partitions."""
        self._read_presence()
        self._recover()
        self._wind_down()
        with self._database.transaction() as session:
            for batch_id, reason in screen(session):
                log.warning("batch_paused", batch_id=str(batch_id), reason=reason)
        with self._database.transaction() as session:
            self._spill.sweep(session)
        self._send_lost_hints()
        self._state_figures()
        self._invite_readers()
        self._keep_house()

    def _state_figures(self) -> None:
        self.leading.state(self._database, window=self._window)
        if not is_counting():  # the broker is asked for nobody else
            return
        try:
            HINTS_READY.set(self._publisher.ready_count())
        except ServiceUnreachable as error:
            log.warning("broker_unreachable", error=str(error))

    def _read_presence(self) -> None:
        try:
            workers = self._board.workers(node=None)
        except ServiceUnreachable as error:
            log.warning("presence_unknown", error=str(error))
            return
        self._window = _children(workers, "generation") or BLIND_WINDOW
        self._beside = min(MOST_BESIDE, max((len(worker.endpoints) for worker in workers), default=0))
        self._readers = _children(workers, "documents") or BLIND_WINDOW
        self.leading.see(workers)

    def _recover(self) -> None:
        with self._database.transaction() as session:
            recovered = recover_dead_leases(session, lease_s=self._settings.worker.lease_s)
        LEASES_RECOVERED.add(len(recovered))
        for shard in recovered:
            log.warning("lease_recovered", shard_id=shard.shard_id, crashes=shard.crashes)
            if shard.crashes >= CRASHES_TO_HALVE:
                self._isolate(shard)

    def _isolate(self, shard: Recovered) -> None:
        """Split a shard whose attempts keep dying; a job that is alone and kills again ends as poison."""
        ended = 0
        with self._database.transaction() as session:
            taken = claim(
                session, shard.shard_id, holder=HOLDER, lease_s=self._settings.worker.lease_s, states=("pending",)
            )
            if taken is None:
                return
            left = halve(session, taken)
            if left == 1 and shard.crashes < CRASHES_TO_POISON:
                give_back(session, taken, wait_s=0.0)
                return
            if left == 1:
                ended = end_unfinished(
                    session,
                    shard_id=taken.shard_id,
                    fence=taken.fence,
                    code="poison_job",
                    message=f"{shard.crashes} workers died in a row while they ran this job, "
                    f"at least {CRASHES_TO_POISON - CRASHES_TO_HALVE} of them while it was alone",
                )
            close(session, taken)
        count_ended(ended)

    def _wind_down(self) -> None:
        with self._database.transaction() as session:
            for batch_id in mark_expired(session):
                log.info("batch_expired", batch_id=str(batch_id))
        until = time.monotonic() + WIND_DOWN_S
        while time.monotonic() < until and self._wind_down_some():
            pass

    def _wind_down_some(self) -> bool:
        """End the unfinished jobs of some shards that no worker holds; false if there were none."""
        with self._database.transaction() as session:
            rows = shards_to_wind_down(session, limit=WIND_DOWN_SHARDS)
        for shard_id, ending in rows:
            code, message = _ENDINGS[ending]
            ended = 0
            with self._database.transaction() as session:
                taken = claim(
                    session,
                    shard_id,
                    holder=HOLDER,
                    lease_s=self._settings.worker.lease_s,
                    states=("pending", "dispatched"),
                )
                if taken is not None:
                    ended = end_unfinished(session, shard_id=shard_id, fence=taken.fence, code=code, message=message)
                    close(session, taken)
            count_ended(ended)
        return bool(rows)

    def _send_lost_hints(self) -> None:
        with self._database.transaction() as session:
            stale = stale_dispatched(session, older_than_s=LOST_AFTER_S)
            if not stale:
                return
            dispatched = unclaimed_count(session)
        try:
            ready = self._publisher.ready_count()
        except ServiceUnreachable as error:
            log.warning("broker_unreachable", error=str(error))
            return
        if ready < dispatched:
            log.warning("hints_sent_again", shards=len(stale), ready=ready, dispatched=dispatched)
            self._send(stale)
            HINTS_RESENT.add(len(stale))
            with self._database.transaction() as session:
                touch_dispatched(session, [shard_id for shard_id, _ in stale])

    def _invite_readers(self) -> None:
        """Recover documents whose reader died, and let as many hints wait as readers are free and documents due."""
        with self._database.transaction() as session:
            for document_id, crashes in recover_documents(session, lease_s=self._settings.worker.lease_s):
                log.warning("document_recovered", document=document_id, crashes=crashes)
            waiting = waiting_documents(
                session, limit=self._readers, with_index=self._settings.cache.chroma_url is not None
            )
        if waiting:
            try:
                self._publisher.invite(min(waiting, self._readers))
            except ServiceUnreachable as error:
                log.warning("broker_unreachable", error=str(error))

    def _keep_house(self) -> None:
        now = time.monotonic()
        if now < self._house_at:
            return
        self._house_at = now + HOUSE_EVERY_S
        make_partitions(self._database, now=utc_now())
        with self._database.transaction() as session:
            delete_abandoned_batches(session)
            more = delete_expired(session)
        if delete_past_retention(self._database, retention_s=self._settings.limits.retention_s) or more:
            self._house_at = now  # there is more: the next sweep goes on

    def _send(self, shards: list[tuple[int, UUID]]) -> None:
        """Publish after commit, with what the broker did not take before; what it does not take now is kept.

        No more than the window lacks: a child that runs ahead leaves its shards' hints behind, and any hint
        that is left makes a free child look for any dispatched shard.
        """
        hints = list(dict.fromkeys([*self._unsent, *shards]))
        self._unsent = []
        if not hints:
            return
        try:
            self._publisher.publish(hints[: max(0, self._window - self._publisher.ready_count())])
        except ServiceUnreachable as error:
            log.warning("publish_failed", shards=len(hints), error=str(error))
            self._unsent = hints


def _children(workers: Sequence[WorkerPresence], node: str) -> int:
    return sum(worker.children for worker in workers if worker.node == node)
