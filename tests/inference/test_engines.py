"""Command lines of engines; none is started here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from inference.engines import VLLM_COMMAND, VLLM_SERVER, plan_engine
from runtime.errors import BadInput
from runtime.settings import EngineSettings

SOCKET = Path("/run/engine.sock")


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    file = tmp_path / "small-gguf" / "small-Q8_0.gguf"
    file.parent.mkdir()
    file.write_bytes(b"GGUF")
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "small-bf16"
    path.mkdir()
    (path / "config.json").write_text("{}")
    return path


@pytest.fixture
def vllm_python(tmp_path: Path) -> Path:
    file = tmp_path / "python"
    file.touch()
    return file


def value_of(command: tuple[str, ...], flag: str) -> str:
    return command[command.index(flag) + 1]


def test_an_engine_that_runs_already_is_not_started(gguf: Path) -> None:
    assert plan_engine(EngineSettings(url="http://host:8000/v1", checkpoint=gguf), socket=SOCKET) is None
    assert plan_engine(EngineSettings(kind="none", checkpoint=gguf), socket=SOCKET) is None


def test_a_missing_checkpoint_is_refused_with_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="make checkpoint"):
        plan_engine(EngineSettings(checkpoint=tmp_path / "none.gguf"), socket=SOCKET)


def test_an_engine_that_is_to_compute_some_requests_first_is_told_so_where_it_can(
    folder: Path, gguf: Path, vllm_python: Path
) -> None:
    settings = EngineSettings(checkpoint=folder, vllm_python=vllm_python)
    plan = plan_engine(settings, socket=SOCKET, policy="priority")
    assert plan is not None
    assert (value_of(plan.command, "--scheduling-policy"), plan.policy) == ("priority", "priority")
    plain = plan_engine(settings, socket=SOCKET)
    assert plain is not None
    assert "--scheduling-policy" not in plain.command
    other = plan_engine(EngineSettings(checkpoint=gguf), socket=SOCKET, policy="priority")
    assert other is not None
    assert other.policy == "fcfs"


def test_a_gguf_file_is_run_by_llama_cpp(gguf: Path) -> None:
    plan = plan_engine(
        EngineSettings(checkpoint=gguf, max_num_seqs=4, context_tokens=512, args="--threads 2"), socket=SOCKET
    )
    assert plan is not None
    assert (plan.kind, plan.alias, plan.url, plan.warning) == ("llamacpp", "small", f"unix://{SOCKET}", None)
    assert plan.command[:3] == (sys.executable, "-m", "inference.llamacpp")
    assert plan.command[-2:] == ("--threads", "2")
    assert [value_of(plan.command, flag) for flag in ("--checkpoint", "--uds", "--slots", "--context-per-slot")] == [
        str(gguf),
        str(SOCKET),
        "4",
        "512",
    ]
    assert plan.description["checkpoint_digest"].startswith("sha256:")


def test_a_folder_is_run_by_vllm_in_its_own_environment(folder: Path, vllm_python: Path) -> None:
    plan = plan_engine(
        EngineSettings(checkpoint=folder, vllm_python=vllm_python, args="--seed 7", alias="mine"), socket=SOCKET
    )
    assert plan is not None
    assert (plan.kind, plan.alias, plan.url) == ("vllm", "mine", f"unix://{SOCKET}")
    assert plan.command[:3] == (str(vllm_python), "-m", VLLM_SERVER)
    assert plan.command[-2:] == ("--seed", "7")
    assert value_of(plan.command, "--served-model-name") == "mine"
    assert plan.env["HF_HUB_OFFLINE"] == "1"
    assert json.loads(json.dumps(plan.description)) == plan.description


def test_vllms_own_sockets_are_on_loopback_unless_somebody_says_where(
    folder: Path, vllm_python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth1")
    plan = plan_engine(EngineSettings(checkpoint=folder, vllm_python=vllm_python), socket=SOCKET)

    assert plan is not None
    assert (plan.env["VLLM_HOST_IP"], plan.env["GLOO_SOCKET_IFNAME"]) == ("127.0.0.1", "lo")
    assert plan.env["NCCL_SOCKET_IFNAME"] == "eth1"


def test_on_a_gpu_vllm_serve_starts_as_many_front_ends_as_are_wished_for(
    folder: Path, vllm_python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi = tmp_path / "bin" / "nvidia-smi"
    nvidia_smi.parent.mkdir()
    nvidia_smi.write_text("#!/bin/sh\nexit 0\n")
    nvidia_smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(nvidia_smi.parent), prepend=":")
    plan = plan_engine(EngineSettings(checkpoint=folder, vllm_python=vllm_python, api_servers=4), socket=SOCKET)
    assert plan is not None
    assert plan.command[:5] == (str(vllm_python), "-m", VLLM_COMMAND, "serve", str(folder))
    assert (value_of(plan.command, "--api-server-count"), value_of(plan.command, "--uds")) == ("4", str(SOCKET))
    assert "--enforce-eager" not in plan.command


def test_on_a_cpu_vllm_has_one_front_end(folder: Path, vllm_python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")  # no nvidia-smi
    plan = plan_engine(EngineSettings(checkpoint=folder, vllm_python=vllm_python, api_servers=4), socket=SOCKET)
    assert plan is not None
    assert "--api-server-count" not in plan.command


def test_16_bit_weights_are_warned_of_and_a_quantized_sibling_is_named(
    folder: Path, vllm_python: Path, tmp_path: Path
) -> None:
    settings = EngineSettings(checkpoint=folder, vllm_python=vllm_python)
    plan = plan_engine(settings, socket=SOCKET)
    assert plan is not None
    assert "make checkpoint" in (plan.warning or "")
    small = tmp_path / "small-w8a8"
    small.mkdir()
    (small / "config.json").write_text('{"quantization_config": {"quant_method": "compressed-tensors"}}')
    plan = plan_engine(settings, socket=SOCKET)
    assert plan is not None
    assert f"STOKER_ENGINE__CHECKPOINT={small}" in (plan.warning or "")
    quantized = plan_engine(EngineSettings(checkpoint=small, vllm_python=vllm_python), socket=SOCKET)
    assert quantized is not None
    assert (quantized.warning, quantized.description["quantization"]) == (None, "compressed-tensors")


def test_a_missing_vllm_is_refused_with_the_command_that_makes_it(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="make engine-vllm"):
        plan_engine(EngineSettings(checkpoint=folder, vllm_python=tmp_path / "none"), socket=SOCKET)


def test_an_engine_that_cannot_load_the_checkpoint_is_refused(gguf: Path, folder: Path) -> None:
    with pytest.raises(BadInput, match="KIND=vllm"):
        plan_engine(EngineSettings(kind="vllm", checkpoint=gguf), socket=SOCKET)
    with pytest.raises(BadInput, match="KIND=llamacpp"):
        plan_engine(EngineSettings(kind="llamacpp", checkpoint=folder), socket=SOCKET)
