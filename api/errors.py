"""Errors as the API shows them: `{"error": {message, type, param, code}}`, and how ours become these."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

from fastapi import HTTPException
from pydantic import BaseModel

MESSAGE_CHARACTERS: Final = 2_000  # both may quote what was sent, which is not sent back whole
PARAM_CHARACTERS: Final = 200

ErrorKind = Literal[
    "invalid_request_error",
    "authentication_error",
    "permission_error",
    "not_found_error",
    "rate_limit_error",
    "server_error",
]


class ErrorBody(BaseModel):
    """What went wrong, and the remedy in `message`; `param` names the field."""

    message: str
    type: ErrorKind
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """The body of every answer from 400 on."""

    error: ErrorBody


# What any route may answer: by its key, by too many requests, by a service that is away, by what is full.
ALWAYS: Final = (401, 403, 429, 500, 503)
_MEANINGS: Final = {
    400: "The request is wrong; `param` names the field.",
    401: "The key is missing, wrong, expired or revoked.",
    403: "The key lacks the scope.",
    404: "There is none of this id for the key's tenant.",
    405: "The path has no such method.",
    408: "The body stood still for too long.",
    409: "The thing is in a state that forbids it.",
    413: "The body, or all files together, are too large.",
    415: "The body is of another type.",
    422: "The Idempotency-Key was used for another request.",
    429: "Too many requests of this key; `Retry-After` says when to come again.",
    500: "A defect of ours.",
    502: "The engine's answer was of no use.",
    503: "A service is away; the request may be sent again.",
    504: "There was no answer in time.",
}


def refusals(*status_codes: int) -> dict[int | str, dict[str, Any]]:
    """A route's answers from 400 on, for its description."""
    return {
        status: {"model": ErrorAnswer, "description": _MEANINGS[status]} for status in sorted({*status_codes, *ALWAYS})
    }


def links(**operations: str) -> dict[int | str, dict[str, Any]]:
    """That a creation's id is a parameter of these operations: `links(retrieve_file="file_id")`."""
    return {
        200: {
            "links": {
                name: {"operationId": name, "parameters": {parameter: "$response.body#/id"}}
                for name, parameter in operations.items()
            }
        }
    }


class ApiError(HTTPException):
    """An answer from 400 on, raised anywhere below a route, also while its body is read."""

    def __init__(
        self,
        status_code: int,
        message: str,
        *,
        code: str | None = None,
        kind: ErrorKind = "invalid_request_error",
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        message = _cut(message, MESSAGE_CHARACTERS)
        super().__init__(status_code, message, dict(headers or {}))
        shown = None if param is None else _cut(param, PARAM_CHARACTERS)
        self.answer = ErrorAnswer(error=ErrorBody(message=message, type=kind, param=shown, code=code))


def _cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[: characters - 1] + "…"


def not_found(what: str) -> ApiError:
    """Nothing of this id for this tenant, whoever else may have it."""
    return ApiError(404, f"there is no {what}; check the id and the key", kind="not_found_error", code="not_found")
