"""`stoker quantize`: what it refuses, and what an interrupt leaves. The quantizer is a stand-in program."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from runtime.children import birth_of
from runtime.errors import BadInput
from runtime.settings import EngineSettings
from scripts import calibration, checkpoint_speed
from scripts.calibration import read_samples, split
from scripts.checkpoint_card import write_card
from scripts.checkpoint_speed import PAIRS, Speed, compare_speed
from scripts.quantize_command import check
from tests.support.processes import Command
from tests.support.stand_in_engine import install
from tests.support.waiting import wait_until

TEXT = "".join(
    f"Line {number}: a sentence that is long enough to count as some text of its own.\n" for number in range(80)
)
SPEED = Speed(
    before=[90.0, 100.0, 110.0],
    after=[135.0, 140.0, 132.0],
    engine="vllm 1",
    max_num_seqs=4,
    requests=8,
    is_by_turns=True,
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "small-bf16"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def refused(checkpoint: Path, output: Path, *, scheme: str = "w8a8") -> str:
    with pytest.raises(BadInput) as raised:
        check(checkpoint, output, scheme=scheme, calibration=None)
    return str(raised.value)


def test_what_cannot_be_quantized_is_refused_by_name_and_remedy(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert "Hugging Face folder" in refused(tmp_path / "small.gguf", output)
    assert "no config.json" in refused(tmp_path, output)
    assert "nothing is fetched from a hub" in refused(Path("some/hub-name"), output)
    assert "inside the checkpoint" in refused(checkpoint, checkpoint / "out")
    assert "needs --calibration" in refused(checkpoint, output, scheme="gptq")
    output.mkdir()
    (output / "kept").touch()
    assert "not empty" in refused(checkpoint, output)
    (checkpoint / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    assert "quantized already (awq)" in refused(checkpoint, tmp_path / "new")
    (checkpoint / "config.json").write_text('{"num_local_experts": 8}')
    assert "mixture of experts" in refused(checkpoint, tmp_path / "new")


def test_awq_is_refused_without_a_gpu(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    said = refused(checkpoint, tmp_path / "out", scheme="awq")
    assert "needs a GPU" in said and "gptq or w4a16" in said
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert "needs --calibration" in refused(checkpoint, tmp_path / "out", scheme="awq")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", "", "is empty"),
        ("a.txt", "short\n", "too short: 1 of at least 10 lines, 5 of at least 4,000 characters"),
        ("a.jsonl", '{"body": {"messages": [{"role": "user", "content": "short"}]}}\n' * 99, "99 of .* lines, 495 of"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}\n', "line 1: .* in parts"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "x"}]}\n{"mess', "line 2: no JSON"),
        ("a.jsonl", '{"body": {"messages": [{"role": "user"}]}}\n', "line 1: body.messages"),
    ],
)
def test_a_bad_calibration_file_is_refused(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(BadInput, match=said):
        read_samples(tmp_path / name)


def test_a_calibration_file_that_cannot_be_read_is_named_once(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"^--calibration \S+/none.txt cannot be read: No such file or directory; name"):
        read_samples(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes("größer".encode("latin-1"))
    with pytest.raises(BadInput, match="no UTF-8 at byte 2; save it"):
        read_samples(tmp_path / "latin.txt")


def test_a_line_separator_within_a_json_string_ends_no_line(tmp_path: Path) -> None:
    line = '{"text": "' + "one\u2028two " * 50 + '"}\n'
    (tmp_path / "a.jsonl").write_text(line * 20)
    assert len(read_samples(tmp_path / "a.jsonl")) == 20


def test_of_a_file_of_any_size_the_beginning_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibration, "MOST_BYTES", len(TEXT) + 10)
    (tmp_path / "a.txt").write_text(TEXT * 3)
    assert [sample["text"] for sample in read_samples(tmp_path / "a.txt")] == TEXT.splitlines()
    assert "its first" in capsys.readouterr().err


def test_chats_that_are_sorted_by_kind_are_calibrated_and_judged_by_all_kinds(tmp_path: Path) -> None:
    chats = [{"messages": [{"role": "user", "content": f"{kind} {'text ' * 20}"}]} for kind in "abc" for _ in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    for part in split(read_samples(tmp_path / "a.jsonl")):
        assert {sample["messages"][0]["content"][0] for sample in part} == {"a", "b", "c"}


def test_the_last_fifth_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    used, held_out = split(read_samples(tmp_path / "a.txt"))
    assert [sample["text"] for sample in used + held_out] == TEXT.splitlines()
    assert (len(used), len(held_out)) == (64, 16)


def test_a_killed_command_takes_the_quantizer_along(checkpoint: Path, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho $$ > {tmp_path / 'pid'}\nexec sleep 60\n")
    python.chmod(0o755)
    arguments = ("quantize", checkpoint, "--scheme", "w8a8", "-o", tmp_path / "out", "--python", python)
    with Command(*arguments, env={}) as command:
        wait_until(lambda: (tmp_path / "pid").exists() and bool((tmp_path / "pid").read_text()), 30, "it quantizes")
        pid = int((tmp_path / "pid").read_text())
        assert birth_of(pid) is not None
        command.process.kill()
        wait_until(lambda: birth_of(pid) is None, 10, "the quantizer has ended")


def test_the_licence_of_the_source_goes_into_the_card(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# Small\nlicense: none\n")
    named = written_readme(checkpoint, tmp_path / "named")
    assert "\nlicense: apache-2.0\ntags: [w8a8" in named and "language" not in named and "none" not in named
    (checkpoint / "README.md").unlink()
    assert "license" not in written_readme(checkpoint, tmp_path / "unknown")
    (checkpoint / "LICENSE.txt").write_text("As you like.")
    assert "\nlicense: other\nlicense_link: LICENSE.txt\n" in written_readme(checkpoint, tmp_path / "copied")
    assert (tmp_path / "copied" / "LICENSE.txt").read_text() == "As you like."


def written_readme(source: Path, folder: Path) -> str:
    folder.mkdir()
    card = {
        "base_model": source.name,
        "scheme": "w8a8",
        "size_bytes": {"before": 2, "after": 1},
        "perplexity": {"before": 15.5, "after": 15.75},
        "perplexity_tokens": 2000,
        "tokens_per_s": SPEED.as_card(),
    }
    write_card(folder, card, source=source)
    assert json.loads((folder / "stoker-card.json").read_text()) == card
    return (folder / "README.md").read_text()


def test_the_card_has_the_medians_and_the_spread_of_the_pairs(checkpoint: Path, tmp_path: Path) -> None:
    readme = written_readme(checkpoint, tmp_path / "card")
    assert "| tokens/s (1.40x, 1.20 to 1.50) | 100.0 | 135.0 |" in readme
    assert "both engines up; 8 completions a leg" in readme


def test_a_speed_that_cannot_be_measured_has_its_reason(checkpoint: Path, tmp_path: Path) -> None:
    engine = EngineSettings(vllm_python=tmp_path / "no-vllm", url="http://127.0.0.1:1")
    with pytest.raises(BadInput, match="vLLM's environment is missing"):
        compare_speed(checkpoint, checkpoint, engine=engine, show=lambda _: None)


@pytest.mark.parametrize("is_gpu", [False, True])
def test_engines_take_turns_but_follow_each_other_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_gpu: bool
) -> None:
    nvidia_smi = tmp_path / "nvidia-smi"
    nvidia_smi.write_text(f"#!/bin/sh\nexit {0 if is_gpu else 1}\n")
    nvidia_smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "0")
    monkeypatch.setattr(checkpoint_speed, "SETTLED_S", 0.0)
    monkeypatch.setattr(checkpoint_speed, "LEG_S", 0.1)
    journal = tmp_path / "journal"
    started = install(tmp_path, journal=journal, latency_s=0.01)
    engine = EngineSettings(
        vllm_python=Path(started["STOKER_ENGINE__VLLM_PYTHON"]), args=started["STOKER_ENGINE__ARGS"], max_num_seqs=2
    )
    shown: list[float] = []
    speed = compare_speed(tmp_path / "scripted", tmp_path / "scripted", engine=engine, show=shown.append)
    assert (len(speed.before), len(speed.after), shown[-1]) == (PAIRS, PAIRS, 1.0)
    assert min(speed.before + speed.after) > 0
    assert speed.is_by_turns is not is_gpu
    first, second = sorted(times_in(file) for file in journal.iterdir())
    assert (first[-1] < second[0]) is is_gpu


def times_in(journal: Path) -> list[float]:
    return [float(line.rpartition(" ")[2]) for line in journal.read_text().splitlines()]


def test_an_interrupt_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho load\nexec sleep 60\n")
    python.chmod(0o755)
    output = tmp_path / "out" / "small-w8a8"
    arguments = ("quantize", checkpoint, "--scheme", "w8a8", "-o", output, "--python", python)
    with Command(*arguments, env={}) as command:
        wait_until(lambda: any(tmp_path.glob(".small-w8a8-*")), 30, "the workspace is there")
        command.process.send_signal(signal.SIGINT)
        ended = command.wait(30)
    assert ended.returncode == 130
    assert "nothing was written" in ended.stderr
    assert {one.name for one in tmp_path.iterdir()} == {"small-bf16", "python"}


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        ("out of memory", 3, "status 9:\nout of memory"),
        ("Traceback\nModuleNotFoundError: No module named 'torch.nn'", 2, "has no torch; run `make quantize-env`"),
    ],
)
def test_a_quantizer_that_fails_says_why_and_leaves_nothing(
    checkpoint: Path, tmp_path: Path, error: str, status: int, said: str
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\ncat >&2 <<'END'\n{error}\nEND\nexit 9\n")
    python.chmod(0o755)
    output = tmp_path / "out" / "small-w8a8"
    with Command("quantize", checkpoint, "--scheme", "w8a8", "-o", output, "--python", python, env={}) as command:
        ended = command.wait(30)
    assert (ended.returncode, said in ended.stderr) == (status, True), ended.stderr
    assert {one.name for one in tmp_path.iterdir()} == {"small-bf16", "python"}


def test_a_missing_environment_is_named_after_what_is_wrong_with_the_input(checkpoint: Path, tmp_path: Path) -> None:
    arguments = ("--scheme", "w8a8", "-o", tmp_path / "out", "--python", tmp_path / "none")
    for text, said in (((), "make quantize-env"), (("--calibration", tmp_path / "a.txt"), "cannot be read")):
        with Command("quantize", checkpoint, *arguments, *text, env={}) as command:
            ended = command.wait(30)
        assert (ended.returncode, said in ended.stderr) == (2, True), ended.stderr


def quantized(checkpoint: Path, folder: Path, *, perplexity: str) -> tuple[int, str, Path]:
    """Exit code and stderr of the command with a quantizer that works and this for a perplexity; and its folder."""
    python, output = folder / "python", folder / "small-w8a8"
    python.write_text(
        '#!/bin/sh\ncase "$*" in\n'
        f"*scripts.perplexity*/.small-w8a8-*) {perplexity} ;;\n"
        "*scripts.perplexity*) echo out of memory >&2; exit 9 ;;\n"
        '*) while [ "$1" != -o ]; do shift; done; mkdir -p "$2"; echo "{\\"recipe\\": []}" ;;\nesac\n'
    )
    python.chmod(0o755)
    (folder / "a.txt").write_text(TEXT)
    arguments = ("quantize", checkpoint, "--scheme", "w8a8", "--calibration", folder / "a.txt", "--no-speed")
    with Command(*arguments, "-o", output, "--python", python, env={}) as command:
        ended = command.wait(30)
    return ended.returncode, ended.stderr, output


def test_a_perplexity_that_fails_loses_no_checkpoint_and_the_card_says_why(checkpoint: Path, tmp_path: Path) -> None:
    status, said, output = quantized(checkpoint, tmp_path, perplexity="echo out of memory >&2; exit 9")
    assert (status, "the perplexity is not measured" in said) == (0, True)
    assert "perplexity ended with status 9" in (output / "stoker-card.json").read_text()


def test_a_checkpoint_without_a_quantized_layer_is_not_kept_whatever_becomes_of_its_source(
    checkpoint: Path, tmp_path: Path
) -> None:
    measured = r"""echo '{"perplexity": 1.0, "tokens": 9, "quantized_layers": 0}'"""
    status, said, output = quantized(checkpoint, tmp_path, perplexity=measured)
    assert (status, output.exists()) == (3, False)
    assert "without a quantized layer" in said
