"""An engine process watched by the worker; the scripted endpoint stands for the engine."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from inference.endpoint import Endpoint, EndpointDown
from inference.engines import EnginePlan
from inference.gpus import GpuMeter
from inference.supervisor import EngineReadings, EngineSupervisor, parse_readings, tokens_per_s
from runtime.children import birth_of
from runtime.errors import Fatal
from tests.support.waiting import wait_until

REPOSITORY = Path(__file__).resolve().parents[2]
HANGING = b'{"model":"scripted","messages":[{"role":"user","content":"[[hang]]"}]}'


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short, for the socket."""
    with tempfile.TemporaryDirectory(prefix="engine-") as path:
        yield Path(path)


def plan_of(folder: Path, *command: str) -> EnginePlan:
    socket = folder / "socket"
    scripted = (sys.executable, "-m", "tests.support.scripted_endpoint", "--socket", str(socket))
    return EnginePlan(
        kind="scripted",
        command=command or scripted,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        url=f"unix://{socket}",
        alias="scripted",
        description={},
        slots=8,
    )


def supervised(folder: Path, *command: str, stall_s: float = 60.0, start_timeout_s: float = 30.0) -> EngineSupervisor:
    return EngineSupervisor(
        plan_of(folder, *command), log_file=folder / "log", start_timeout_s=start_timeout_s, stall_s=stall_s
    )


def test_an_engine_is_up_after_start_and_gone_after_stop(folder: Path) -> None:
    with supervised(folder) as engine:
        assert (engine.is_healthy, engine.version, engine.restarts) == (True, "scripted-1", 0)
        pid = engine.pid
        assert pid is not None
        assert birth_of(pid) is not None
    assert engine.pid is None
    assert birth_of(pid) is None


def test_stop_ends_the_engines_own_children_as_well(folder: Path) -> None:
    note = folder / "grandchild"
    script = (
        f"import os, subprocess, sys\nchild = subprocess.Popen(['sleep', '600'])\n"
        f"open({str(note)!r}, 'w').write(str(child.pid))\n"
        f"os.execv(sys.executable, [sys.executable, '-m', 'tests.support.scripted_endpoint', "
        f"'--socket', {str(folder / 'socket')!r}])"
    )
    with supervised(folder, sys.executable, "-c", script):
        pid = int(note.read_text())
        assert birth_of(pid) is not None
    wait_until(lambda: birth_of(pid) is None, 5, "the engine's child is gone")


def test_a_killed_engine_is_started_again(folder: Path) -> None:
    with supervised(folder) as engine:
        first = engine.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: engine.restarts == 1 and engine.is_healthy and engine.pid, 30, "the engine is up again")
        assert engine.pid != first


def test_an_engine_that_makes_no_token_with_work_at_hand_is_restarted(folder: Path) -> None:
    async def ask() -> None:
        async with Endpoint(f"unix://{folder / 'socket'}", api_key=None, timeout_s=60, connections=1) as endpoint:
            await endpoint.post("/v1/chat/completions", HANGING, request_id="hangs")

    def hang() -> None:
        with pytest.raises(EndpointDown):
            asyncio.run(ask())

    with supervised(folder, stall_s=1.0) as engine:
        first = engine.pid
        job = threading.Thread(target=hang)
        job.start()
        wait_until(lambda: engine.restarts == 1 and engine.is_healthy, 40, "the engine is restarted")
        assert engine.pid != first
        job.join(10)
        assert not job.is_alive()


def test_an_idle_engine_is_not_taken_for_a_stalled_one(folder: Path) -> None:
    with supervised(folder, stall_s=0.1) as engine:
        wait_until(lambda: engine.readings.running is not None, 20, "a first reading")
        first = engine.readings
        wait_until(lambda: engine.readings is not first, 20, "a second reading")
        assert engine.restarts == 0
        assert (first.tokens_per_s, engine.readings.tokens_per_s) == (None, 0.0)


def test_an_engine_that_ends_at_once_is_fatal_and_its_log_is_shown(folder: Path) -> None:
    with (
        pytest.raises(Fatal, match=r"status 3 .*\n.*no such model"),
        supervised(folder, sys.executable, "-c", "import sys; print('no such model', flush=True); sys.exit(3)"),
    ):
        pass


def test_an_engine_that_never_answers_is_fatal_and_ended(folder: Path) -> None:
    note = folder / "pid"
    script = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    with (
        pytest.raises(Fatal, match=r"was not up after 1\.5 s"),
        supervised(folder, sys.executable, "-c", script, start_timeout_s=1.5),
    ):
        pass
    assert birth_of(int(note.read_text())) is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_whose_program_is_missing_is_fatal(folder: Path) -> None:
    with pytest.raises(Fatal), supervised(folder, str(folder / "no-such-program")):
        pass


VLLM = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 2.0
vllm:num_requests_running{engine="1",model_name="m"} 3.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m"} 1.0
# HELP vllm:kv_cache_usage_perc KV-cache usage. 1 means 100 percent usage.
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.5
vllm:kv_offload_cpu_cache_usage_perc{engine="0",model_name="m"} 1.0
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="m"} 1.5e+03
# TYPE vllm:generation_tokens_created gauge
vllm:generation_tokens_created{engine="0",model_name="m"} 1.7959027e+09
"""
LLAMACPP = """\
# HELP llamacpp:prompt_tokens_total Number of prompt tokens processed, excluding cached tokens
# TYPE llamacpp:prompt_tokens_total counter
llamacpp:prompt_tokens_total 31
# HELP llamacpp:tokens_predicted_total Number of generation tokens processed
# TYPE llamacpp:tokens_predicted_total counter
llamacpp:tokens_predicted_total 16
# HELP llamacpp:tokens_predicted_seconds_total Total time spent generating tokens
# TYPE llamacpp:tokens_predicted_seconds_total counter
llamacpp:tokens_predicted_seconds_total 2.94648
# HELP llamacpp:predicted_tokens_seconds Average generation throughput in tokens/s
# TYPE llamacpp:predicted_tokens_seconds gauge
llamacpp:predicted_tokens_seconds 5.09083
# HELP llamacpp:requests_processing Number of requests processing
# TYPE llamacpp:requests_processing gauge
llamacpp:requests_processing 1
# HELP llamacpp:requests_deferred Number of requests deferred
# TYPE llamacpp:requests_deferred gauge
llamacpp:requests_deferred 4
"""


@pytest.mark.parametrize(
    ("text", "readings"),
    [
        (VLLM, EngineReadings(running=5, waiting=1, generated_tokens=1500, kv_use=0.375)),
        ('vllm:gpu_cache_usage_perc{model_name="m"} 0.0625\n', EngineReadings(None, None, None, kv_use=0.0625)),
        (LLAMACPP, EngineReadings(running=1, waiting=4, generated_tokens=16)),
        ("llamacpp:kv_cache_usage_ratio 1.002\n", EngineReadings(None, None, None, kv_use=1.0)),
        ("", EngineReadings(None, None, None)),
    ],
    ids=["vLLM", "older vLLM", "llama.cpp", "older llama.cpp", "nothing"],
)
def test_readings_are_understood_and_series_summed_or_averaged(text: str, readings: EngineReadings) -> None:
    assert parse_readings(text) == readings


@pytest.mark.parametrize(
    ("before", "after", "rate"),
    [(100, 350, 50.0), (350, 350, 0.0), (350, 100, None), (None, 100, None), (1, None, None)],
)
def test_the_rate_of_tokens_is_unknown_where_the_engine_began_anew(
    before: int | None, after: int | None, rate: float | None
) -> None:
    assert tokens_per_s(before, after, seconds=5.0) == rate


@pytest.mark.parametrize(
    ("visible", "text", "use"),
    [
        (None, "35\n65\n", 0.5),
        ("1", "35\n[N/A]\n", 0.35),
        (None, "No devices were found\n", None),
        ("", "35\n", None),
        ("-1", "35\n", None),
    ],
    ids=["two", "one of them", "no GPU", "hidden", "hidden by -1"],
)
def test_a_gpu_meter_gives_the_mean_of_the_engines_gpus(
    folder: Path, visible: str | None, text: str, use: float | None
) -> None:
    smi, asked = folder / "smi", folder / "asked"
    smi.write_text(f"#!/bin/sh\necho \"$@\" > {asked}\nprintf '%s' '{text}'\n")
    smi.chmod(0o755)
    meter = GpuMeter({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}, query=(str(smi), "--query"))
    assert meter.read() is None
    if use is not None:
        wait_until(lambda: meter.read() == use, 10, "a reading")
        assert asked.read_text().split() == ["--query", *([] if visible is None else [f"--id={visible}"])]
    meter.close()
    assert meter.read() is None


def test_a_gpu_query_that_hangs_is_ended_and_waited_for_by_nobody(folder: Path) -> None:
    smi, note = folder / "smi", folder / "pids"
    smi.write_text(f"#!/bin/sh\necho $$ >> {note}\nexec sleep 600\n")
    smi.chmod(0o755)
    meter = GpuMeter({}, query=(str(smi),), hung_after_s=0.0)
    meter.read()
    wait_until(lambda: note.exists() and note.read_text(), 10, "the query hangs")
    assert meter.read() is None
    wait_until(lambda: meter.read() is None and len(note.read_text().split()) > 1, 10, "the next query")
    meter.close()
    wait_until(lambda: all(birth_of(int(pid)) is None for pid in note.read_text().split()), 10, "none is left")
    assert GpuMeter({}, query=(str(folder / "no-such-program"),)).read() is None
