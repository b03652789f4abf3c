"""What goes wrong. Every message names the remedy; none has the key in it.

StokerClientError
├── BadInput      what was passed cannot be run; nothing was sent
├── NoGateway     no gateway answers, and none could be started
├── Refused       the gateway answered with an error
├── BatchFailed   the batch ended without results for all rows, or is paused
└── JobsFailed    with errors="raise": some rows have no good answer; the results are there all the same
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


class StokerClientError(Exception):
    """Whatever this package raises by itself."""


class BadInput(StokerClientError):
    """What was passed cannot be run. It names the argument, the column or the row; nothing was sent."""


class NoGateway(StokerClientError):
    """No gateway answers at the stated address, or none could be started here."""


class Refused(StokerClientError):
    """The gateway answered a request with an error.

    `status_code` is HTTP's, `code` the gateway's own word, such as `key_reused`, if it gave one.
    """

    def __init__(self, message: str, *, status_code: int, code: str | None = None) -> None:
        super().__init__(message)
        self.status_code = status_code
        self.code = code


@dataclass(frozen=True, slots=True)
class Problem:
    """Why validation refused a batch. `row` counts from 1; None: it is about all of them."""

    row: int | None
    code: str
    message: str


class BatchFailed(StokerClientError):
    """The batch was refused by validation, was cancelled, has expired, or is paused.

    `problems` says what validation found, the first ones, by row; of an argument that all rows share it is one problem.
    """

    def __init__(self, message: str, *, batch_id: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__(message)
        self.batch_id = batch_id
        self.problems = tuple(problems)


class JobsFailed(StokerClientError):
    """Rows without a good answer. `results` is what run() would have returned; `failed` says how many they are.

    The same call gives the same again; with resume=False it is a new batch, which asks them again.
    """

    def __init__(self, message: str, *, failed: int, results: Any) -> None:
        super().__init__(message)
        self.failed = failed
        self.results = results
