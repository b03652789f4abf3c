"""A checkpoint without weights: a config of a well-known size and a real tokenizer, for `--load-format dummy`.

No model hub is needed. Answers are noise; speed and memory are those of a model of this shape.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a Llama: layers, widths, heads, and the vocabulary where it is not the tokenizer's."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int = 49152


SHAPES: Final = {
    "7b": Shape(layers=28, hidden=3584, intermediate=18944, heads=28, kv_heads=4, vocabulary=152064),  # as Qwen2.5-7B
    "0.5b": Shape(layers=24, hidden=896, intermediate=4864, heads=14, kv_heads=2, vocabulary=151936),  # as Qwen2.5-0.5B
    "tiny": Shape(layers=2, hidden=64, intermediate=128, heads=2, kv_heads=1),
}
# What llmcompressor writes for W4A16: groups of 128 weights, packed.
FOUR_BIT: Final[dict[str, Any]] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "format": "pack-quantized",
            "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True},
        }
    },
}


def write_dummy(folder: Path, shape: Shape, *, tokenizer: Path, four_bit: bool = False) -> Path:
    """The checkpoint's folder; `tokenizer` is a folder with one whose vocabulary is not larger."""
    folder.mkdir(parents=True, exist_ok=True)
    source = json.loads((tokenizer / "config.json").read_text())
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.hidden // shape.heads,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "vocab_size": shape.vocabulary,
        **{name: source.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        **({"quantization_config": FOUR_BIT} if four_bit else {}),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name in TOKENIZER_FILES:
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, folder / name)
    return folder
