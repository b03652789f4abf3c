"""Texts as vectors: all-MiniLM-L6-v2 in int8 on the CPU.

It must not fetch anything: `make embedder` does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import onnxruntime
from tokenizers import Encoding, Tokenizer

from cache.score import Vectors
from runtime.errors import BadInput

MOST_TOKENS: Final = 256  # what MiniLM was trained on; a longer text is cut
# Padding included: what fits the processor's cache. CPU of one thread for passages of 20 to 190 tokens: 34 ms each, 55
# with 4,096 tokens at once; for payloads of 5 to 15: 3.7 and 4.7.
TOKENS_AT_ONCE: Final = 512


class OnnxEmbedder:
    """A sentence encoder from a folder with model.onnx and tokenizer.json: mean of the tokens' vectors."""

    def __init__(self, folder: Path, *, threads: int = 2) -> None:
        model, tokens = folder / "model.onnx", folder / "tokenizer.json"
        if not (model.is_file() and tokens.is_file()):
            raise BadInput(f"no embedder in {folder}: it needs model.onnx and tokenizer.json; run `make embedder`")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.enable_cpu_mem_arena = False  # it would keep what the largest batch needed: 0.9 GB after long texts
        # Threads that spin between shards take a third more CPU, beside an engine that wants it (measured).
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        self._inputs = {entry.name for entry in self._session.get_inputs()}
        self._tokenizer = Tokenizer.from_file(str(tokens))
        self._tokenizer.enable_truncation(MOST_TOKENS)
        self._tokenizer.no_padding()
        with model.open("rb") as weights:
            self._id = f"onnx-{hashlib.file_digest(weights, 'sha256').hexdigest()[:16]}"

    @property
    def id(self) -> str:
        """Of the weights."""
        return self._id

    def embed(self, texts: Sequence[str]) -> Vectors:
        """One vector of length 1 for each text, in order: float32, (texts, dimensions).

        Texts of like length are computed together: 40 to 50 a second unsorted, 67 to 84 sorted."""
        encoded = self._tokenizer.encode_batch(list(texts))
        order = sorted(range(len(texts)), key=lambda at: len(encoded[at].ids))
        if not order:
            return np.zeros((0, 0), np.float32)
        parts = _parts(order, [len(encoded[at].ids) for at in order])
        found = np.concatenate([self._run([encoded[at] for at in part]) for part in parts])
        placed = np.empty_like(found)
        placed[order] = found
        return placed

    def _run(self, part: Sequence[Encoding]) -> Vectors:
        longest = max(len(text.ids) for text in part)
        ids = np.zeros((len(part), longest), np.int64)
        mask = np.zeros_like(ids)
        for row, text in enumerate(part):
            ids[row, : len(text.ids)] = text.ids
            mask[row, : len(text.ids)] = 1
        given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        hidden = self._session.run(None, {name: given[name] for name in self._inputs})[0]
        means = (hidden * mask[..., None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
        return np.asarray(means / np.linalg.norm(means, axis=1, keepdims=True), dtype=np.float32)


def _parts(order: Sequence[int], lengths: Sequence[int]) -> Iterator[Sequence[int]]:
    """The places in parts that are computed together; lengths ascend, so each part's last one is its longest."""
    start = 0
    for at, length in enumerate(lengths):
        if at > start and (at - start + 1) * length > TOKENS_AT_ONCE:
            yield order[start:at]
            start = at
    yield order[start:]
