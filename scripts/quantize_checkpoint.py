"""Quantizes a Hugging Face checkpoint folder with llmcompressor. Run by `.venv-quantize/bin/python`.

    w8a8    int8 weights per output channel, int8 activations per token at run time: the fast one on a CPU;
            with calibration samples SmoothQuant first, without them rounded to nearest
    w4a16   int4 weights in groups, rounded to nearest: the small one; it saves memory, not time
    fp8     float8 weights per output channel, float8 activations per token at run time: for GPUs that have it
    awq     int4 weights in groups, channels that matter scaled first; needs calibration samples
    gptq    int4 weights in groups, errors made up for by the weights that follow; needs calibration samples

lm_head (often tied to the embeddings) stays as it is. The folder is written in the compressed-tensors format,
which vLLM recognises by itself: no --quantization flag. Steps are told on stdout, `quantize 3/30`; the last
line there is a report in JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from scripts.schemes import CALIBRATED, SCHEMES

IN_GROUPS = frozenset({"w4a16", "awq", "gptq"})
KEPT_AS_THEY_ARE = ["lm_head"]
# vLLM's Marlin and CPU kernels take these; the largest that divides every layer costs the least space.
GROUP_SIZES = (128, 64, 32)
# How much of the activations' range goes into the weights. docs/decisions/0015 has what was measured.
SMOOTHING = 0.8
LEAST_TOKENS = 8  # of a sequence: a shorter one says nothing of what follows what
PACKAGES = ("llmcompressor", "compressed-tensors", "torch", "transformers")


class UnsupportedCheckpointError(Exception):
    """The checkpoint does not fit the scheme, or the samples are too few; the message names what and the choices."""


def main() -> int:
    """Quantize one checkpoint; return 0, or 2 when it cannot be done as asked."""
    parser = argparse.ArgumentParser(description="Quantize a checkpoint folder.")
    parser.add_argument("checkpoint", type=Path, help="a Hugging Face folder: config.json, safetensors, tokenizer")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the checkpoint folder to write (replaced)")
    parser.add_argument("--scheme", choices=SCHEMES, required=True)
    parser.add_argument("--group-size", type=int, help="4 bits only; default: the largest of 128, 64, 32 that fits")
    parser.add_argument("--calibration", type=Path, help="JSON lines, each with `text` or `messages`")
    parser.add_argument("--samples", type=int, default=256, help="calibration sequences used at most")
    parser.add_argument("--sequence-tokens", type=int, default=512, help="tokens of a calibration sequence at most")
    arguments = parser.parse_args()
    checkpoint: Path = arguments.checkpoint
    if not (checkpoint / "config.json").is_file():
        sys.stderr.write(f"quantize_checkpoint: {checkpoint} has no config.json; name a Hugging Face folder\n")
        return 2
    say_step("load")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    try:
        sequences = (
            read_sequences(
                tokenizer, arguments.calibration, count=arguments.samples, sequence_tokens=arguments.sequence_tokens
            )
            if arguments.calibration
            else []
        )
        report = quantize(
            checkpoint,
            arguments.output,
            tokenizer=tokenizer,
            scheme=arguments.scheme,
            group_size=arguments.group_size,
            sequences=sequences,
        )
    except UnsupportedCheckpointError as error:
        sys.stderr.write(f"quantize_checkpoint: {error}\n")
        return 2
    print(json.dumps(report))  # noqa: T201
    return 0


def quantize(
    checkpoint: Path,
    output: Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    scheme: str,
    group_size: int | None = None,
    sequences: list[list[int]],
) -> dict[str, Any]:
    """Write `checkpoint` quantized by `scheme`, with its tokenizer and generation config, to the folder `output`.

    Returns what was done. The folder appears by rename when it is complete; an older one of the same name is
    replaced. Raises UnsupportedCheckpointError.
    """
    if scheme in CALIBRATED and not sequences:
        raise UnsupportedCheckpointError(f"{scheme} needs --calibration")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto", local_files_only=True)
    stored = model.dtype
    if sequences and not torch.accelerator.is_available():
        # A CPU without AVX-512 multiplies bfloat16 in software: 9 s a layer of the small model, 4,096 tokens.
        model = model.float()
    layers = _scheme(model, scheme, group_size)
    recipe = recipe_of(scheme, layers, is_calibrated=bool(sequences))
    _tell_layers(model)
    say_step("quantize")
    oneshot(model=model, recipe=recipe, **({"dataset": _batches(sequences)} if sequences else {}))
    _store_as(model, stored)
    say_step("save")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as temporary:
        folder = Path(temporary) / output.name
        folder.mkdir()
        model.save_pretrained(folder, save_compressed=True)
        tokenizer.save_pretrained(folder)
        for weights in folder.glob("*.safetensors"):
            weights.chmod(0o644)  # safetensors writes 0600; a container's user must read it too
        if output.exists():
            shutil.rmtree(output)
        folder.rename(output)
    return {
        "recipe": [type(modifier).__name__ for modifier in recipe],
        "group_size": layers.weights.group_size,
        "calibration_sequences": len(sequences),
        "calibration_tokens": sum(map(len, sequences)),
        "versions": {package: version(package) for package in PACKAGES},
    }


def recipe_of(scheme: str, layers: QuantizationScheme, *, is_calibrated: bool) -> list[Modifier]:
    """llmcompressor's standard steps for `scheme`, with what calibration samples can better if there are any."""
    how = {"config_groups": {"group_0": layers}, "ignore": KEPT_AS_THEY_ARE}
    if scheme == "gptq":
        return [GPTQModifier(**how)]
    if scheme == "awq":
        return [AWQModifier(), QuantizationModifier(**how)]
    if scheme == "w8a8" and is_calibrated:
        return [SmoothQuantModifier(smoothing_strength=SMOOTHING), QuantizationModifier(**how)]
    return [QuantizationModifier(**how)]


def read_sequences(
    tokenizer: PreTrainedTokenizerBase, file: Path, *, count: int, sequence_tokens: int
) -> list[list[int]]:
    """At most `count` sequences of token ids: a chat each, by the checkpoint's template; texts run on.

    Raises UnsupportedCheckpointError if there is none, or chats and no template.
    """
    chats, text = [], []
    for line in file.read_text().splitlines():
        sample = json.loads(line)
        if "messages" in sample:
            chats.append(sample["messages"])
        else:
            text.append(sample["text"])
    if chats and not tokenizer.chat_template:
        raise UnsupportedCheckpointError("the checkpoint has no chat template; give --calibration as text lines")
    found = [tokenizer(tokenizer.apply_chat_template(chat, tokenize=False), add_special_tokens=False) for chat in chats]
    sequences = [encoded["input_ids"][:sequence_tokens] for encoded in found]
    ids = tokenizer("\n".join(text))["input_ids"] if text else []
    sequences += [ids[at : at + sequence_tokens] for at in range(0, len(ids), sequence_tokens)]
    sequences = [sequence for sequence in sequences if len(sequence) >= LEAST_TOKENS][:count]
    if not sequences:
        raise UnsupportedCheckpointError(f"the samples hold no sequence of {LEAST_TOKENS} tokens; give more text")
    return sequences


def say_step(name: str, done: int = 0, total: int = 0) -> None:
    """One step for whoever reads stdout: `load`, or `quantize 3/30`."""
    sys.stdout.write(f"{name} {done}/{total}\n" if total else f"{name}\n")
    sys.stdout.flush()


def _store_as(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast what is not quantized back to the dtype that it came in, and the scales of 4 bits.

    Scales of 8 bits stay float32: rounded to bfloat16 they would move a weight by up to half a step.
    """
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None or scheme.weights.num_bits < 8:
            for parameter in module.parameters(recurse=False):
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def _batches(sequences: list[list[int]]) -> DataLoader[Any]:
    def batch(sequence: list[list[int]]) -> dict[str, torch.Tensor]:
        ids = torch.tensor(sequence)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return DataLoader(sequences, batch_size=1, collate_fn=batch)


def _tell_layers(model: PreTrainedModel) -> None:
    """Say how far the calibration is, by samples in the first layer and then layer by layer."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    layers = list(max(lists, key=len, default=[]))

    def teller(number: int) -> Callable[..., None]:
        told = False

        def tell(*_: object) -> None:
            nonlocal told
            if not told:
                told = True
                say_step("quantize", number, len(layers))

        return tell

    for number, layer in enumerate(layers, start=1):
        layer.register_forward_hook(teller(number))


def _scheme(model: PreTrainedModel, scheme: str, group_size: int | None) -> QuantizationScheme:
    if scheme not in IN_GROUPS:
        if group_size is not None:
            raise UnsupportedCheckpointError(f"{scheme} is per channel: leave --group-size out")
        return preset_name_to_scheme({"w8a8": "W8A8", "fp8": "FP8_DYNAMIC"}[scheme], targets=["Linear"])
    fitting = group_size if group_size is not None else _group_size(model)
    _require_fit(model, fitting)
    weights = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=fitting, symmetric=scheme != "awq")
    return QuantizationScheme(targets=["Linear"], weights=weights)


def _group_size(model: PreTrainedModel) -> int:
    for size in GROUP_SIZES:
        if all(width % size == 0 for _, width in _input_widths(model)):
            return size
    raise UnsupportedCheckpointError(f"no group size of {GROUP_SIZES} divides the width of every layer; use w8a8")


def _require_fit(model: PreTrainedModel, group_size: int) -> None:
    for name, width in _input_widths(model):
        if group_size < 1 or width % group_size:
            raise UnsupportedCheckpointError(
                f"group size {group_size} does not divide the width {width} of {name}; "
                "leave --group-size out or use w8a8"
            )


def _input_widths(model: PreTrainedModel) -> list[tuple[str, int]]:
    """Return name and input width of every layer that is quantized."""
    return [
        (name, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name not in KEPT_AS_THEY_ARE
    ]


if __name__ == "__main__":
    sys.exit(main())
