"""`stoker quantize`: checks, then a child in .venv-quantize, then the card. It never imports torch or vLLM."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from inference.checkpoints import quantization_of
from runtime.children import stop
from runtime.errors import BadInput, Fatal
from scripts.calibration import read_samples, split, write_samples
from scripts.terminal import bar, emit_table, say, stderr

SCHEMES = ("w4a16", "fp8", "awq", "gptq", "w8a8")
CALIBRATED = frozenset({"awq", "gptq"})
SCRIPTS = Path(__file__).parent
EXIT_INTERRUPTED = 130
LOG_TAIL_LINES = 15
# Without progress bars, and never to a network. The log stays on: GPTQ needs the level that it defines.
CHILD_ENV = {
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
    "PYTHONWARNINGS": "ignore",
}
NO_SPEED = "not measured: this version does not start engines; compare with `stoker run` on either checkpoint"
_STEP = re.compile(r"^(\w+)(?: (\d+)/(\d+))?$")


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--scheme", type=click.Choice(SCHEMES), required=True)
@click.option("--calibration", type=click.Path(path_type=Path), help="Text lines or a JSONL batch file of chats.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The folder to write.")
@click.option("--samples", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--sequence-tokens", type=click.IntRange(min=16), default=512, show_default=True)
@click.option("--python", type=click.Path(path_type=Path), default=Path(".venv-quantize/bin/python"), show_default=True)
def quantize(
    checkpoint: Path,
    scheme: str,
    calibration: Path | None,
    output: Path,
    samples: int,
    sequence_tokens: int,
    python: Path,
) -> None:
    """Quantize CHECKPOINT, a Hugging Face folder, and say what it costs: size, perplexity on your text."""
    check(checkpoint, output, scheme=scheme, calibration=calibration, python=python)
    parts = split(read_samples(calibration)) if calibration else None
    output.parent.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as temporary:
            folder = Path(temporary) / output.name
            flags = ["--sequence-tokens", str(sequence_tokens)]
            made_with = list(flags)
            if parts:
                file = write_samples(Path(temporary) / "calibration.jsonl", parts[0])
                made_with += ["--calibration", str(file), "--samples", str(samples)]
            report = _child(python, "quantize_checkpoint", checkpoint, "-o", folder, "--scheme", scheme, *made_with)
            before = after = None
            if parts:
                held_out = write_samples(Path(temporary) / "held-out.jsonl", parts[1])
                flags += ["--sequences", str(max(1, samples // 4))]
                before = _child(python, "perplexity", checkpoint, held_out, *flags)
                after = _child(python, "perplexity", folder, held_out, *flags)
                if not after["quantized_layers"]:
                    raise Fatal("the written checkpoint was loaded without a quantized layer: it is not kept")
            card = card_of(checkpoint, folder, scheme=scheme, report=report, before=before, after=after)
            card["calibration_sha256"] = hashlib.sha256(calibration.read_bytes()).hexdigest() if calibration else None
            write_card(folder, card)
            if output.exists():
                output.rmdir()  # empty: checked
            folder.rename(output)
    except KeyboardInterrupt:
        say(f"interrupted; nothing was written to {output}")
        sys.exit(EXIT_INTERRUPTED)
    emit_table(f"{output} ({scheme})", ("figure", "before", "after"), _rows(card))
    say(f"a worker serves it with STOKER_ENGINE__CHECKPOINT={output}")


def check(checkpoint: Path, output: Path, *, scheme: str, calibration: Path | None, python: Path) -> None:
    """Raise BadInput, with the remedy, for what can be known before anything is loaded."""
    if checkpoint.suffix == ".gguf":
        raise BadInput(f"CHECKPOINT {checkpoint} is a GGUF: take the Hugging Face folder that it was made from")
    if not (checkpoint / "config.json").is_file():
        raise BadInput(f"CHECKPOINT {checkpoint} has no config.json; name a Hugging Face folder")
    method = quantization_of(checkpoint)
    if method:
        raise BadInput(f"CHECKPOINT {checkpoint} is quantized already ({method}); take the 16-bit one")
    if output.resolve().is_relative_to(checkpoint.resolve()):
        raise BadInput(f"-o {output} lies inside the checkpoint; name a folder beside it")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise BadInput(f"-o {output} exists and is not empty; name another folder, or remove it")
    if scheme in CALIBRATED and calibration is None:
        raise BadInput(f"--scheme {scheme} needs --calibration FILE: text lines or a JSONL batch file of chats")
    if not python.exists():
        raise BadInput(f"the quantizer's environment is missing: no {python}; run `make quantize-env`")
    nearest = next(folder for folder in output.resolve().parents if folder.exists())
    if shutil.disk_usage(nearest).free < size_of(checkpoint):
        raise BadInput(f"-o {output}: {nearest} has less free than {size_of(checkpoint):,} bytes; free some")


def size_of(folder: Path) -> int:
    """Bytes of all files of a checkpoint."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def card_of(
    checkpoint: Path,
    folder: Path,
    *,
    scheme: str,
    report: dict[str, Any],
    before: dict[str, Any] | None,
    after: dict[str, Any] | None,
) -> dict[str, Any]:
    """What is known of the quantized checkpoint; a figure that was not measured says so."""
    unknown = "not measured: no --calibration"
    return {
        "base_model": checkpoint.resolve().name,
        "scheme": scheme,
        "command": shlex.join(["stoker", *sys.argv[1:]]),
        **report,
        "size_bytes": {"before": size_of(checkpoint), "after": size_of(folder)},
        "perplexity": {
            "before": round(before["perplexity"], 4) if before else unknown,
            "after": round(after["perplexity"], 4) if after else unknown,
        },
        "perplexity_tokens": after["tokens"] if after else 0,
        "tokens_per_s": {"before": NO_SPEED, "after": NO_SPEED},
        "engine": "untested on this kind of engine",
    }


def write_card(folder: Path, card: dict[str, Any]) -> None:
    """stoker-card.json for programs, README.md with its front matter for people."""
    (folder / "stoker-card.json").write_text(json.dumps(card, indent=2) + "\n")
    rows = "".join(f"| {name} | {one} | {two} |\n" for name, one, two in _rows(card))
    facts = "".join(f"- {name}: {json.dumps(value)}\n" for name, value in card.items() if not isinstance(value, dict))
    (folder / "README.md").write_text(
        f"---\nbase_model: {json.dumps(card['base_model'])}\ntags: [{card['scheme']}, compressed-tensors]\n---\n\n"
        f"# {card['base_model']}, {card['scheme']}\n\n| figure | before | after |\n|---|---|---|\n{rows}\n{facts}"
    )


def _rows(card: dict[str, Any]) -> list[tuple[str, object, object]]:
    names = {
        "size_bytes": "size in bytes",
        "perplexity": f"perplexity on {card['perplexity_tokens']:,} held-out tokens",
        "tokens_per_s": "tokens/s",
    }
    return [(label, card[name]["before"], card[name]["after"]) for name, label in names.items()]


def _child(python: Path, script: str, *arguments: object) -> dict[str, Any]:
    """Run a script in the quantizer's environment, show its steps, and return its report."""
    command = [str(python), "-m", f"scripts.{script}", *map(str, arguments)]
    env = {**os.environ, **CHILD_ENV, "PYTHONPATH": str(SCRIPTS.parent)}
    report: dict[str, Any] = {}
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=log, start_new_session=True)
        try:
            with bar(script, total=None) as show:
                for raw in child.stdout or ():
                    line = raw.decode(errors="replace").strip()
                    if line.startswith("{"):
                        report = json.loads(line)
                    elif found := _STEP.match(line):
                        if not stderr.is_terminal:
                            say(line)
                        show(float(found[2] or 0))
            status = child.wait()
        finally:
            stop(child, grace_s=5.0)
        log.seek(0)
        tail = "\n".join(log.read().decode(errors="replace").splitlines()[-LOG_TAIL_LINES:])
    if status == 2:
        raise BadInput(tail)
    if status or not report:
        raise Fatal(f"{script} ended with status {status}:\n{tail}")
    return report
