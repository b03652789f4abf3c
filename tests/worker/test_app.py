"""The Celery app where there is nothing to run an engine from, and how many children a worker has."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from kombu.exceptions import ContentDisallowed
from kombu.serialization import loads, prepare_accept_content

from models.messages import RunShard
from runtime.errors import EXIT_USAGE
from runtime.settings import BrokerSettings, EngineSettings, Settings, WorkerSettings
from tests.support.processes import REPOSITORY, clean_environment
from worker.celery_app import make_app
from worker.shared import SharedState
from worker.steps import CONTROL_CHILDREN, LEAST_CHILDREN, MOST_CHILDREN, SLOTS_A_CHILD, WorkerParts

ELSEWHERE = "http://127.0.0.1:1"


@contextmanager
def parts(engine: EngineSettings, *, children: int | None = None) -> Iterator[WorkerParts]:
    settings = Settings.model_construct(engine=engine, worker=WorkerSettings(children=children))
    found = WorkerParts(settings=settings, shared=SharedState())
    yield found
    found.end()


def test_dispatchers_and_publishers_need_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    engine = EngineSettings(checkpoint=tmp_path / "none.gguf")
    broker = BrokerSettings(url="amqp://guest@127.0.0.1:1//")

    app = make_app(Settings.model_construct(broker=broker, engine=engine))

    assert app.conf.worker_concurrency is None


def test_a_pickle_in_a_message_is_not_opened() -> None:
    app = make_app(Settings.model_construct(broker=BrokerSettings(url="amqp://guest@127.0.0.1:1//")))
    accepted = prepare_accept_content(app.conf.accept_content)
    with pytest.raises(ContentDisallowed):
        loads(b"cos\nsystem\n(S'false'\ntR.", "application/x-python-serialize", "binary", accept=accepted)


def test_an_app_runs_its_own_task_beside_another_app() -> None:
    settings = Settings.model_construct(broker=BrokerSettings(url="amqp://guest@127.0.0.1:1//"))
    first, second = make_app(settings), make_app(settings)

    first.finalize()
    second.finalize()

    assert first.tasks[RunShard.wire_name].app is first
    assert first.tasks[RunShard.wire_name].run is not second.tasks[RunShard.wire_name].run


def test_children_that_are_set_need_no_plan_of_an_engine(tmp_path: Path) -> None:
    with parts(EngineSettings(checkpoint=tmp_path / "none.gguf"), children=3) as found:
        assert found.children == 3


def test_a_control_worker_runs_four_commands_at_once_and_no_engine(tmp_path: Path) -> None:
    engine = EngineSettings(checkpoint=tmp_path / "none.gguf")
    settings = Settings.model_construct(engine=engine, worker=WorkerSettings(node="control"))

    found = WorkerParts(settings=settings, shared=SharedState())

    assert (found.children, found.has_engine) == (CONTROL_CHILDREN, False)


@pytest.mark.parametrize(
    ("slots", "children"),
    [(8, LEAST_CHILDREN), (3 * SLOTS_A_CHILD, 3), (100 * SLOTS_A_CHILD, MOST_CHILDREN)],
)
def test_children_follow_the_slots(slots: int, children: int) -> None:
    with parts(EngineSettings(url=ELSEWHERE, max_num_seqs=slots)) as found:
        assert found.children == children
        assert found.in_flight * children >= 2 * slots


def test_llamacpp_has_one_child(tmp_path: Path) -> None:
    checkpoint = tmp_path / "small-gguf" / "small.gguf"
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(b"GGUF")

    with parts(EngineSettings(checkpoint=checkpoint)) as found:
        assert found.children == 1


def test_a_worker_that_could_record_no_spans_says_so_in_one_line_and_ends() -> None:
    services = {
        "STOKER_POSTGRES__URL": "postgresql://nobody@127.0.0.1:1/none",
        "STOKER_BROKER__URL": "amqp://guest@127.0.0.1:1//",
        "STOKER_REDIS__URL": "redis://127.0.0.1:1/0",
    }

    ended = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "worker.main", "worker"],
        cwd=REPOSITORY,
        env=clean_environment() | services | {"STOKER_TRACE__TO": "langsmith"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert ended.returncode == EXIT_USAGE
    assert ended.stderr == "stoker: STOKER_TRACE__API_KEY is not set; langsmith takes no spans without one\n"
