"""The state machines of batches and shards, model-checked: any order of steps, on real Postgres.

Hypothesis writes the histories; each step is one transaction, as a worker, the leader or a user would make it, and
claims are kept after they are lost, so that late writes come as often as honest ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar
from uuid import UUID

from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import text

from pipeline.dispatch import Dispatcher
from runtime.clock import utc_now, uuid7
from runtime.settings import LimitSettings, Settings, WorkerSettings
from store.batches import mark_expired, request_cancel, resume
from store.database import Database, Session
from store.dispatching import candidates, mark_dispatched, recall
from store.presence import PresenceBoard
from store.shards import Claim, Retry, claim_next, close, give_back, quarantine, write_results, write_retries
from tests.support.batches import answers, execute
from tests.support.silent_broker import LEADERS_LEASE_S, SilentBroker

LEASE_S = 600.0  # of claims: none ends by itself
TERMINAL = {"completed", "cancelled", "expired"}
STEPS = {
    "in_progress": {"cancelling", "finalizing"},
    "cancelling": {"finalizing"},
    "finalizing": TERMINAL,
}
HISTORY = """
CREATE TABLE history (place bigint GENERATED ALWAYS AS IDENTITY, batch_id uuid, before text, after text);
CREATE FUNCTION keep_history() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO history (batch_id, before, after) VALUES (new.id, old.state, new.state); RETURN NULL; END $$;
CREATE TRIGGER history AFTER UPDATE ON batches FOR EACH ROW WHEN (old.state <> new.state)
    EXECUTE FUNCTION keep_history();
"""
TABLES = ("history", "followers", "job_tries", "job_steps", "results", "jobs", "shards", "batches")
HELD = st.integers(0, 1_000_000)


class Protocol(RuleBasedStateMachine):
    """Batches of a few jobs, honest and late workers, a leader, an impatient user."""

    database: ClassVar[Database]
    board: ClassVar[PresenceBoard]

    @initialize()
    def begin(self) -> None:
        for table in TABLES:  # TRUNCATE of the partitions would take longer than all steps of a history
            execute(self.database, f"DELETE FROM {table}")
        self.claims: list[Claim] = []
        self.states: dict[UUID, str] = {}
        self.results: dict[tuple[UUID, int], tuple[Any, ...]] = {}
        self.fences: dict[int, int] = {}
        self.take_over()

    @rule()
    def take_over(self) -> None:
        limits = LimitSettings(retention_s=1e9)
        settings = Settings.model_construct(worker=WorkerSettings(lease_s=LEADERS_LEASE_S), limits=limits)
        self.leader = Dispatcher(self.database, SilentBroker(), self.board, settings)

    @precondition(lambda self: len(self.states) < 3)
    @rule(
        sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
        led=st.lists(HELD, max_size=3),
        tenant=st.sampled_from("ab"),
    )
    def submit(self, sizes: list[int], led: list[int], tenant: str) -> None:
        batch_id, leaders = uuid7(), sum(sizes)
        total = leaders + len(led)
        with self.database.transaction() as session:
            session.execute(
                text("""
                INSERT INTO batches (id, tenant, state, endpoint, input_name, input_digest, submit_digest, options,
                    total, followers, shards_left, expires_at)
                VALUES (:id, :tenant, 'in_progress', '/v1/chat/completions', '', '', '', '{}', :total, :followers,
                    :shards, clock_timestamp() + interval '1 day')"""),
                {"id": batch_id, "tenant": tenant, "total": total, "followers": len(led), "shards": len(sizes)},
            )
            for seq, leader in enumerate(led, leaders):
                session.execute(
                    text("INSERT INTO followers (batch_id, seq, leader) VALUES (:id, :seq, :leader)"),
                    {"id": batch_id, "seq": seq, "leader": leader % leaders},
                )
            for seq in range(total):
                session.execute(
                    text("INSERT INTO jobs (batch_id, seq, custom_id, body) VALUES (:id, :seq, :name, '{}')"),
                    {"id": batch_id, "seq": seq, "name": f"id-{seq}"},
                )
            for at, size in enumerate(sizes):
                first = sum(sizes[:at])
                session.execute(
                    text("INSERT INTO shards (batch_id, seqs, tokens) VALUES (:id, :seqs, :tokens)"),
                    {"id": batch_id, "seqs": list(range(first, first + size)), "tokens": 100 * size},
                )
        self.states[batch_id] = "in_progress"

    @rule()
    def lead(self) -> None:
        self.leader.tick()

    @rule()
    def sweep(self) -> None:
        self.leader.sweep()

    @rule()
    def finish(self) -> None:
        self.leader.finish_batches()

    @rule()
    def dispatch_all(self) -> None:
        execute(self.database, "UPDATE shards SET not_before = clock_timestamp() WHERE not_before IS NOT NULL")
        with self.database.transaction() as session:
            chosen = [shard_id for batch in candidates(session, limit=100) for shard_id, _ in batch.shards]
            if chosen:
                mark_dispatched(session, chosen)

    @rule()
    def recall_all(self) -> None:
        with self.database.transaction() as session:
            recall(session, [shard for batch in candidates(session, limit=100) for shard in batch.unclaimed])

    @rule(engine=st.sampled_from(["one", "two"]), worker=st.sampled_from(["one", "two"]))
    def claim(self, engine: str, worker: str) -> None:
        with self.database.transaction() as session:
            taken = claim_next(session, holder="worker", lease_s=LEASE_S, engine=engine, worker=worker)
        assume(taken is not None)
        assert taken is not None
        self.claims.append(taken)

    @precondition(lambda self: self.claims)
    @rule(held=HELD, count=st.integers(1, 4), twice=st.booleans())
    def write(self, held: int, count: int, twice: bool) -> None:
        taken = self.claims[held % len(self.claims)]
        for _ in range(1 + twice):
            self._as_owner(
                taken,
                lambda session: (
                    write_results(session, taken, answers(self._seqs(taken)[:count]), engine_id=None, lease_s=LEASE_S)
                    is not None
                ),
            )

    @precondition(lambda self: self.claims)
    @rule(held=HELD)
    def fail_transiently(self, held: int) -> None:
        taken = self.claims[held % len(self.claims)]
        retries = [Retry(seq, 1, 1, not_before=utc_now(), error="later") for seq in self._seqs(taken)]
        assume(retries)
        self._as_owner(taken, lambda session: write_retries(session, taken, retries))

    @precondition(lambda self: self.claims)
    @rule(held=HELD)
    def suspect(self, held: int) -> None:
        taken = self.claims[held % len(self.claims)]
        suspects = [seq for seq in self._seqs(taken)[:2] if (taken.batch_id, seq) not in self.results]
        assume(suspects)
        for _ in range(2):  # as after an ambiguous COMMIT
            self._as_owner(taken, lambda session: quarantine(session, taken, suspects))

    @precondition(lambda self: self.claims)
    @rule(held=HELD)
    def work_to_the_end(self, held: int) -> None:
        taken = self.claims[held % len(self.claims)]
        self._as_owner(taken, lambda session: self._work(session, taken))

    @precondition(lambda self: self.claims)
    @rule(held=HELD)
    def end_attempt(self, held: int) -> None:
        taken = self.claims[held % len(self.claims)]
        self._as_owner(taken, lambda session: close(session, taken) or give_back(session, taken, wait_s=0))

    @precondition(lambda self: self.claims)
    @rule(held=HELD, times=st.integers(1, 7))
    def die_again_and_again(self, held: int, times: int) -> None:
        shard_id = self.claims[held % len(self.claims)].shard_id
        for _ in range(times):
            execute(
                self.database,
                "UPDATE shards SET lease_until = '2000-01-01' WHERE id = :id AND state = 'running'",
                id=shard_id,
            )
            self.leader.sweep()
            self.dispatch_all()
            with self.database.transaction() as session:
                taken = claim_next(session, holder="worker", lease_s=LEASE_S, engine="three")
            if taken is None:
                return
            self.claims.append(taken)
            shard_id = taken.shard_id

    @precondition(lambda self: self.states)
    @rule(which=HELD)
    def cancel(self, which: int) -> None:
        with self.database.transaction() as session:
            request_cancel(session, self._batch(which))

    @precondition(lambda self: self.states)
    @rule(which=HELD)
    def expire(self, which: int) -> None:
        execute(self.database, "UPDATE batches SET expires_at = created_at WHERE id = :id", id=self._batch(which))
        with self.database.transaction() as session:
            mark_expired(session)

    @precondition(lambda self: self.states)
    @rule(which=HELD)
    def pause_or_resume(self, which: int) -> None:
        with self.database.transaction() as session:
            if not resume(session, self._batch(which)):
                session.execute(
                    text("""
                    UPDATE batches SET paused_reason = 'by hand'
                    WHERE id = :id AND state = 'in_progress' AND ending IS NULL"""),
                    {"id": self._batch(which)},
                )

    @invariant()
    def every_count_agrees_with_the_rows(self) -> None:
        with self.database.transaction() as session:
            wrong = session.execute(text(_DISAGREEMENTS)).all()
        assert wrong == []

    @invariant()
    def states_only_go_forward_and_results_stay(self) -> None:
        with self.database.transaction() as session:
            batches = session.execute(text("SELECT id, state, ending, shards_left FROM batches")).all()
            results = session.execute(text("SELECT batch_id, seq, outcome, error_code, created_at FROM results")).all()
            fences = session.execute(text("SELECT id, fence FROM shards")).all()
            history = session.execute(text("SELECT batch_id, before, after FROM history ORDER BY place")).all()
        for _, before, after in history:
            assert after in STEPS[before], f"{before} became {after}"
        closers = Counter(batch_id for batch_id, _, after in history if after == "finalizing")
        assert all(count == 1 for count in closers.values()), "one closer"
        for batch_id, state, ending, left in batches:
            assert left == 0 or state not in {"finalizing", *TERMINAL}
            assert state not in TERMINAL or state == ending
            self.states[batch_id] = state
        rows = {(batch_id, seq): tuple(rest) for batch_id, seq, *rest in results}
        assert len(rows) == len(results)
        assert self.results.items() <= rows.items(), "a result never changes and never goes"
        self.results = rows
        assert all(fence >= self.fences.get(shard_id, 0) for shard_id, fence in fences)
        self.fences = {shard_id: fence for shard_id, fence in fences}

    def teardown(self) -> None:
        """Honest workers and the leader drive everything to its end."""
        if not hasattr(self, "states"):
            return
        execute(self.database, "UPDATE shards SET lease_until = clock_timestamp() - interval '1 s'")
        execute(self.database, "UPDATE batches SET paused_reason = NULL")
        for _ in range(100):
            self.leader.tick()
            self.leader.sweep()
            self.dispatch_all()
            with self.database.transaction() as session:
                while taken := claim_next(
                    session, holder="worker", lease_s=LEASE_S, engine=str(uuid7()), worker=str(uuid7())
                ):
                    if not taken.runnable or not self._work(session, taken):
                        give_back(session, taken, wait_s=0)
            self.leader.finish_batches()
            self.every_count_agrees_with_the_rows()
            self.states_only_go_forward_and_results_stay()
            if set(self.states.values()) <= TERMINAL:
                break
        assert set(self.states.values()) <= TERMINAL, self.states
        with self.database.transaction() as session:
            missing = session.execute(
                text("""
                SELECT b.id FROM batches b WHERE b.total <> (SELECT count(*) FROM results r WHERE r.batch_id = b.id)""")
            ).all()
        assert missing == []

    def _as_owner(self, taken: Claim, step: Callable[[Session], bool]) -> None:
        """Do it; exactly the attempt whose fence stands may."""
        with self.database.transaction() as session:
            is_owner = session.execute(
                text("SELECT fence = :fence AND state = 'running' FROM shards WHERE id = :id"),
                {"fence": taken.fence, "id": taken.shard_id},
            ).scalar_one()
            assert step(session) == is_owner

    @staticmethod
    def _work(session: Session, taken: Claim) -> bool:
        left = list(session.scalars(text("SELECT unnest(seqs) FROM shards WHERE id = :id"), {"id": taken.shard_id}))
        written = write_results(session, taken, answers(left), engine_id=None, lease_s=LEASE_S)
        return written is not None and close(session, taken)

    def _seqs(self, taken: Claim) -> list[int]:
        """What the attempt still has: an honest one writes nothing that it moved to quarantine, a late one may."""
        with self.database.transaction() as session:
            fence, seqs = session.execute(
                text("SELECT fence, seqs FROM shards WHERE id = :id"), {"id": taken.shard_id}
            ).one()
        return [seq for seq in taken.seqs if fence != taken.fence or seq in seqs]

    def _batch(self, which: int) -> UUID:
        return list(self.states)[which % len(self.states)]


_DISAGREEMENTS = """
SELECT s.id, 'counters' FROM shards s WHERE
    ROW(CAST(s.done AS int8), CAST(s.followers AS int8), CAST(s.failed AS int8), s.completion_tokens)
    IS DISTINCT FROM (
        SELECT ROW(count(*) FILTER (WHERE r.seq = ANY(s.seqs)), count(*) FILTER (WHERE r.seq <> ALL(s.seqs)),
            count(*) FILTER (WHERE r.outcome = 'failed'), CAST(coalesce(sum(r.completion_tokens), 0) AS int8))
        FROM results r WHERE r.batch_id = s.batch_id AND (r.seq = ANY(s.seqs) OR EXISTS (
            SELECT FROM followers x WHERE x.batch_id = s.batch_id AND x.seq = r.seq AND x.leader = ANY(s.seqs))))
UNION ALL
SELECT b.total, 'jobs are not in exactly one shard, or followers' FROM batches b WHERE
    (SELECT array_agg(u ORDER BY u) FROM (
        SELECT unnest(s.seqs) AS u FROM shards s WHERE s.batch_id = b.id
        UNION ALL SELECT x.seq FROM followers x WHERE x.batch_id = b.id) AS kept)
    IS DISTINCT FROM (SELECT array_agg(g) FROM generate_series(0, b.total - 1) g)
UNION ALL
SELECT x.seq, 'a follower without its leader, or the other way round' FROM followers x
WHERE EXISTS (SELECT FROM results r WHERE r.batch_id = x.batch_id AND r.seq = x.seq)
    <> EXISTS (SELECT FROM results r WHERE r.batch_id = x.batch_id AND r.seq = x.leader)
UNION ALL
SELECT b.shards_left, 'shards_left' FROM batches b
WHERE b.shards_left <> (SELECT count(*) FROM shards s WHERE s.batch_id = b.id AND s.state <> 'done')
"""


def test_no_order_of_steps_breaks_the_protocol(database: Database, redis_url: str) -> None:
    Protocol.database, Protocol.board = database, PresenceBoard(redis_url)
    execute(database, HISTORY)
    try:
        run_state_machine_as_test(
            Protocol,
            settings=settings(
                max_examples=60,
                stateful_step_count=50,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        Protocol.board.close()
