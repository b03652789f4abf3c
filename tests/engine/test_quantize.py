"""`stoker quantize` for real: the small 16-bit checkpoint becomes W8A8, and a real vLLM answers from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from inference.engines import plan_engine
from runtime.settings import EngineSettings
from tests.engine.asking import answer_of
from tests.support.processes import REPOSITORY, stoker

SOURCE = REPOSITORY / ".checkpoints" / "smollm2-135m-bf16"
QUANTIZER = REPOSITORY / ".venv-quantize" / "bin" / "python"
VLLM_PYTHON = REPOSITORY / ".venv-vllm" / "bin" / "python"
TEXT = "".join(
    f"Parcel {number} left the shop on Monday, and the customer got it {number} days later.\n" for number in range(60)
)

pytestmark = [
    pytest.mark.engine,
    pytest.mark.long,
    pytest.mark.skipif(not VLLM_PYTHON.exists(), reason="run `make engine-vllm`"),
    pytest.mark.skipif(not QUANTIZER.exists(), reason="run `make quantize-env`"),
    pytest.mark.skipif(not (SOURCE / "config.json").exists(), reason="run `make checkpoint`"),
]


def test_an_engine_serves_what_quantize_wrote(tmp_path: Path) -> None:
    calibration, made = tmp_path / "text.txt", tmp_path / "small-w8a8"
    calibration.write_text(TEXT)
    few = ("--samples", "4", "--sequence-tokens", "64", "--no-speed", "--python", QUANTIZER)
    arguments = ("quantize", SOURCE, "--scheme", "w8a8", "--calibration", calibration, "-o", made, *few)
    ended = stoker(*arguments, env={}, timeout_s=200)
    assert ended.returncode == 0, ended.stderr
    _check_card(made)
    settings = EngineSettings(checkpoint=made, vllm_python=VLLM_PYTHON, max_num_seqs=4)
    plan = plan_engine(settings, socket=tmp_path / "engine.sock")
    assert plan is not None
    assert (plan.alias, plan.description["quantization"], plan.warning) == ("small", "compressed-tensors", None)
    reply = answer_of(plan, log=tmp_path / "engine.log")
    assert reply.status_code == 200, reply.body
    assert json.loads(reply.body)["choices"][0]["message"]["content"].strip()


def _check_card(made: Path) -> None:
    card = json.loads((made / "stoker-card.json").read_text())
    assert card["tokens_per_s"]["after"] == "not measured: --no-speed"
    assert card["calibration_sequences"] == 4
    sizes, perplexity = card["size_bytes"], card["perplexity"]
    assert sizes["after"] < 0.7 * sizes["before"]
    assert perplexity["before"] != perplexity["after"], "the quantized one was judged by itself, not by its source"
    assert perplexity["after"] < 1.5 * perplexity["before"]
    assert f"perplexity on {card['perplexity_tokens']:,} held-out tokens" in (made / "README.md").read_text()
