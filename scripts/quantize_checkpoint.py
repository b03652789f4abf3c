"""Quantizes a Hugging Face checkpoint folder with llmcompressor, without calibration samples.

Run by `.venv-quantize/bin/python`. Both schemes round to nearest, so no sample texts are needed:

    w8a8    int8 weights per output channel, int8 activations per token at run time: the fast one on a CPU
    w4a16   int4 weights in groups, bfloat16 activations: the small one; it saves memory, not time

lm_head (often tied to the embeddings) stays as it is. The folder is written in the compressed-tensors
format, which vLLM recognises by itself: no --quantization flag.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

SCHEMES = ("w8a8", "w4a16")
KEPT_AS_THEY_ARE = ["lm_head"]
# vLLM's Marlin and CPU kernels take these; the largest that divides every layer costs the least space.
GROUP_SIZES = (128, 64, 32)


class UnsupportedCheckpointError(Exception):
    """The checkpoint does not fit the scheme; the message names the layer and the choices."""


def main() -> int:
    """Quantize one checkpoint; return 0, or 2 when it cannot be done as asked."""
    parser = argparse.ArgumentParser(description="Quantize a checkpoint folder, without calibration samples.")
    parser.add_argument("checkpoint", type=Path, help="a Hugging Face folder: config.json, safetensors, tokenizer")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the checkpoint folder to write (replaced)")
    parser.add_argument("--scheme", choices=SCHEMES, required=True)
    parser.add_argument("--group-size", type=int, help="w4a16 only; default: the largest of 128, 64, 32 that fits")
    arguments = parser.parse_args()
    checkpoint: Path = arguments.checkpoint
    output: Path = arguments.output
    if not (checkpoint / "config.json").is_file():
        sys.stderr.write(f"quantize_checkpoint: {checkpoint} has no config.json; name a Hugging Face folder\n")
        return 2
    try:
        quantize(checkpoint, output, scheme=arguments.scheme, group_size=arguments.group_size)
    except UnsupportedCheckpointError as error:
        sys.stderr.write(f"quantize_checkpoint: {error}\n")
        return 2
    sys.stderr.write(f"written: {output}\n")
    return 0


def quantize(checkpoint: Path, output: Path, *, scheme: str, group_size: int | None = None) -> None:
    """Write `checkpoint` quantized by `scheme`, with tokenizer and generation config, to the folder `output`.

    The folder appears by rename when it is complete; an older one of the same name is replaced. Raises
    UnsupportedCheckpointError.
    """
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto", local_files_only=True)
    modifier = QuantizationModifier(
        config_groups={"group_0": _scheme(model, scheme, group_size)}, ignore=KEPT_AS_THEY_ARE
    )
    oneshot(model=model, recipe=modifier)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as temporary:
        folder = Path(temporary) / output.name
        folder.mkdir()
        model.save_pretrained(folder, save_compressed=True)
        AutoTokenizer.from_pretrained(checkpoint, local_files_only=True).save_pretrained(folder)
        for weights in folder.glob("*.safetensors"):
            weights.chmod(0o644)  # safetensors writes 0600; a container's user must read it too
        if output.exists():
            shutil.rmtree(output)
        folder.rename(output)


def _scheme(model: PreTrainedModel, scheme: str, group_size: int | None) -> QuantizationScheme:
    if scheme == "w8a8":
        if group_size is not None:
            raise UnsupportedCheckpointError("w8a8 is per channel: leave --group-size out")
        return preset_name_to_scheme("W8A8", targets=["Linear"])
    fitting = group_size if group_size is not None else _group_size(model)
    _require_fit(model, fitting)
    weights = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=fitting, symmetric=True)
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
