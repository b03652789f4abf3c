"""What is said of checkpoints without loading them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from inference.checkpoints import alias_of, digest_of, is_packed, quantization_of, quantized_sibling
from runtime.errors import BadInput


def make_checkpoint(folder: Path, *, method: str | None = None) -> Path:
    folder.mkdir(parents=True)
    config = {"quantization_config": {"quant_method": method}} if method else {}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.mark.parametrize(
    ("path", "alias"),
    [
        ("smollm2-135m-w8a8", "smollm2-135m"),
        ("smollm2-135m-gguf/model-Q8_0.gguf", "smollm2-135m"),
        ("Qwen3-0.6B-FP8", "Qwen3-0.6B"),
        ("llama-3.2-1b", "llama-3.2-1b"),
        ("m_awq", "m"),
        ("m.Q4_K_M/m.gguf", "m"),
    ],
)
def test_an_alias_is_the_name_without_its_quantization(path: str, alias: str) -> None:
    assert alias_of(Path("/models") / path) == alias


def test_a_gguf_file_named_without_a_folder_has_an_alias() -> None:
    assert alias_of(Path("model.gguf")) == "model"


def test_a_digest_changes_with_content_and_name_only(tmp_path: Path) -> None:
    first, second = (make_checkpoint(tmp_path / name) for name in ("a", "b"))
    assert digest_of(first) == digest_of(second)
    assert digest_of(first).startswith("sha256:")
    (second / "model.safetensors").write_bytes(b"weighty")
    assert digest_of(first) != digest_of(second)
    (second / "model.safetensors").rename(second / "other.safetensors")
    (second / "other.safetensors").write_bytes(b"weights")
    assert digest_of(first) != digest_of(second)
    assert digest_of(first / "config.json").startswith("sha256:")


def test_the_quantization_is_what_the_config_says(tmp_path: Path) -> None:
    assert quantization_of(make_checkpoint(tmp_path / "plain")) is None
    assert quantization_of(make_checkpoint(tmp_path / "small", method="awq")) == "awq"


@pytest.mark.parametrize("content", [None, "not json"])
def test_a_folder_that_is_no_checkpoint_is_refused_with_the_variable_to_set(
    tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(BadInput, match="STOKER_ENGINE__CHECKPOINT"):
        quantization_of(tmp_path)


def test_a_quantized_sibling_is_found(tmp_path: Path) -> None:
    plain = make_checkpoint(tmp_path / "small-bf16")
    assert quantized_sibling(plain) is None
    make_checkpoint(tmp_path / "small-fp16")
    small = make_checkpoint(tmp_path / "small-w8a8", method="compressed-tensors")
    assert quantized_sibling(plain) == small
    packed = make_checkpoint(tmp_path / "small-awq", method="awq")
    assert (is_packed(packed), is_packed(small), is_packed(plain)) == (True, False, False)
    assert (quantized_sibling(plain), quantized_sibling(plain, packed=False)) == (packed, small)


def test_another_model_whose_name_begins_alike_is_no_sibling(tmp_path: Path) -> None:
    plain = make_checkpoint(tmp_path / "llama-3")
    make_checkpoint(tmp_path / "llama-3-70b-awq", method="awq")
    assert quantized_sibling(plain) is None
