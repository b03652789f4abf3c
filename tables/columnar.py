"""Parquet and Arrow files: their schema and rows from what stands in them, their batches in flat memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

# Measured on one row group of 8,000,000 rows (93 MB): without a buffer size the whole column chunks are read (186 MB of
# memory at the most), with 64 KB to 1 MB it stays at 98-104 MB, of which 85 MB are pyarrow itself; no slower.
BUFFER_BYTES: Final = 1 << 18
ARROW_MAGIC: Final = b"ARROW1"
PROBED_ROWS: Final = 64


def parquet_schema(file: Path) -> tuple[pa.Schema, int]:
    """Schema and rows, from the footer."""
    with _parquet(file) as opened:
        return opened.schema_arrow, opened.metadata.num_rows


def parquet_batches(file: Path, names: Sequence[str], *, batch_rows: int, batch_bytes: int) -> Iterator[pa.RecordBatch]:
    """Batches of the columns `names`: `batch_rows` rows, or fewer where rows are wide.

    How wide is seen at the first PROBED rows of each row group: the footer's sizes are of encoded values, and a
    dictionary of long texts is small there.
    """
    with _parquet(file) as opened:
        for number in range(opened.metadata.num_row_groups):
            # A name is taken as the beginning of a path too: `a` brings `a.b` along, which the caller drops.
            batches = partial(opened.iter_batches, row_groups=[number], columns=list(names), use_threads=False)
            probed = next(batches(PROBED_ROWS), None)
            if probed is None or not probed.num_rows:
                continue
            rows = max(1, min(batch_rows, batch_bytes * probed.num_rows // max(1, probed.nbytes)))
            yield from batches(rows)


@contextmanager
def _parquet(file: Path) -> Iterator[pq.ParquetFile]:
    with pq.ParquetFile(file, pre_buffer=False, buffer_size=BUFFER_BYTES) as opened:
        yield opened


def arrow_schema(file: Path) -> tuple[pa.Schema, int]:
    """Schema and rows of the file format or the stream format; a stream is walked through for its rows."""
    with pa.memory_map(str(file)) as source:
        if _is_stream(file):
            with pa.ipc.open_stream(source) as stream:
                schema = stream.schema
            return schema, sum(batch.num_rows for batch in arrow_batches(file, schema.names[:1]))
        with pa.ipc.open_file(source) as opened:
            schema = opened.schema
            return schema, sum(batch.num_rows for batch in arrow_batches(file, schema.names[:1]))


def arrow_batches(file: Path, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The batches as the file has them, only the columns `names`; mapped, so what is not compressed is not copied."""
    with pa.memory_map(str(file)) as source:
        if _is_stream(file):
            with pa.ipc.open_stream(source) as stream:
                fields = [stream.schema.get_field_index(name) for name in names if name in stream.schema.names]
            source.seek(0)
            with pa.ipc.open_stream(source, options=pa.ipc.IpcReadOptions(included_fields=fields)) as stream:
                yield from stream
        else:
            with pa.ipc.open_file(source) as opened:
                fields = [opened.schema.get_field_index(name) for name in names if name in opened.schema.names]
            with pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=fields)) as opened:
                for number in range(opened.num_record_batches):
                    yield opened.get_batch(number)


def _is_stream(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(ARROW_MAGIC)) != ARROW_MAGIC
