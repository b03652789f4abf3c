"""Metrics: their names, and that all processes of a tree add up whatever becomes of them."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from runtime import metrics
from runtime.metrics import CATALOGUE, JOBS, is_counting
from runtime.metrics_folder import MetricsFolder
from tests.support.counting_tree import SHORT_LIVES
from tests.support.own_services import free_port

REPOSITORY = Path(__file__).resolve().parents[2]
LABELS = {
    *("outcome", "source", "kind", "endpoint", "found", "state", "node"),
    *("method", "route", "status", "schedule"),
}


def test_names_follow_the_rules_of_prometheus_and_name_no_tenant() -> None:
    assert max(Counter(metric.name for metric in CATALOGUE).values()) == 1
    for metric in CATALOGUE:
        assert re.fullmatch(r"stoker_[a-z]+(_[a-z]+)*", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert metric.kind != "histogram" or metric.name.endswith("_seconds"), metric.name
        assert set(metric.labels) <= LABELS, metric.name
        assert metric.help.endswith("."), metric.name


def test_nothing_is_counted_where_no_port_is_set() -> None:
    assert not is_counting()
    JOBS.add(1, outcome="succeeded", source="engine")
    assert "PROMETHEUS_MULTIPROC_DIR" not in os.environ


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    """What a tree of processes saw of itself."""
    port = free_port()
    command = [sys.executable, "-m", "tests.support.counting_tree", str(port)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_forked_and_started_processes_add_up(told: dict[str, Any]) -> None:
    assert told["alive"] == {
        "stoker_jobs_total": 5,
        "stoker_shards_running": 3,
        "stoker_shard_seconds_sum": pytest.approx(0.6),
        "stoker_shard_seconds_count": 2,
        "stoker_deadline_slack_seconds": 7,
    }


def test_a_dead_process_has_no_gauge_and_its_counts_stay(told: dict[str, Any]) -> None:
    assert told["one killed"] == {**told["alive"], "stoker_shards_running": 2}
    many = told["many killed"]
    assert (many["stoker_jobs_total"], many["stoker_shard_seconds_count"]) == (5 + SHORT_LIVES, 2 + SHORT_LIVES)
    assert many["stoker_shards_running"] == 2
    assert told["files"] == 7, "the owner's lock, two of the dead, one of the parent, three of the child"


def test_the_engines_metrics_come_along_but_for_its_process_and_an_unreadable_one_hides_nothing(
    told: dict[str, Any],
) -> None:
    families = {family.name: family for family in text_string_to_metric_families(told["text"])}
    assert families["vllm:running"].samples[0].value == 3
    assert families["stoker_engine_sequences_max"].samples[0].value == 8, "what is known at any moment is set anew"
    assert "process_x" not in families
    assert "stoker_jobs_total" in told["broken"] and "vllm:" not in told["broken"]
    assert told["as open metrics"] == told["text"], "there the client would write the engine's names otherwise"


def test_requests_are_counted_by_their_routes_whatever_comes_of_them(told: dict[str, Any]) -> None:
    found = [line for line in told["leads"].splitlines() if line.startswith("stoker_http_requests_total{")]
    route = 'route="/v1/batches/{batch_id}"'
    assert sorted(found) == [
        f'stoker_http_requests_total{{method="GET",{route},status="200"}} 1.0',
        f'stoker_http_requests_total{{method="HEAD",{route},status="500"}} 1.0',
        f'stoker_http_requests_total{{method="PATCH",{route},status="206"}} 1.0',
        f'stoker_http_requests_total{{method="POST",{route},status="500"}} 1.0',
        f'stoker_http_requests_total{{method="PUT",{route},status="206"}} 1.0',
        f'stoker_http_requests_total{{method="other",{route},status="499"}} 1.0',
    ]


def test_who_leads_no_more_states_nothing_and_who_never_led_has_no_series(told: dict[str, Any]) -> None:
    assert "stoker_dispatch_leader" not in told["never led"]
    assert "stoker_dispatch_leader 1.0" in told["leads"]
    after = told["leads no more"].splitlines()
    assert {"stoker_dispatch_leader 0.0", "stoker_jobs_unfinished 0.0", "stoker_batches_at_risk 0.0"} <= {*after}
    assert "stoker_deadline_slack_seconds NaN" in after, "neither late nor in time"


def test_nothing_is_left_and_a_taken_port_is_no_failure(told: dict[str, Any]) -> None:
    assert told["refused"] is None
    assert told["left"] is False


def test_the_folder_of_a_killed_process_goes_with_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    command = (
        "import os; from runtime.metrics_folder import MetricsFolder\n"
        "folder = MetricsFolder(); print(folder.path, flush=True); os.kill(os.getpid(), 9)"
    )
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    killed = subprocess.run(
        [sys.executable, "-c", command], cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False
    )
    left, living = Path(killed.stdout.strip()), MetricsFolder()
    assert left.exists(), "it is young: perhaps it has no lock yet"
    for folder in (left, Path(living.path)):
        os.utime(folder, (time.time() - 100, time.time() - 100))
    other = MetricsFolder()
    assert not left.exists()
    assert Path(living.path).exists(), "its owner lives"
    other.remove()
    living.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_gone_ends_the_counting_and_no_work() -> None:
    """And that it begins anew in the same process is no hindrance to its forks."""
    command = (
        "import os, shutil, signal; from runtime.metrics import JOBS, SHARD_SECONDS, is_counting, open_metrics\n"
        "from runtime.settings import MetricsSettings\n"
        "folder = open_metrics(MetricsSettings(port=1)); shutil.rmtree(folder.path)\n"
        "JOBS.add(1, outcome='succeeded', source='engine'); SHARD_SECONDS.observe(1)\n"
        "print(is_counting(), flush=True)\n"
        "os.environ.pop('PROMETHEUS_MULTIPROC_DIR'); again = open_metrics(MetricsSettings(port=1)); signal.alarm(10)\n"
        "pid = os.fork(); pid and print(os.waitpid(pid, 0)[1], is_counting()); pid and again.remove()"
    )
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60
    )
    assert [line for line in done.stdout.splitlines() if "metrics_end" not in line] == ["False", "0 True"], done.stderr
    assert (done.stdout + done.stderr).count("metrics_end") == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of its own, of 256 KB."""
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "stoker-test", str(tmp_path)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a disk")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("free", [0, 150_000])
def test_a_full_disk_ends_the_counting_and_kills_nobody(small_disk: Path, free: int) -> None:
    """It is full before the first file or between two of them; and before the counts of the dead are put together."""
    command = (
        "import os; from runtime.metrics import JOBS, REQUESTS, SHARD_SECONDS, is_counting, open_metrics\n"
        "from runtime.metrics_folder import families_in\n"
        "from runtime.settings import MetricsSettings\n"
        "folder = open_metrics(MetricsSettings(port=1)); free = int(os.environ['FREE'])\n"
        "disk = os.statvfs(folder.path); taken = disk.f_bavail * disk.f_frsize - free\n"
        "open(os.environ['TMPDIR'] + '/filler', 'wb').write(bytes(max(taken, 0)))\n"
        "def count():\n"
        "    for at in range(2000):\n"
        "        REQUESTS.add(1, endpoint=f'endpoint {at}', outcome='ok')\n"
        "    print(is_counting(), flush=True); os._exit(0)\n"
        "pid = os.fork(); pid or count(); print(os.waitpid(pid, 0)[1])\n"
        "JOBS.add(1, outcome='succeeded', source='engine')\n"
        "for _ in range(2): print(sum(s.value for f in families_in(folder.path) for s in f.samples) > 0)\n"
        "SHARD_SECONDS.observe(1); print('done'); folder.remove()"
    )
    env = {**os.environ, "TMPDIR": str(small_disk), "FREE": str(free)}
    done = subprocess.run(
        [sys.executable, "-c", command],
        cwd=REPOSITORY,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    told = [line for line in done.stdout.splitlines() if "metrics_" not in line]
    assert told == ["False", "0", *[str(free > 0)] * 2, "done"], done.stdout + done.stderr
    assert (done.stdout + done.stderr).count("metrics_end") == 2, "one of each process"


def test_each_count_has_the_labels_of_its_metric() -> None:
    """A wrong one is a defect of ours, which no process without a port would notice."""
    by_name = {name: metric for name, metric in vars(metrics).items() if isinstance(metric, metrics.Metric)}
    modules = subprocess.check_output(["git", "ls-files", "*.py"], cwd=REPOSITORY, text=True).split()
    calls = 0
    for module in modules:
        text = (REPOSITORY / module).read_text() if (REPOSITORY / module).exists() else ""
        if "runtime.metrics" not in text:
            continue
        for call in ast.walk(ast.parse(text)):
            match call:
                case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="add" | "set" | "observe")):
                    if name in by_name:
                        calls += 1
                        labels = sorted(str(keyword.arg) for keyword in call.keywords)
                        assert labels == sorted(by_name[name].labels), f"{module}:{call.lineno}"
    assert calls > len(CATALOGUE)
