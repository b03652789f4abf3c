"""`stoker quantize`: what it refuses, and what an interrupt leaves. The quantizer is a stand-in program."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from runtime.errors import BadInput
from scripts.calibration import read_samples, split
from scripts.quantize_command import check
from tests.support.processes import Command
from tests.support.waiting import wait_until

TEXT = "".join(
    f"Line {number}: a sentence that is long enough to count as some text of its own.\n" for number in range(80)
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "small-bf16"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def refused(checkpoint: Path, output: Path, *, scheme: str = "w8a8", python: Path = Path("/bin/sh")) -> str:
    with pytest.raises(BadInput) as raised:
        check(checkpoint, output, scheme=scheme, calibration=None, python=python)
    return str(raised.value)


def test_what_cannot_be_quantized_is_refused_by_name_and_remedy(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert "Hugging Face folder" in refused(tmp_path / "small.gguf", output)
    assert "no config.json" in refused(tmp_path, output)
    assert "inside the checkpoint" in refused(checkpoint, checkpoint / "out")
    assert "needs --calibration" in refused(checkpoint, output, scheme="awq")
    assert "make quantize-env" in refused(checkpoint, output, python=tmp_path / "none")
    output.mkdir()
    (output / "kept").touch()
    assert "not empty" in refused(checkpoint, output)
    (checkpoint / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    assert "quantized already (awq)" in refused(checkpoint, tmp_path / "new")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", "", "is empty"),
        ("a.txt", "short\n", "too short: 1 lines"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "x"}]}\n{"mess', "line 2: no JSON"),
        ("a.jsonl", '{"body": {"messages": [{"role": "user"}]}}\n', "line 1: body.messages"),
    ],
)
def test_a_bad_calibration_file_is_refused(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(BadInput, match=said):
        read_samples(tmp_path / name)


def test_the_last_fifth_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    used, held_out = split(read_samples(tmp_path / "a.txt"))
    assert [sample["text"] for sample in used + held_out] == TEXT.splitlines()
    assert (len(used), len(held_out)) == (64, 16)


def test_an_interrupt_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho load\nexec sleep 60\n")
    python.chmod(0o755)
    output = tmp_path / "out" / "small-w8a8"
    arguments = ("quantize", checkpoint, "--scheme", "w8a8", "-o", output, "--python", python)
    with Command(*arguments, env={}) as command:
        wait_until(lambda: any(output.parent.glob(".small-w8a8-*")), 30, "the workspace is there")
        command.process.send_signal(signal.SIGINT)
        ended = command.wait(30)
    assert ended.returncode == 130
    assert "nothing was written" in ended.stderr
    assert list(output.parent.iterdir()) == []


def test_a_quantizer_that_fails_says_why_and_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho out of memory >&2\nexit 9\n")
    python.chmod(0o755)
    output = tmp_path / "out" / "small-w8a8"
    with Command("quantize", checkpoint, "--scheme", "w8a8", "-o", output, "--python", python, env={}) as command:
        ended = command.wait(30)
    assert ended.returncode == 3
    assert "status 9" in ended.stderr and "out of memory" in ended.stderr
    assert list(output.parent.iterdir()) == []
