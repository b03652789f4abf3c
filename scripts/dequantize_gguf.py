"""Turns a Llama-architecture GGUF into a Hugging Face checkpoint folder in bfloat16.

Run by `.venv-quantize/bin/python`. vLLM and llmcompressor want safetensors; transformers reads a GGUF but
will not save it. What the GGUF's quantization lost stays lost: this only changes the container.

Tensor names are those of llama.cpp's gguf-py (`TENSOR_NAMES`). The GGUF keeps the rows of q_proj and k_proj
in the order of Meta's original rotary code (pairs next to each other); Hugging Face's Llama wants halves.
The permutation is `LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py; its inverse, `unpermute` here,
is the one in transformers' modeling_gguf_pytorch_utils.py
(`LlamaTensorProcessor._reverse_permute_weights`).

The tokenizer is rebuilt from the GGUF's vocabulary and merges, not by `AutoTokenizer(gguf_file=...)`: that
one (transformers 5.17) ends texts with <|im_start|>, drops the digit splitting of "smollm" and turns U+2581
into a space when decoding.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

FIXED_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL, in tokenizer.ggml.token_type
LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


class UnsupportedCheckpointError(Exception):
    """The GGUF holds something that this converter does not know; the message names it."""


def main() -> int:
    """Convert one GGUF; return 0, or 2 when the file cannot be converted."""
    parser = argparse.ArgumentParser(description="Turn a Llama GGUF into a bfloat16 Hugging Face checkpoint folder.")
    parser.add_argument("gguf", type=Path, help="the GGUF file")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the checkpoint folder to write (replaced)")
    arguments = parser.parse_args()
    gguf: Path = arguments.gguf
    output: Path = arguments.output
    if not gguf.is_file():
        sys.stderr.write(f"dequantize_gguf: there is no file {gguf}; `make checkpoint` fetches the demo one\n")
        return 2
    try:
        convert(gguf, output)
    except UnsupportedCheckpointError as error:
        sys.stderr.write(f"dequantize_gguf: {error}\n")
        return 2
    sys.stderr.write(f"written: {output}\n")
    return 0


def convert(gguf: Path, output: Path) -> None:
    """Write config, weights, tokenizer, chat template and generation config of `gguf` to the folder `output`.

    The folder appears by rename when it is complete; an older one of the same name is replaced. Raises
    UnsupportedCheckpointError.
    """
    reader = GGUFReader(gguf)
    config = _config(reader)
    tensors = _tensors(reader, config)
    tokenizer = _tokenizer(reader)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as temporary:
        folder = Path(temporary) / output.name
        folder.mkdir()
        config.save_pretrained(folder)
        GenerationConfig(
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        ).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        weights = folder / "model.safetensors"
        save_file(tensors, weights, metadata={"format": "pt"})
        weights.chmod(0o644)  # safetensors writes 0600; a container's user must read it too
        if output.exists():
            shutil.rmtree(output)
        folder.rename(output)


def unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Return `weight` (heads * head size, width) with each head's rows in Hugging Face's rotary order."""
    pairs = weight.shape[0] // heads // 2
    return weight.reshape(heads, pairs, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def _config(reader: GGUFReader) -> LlamaConfig:
    architecture = _field(reader, "general.architecture")
    if architecture != "llama":
        raise UnsupportedCheckpointError(f"architecture {architecture!r}; only 'llama' is known here")
    if _field(reader, "llama.rope.scaling.type", default="none") != "none":
        raise UnsupportedCheckpointError("a scaled rotary embedding (llama.rope.scaling.type) is not known here")
    names = {tensor.name for tensor in reader.tensors}
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        vocab_size=len(_field(reader, "tokenizer.ggml.tokens")),
        hidden_size=_field(reader, "llama.embedding_length"),
        intermediate_size=_field(reader, "llama.feed_forward_length"),
        num_hidden_layers=_field(reader, "llama.block_count"),
        num_attention_heads=_field(reader, "llama.attention.head_count"),
        num_key_value_heads=_field(reader, "llama.attention.head_count_kv"),
        max_position_embeddings=_field(reader, "llama.context_length"),
        rms_norm_eps=_field(reader, "llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": _field(reader, "llama.rope.freq_base", default=10000.0),
        },
        tie_word_embeddings="output.weight" not in names,
        bos_token_id=_field(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=_field(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=_field(reader, "tokenizer.ggml.padding_token_id"),
    )


def _tokenizer(reader: GGUFReader) -> PreTrainedTokenizerFast:
    """Return the byte-level BPE tokenizer, with its chat template.

    Digits stand alone, as llama.cpp's LLAMA_VOCAB_PRE_TYPE_SMOLLM and the original tokenizer.json have it.
    """
    kind = (_field(reader, "tokenizer.ggml.model"), _field(reader, "tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise UnsupportedCheckpointError(f"tokenizer {kind!r}; only ('gpt2', 'smollm') is known here")
    tokens = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    token_types = _field(reader, "tokenizer.ggml.token_type")
    control = [token for token, token_type in zip(tokens, token_types, strict=True) if token_type == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[_field(reader, "tokenizer.ggml.bos_token_id")],
        eos_token=tokens[_field(reader, "tokenizer.ggml.eos_token_id")],
        unk_token=tokens[_field(reader, "tokenizer.ggml.unknown_token_id")],
        pad_token=tokens[_field(reader, "tokenizer.ggml.padding_token_id")],
        model_max_length=_field(reader, "llama.context_length"),
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = _field(reader, "tokenizer.chat_template")
    return fast


def _field(reader: GGUFReader, name: str, **fallback: Any) -> Any:
    """Return the metadata value `name`, or `default=` where it is absent; without one absence is an error."""
    field = reader.get_field(name)
    if field is not None:
        return field.contents()
    if "default" in fallback:
        return fallback["default"]
    raise UnsupportedCheckpointError(f"the GGUF lacks the metadata {name!r}")


def _tensors(reader: GGUFReader, config: LlamaConfig) -> dict[str, torch.Tensor]:
    """Return all weights in bfloat16 under their Hugging Face names."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    tensors: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        layer = LAYER_TENSOR.fullmatch(tensor.name)
        if tensor.name in FIXED_NAMES:
            name, kind = FIXED_NAMES[tensor.name], ""
        elif layer and layer[2] in LAYER_NAMES:
            name, kind = f"model.layers.{layer[1]}.{LAYER_NAMES[layer[2]]}.weight", layer[2]
        else:
            raise UnsupportedCheckpointError(f"unknown tensor {tensor.name!r}")
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if kind in heads:
            weight = unpermute(weight, heads[kind])
        tensors[name] = weight.to(torch.bfloat16).contiguous()
    return tensors


if __name__ == "__main__":
    sys.exit(main())
