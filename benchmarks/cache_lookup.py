"""Lookups in the semantic cache's index: milliseconds a job, batched, at growing numbers of entries.

    python -m benchmarks.cache_lookup --folder BANKING77 [--sizes 1000 10000 100000]

A Chroma server of its own on a loopback port, one collection a size, SHARD lookups a request and NEIGHBOURS entries
found for each. The vectors are MiniLM's of BANKING77's lines; beyond these, mixes of two of them with noise, which lie
between and around the real ones. A query is a real vector with noise, so that none is an entry. Recall is against
exact search. Embedding is measured apart. Writes benchmarks/results/cache_lookup.json.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import chromadb
import numpy as np
from chromadb.config import Settings

from benchmarks.banking77 import EMBEDDER, read_lines
from benchmarks.paired import keep, made_with
from cache.embedder import OnnxEmbedder
from cache.score import NEIGHBOURS, Vectors
from runtime.children import spawn, stop

SHARD: Final = 64
NOISE: Final = 0.02  # in each of 384 dimensions: a cosine of 0.93 with the vector without it
QUERIES: Final = 32 * SHARD
EMBEDDED: Final = 16 * SHARD
ROUNDS: Final = 3
ROWS_AT_ONCE: Final = 1000
START_S: Final = 30.0


def main() -> None:
    """Measure, print the table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    options = parser.parse_args()
    real, lines_per_s = embedded(options.folder)
    draw = np.random.default_rng(0)
    entries = filled(real, max(options.sizes), draw)
    queries = noisy(real[draw.integers(len(real), size=QUERIES)], draw)
    print(f"embedding: {lines_per_s:.0f} lines/s", flush=True)
    rows = []
    with tempfile.TemporaryDirectory(prefix="chroma-") as folder, server(Path(folder)) as client:
        for size in options.sizes:
            rows.append(measured(client, entries[:size], queries))
            print(json.dumps(rows[-1]), flush=True)
    report = {
        "made_with": {**made_with(), "chroma": version("chromadb")},
        "lookups_a_request": SHARD,
        "neighbours": NEIGHBOURS,
        "real_vectors": len(real),
        "embedded_lines_per_s": round(lines_per_s),
        "rows": rows,
    }
    keep("cache_lookup", report)


def embedded(folder: Path) -> tuple[Vectors, float]:
    """The vectors of all lines, and how many were made a second in shards."""
    texts, embedder = read_lines(folder)[0], OnnxEmbedder(EMBEDDER)
    embedder.embed(texts[:SHARD])
    began = time.monotonic()
    for at in range(0, EMBEDDED, SHARD):
        embedder.embed(texts[at : at + SHARD])
    lines_per_s = EMBEDDED / (time.monotonic() - began)
    return embedder.embed(texts), lines_per_s


def filled(real: Vectors, count: int, draw: np.random.Generator) -> Vectors:
    """The real vectors, shuffled, then mixes of two of them with noise up to `count`."""
    missing = max(0, count - len(real))
    one, other = draw.integers(len(real), size=(2, missing))
    share = draw.uniform(0.5, 0.9, size=(missing, 1)).astype(np.float32)
    return np.concatenate((draw.permutation(real), noisy(share * real[one] + (1 - share) * real[other], draw)))


def noisy(vectors: Vectors, draw: np.random.Generator) -> Vectors:
    """The vectors with noise, of length 1 again."""
    moved = vectors + draw.normal(0, NOISE, size=vectors.shape)
    return np.asarray(moved / np.linalg.norm(moved, axis=1, keepdims=True), dtype=np.float32)


@contextmanager
def server(folder: Path) -> Iterator[Any]:
    """A client of a Chroma server that runs for this block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).with_name("chroma")
    process = spawn(
        [str(program), "run", "--path", str(folder / "rows"), "--host", "127.0.0.1", "--port", str(port)],
        env={**os.environ, "ANONYMIZED_TELEMETRY": "False"},
        log=folder / "log",
        session=False,
    )
    try:
        end = time.monotonic() + START_S
        while not answers(port):
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"Chroma did not start:\n{(folder / 'log').read_text(errors='replace')}")
            time.sleep(0.05)
        yield chromadb.HttpClient(host="127.0.0.1", port=port, settings=Settings(anonymized_telemetry=False))
    finally:
        stop(process, grace_s=10.0)


def answers(port: int) -> bool:
    """Whether something listens there."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def measured(client: Any, entries: Vectors, queries: Vectors) -> dict[str, Any]:
    """One size: writing, finding one by one and batched, recall, and a shard's own write between lookups."""
    collection = client.create_collection(
        f"entries-{len(entries)}", embedding_function=None, configuration={"hnsw": {"space": "cosine"}}
    )
    began = time.monotonic()
    for at in range(0, len(entries), ROWS_AT_ONCE):
        part = entries[at : at + ROWS_AT_ONCE]
        collection.upsert(ids=[str(at + row) for row in range(len(part))], embeddings=part)
    written_s = time.monotonic() - began
    shards = [queries[at : at + SHARD] for at in range(0, len(queries), SHARD)]
    found = [find(collection, shard)[0] for shard in shards]
    recall = statistics.mean(recalled(ids, exact(entries, shard)) for ids, shard in zip(found, shards, strict=True))
    batched = [find(collection, shard)[1] / SHARD for _ in range(ROUNDS) for shard in shards]
    single = [find(collection, query[None])[1] for query in shards[0]]
    return {
        "entries": len(entries),
        "ms_a_job_median": round(statistics.median(batched), 3),
        "ms_a_job_p95": round(float(np.percentile(batched, 95)), 3),
        "ms_one_a_request_median": round(statistics.median(single), 3),
        "recall": round(recall, 4),
        "upsert_rows_per_s": round(len(entries) / written_s),
        "upsert_of_a_shard_ms_median": round(statistics.median(written_ms(collection, shard) for shard in shards), 1),
    }


def find(collection: Any, shard: Vectors) -> tuple[list[list[str]], float]:
    """The neighbours' ids of each lookup, and the milliseconds of the request."""
    began = time.monotonic()
    found = collection.query(query_embeddings=shard, n_results=NEIGHBOURS, include=["distances"])
    return found["ids"], 1000 * (time.monotonic() - began)


def written_ms(collection: Any, shard: Vectors) -> float:
    """Milliseconds to write a shard's vectors; each call overwrites those of the one before."""
    began = time.monotonic()
    collection.upsert(ids=[f"new-{row}" for row in range(len(shard))], embeddings=shard)
    return 1000 * (time.monotonic() - began)


def exact(entries: Vectors, shard: Vectors) -> list[set[str]]:
    """The true neighbours' ids."""
    nearest = np.argpartition(-(shard @ entries.T), NEIGHBOURS - 1, axis=1)[:, :NEIGHBOURS]
    return [set(map(str, row)) for row in nearest.tolist()]


def recalled(found: list[list[str]], true: list[set[str]]) -> float:
    """The share of the true neighbours that were found."""
    return statistics.mean(len(set(ids) & nearest) / NEIGHBOURS for ids, nearest in zip(found, true, strict=True))


if __name__ == "__main__":
    main()
