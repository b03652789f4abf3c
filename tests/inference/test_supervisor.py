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
from inference.supervisor import EngineReadings, EngineSupervisor, parse_readings
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


def test_readings_of_vllm_and_llama_cpp_are_understood_and_series_summed() -> None:
    vllm = (
        '# HELP x\nvllm:num_requests_running{engine="0",model_name="m"} 2.0\n'
        'vllm:num_requests_running{engine="1",model_name="m"} 3.0\nvllm:num_requests_waiting{engine="0"} 1.0\n'
        'vllm:generation_tokens_total{engine="0"} 1.5e+03\n'
    )
    assert parse_readings(vllm) == EngineReadings(running=5, waiting=1, generated_tokens=1500)
    llamacpp = "llamacpp:requests_processing 1\nllamacpp:requests_deferred 4\nllamacpp:tokens_predicted_total 77\n"
    assert parse_readings(llamacpp) == EngineReadings(running=1, waiting=4, generated_tokens=77)
    assert parse_readings("") == EngineReadings(None, None, None)
