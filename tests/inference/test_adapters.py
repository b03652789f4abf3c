"""LoRA adapters become flags of vLLM; what cannot be one is refused before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from inference.adapters import adapter_flags
from inference.engines import plan_engine
from runtime.errors import BadInput
from runtime.settings import EngineSettings

SOCKET = Path("/run/engine.sock")


def adapter(folder: Path, **config: Any) -> Path:
    """A folder as PEFT saves one."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8} | config))
    (folder / "adapter_model.safetensors").write_bytes(folder.name.encode())
    return folder


@pytest.fixture
def settings(tmp_path: Path) -> EngineSettings:
    """Of vLLM with a checkpoint and two adapters."""
    base = tmp_path / "small-bf16"
    base.mkdir()
    (base / "config.json").write_text("{}")
    (tmp_path / "python").touch()
    adapters = {"sql": adapter(tmp_path / "sql"), "law": adapter(tmp_path / "law", rank_pattern={"q_proj": 20})}
    return EngineSettings(checkpoint=base, vllm_python=tmp_path / "python", adapters=adapters)


def test_adapters_are_served_by_their_names_with_room_for_the_largest_rank(settings: EngineSettings) -> None:
    plan = plan_engine(settings, socket=SOCKET)
    assert plan is not None
    flags = list(plan.command)
    at = flags.index("--lora-modules")
    assert flags[at + 1 : at + 3] == [f"law={settings.adapters['law']}", f"sql={settings.adapters['sql']}"]
    assert flags[flags.index("--max-lora-rank") + 1] == "32" and flags[flags.index("--max-loras") + 1] == "2"
    digests = plan.description["adapters"]
    assert sorted(digests) == ["law", "sql"] and digests["law"] != digests["sql"]
    assert all(digest.startswith("sha256:") for digest in digests.values())


def test_without_adapters_nothing_is_said_of_them(settings: EngineSettings) -> None:
    plan = plan_engine(settings.model_copy(update={"adapters": {}}), socket=SOCKET)
    assert plan is not None and "--enable-lora" not in plan.command and "adapters" not in plan.description


@pytest.mark.parametrize(
    ("name", "config", "told"),
    [
        ("a b", {}, "cannot be the name"),
        ("base", {}, "is not base"),
        ("a", {"r": None}, "states no rank"),
        ("a", {"r": 4096}, "vLLM takes 1 to 512"),
    ],
)
def test_what_cannot_be_an_adapter_is_refused(tmp_path: Path, name: str, config: dict[str, Any], told: str) -> None:
    with pytest.raises(BadInput, match=told):
        adapter_flags({name: adapter(tmp_path / "one", **config)}, alias="base")


def test_a_folder_that_holds_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=f"{tmp_path} holds no adapter_config.json"):
        adapter_flags({"a": tmp_path}, alias="base")
    (adapter(tmp_path / "one") / "adapter_model.safetensors").unlink()
    with pytest.raises(BadInput, match="holds no adapter_model"):
        adapter_flags({"a": tmp_path / "one"}, alias="base")


def test_llama_cpp_takes_no_adapters(tmp_path: Path, settings: EngineSettings) -> None:
    file = tmp_path / "small.gguf"
    file.touch()
    with pytest.raises(BadInput, match="STOKER_ENGINE__ADAPTERS: llama"):
        plan_engine(settings.model_copy(update={"checkpoint": file}), socket=SOCKET)


def test_on_a_cpu_a_quantized_checkpoint_takes_no_adapters(
    settings: EngineSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # nowhere is nvidia-smi
    assert settings.checkpoint is not None
    quantized = {"quantization_config": {"quant_method": "compressed-tensors"}}
    (settings.checkpoint / "config.json").write_text(json.dumps(quantized))
    with pytest.raises(BadInput, match="beside 16-bit weights only"):
        plan_engine(settings, socket=SOCKET)


def test_the_engine_does_not_see_the_keys_of_providers(
    settings: EngineSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOUD_API_KEY", "sk-a-long-secret")
    monkeypatch.setenv("CUDA_HOME", "/usr/local/cuda")
    plan = plan_engine(settings, socket=SOCKET)
    assert plan is not None and "CLOUD_API_KEY" not in plan.env and plan.env["CUDA_HOME"] == "/usr/local/cuda"
