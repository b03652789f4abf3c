"""What is counted of jobs is what is committed, each once, whatever happens in between."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from inference.router import Router
from pipeline.attempt import Attempt, Unwritten
from pipeline.context import FeedContext
from pipeline.heartbeat import Heartbeat
from pipeline.leading import Leading
from pipeline.lookups import Lookups
from pipeline.writing import Writer
from runtime.errors import ServiceUnreachable
from runtime.metrics import metrics_served
from runtime.metrics_folder import families_in
from runtime.settings import MetricsSettings, Settings, WorkerSettings
from store.database import Database, Session
from store.shards import Claim, LoadedJobs
from tests.support.batches import LEASE_S, answers, chats, claimed, dispatch_all, results_of, store_batch
from tests.support.own_services import free_port


class Watched(Database):
    """A database that counts its transactions; before the one with the number `goes_at` it is away."""

    transactions = 0
    goes_at = 0

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """As it is, or not reached."""
        self.transactions += 1
        if self.transactions == self.goes_at:
            raise ServiceUnreachable("Postgres is away")
        with super().transaction() as session:
            yield session


@pytest.fixture
def watched(postgres_url: str, database: Database) -> Iterator[Watched]:
    watched = Watched(postgres_url)
    yield watched
    watched.close()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], dict[str, float]]]:
    """The samples of a metric, by the values of their labels; while this process counts."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with metrics_served(MetricsSettings(port=free_port())):
        [folder] = tmp_path.glob("stoker-metrics-*")
        yield lambda name: {
            "/".join(sample.labels.values()): sample.value
            for family in families_in(str(folder))
            for sample in family.samples
            if sample.name == name
        }


def write(database: Database, claim: Claim) -> None:
    """Write the results of a shard of five jobs, of which one is nothing that Postgres can store."""
    results = [replace(one, response="\0") if one.seq == claim.seqs[2] else one for one in answers(claim.seqs)]
    context = FeedContext(
        database=database,
        heartbeat=Heartbeat(database, lease_s=LEASE_S, interval_s=LEASE_S),
        router=Router(engine=None),
        settings=Settings.model_construct(worker=WorkerSettings()),
        holder="test",
        engine="engine",
        worker="worker",
        draining=lambda: False,
        engine_id=lambda: None,
    )
    writing = Writer(context, Lookups(context)).write(
        Attempt(claim, LoadedJobs([], None)), Unwritten(results), is_over=True, patience=lambda: True
    )
    asyncio.run(writing)


def test_results_that_are_written_anew_since_postgres_went_in_between_are_counted_once(
    database: Database, watched: Watched, tmp_path: Path, counted: Callable[[str], dict[str, float]]
) -> None:
    """It refuses all five together, takes two of them alone, and is away at the third."""
    batch_id = store_batch(database, tmp_path, chats(5), shard_jobs=5)
    watched.goes_at = 4
    write(watched, claimed(database, dispatch_all(database)[0]))
    assert watched.transactions > watched.goes_at
    assert Counter(result.error_code for result in results_of(database, batch_id)) == {
        None: 4,
        "unstorable_response": 1,
    }
    assert counted("stoker_jobs_total") == {"succeeded/engine": 4, "failed/engine": 1}
    assert counted("stoker_tokens_total") == {"prompt": 12, "completion": 8, "cached": 0}


def test_the_leader_asks_how_many_batches_there_are_only_where_somebody_counts(watched: Watched) -> None:
    Leading().state(watched, window=1)
    assert watched.transactions == 1, "for the deadlines"


def test_the_leader_states_how_many_batches_there_are(
    database: Database, tmp_path: Path, counted: Callable[[str], dict[str, float]]
) -> None:
    store_batch(database, tmp_path, chats(3))
    Leading().state(database, window=1)
    assert counted("stoker_batches")["in_progress"] == 1
    assert counted("stoker_jobs_unfinished") == {"": 3}
