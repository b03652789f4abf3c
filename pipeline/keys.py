"""Issuing keys: one for whoever asks on the command line, and a first one for a gateway that nobody has a key to.

A key's text is returned and written to the file named, never logged.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from models.keys import MadeKey, is_one_of, make_key, parse_key
from models.states import Scope
from pipeline.begin import TENANT
from runtime.errors import BadInput
from store.budgets import set_key_caps
from store.database import Database, Session
from store.keys import NewKey, create_key, has_living_key, living_key, lock_first_key
from store.money import set_key_money

FIRST_NAME: Final = "first"


@dataclass(frozen=True, slots=True)
class IssuedKey:
    """A key that now works, and until when."""

    key: MadeKey
    scopes: tuple[Scope, ...]
    expires_at: datetime | None


def issue_key(
    session: Session,
    *,
    tenant: str,
    name: str,
    scopes: Collection[Scope],
    requests_per_minute: int | None = None,
    day_tokens: int | None = None,
    month_tokens: int | None = None,
    day_money: int | None = None,
    month_money: int | None = None,
    expires_in: timedelta | None = None,
) -> IssuedKey:
    """A new key, stored with its limits; money is in nanos."""
    made = make_key()
    ordered = tuple(scope for scope in Scope if scope in scopes)
    new = NewKey(made.id, tenant, name, made.digest, ordered, requests_per_minute, expires_in)
    expires_at = create_key(session, new)
    if day_tokens is not None or month_tokens is not None:
        set_key_caps(session, made.id, day_tokens=day_tokens, month_tokens=month_tokens)
    if day_money is not None or month_money is not None:
        set_key_money(session, made.id, day_money=day_money, month_money=month_money)
    return IssuedKey(made, ordered, expires_at)


def ensure_first_key(database: Database, file: Path) -> str | None:
    """The command line's own key: that of the file if it works, else a new one if its tenant has no key that does.

    The new one may do everything and is written into the file, which only its owner can read. None: there are keys, but
    the file has none of them. Raises BadInput if the file cannot be written.
    """
    with database.transaction() as session:
        lock_first_key(session, TENANT)
        kept = _kept(session, file)
        if kept is not None or has_living_key(session, TENANT):
            return kept
        text = issue_key(session, tenant=TENANT, name=FIRST_NAME, scopes=tuple(Scope)).key.text
        # Before the commit: a file with a key that never was is replaced by the next start, a key that is in no file
        # would stand in its way.
        _write(file, text)
    return text


def _kept(session: Session, file: Path) -> str | None:
    try:
        text = file.read_text().strip()
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    except OSError as error:
        raise BadInput(f"{file}: {error.strerror}; it is to hold the key of this machine's gateway") from error
    presented = parse_key(text)
    if presented is None:
        return None
    key = living_key(session, presented.id)
    is_ours = key is not None and key.tenant == TENANT and is_one_of(presented.digest, key.digests)
    return text if is_ours else None


def _write(file: Path, text: str) -> None:
    part = file.with_name(f"{file.name}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
            opened.write(text + "\n")
        part.replace(file)
    except OSError as error:
        raise BadInput(f"{file}: {error.strerror}; it is to hold the key of this machine's gateway") from error
