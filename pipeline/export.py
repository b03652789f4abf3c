"""Result files: the contract's output and error lines, in input order, and the manifest beside them.

Lines are joined from stored text without parsing the responses; memory does not grow with the batch.
"""

from __future__ import annotations

import importlib.metadata
import json
import time
from collections.abc import Iterator
from typing import Any, BinaryIO
from uuid import UUID

import msgspec

from models.money import plain
from models.names import batch_name, request_name
from models.states import Outcome
from pipeline.cost_figures import endpoint_figures
from pipeline.ledger import ledger_of_batch
from store.batches import BatchProgress, batch_progress
from store.database import Database
from store.results import ResultRow, engines_of, result_pages

FOLLOW_S = 0.5


def write_lines(
    database: Database, batch_id: UUID, *, output: BinaryIO | None, errors: BinaryIO | None
) -> tuple[int, int]:
    """Write what has finished by now: answers to `output`, failed jobs to `errors`; how many of each there were."""
    answered = failed = 0
    for page in result_pages(database, batch_id):
        good = [line(batch_id, row) for row in page if row.outcome is not Outcome.FAILED]
        bad = [line(batch_id, row) for row in page if row.outcome is Outcome.FAILED]
        answered, failed = answered + len(good), failed + len(bad)
        if output is not None:
            output.write(b"".join(good))
        if errors is not None:
            errors.write(b"".join(bad))
    return answered, failed


def input_line(endpoint: str, custom_id: str, body: str, stoker: str | None) -> bytes:
    """One line of a batch file that would make this job again, newline included."""
    ours = "" if stoker is None else f',"stoker":{_one_line(stoker)}'
    return (
        f'{{"custom_id":{_json(custom_id)},"method":"POST","url":"{endpoint}","body":{_one_line(body)}{ours}}}\n'
    ).encode()


def follow_lines(database: Database, batch_id: UUID, *, tenant: str) -> Iterator[tuple[Outcome, bytes]]:
    """Every line of a batch in input order, each as soon as all before it have finished; ends with the batch.

    A batch that is paused is waited for.
    """
    next_seq = 0
    while True:
        with database.transaction() as session:
            is_ended = batch_progress(session, batch_id, tenant=tenant).is_ended
        for row in _gapless(database, batch_id, next_seq=next_seq):
            yield row.outcome, line(batch_id, row)
            next_seq = row.seq + 1
        if is_ended:
            return
        time.sleep(FOLLOW_S)


def line(batch_id: UUID, row: ResultRow) -> bytes:
    """One line of a result file, newline included; our extras stand under `stoker`."""
    name = request_name(batch_id, row.seq)
    response, error = "null", "null"
    if row.response is not None:
        response = f'{{"status_code":{row.status_code},"request_id":"{name}","body":{_one_line(row.response)}}}'
    else:
        error = _json({"code": row.error_code, "message": row.error_message})
    return (
        f'{{"id":"{name}","custom_id":{_json(row.custom_id)},"response":{response},"error":{error},'
        f'"stoker":{{"outcome":"{row.outcome.value}","source":"{row.source}"{_origin(row)}{_usage(row)}{_cost(row)}{_members(row)}}}}}\n'
    ).encode()


def manifest(database: Database, progress: BatchProgress) -> dict[str, Any]:
    """What made these results: input, settings, every engine with version, flags and checkpoint digest, counts.

    `endpoints`: what each engine and endpoint did, and what those ask that bill tokens.
    """
    with database.transaction() as session:
        engines = engines_of(session, progress.id)
        costs = endpoint_figures(ledger_of_batch(session, progress.id))
    return {
        "batch": batch_name(progress.id),
        "state": progress.state.value,
        "endpoint": progress.endpoint,
        "input": progress.options,
        "max_output_tokens": progress.max_output_tokens,
        "engines": engines,
        "jobs": {
            "total": progress.total,
            "done": progress.done,
            "succeeded": progress.succeeded,
            "failed": progress.failed,
            "truncated": progress.truncated,
            "empty": progress.empty,
            "followers": progress.followers,
        },
        "tokens": {
            "prompt": progress.prompt_tokens,
            "completion": progress.completion_tokens,
            "cached": progress.cached_tokens,
            "reasoning": progress.reasoning_tokens,
        },
        "endpoints": costs,
        "times": {
            name: moment.isoformat() if moment else None
            for name, moment in (
                ("created", progress.created_at),
                ("in_progress", progress.in_progress_at),
                ("ended", progress.ended_at),
            )
        },
        "stoker": importlib.metadata.version("stoker"),
    }


def _gapless(database: Database, batch_id: UUID, *, next_seq: int) -> Iterator[ResultRow]:
    for page in result_pages(database, batch_id, after_seq=next_seq - 1):
        for row in page:
            if row.seq != next_seq:
                return
            yield row
            next_seq += 1
        if not page:
            return


def _origin(row: ResultRow) -> str:
    """Whose result it took, and which entry of the cache an answer came from."""
    leader = "" if row.leader is None else f',"leader":{_json(row.leader)}'
    entry = "" if row.entry is None else f',"entry":{row.entry}'
    namespace = "" if row.namespace is None else f',"namespace":{row.namespace}'
    return leader + entry + namespace + ("" if row.similarity is None else f',"similarity":{row.similarity:.4f}')


def _usage(row: ResultRow) -> str:
    """What the job took, where its response does not say it: a failed one, and one that was asked for twice."""
    told = row.outcome is not Outcome.FAILED and '"repaired":true' not in (row.stoker or "")
    if told or not row.prompt_tokens + row.completion_tokens:
        return ""
    return f',"usage":{{"prompt_tokens":{row.prompt_tokens},"completion_tokens":{row.completion_tokens}}}'


def _cost(row: ResultRow) -> str:
    """Which registered endpoint did the job, and what that asks for it."""
    endpoint = "" if row.endpoint is None else f',"endpoint":{_json(row.endpoint)}'
    if row.cost is None or row.endpoint is None:
        return endpoint
    return f'{endpoint},"cost":{{"amount":{plain(row.cost)},"currency":{_json(row.currency)}}}'


def _members(row: ResultRow) -> str:
    """What else its `stoker` has, as further members of an object that has some."""
    inside = "" if row.stoker is None else _one_line(row.stoker).strip()[1:-1].strip()
    return f",{inside}" if inside else ""


def _one_line(text: str) -> str:
    """JSON text without raw newlines; those can only stand between tokens, so any space will do."""
    return text.replace("\n", " ").replace("\r", " ") if "\n" in text or "\r" in text else text


def _json(value: Any) -> str:
    try:
        return msgspec.json.encode(value).decode()
    except UnicodeEncodeError:
        return json.dumps(value)
