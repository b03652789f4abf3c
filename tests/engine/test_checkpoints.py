"""Other checkpoints than the default: a second quantization loads and answers, 16 bits are warned of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from inference.engines import EnginePlan, has_gpu, lacks_avx512, plan_engine
from runtime.errors import BadInput
from runtime.settings import EngineSettings
from tests.engine.asking import answer_of
from tests.support.processes import REPOSITORY

FOLDER = REPOSITORY / ".checkpoints"
VLLM_PYTHON = REPOSITORY / ".venv-vllm" / "bin" / "python"

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not VLLM_PYTHON.exists(), reason="run `make engine-vllm`"),
    pytest.mark.skipif(not (FOLDER / "smollm2-135m-w4a16").exists(), reason="run `make checkpoint`"),
]


def plan_of(checkpoint: str, folder: Path) -> EnginePlan:
    settings = EngineSettings(checkpoint=FOLDER / checkpoint, vllm_python=VLLM_PYTHON, max_num_seqs=4)
    plan = plan_engine(settings, socket=folder / "engine.sock")
    assert plan is not None
    return plan


TAKES_PACKED = has_gpu() or not lacks_avx512()


@pytest.mark.skipif(TAKES_PACKED, reason="this machine has AVX-512 or a GPU")
def test_a_w4a16_checkpoint_is_refused_where_it_would_kill_the_engine(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"AVX-512.*set STOKER_ENGINE__CHECKPOINT=.*smollm2-135m-w8a8"):
        plan_of("smollm2-135m-w4a16", tmp_path)


@pytest.mark.skipif(not TAKES_PACKED, reason="vLLM's 4-bit kernel for CPUs needs AVX-512")
def test_a_w4a16_checkpoint_loads_and_answers(tmp_path: Path) -> None:
    plan = plan_of("smollm2-135m-w4a16", tmp_path)
    assert (plan.kind, plan.alias, plan.warning) == ("vllm", "smollm2-135m", None)
    reply = answer_of(plan, log=tmp_path / "engine.log")
    assert reply.status_code == 200, reply.body
    answer = json.loads(reply.body)
    assert answer["choices"][0]["message"]["content"].strip()


def test_sixteen_bit_weights_are_warned_of_and_a_quantized_checkpoint_beside_them_is_named(tmp_path: Path) -> None:
    warning = plan_of("smollm2-135m-bf16", tmp_path).warning
    assert warning is not None
    assert "16-bit" in warning and "STOKER_ENGINE__CHECKPOINT=" in warning
    assert "smollm2-135m-w4a16" in warning or "smollm2-135m-w8a8" in warning
