"""The errors of Stoker; the branch an error stands on decides what becomes of the job.

    StokerError
    ├── BadInput             the caller's input is wrong: say line, field and remedy (exit code 2)
    │   └── InvalidFile      a batch file with bad lines; nothing of it was stored
    ├── NotFound             no such batch for this tenant (exit code 2)
    ├── ServiceUnreachable   Postgres, the broker, Redis or the engine does not answer (exit code 3)
    │   ├── BlobGone         the bytes of an upload are not where they were put
    │   ├── Deadlocked       Postgres ended this transaction, another could not go on: it may be done again at once
    │   └── LockHeld         others hold what this transaction needs, and it waits no longer: it may be done again later
    ├── Transient            try the job again later: the row of its tries says when
    ├── Permanent            the job ends with this error as its result
    ├── Unstorable           Postgres refuses a value: that job ends with an error instead
    ├── Stopped              nothing more is to begin: the job stays unfinished, with what it has finished of its steps
    ├── LostFence            another attempt owns the shard: write nothing more
    └── Fatal                this process cannot go on: give back what it holds and exit

Adapters translate foreign errors at their edge (`raise … from error`); nothing above them knows
psycopg's, redis's or httptools's errors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

EXIT_USAGE: Final = 2
EXIT_UNREACHABLE: Final = 3
EXIT_INTERRUPTED: Final = 130  # as shells have it: 128 and the number of SIGINT


class StokerError(Exception):
    """Base of all errors that Stoker raises on purpose."""


class BadInput(StokerError):
    """What the caller gave cannot be used; the message names the place and the remedy."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with one line of a batch file.

    `line` counts from 1 (None: the file as a whole); `code` is a code of the batch contract;
    `field` is a path in the line such as `body.temperature`, or None.
    """

    line: int | None
    code: str
    field: str | None
    message: str

    def members(self) -> dict[str, str | int | None]:
        """As the batch contract lists it among a batch's errors, and as Postgres stores it: without NUL."""
        field = None if self.field is None else self.field.replace("\0", " ")
        return {"code": self.code, "message": self.message.replace("\0", " "), "param": field, "line": self.line}

    def __str__(self) -> str:
        place = "file" if self.line is None else f"line {self.line}"
        return f"{place}: {self.field + ': ' if self.field else ''}{self.message} [{self.code}]"


class InvalidFile(BadInput):
    """A batch file was refused. `problems` holds the first ones, `total` counts all that were found."""

    def __init__(self, problems: list[Problem], *, total: int) -> None:
        super().__init__(f"the file was refused: {total} problem{'s' if total != 1 else ''}; nothing was stored")
        self.problems = problems
        self.total = total


class NotFound(StokerError):
    """No such thing for this tenant."""


class ServiceUnreachable(StokerError):
    """A service does not answer; the message names it, its address without secrets, and the remedy."""


class BlobGone(ServiceUnreachable):
    """The bytes of an upload are not where they were put: deleted by hand, or their folder is not mounted."""


class Deadlocked(ServiceUnreachable):
    """Two transactions waited for each other, and Postgres ended this one. It may be done again at once."""


class LockHeld(ServiceUnreachable):
    """Others held what this transaction needs for longer than it waits, so that they get on. It may be done later."""


class Transient(StokerError):
    """The job may succeed later. `retry_after_s` is the server's own wish, if it stated one."""

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Permanent(StokerError):
    """The job ends with this error. `code` is what its error line shows."""

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code


class Unstorable(StokerError):
    """Postgres refuses a value, for good."""


class Stopped(StokerError):
    """Its attempt starts nothing more: the job stays unfinished."""


class LostFence(StokerError):
    """The shard's fence has moved on: this attempt owns it no more and must write nothing."""


class Fatal(StokerError):
    """This process cannot go on."""


def exit_code_of(error: StokerError) -> int:
    """What a process that ends with this error exits with."""
    return EXIT_USAGE if isinstance(error, BadInput | NotFound) else EXIT_UNREACHABLE


def extra_remedy(extra: str) -> str:
    """How the libraries of one of our extras are installed. Stoker is on no package index: from its own folder."""
    return f"pip install -e '.[{extra}]' in Stoker's folder"
