"""The states of batches and shards, the outcomes of jobs. A transition is a conditional UPDATE in store/."""

from __future__ import annotations

from enum import StrEnum


class BatchState(StrEnum):
    """validating → in_progress → finalizing → completed | failed | expired | cancelled (via cancelling)."""

    VALIDATING = "validating"
    IN_PROGRESS = "in_progress"
    CANCELLING = "cancelling"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


TERMINAL = frozenset({BatchState.COMPLETED, BatchState.FAILED, BatchState.EXPIRED, BatchState.CANCELLED})


class Ending(StrEnum):
    """Why a batch ends, known before it has ended; null while it simply runs."""

    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


class Priority(StrEnum):
    """A batch's class, highest first: a class is dispatched only while no higher one has a shard to send."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


class JobOrder(StrEnum):
    """In which order a batch's jobs are run; results are in the file's order whatever it is.

    prefix: prompts that begin alike together, of these the longest outputs first. prefix-short: the shortest first.
    """

    PREFIX = "prefix"
    PREFIX_SHORT = "prefix-short"
    FILE = "file"


class ShardState(StrEnum):
    """pending → dispatched → running → done; running falls back to pending by give back or recover."""

    PENDING = "pending"
    DISPATCHED = "dispatched"
    RUNNING = "running"
    DONE = "done"


class DocumentState(StrEnum):
    """pending → running → ready | failed; running falls back to pending when its worker died or it is to wait."""

    PENDING = "pending"
    RUNNING = "running"
    READY = "ready"
    FAILED = "failed"


class Outcome(StrEnum):
    """What a job's result is worth.

    succeeded: a whole answer. truncated: cut by its token limit, or empty because of it.
    empty: the engine ended by itself without content. failed: an error.
    """

    SUCCEEDED = "succeeded"
    TRUNCATED = "truncated"
    EMPTY = "empty"
    FAILED = "failed"


class CacheMode(StrEnum):
    """Which answers that were given before may serve a batch or a line.

    exact: those to an equal request. semantic: also those to one that means the same, within a stated error.
    """

    OFF = "off"
    EXACT = "exact"
    SEMANTIC = "semantic"


class Source(StrEnum):
    """Where a result came from.

    reused: copied from an earlier batch's equal job. exact: the answer to an equal request. duplicate: that of an equal
    line of the batch. semantic: that of a request which means the same.
    """

    ENGINE = "engine"
    REUSED = "reused"
    EXACT = "exact"
    DUPLICATE = "duplicate"
    SEMANTIC = "semantic"
    NONE = "none"


class Scope(StrEnum):
    """What a key may do. submit: upload, create, cancel. read: list and download. admin: all of it, and the engines."""

    SUBMIT = "submit"
    READ = "read"
    ADMIN = "admin"


class Trust(StrEnum):
    """Who runs an endpoint, and where a batch's prompts may go.

    own: machines of ours; external: also somebody else's, such as a managed provider.
    """

    OWN = "own"
    EXTERNAL = "external"


class Purpose(StrEnum):
    """What a file is for; only results have `batch_output`."""

    BATCH = "batch"
    USER_DATA = "user_data"
    BATCH_OUTPUT = "batch_output"


class Part(StrEnum):
    """Which lines of a batch a file has. input: those it was made of, where no upload was."""

    INPUT = "input"
    OUTPUT = "output"
    ERRORS = "errors"


class BudgetPeriod(StrEnum):
    """How long a budget holds; days and months are UTC's."""

    DAY = "day"
    MONTH = "month"
    BATCH = "batch"


class DeliveryState(StrEnum):
    """pending → delivered | failed."""

    PENDING = "pending"
    DELIVERED = "delivered"
    FAILED = "failed"


class Missed(StrEnum):
    """What becomes of due times at which nobody was there to run: all of them run, the last one does, or none."""

    ONCE = "once"
    ALL = "all"
    SKIP = "skip"


class Overlap(StrEnum):
    """What a run does while the one before it, or its batch, has not ended: nothing, wait, or begin beside it."""

    SKIP = "skip"
    WAIT = "wait"
    ALLOW = "allow"


class RunState(StrEnum):
    """waiting → running → succeeded | failed; waiting → skipped. A running one whose worker died waits again."""

    WAITING = "waiting"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    SKIPPED = "skipped"
