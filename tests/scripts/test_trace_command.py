"""`stoker trace` on spans in a file: no services, no worker."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from click.testing import CliRunner

from models.names import batch_name
from runtime.clock import uuid7
from runtime.errors import NotFound
from runtime.settings import Settings, TraceSettings
from runtime.tracing import Value, batch_span, context_of, own_trace, record_root, span, start_tracing, stop_tracing
from scripts.trace_command import trace

SECOND_NS = 1_000_000_000


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path, trace=TraceSettings(to="file"))


def recorded(settings: Settings, *, jobs: int = 6, with_root: bool = True) -> UUID:
    """A batch of one shard with so many requests, the last of which failed."""
    batch_id, began_ns = uuid7(), time.time_ns()
    start_tracing(settings, process="test")
    with batch_span("submit", batch_id):
        pass
    with batch_span("publish generation", batch_id, kind="producer") as sent:
        header = sent.header
    with batch_span("process generation", batch_id, kind="consumer", header=header):
        shard = own_trace("shard", batch_id, attributes={"stoker.shard.id": 7}).begin()
        context_of(shard, shard_id=7).run(_requests, jobs)
        shard.end()
    if with_root:
        told: dict[str, Value] = {"stoker.state": "completed", "stoker.jobs": jobs}
        record_root(batch_id, started_ns=began_ns, ended_ns=began_ns + 2 * SECOND_NS, attributes=told, error=None)
    stop_tracing()
    return batch_id


def _requests(jobs: int) -> None:
    for seq in range(jobs):
        told: dict[str, Value] = {
            "gen_ai.operation.name": "chat",
            "stoker.job.seq": seq,
            "gen_ai.usage.output_tokens": 1_000,
        }
        with span("chat small", kind="client", attributes=told) as request:
            if seq == jobs - 1:
                request.fail("Throttled")


def shown(settings: Settings, *arguments: str) -> str:
    said = CliRunner().invoke(trace, list(arguments), obj=settings, catch_exceptions=False)
    assert said.exit_code == 0
    return said.stdout


def test_a_batch_is_a_tree_and_its_shards_hang_under_the_task_that_ran_them(settings: Settings) -> None:
    recorded(settings)  # another batch, of which nothing is shown
    batch_id = recorded(settings)
    lines = shown(settings, batch_name(batch_id)).splitlines()
    depth = {line.lstrip("│├└─ ").split("  ")[0]: len(line) - len(line.lstrip("│├└─ ")) for line in lines}
    assert depth == {
        "batch": 0,
        "submit": 4,
        "publish generation": 4,
        "process generation": 8,
        "shard": 12,
        "chat small": 16,
        "… and 2 more requests, 2,000 tokens out; --all shows them": 16,
    }
    assert lines[0].startswith("batch  +0.00 s  2.00 s  completed  jobs 6") and batch_id.hex in lines[0]
    assert [line for line in lines if "Throttled" in line], "what failed is shown, however many there are"
    assert shown(settings, batch_name(batch_id), "--all").count("chat small") == 6


def test_json_has_every_span_in_its_place(settings: Settings) -> None:
    batch_id = recorded(settings)
    (root,) = json.loads(shown(settings, batch_id.hex, "--json"))
    names = [root["name"]]
    inner: dict[str, Any] = root
    while inner["under"]:
        inner = inner["under"][-1]
        names.append(inner["name"])
    assert names == ["batch", "publish generation", "process generation", "shard", "chat small"]
    assert inner["error"] == "Throttled" and inner["attributes"]["stoker.job.seq"] == 5
    assert (root["seconds"], root["trace_id"]) == (2.0, batch_id.hex)


def test_a_batch_that_has_not_ended_is_shown_as_far_as_it_came(settings: Settings) -> None:
    batch_id = recorded(settings, with_root=False)
    assert [line.split("  ")[0] for line in shown(settings, batch_id.hex).splitlines() if line[0] not in "│├└ "] == [
        "submit",
        "publish generation",
    ]


@pytest.mark.parametrize(("to", "remedy"), [("off", "STOKER_TRACE__TO=file"), ("langsmith", "spans go to langsmith")])
def test_where_nothing_was_recorded_the_remedy_is_said(tmp_path: Path, to: Any, remedy: str) -> None:
    settings = Settings(home=tmp_path, trace=TraceSettings(to=to))
    with pytest.raises(NotFound, match=remedy):
        shown(settings, uuid7().hex)


def test_a_line_that_a_crash_has_cut_hides_no_other(settings: Settings, tmp_path: Path) -> None:
    batch_id = recorded(settings)
    with (tmp_path / "traces" / "spans.jsonl").open("a") as file:
        file.write(f'{{"resourceSpans": [{{"{batch_id.hex}')
    assert shown(settings, batch_id.hex).startswith("batch")


def test_the_beginning_of_a_batch_that_is_recorded_here_needs_no_service(settings: Settings) -> None:
    batch_id = recorded(settings)
    assert shown(settings, batch_name(batch_id)[:14]).splitlines()[0].endswith(batch_id.hex)
    missing = CliRunner().invoke(trace, ["batch_ffff"], obj=settings)
    assert isinstance(missing.exception, NotFound) and "STOKER_TRACE__TO=file" in str(missing.exception)
