"""A validator: turns uploaded files into jobs after their batches' creation was answered, and what follows an end.

It holds a batch by a lease; when it dies another one begins the file anew. Beside that: webhooks, sizes of results'
files, uploads that nobody may see any more. Every step may be cut off or done twice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Final

from models.batch_requests import CreateBatch
from models.file_names import is_upload
from models.lines import SubmitOptions
from models.states import CacheMode
from pipeline.begin import LEASE
from pipeline.cutting import for_workers
from pipeline.made_files import count_next
from pipeline.serving import live_workers, served_models
from pipeline.submit import fill_held
from pipeline.traced import trace_end
from pipeline.webhooks import deliver_due
from runtime.errors import BadInput, BlobGone, InvalidFile, LostFence, Problem, ServiceUnreachable
from runtime.logs import get_logger
from runtime.settings import Settings
from runtime.tracing import batch_span
from store.blobs import UNFINISHED, Blobs
from store.database import Database
from store.files import forget_file, gone_blobs, unknown_blobs
from store.notifications import VALIDATE_CHANNEL, listening, wait_for_news
from store.presence import PresenceBoard
from store.submissions import NewBatch
from store.validating import Validating, claim_validating, end_cancelled, put_back, refuse

log = get_logger(__name__)

POLL_S: Final = 1.0
WAIT_AFTER_FAULT: Final = timedelta(seconds=5)
MOST_TRIES: Final = 5  # validators that a file may take down with it
GONE_AT_ONCE: Final = 100
AFTER_DEFECT_S: Final = 10.0
SWEEP_BLOBS_S: Final = 3600.0
UNKNOWN_BLOB_S: Final = 86_400.0  # longer than any upload takes: until then a blob without a row may be one


class _Stopping(Exception):
    """This process is to end: the batch is put back for another validator."""


def run_validator(
    database: Database, blobs: Blobs, board: PresenceBoard, settings: Settings, stop: threading.Event
) -> None:
    """Validate batches as they come until told to stop; waits while Postgres is away."""
    while not stop.is_set():
        try:
            with listening(database, VALIDATE_CHANNEL) as connection:
                while not stop.is_set():
                    while not stop.is_set() and validate_next(database, blobs, board, settings, stop=stop):
                        pass
                    wait_for_news(connection, POLL_S)
        except ServiceUnreachable as error:
            log.warning("validator_waits", error=str(error))
            stop.wait(POLL_S)


def start_aftercare(database: Database, blobs: Blobs, settings: Settings, stop: threading.Event) -> None:
    """What follows an end, each in a thread of its own: no webhook waits for a large file to be counted."""
    tasks: tuple[tuple[str, float, Callable[[], object]], ...] = (
        ("webhooks", POLL_S, lambda: deliver_due(database, settings)),
        ("sizes", POLL_S, lambda: count_next(database)),
        ("files", POLL_S, lambda: free_blobs(database, blobs)),
        ("sweep", SWEEP_BLOBS_S, lambda: sweep_blobs(database, blobs)),
    )
    for name, every_s, task in tasks:
        threading.Thread(target=_repeat, args=(task, every_s, stop), name=name, daemon=True).start()


def _repeat(task: Callable[[], object], every_s: float, stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            task()
        except ServiceUnreachable as error:
            log.warning("aftercare_waits", task=threading.current_thread().name, error=str(error))
        except Exception:  # a defect must not end what follows all other batches; it is tried again
            log.exception("aftercare_defect", task=threading.current_thread().name)
            stop.wait(AFTER_DEFECT_S)
        stop.wait(every_s)


def validate_next(
    database: Database,
    blobs: Blobs,
    board: PresenceBoard,
    settings: Settings,
    *,
    stop: threading.Event | None = None,
) -> bool:
    """Take the oldest batch that waits, and set it going or end it; false if none waits.

    Once `stop` is set it is put back at the next chunk of lines.
    """
    with database.transaction() as session:
        held = claim_validating(session, lease=LEASE)
    if held is None:
        return False

    def go_on() -> None:
        if stop is not None and stop.is_set():
            raise _Stopping

    try:
        with batch_span("validate", held.id):
            problems = _problems(database, blobs, board, settings, held, go_on)
    except LostFence:
        with database.transaction() as session:  # cancelled meanwhile; if another holds it, nothing happens
            end_cancelled(session, held)
        trace_end(database, held.id)
        return True
    except _Stopping:
        _put_back(database, held, wait=timedelta(0), is_tried=False)
        return True
    except BlobGone as error:  # by a hand, or its folder is not mounted: it may come back
        log.warning("validation_waits", batch_id=str(held.id), error=str(error))
        _put_back(database, held, wait=WAIT_AFTER_FAULT, is_tried=True)
        return True
    except (ServiceUnreachable, OSError) as error:
        log.warning("validation_waits", batch_id=str(held.id), error=str(error))
        _put_back(database, held, wait=WAIT_AFTER_FAULT, is_tried=False)
        return True
    except Exception as error:  # a defect of ours ends the batch with a traceback in the log, never a loop for ever
        log.exception("validation_defect", batch_id=str(held.id))
        problems = [Problem(None, "internal_error", None, f"{type(error).__name__}; tell who runs this gateway")]
    if problems:
        with database.transaction() as session:
            refuse(session, held, problems)
        log.info("batch_refused", batch_id=str(held.id), code=problems[0].code)
        trace_end(database, held.id)
    return True


def _put_back(database: Database, held: Validating, *, wait: timedelta, is_tried: bool) -> None:
    with database.transaction() as session:
        put_back(session, held, wait=wait, is_tried=is_tried)


def _problems(
    database: Database,
    blobs: Blobs,
    board: PresenceBoard,
    settings: Settings,
    held: Validating,
    go_on: Callable[[], None],
) -> list[Problem]:
    """Why the batch cannot run; empty: it is going."""
    if held.is_cancelled:
        raise LostFence("cancelled before it was validated")
    if held.tries > MOST_TRIES:
        return [Problem(None, "internal_error", None, f"it could not be read in {MOST_TRIES} tries; upload it again")]
    asked = CreateBatch.model_validate(held.request)
    workers, options = live_workers(board), submit_options(asked, settings)
    try:
        with blobs.local_copy(held.input_file_id) as path:
            filled = fill_held(
                database,
                path,
                _new_batch(held, asked, options),
                options=options,
                settings=for_workers(settings, workers),
                served_models=served_models(workers),
                order=asked.extras.order,
                go_on=go_on,
            )
    except InvalidFile as error:
        return _listed(error)
    except BadInput as error:
        return [Problem(None, "invalid_request", "input_file_id", str(error))]
    log.info("batch_going", batch_id=str(held.id), jobs=filled.total)
    return []


def free_blobs(database: Database, blobs: Blobs) -> int:
    """Delete the bytes of uploads that are deleted or have expired: how many."""
    with database.transaction() as session:
        gone = gone_blobs(session, limit=GONE_AT_ONCE)
        for file_id, blob in gone:
            blobs.delete(blob)
            forget_file(session, file_id)
    return len(gone)


def sweep_blobs(database: Database, blobs: Blobs) -> int:
    """Delete what uploads left that a kill cut off, whole blobs or parts, once it is a day old: how many."""
    old = [name for name in blobs.older_than(UNKNOWN_BLOB_S) if is_upload(name.removesuffix(UNFINISHED))]
    with database.transaction() as session:
        unknown = unknown_blobs(session, old)
    for name in unknown:
        blobs.delete(name)
    return len(unknown)


def submit_options(asked: CreateBatch, settings: Settings) -> SubmitOptions:
    """What a create body changes in every line."""
    return SubmitOptions(
        model=asked.extras.model,
        max_output_tokens=min(
            asked.extras.max_output_tokens or settings.limits.max_output_tokens, settings.limits.max_output_tokens
        ),
        cache=asked.extras.cache or CacheMode(settings.cache.mode),
        settings=asked.extras.line_settings,
        validate_answers=asked.extras.validate_answers,
        trust=asked.extras.trust,
    )


def _new_batch(held: Validating, asked: CreateBatch, options: SubmitOptions) -> NewBatch:
    return NewBatch(
        id=held.id,
        tenant=held.tenant,
        endpoint=held.endpoint,
        input_name=held.input_name,
        input_digest=held.input_digest,
        submit_digest=held.digest,
        options={},
        max_output_tokens=options.max_output_tokens,
        priority=asked.extras.priority,
        weight=asked.extras.weight,
        fence=held.fence,
    )


def _listed(error: InvalidFile) -> list[Problem]:
    more = error.total - len(error.problems)
    if not more:
        return error.problems
    last = error.problems[-1]
    return [*error.problems, Problem(None, last.code, None, f"{more:,} more problems; mend these and upload it again")]
