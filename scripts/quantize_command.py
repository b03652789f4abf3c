"""`stoker quantize`: checks, then children in .venv-quantize, then two engines, then the card.

It never imports torch or vLLM.
"""

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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from inference.checkpoints import has_experts, quantization_of
from inference.engines import has_gpu
from runtime.children import spawn, stop
from runtime.errors import EXIT_INTERRUPTED, BadInput, Fatal, StokerError
from runtime.settings import EngineSettings, Settings
from scripts.calibration import LEAST_CHARACTERS, LEAST_LINES, Sample, read_samples, split, write_samples
from scripts.checkpoint_card import Card, not_measured, rows_of, size_of, write_card
from scripts.checkpoint_speed import compare_speed
from scripts.schemes import CALIBRATED, ON_AN_ACCELERATOR, SCHEMES
from scripts.terminal import bar, emit_table, say, stderr

REPOSITORY = Path(__file__).parent.parent
QUANTIZER = ".venv-quantize/bin/python"
LOG_TAIL_LINES = 15
# Without progress bars, and never to a network. The log stays on: GPTQ needs the level that it defines.
CHILD_ENV = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
HELD_OUT_SHARE = 2  # held-out sequences that the perplexity takes: --samples divided by this
_LACKING = re.compile(r"^ModuleNotFoundError: No module named '(\w+)", re.MULTILINE)
_STEP = re.compile(r"^(\w+)(?: (\d+)/(\d+))?$")


@dataclass(frozen=True, slots=True)
class Order:
    """What to make of which checkpoint, and with what."""

    checkpoint: Path
    scheme: str
    calibration: Path | None
    samples: int
    sequence_tokens: int
    python: Path
    engine: EngineSettings | None
    """None: do not measure the speed."""


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--scheme",
    type=click.Choice(SCHEMES),
    required=True,
    help="4 bits (gptq, awq, w4a16) give memory; w8a8, and fp8 on a GPU that has it, tokens/s too: docs/quantize.md.",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="Text lines or a JSONL batch file of chats, like what you will run: at least "
    f"{LEAST_LINES} lines and {LEAST_CHARACTERS:,} characters. A fifth is held out and judges the result.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The folder to write.")
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Sequences to calibrate with at most; half as many judge.",
)
@click.option(
    "--sequence-tokens", type=click.IntRange(min=16), default=512, show_default=True, help="Tokens of a sequence."
)
@click.option("--speed/--no-speed", default=True, help="Measure tokens/s before and after, with an engine for each.")
@click.option(
    "--python",
    type=click.Path(path_type=Path),
    default=REPOSITORY / QUANTIZER,
    show_default=QUANTIZER,
    help="The Python that has llmcompressor, as `make quantize-env` makes it.",
)
@click.pass_obj
def quantize(
    settings: Settings,
    checkpoint: Path,
    scheme: str,
    calibration: Path | None,
    output: Path,
    samples: int,
    sequence_tokens: int,
    speed: bool,
    python: Path,
) -> None:
    """Quantize CHECKPOINT, a Hugging Face folder, and say what it costs: size, perplexity on your text, tokens/s."""
    check(checkpoint, output, scheme=scheme, calibration=calibration)
    parts = split(read_samples(calibration)) if calibration else None
    if not python.exists():
        raise BadInput(f"the quantizer's environment is missing: no {python}; run `make quantize-env`")
    engine = settings.engine if speed else None
    order = Order(checkpoint, scheme, calibration, samples, sequence_tokens, python, engine)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        with _workspace(output) as folder:
            card = make(order, folder, parts=parts)
            write_card(folder, card, source=checkpoint)
            output.parent.mkdir(parents=True, exist_ok=True)
            if output.exists():
                output.rmdir()  # empty: checked
            folder.rename(output)
    except KeyboardInterrupt:
        say(f"interrupted; nothing was written to {output}")
        sys.exit(EXIT_INTERRUPTED)
    emit_table(f"{output} ({scheme})", ("figure", "before", "after"), rows_of(card))
    say(f"a worker serves it with STOKER_ENGINE__CHECKPOINT={output}")


@contextmanager
def _workspace(output: Path) -> Iterator[Path]:
    """Where to write the checkpoint until it is whole: in the nearest folder that there is, so on the same disk."""
    try:
        temporary = tempfile.TemporaryDirectory(dir=_nearest(output), prefix=f".{output.name}-")
    except OSError as error:
        raise BadInput(f"-o {output}: nothing can be written there: {error.strerror}; name another folder") from error
    with temporary as name:
        yield Path(name) / output.name


def _nearest(output: Path) -> Path:
    return next(folder for folder in output.resolve().parents if folder.exists())


def check(checkpoint: Path, output: Path, *, scheme: str, calibration: Path | None) -> None:
    """Raise BadInput, with the remedy, for what can be known before anything is loaded."""
    if checkpoint.suffix == ".gguf":
        raise BadInput(f"CHECKPOINT {checkpoint} is a GGUF: take the Hugging Face folder that it was made from")
    if not checkpoint.is_dir():
        raise BadInput(
            f"CHECKPOINT {checkpoint}: there is no such folder here; nothing is fetched from a hub: download the "
            "model's folder first (config.json, *.safetensors, tokenizer.json, …) and name it"
        )
    if not (checkpoint / "config.json").is_file():
        raise BadInput(f"CHECKPOINT {checkpoint} has no config.json; name a Hugging Face folder")
    if has_experts(checkpoint):
        raise BadInput(
            f"CHECKPOINT {checkpoint} is a mixture of experts: whether their weights would be quantized, and the "
            "router left alone, is not tested; take one that its makers have quantized"
        )
    method = quantization_of(checkpoint)
    if method:
        raise BadInput(f"CHECKPOINT {checkpoint} is quantized already ({method}); take the 16-bit one")
    _check_scheme(scheme, calibration)
    _check_output(checkpoint, output)


def _check_scheme(scheme: str, calibration: Path | None) -> None:
    if scheme in ON_AN_ACCELERATOR and not has_gpu():
        raise BadInput(
            f"--scheme {scheme} needs a GPU: llmcompressor's search cannot run without one, and nvidia-smi lists none; "
            "run it on a GPU machine, or take --scheme gptq or w4a16, which make 4-bit weights here"
        )
    if scheme in CALIBRATED and calibration is None:
        raise BadInput(f"--scheme {scheme} needs --calibration FILE: text lines or a JSONL batch file of chats")


def _check_output(checkpoint: Path, output: Path) -> None:
    if output.resolve().is_relative_to(checkpoint.resolve()):
        raise BadInput(f"-o {output} lies inside the checkpoint; name a folder beside it")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise BadInput(f"-o {output} exists and is not empty; name another folder, or remove it")
    nearest = _nearest(output)
    if shutil.disk_usage(nearest).free < size_of(checkpoint):
        raise BadInput(f"-o {output}: {nearest} has less free than {size_of(checkpoint):,} bytes; free some")


def make(order: Order, folder: Path, *, parts: tuple[list[Sample], list[Sample]] | None) -> Card:
    """Write the quantized checkpoint to `folder` and measure it against its source; files beside it are scratch.

    Raises BadInput or Fatal when the quantizer fails, not when only the speed cannot be measured: the card says why.
    """
    flags = ["--sequence-tokens", str(order.sequence_tokens)]
    made_with = list(flags)
    if parts:
        file = write_samples(folder.parent / "calibration.jsonl", parts[0])
        made_with += ["--calibration", str(file), "--samples", str(order.samples)]
    digest = _digest(order.calibration) if order.calibration else None
    goal = ["-o", folder, "--scheme", order.scheme]
    report = _child(order.python, "quantize_checkpoint", order.checkpoint, *goal, *made_with, scratch=folder.parent)
    perplexity, tokens = not_measured("no --calibration"), 0
    if parts:
        held_out = write_samples(folder.parent / "held-out.jsonl", parts[1])
        flags += ["--sequences", str(max(1, order.samples // HELD_OUT_SHARE))]
        perplexity, tokens = _perplexity(order, folder, held_out, flags)
    return {
        "base_model": order.checkpoint.resolve().name,
        "scheme": order.scheme,
        "command": shlex.join(["stoker", *sys.argv[1:]]),
        **report,
        "calibration_sha256": digest,
        "size_bytes": {"before": size_of(order.checkpoint), "after": size_of(folder)},
        "perplexity": perplexity,
        "perplexity_tokens": tokens,
        "tokens_per_s": _speed(order, folder),
    }


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _perplexity(order: Order, folder: Path, held_out: Path, flags: list[str]) -> tuple[dict[str, Any], int]:
    found: dict[str, Any] = {}
    failure: Fatal | None = None
    try:
        for side, checkpoint in (("after", folder), ("before", order.checkpoint)):
            found[side] = _child(order.python, "perplexity", checkpoint, held_out, *flags, scratch=folder.parent)
    except Fatal as error:  # most often memory: what was made stays
        failure = error
    if "after" in found and not found["after"]["quantized_layers"]:
        raise Fatal("the written checkpoint was loaded without a quantized layer: it is not kept")
    if failure is not None:
        return _given_up("perplexity", failure, folder), 0
    return {side: round(found[side]["perplexity"], 4) for side in ("before", "after")}, found["after"]["tokens"]


def _speed(order: Order, folder: Path) -> dict[str, Any]:
    if order.engine is None:
        return not_measured("--no-speed")
    try:
        with bar("speed", total=1.0) as show:
            say("speed: starting the engines")
            return compare_speed(order.checkpoint, folder, engine=order.engine, show=show).as_card()
    except StokerError as error:
        return _given_up("speed", error, folder)


def _given_up(what: str, error: StokerError, folder: Path) -> dict[str, Any]:
    """A figure that is left out, and why: said to the user, and in short on the card."""
    say(f"the {what} is not measured: {error}")
    return not_measured(str(error).partition("\n")[0].rstrip(":").replace(str(folder), folder.name))


def _child(python: Path, script: str, *arguments: object, scratch: Path) -> dict[str, Any]:
    """Run a script in the quantizer's environment, show its steps, and return its report; it dies with us."""
    command = [str(python), "-m", f"scripts.{script}", *map(str, arguments)]
    env = {**os.environ, **CHILD_ENV, "PYTHONPATH": str(REPOSITORY)}
    log = scratch / f"{script}.log"
    child = spawn(command, env=env, log=log, session=True, stdout=subprocess.PIPE)
    try:
        report = _report(child, script)
        status = child.wait()
    finally:
        stop(child, grace_s=5.0)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])
    if status == 2:
        raise BadInput(tail)
    if lacking := _LACKING.search(tail):
        raise BadInput(
            f"{python} has no {lacking[1]}; run `make quantize-env`, or name a Python that has llmcompressor"
        )
    if status or not report:
        raise Fatal(f"{script} ended with status {status}:\n{tail}")
    return report


def _report(child: subprocess.Popen[bytes], script: str) -> dict[str, Any]:
    """Show the steps that the child tells until its stdout ends; its last line in JSON, or nothing."""
    report: dict[str, Any] = {}
    with bar(script.replace("_", " "), total=1.0) as show:
        for raw in child.stdout or ():
            line = raw.decode(errors="replace").strip()
            if line.startswith("{"):
                report = json.loads(line)
            elif found := _STEP.match(line):
                if not stderr.is_terminal:
                    say(line)
                show(int(found[2]) / int(found[3]) if found[2] else 0.0)
    return report
