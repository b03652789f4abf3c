"""What Prometheus is told by real processes is what is in the results."""

from __future__ import annotations

import signal
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from prometheus_client.parser import text_string_to_metric_families

from store.database import Database
from tests.support.batches import chat, store_batch
from tests.support.gateway_process import GatewayProcess
from tests.support.own_services import free_port
from tests.support.processes import WorkerProcess
from tests.support.stand_in_engine import install
from tests.support.waiting import wait_until


class Scraped:
    """What a process answered at /metrics: `scraped("stoker_jobs_total", outcome="failed")`; None: no such sample."""

    def __init__(self, port: int) -> None:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
        self.samples = {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}

    def __call__(self, name: str, **labels: str) -> float | None:
        return self.samples.get((name, frozenset(labels.items())))

    def sum(self, name: str) -> float:
        """Over all labels."""
        return sum(value for (known, _), value in self.samples.items() if known == name)


@pytest.fixture
def env(services: dict[str, str], tmp_path: Path) -> Iterator[dict[str, str]]:
    """A worker with an engine of its own, and metrics."""
    engine = install(tmp_path, journal=tmp_path / "journal", latency_s=0.01)
    with tempfile.TemporaryDirectory(prefix="st-") as short:  # a unix socket's path is in it
        yield services | engine | {"STOKER_METRICS__PORT": str(free_port()), "TMPDIR": short}


def test_workers_and_gateways_count_what_was_done_and_leave_nothing(
    env: dict[str, str], tmp_path: Path, postgres_url: str, database: Database
) -> None:
    port, gateway_port = int(env["STOKER_METRICS__PORT"]), free_port()
    bodies = [chat(f"question {number % 40}", temperature=0) for number in range(60)]
    bodies += [chat(f"[[status 400]] {number}") for number in range(3)]
    with (
        WorkerProcess("one", env=env, folder=tmp_path) as worker,
        GatewayProcess(env=env | {"STOKER_METRICS__PORT": str(gateway_port)}, folder=tmp_path) as gateway,
    ):
        batch = store_batch(database, tmp_path, bodies, shard_jobs=16)
        wait_until(lambda: "batch_ended" in worker.log, 30, "it has ended")
        found = Scraped(port)
        with psycopg.connect(postgres_url) as connection:
            rows = connection.execute("SELECT outcome, source, count(*) FROM results GROUP BY 1, 2").fetchall()
            sums = connection.execute("SELECT sum(prompt_tokens), sum(completion_tokens) FROM results").fetchone()
        assert sorted(rows) == [("failed", "engine", 3), ("succeeded", "duplicate", 20), ("succeeded", "engine", 40)]
        assert [found("stoker_jobs_total", outcome=outcome, source=source) for outcome, source, _ in rows] == [
            count for *_, count in rows
        ]
        assert found.sum("stoker_jobs_total") == 63
        assert sums == (found("stoker_tokens_total", kind="prompt"), found("stoker_tokens_total", kind="completion"))
        assert found("stoker_cache_lookups_total", found="none") == 40, "what is not deterministic is not looked up"
        assert found.sum("stoker_requests_total") == 43
        assert (found("stoker_engine_healthy"), found("stoker_engine_sequences_max")) == (1, 64)
        assert (found("stoker_shards_running"), found("stoker_shard_seconds_count")) == (0, 3)
        assert (found("stoker_dispatch_leader"), found("stoker_hints_resent_total")) == (1, 0)

        wait_until(lambda: Scraped(port)("stoker_batches", state="in_progress") == 0, 10, "the leader has looked")
        assert found("vllm:generation_tokens_total", model_name="scripted") is not None, "read when it was up"
        for path in ("/v1/batches", f"/v1/batches/{batch}", "/nowhere/secret"):
            with pytest.raises(urllib.error.HTTPError):
                urllib.request.urlopen(gateway.url + path)
        asked = Scraped(gateway_port)
        assert asked("stoker_http_requests_total", method="GET", route="/v1/batches", status="401") == 1
        assert asked("stoker_http_requests_total", method="GET", route="/v1/batches/{batch_id}", status="401") == 1
        assert asked("stoker_http_requests_total", method="GET", route="none", status="404") == 1
        gateway.process.send_signal(signal.SIGTERM)
        gateway.process.wait(20)
        assert worker.terminate(20) == 0
    assert list(Path(env["TMPDIR"]).iterdir()) == []
