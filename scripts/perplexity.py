"""Prints the perplexity of a checkpoint folder on texts, as JSON. Run by `.venv-quantize/bin/python`.

The folder is loaded as it lies on disk. A quantized one is run quantized: transformers takes the stored
integers with their scales, and compressed-tensors rounds activations in every forward pass where the scheme
says so. What is computed beside that is computed in float32, on both sides of a comparison.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from scripts.quantize_checkpoint import read_sequences, say_step


def main() -> int:
    """Print `{"perplexity": …, "tokens": …, "quantized_layers": …}` as the last line."""
    parser = argparse.ArgumentParser(description="Perplexity of a checkpoint folder on texts.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("samples", type=Path, help="JSON lines, each with `text` or `messages`")
    parser.add_argument("--sequences", type=int, default=64, help="sequences read at most")
    parser.add_argument("--sequence-tokens", type=int, default=512)
    arguments = parser.parse_args()
    say_step("load")
    model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=torch.float32, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint, local_files_only=True)
    sequences = read_sequences(
        tokenizer, arguments.samples, count=arguments.sequences, sequence_tokens=arguments.sequence_tokens
    )
    print(json.dumps(_measured(model, sequences)))  # noqa: T201
    return 0


def _measured(model: PreTrainedModel, sequences: list[list[int]]) -> dict[str, Any]:
    model.eval()
    loss, tokens = 0.0, 0
    with torch.inference_mode():
        for number, sequence in enumerate(sequences, start=1):
            ids = torch.tensor([sequence], device=model.device)
            logits = model(input_ids=ids).logits[0, :-1].float()
            loss += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            tokens += len(sequence) - 1
            say_step("evaluate", number, len(sequences))
    layers = sum(getattr(module, "quantization_scheme", None) is not None for module in model.modules())
    return {"perplexity": math.exp(loss / tokens), "tokens": tokens, "quantized_layers": layers}


if __name__ == "__main__":
    sys.exit(main())
