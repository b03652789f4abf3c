"""What the sides of benchmarks/submit.py read: the batch file, and the same rows as each bare COPY wants them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from uuid import UUID, uuid4

import psycopg

from benchmarks.batch_lines import bodies, custom_id, line
from benchmarks.submit_sides import ROWS_A_TRANSACTION
from store.batches import finish
from store.database import Database

MODEL = "smollm2-135m"
BLOCK_BYTES = 256 * 1024
BINARY_START, BINARY_END = b"PGCOPY\n\xff\r\n\0" + bytes(8), b"\xff\xff"
# About 400 bytes, as vLLM writes it; `{}` is the job's number.
RESPONSE = (
    '{"id": "chatcmpl-{}", "object": "chat.completion", "created": 1764021600, "model": "smollm2-135m", "choices": '
    '[{"index": 0, "message": {"role": "assistant", "content": "Shipping. The parcel {} left on Friday."}, '
    '"logprobs": null, "finish_reason": "stop", "stop_reason": null}], '
    '"usage": {"prompt_tokens": 96, "total_tokens": 120, "completion_tokens": 24, "prompt_tokens_details": null}}'
)
FILL = """
    INSERT INTO results (batch_id, seq, outcome, source, status_code, response, prompt_tokens, completion_tokens,
        cached_tokens, reasoning_tokens, duration_ms)
    SELECT batch_id, seq, 'succeeded', 'engine', 200, replace(%s, '{}', seq::text), 96, 24, 0, 0, 1200
    FROM jobs WHERE batch_id = %s ORDER BY seq"""


def write_files(folder: Path, lines: int) -> dict[str, Path]:
    """A file for every side that stores."""
    folder.mkdir()
    files = {kind: folder / kind.replace(" ", "_") for kind in ("submit", "write_row", "binary blocks")}
    row_start = struct.pack(">hi16si", 4, 16, uuid4().bytes, 4)
    with (
        files["submit"].open("w") as batch,
        files["write_row"].open("w") as rows,
        files["binary blocks"].open("wb") as blocks,
    ):
        block = bytearray(BINARY_START)
        for seq, body in enumerate(bodies(lines, model=MODEL)):
            name, encoded = custom_id(seq), body.encode()
            batch.write(line(seq, body))
            rows.write(f"{name}\t{body}\n")
            block += row_start + struct.pack(">ii", seq, len(name)) + name.encode()
            block += struct.pack(">i", len(encoded)) + encoded
            ends = (seq + 1) % ROWS_A_TRANSACTION == 0 or seq + 1 == lines
            if ends:
                block += BINARY_END
            if ends or len(block) >= BLOCK_BYTES:
                blocks.write(len(block).to_bytes(4, "big") + block + (bytes(4) if ends else b""))
                block = bytearray(BINARY_START if ends else b"")
    return files


def fill_results(url: str, batch_id: UUID) -> None:
    """Give every job of a batch a result, by one statement, and end the batch as the leader does."""
    json.loads(RESPONSE)  # what is stored must be JSON
    with psycopg.connect(url) as connection:
        connection.execute(FILL, (RESPONSE, batch_id))
        connection.execute(
            "UPDATE shards SET state = 'done', done = cardinality(seqs) WHERE batch_id = %s", (batch_id,)
        )
        connection.execute("UPDATE batches SET state = 'finalizing', shards_left = 0 WHERE id = %s", (batch_id,))
    database = Database(url, pool_size=1)
    with database.transaction() as session:
        finish(session, batch_id)
    database.close()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("VACUUM (ANALYZE) jobs, results, shards, batches")
        connection.execute("CHECKPOINT")
