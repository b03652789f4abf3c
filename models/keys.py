"""Keys as text: made, taken apart, compared. No I/O, and nothing here may be logged but ids.

A key is `sk-<12 hex: its public id>-<43 characters: its secret>`. The secret is 32 random bytes in base64url; what is
stored is its sha256, which is slow enough: nobody guesses 256 bits (docs/decisions/0022-keys.md).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

ID_BYTES: Final = 6
SECRET_BYTES: Final = 32
_KEY: Final = re.compile(r"sk-([0-9a-f]{12})-([A-Za-z0-9_-]{43})", re.ASCII)
_NOBODYS: Final = bytes(hashlib.sha256().digest_size)


@dataclass(frozen=True, slots=True)
class MadeKey:
    """A key as it is shown once; of it `id` and `digest` are stored."""

    id: str
    text: str = field(repr=False)
    digest: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class PresentedKey:
    """A key that somebody sent, which may be none of ours."""

    id: str
    digest: bytes = field(repr=False)


def make_key() -> MadeKey:
    """A key that nobody has."""
    return remake_key(secrets.token_hex(ID_BYTES))


def remake_key(key_id: str) -> MadeKey:
    """The key of this id with a new secret."""
    secret = base64.urlsafe_b64encode(secrets.token_bytes(SECRET_BYTES)).rstrip(b"=").decode()
    return MadeKey(id=key_id, text=f"sk-{key_id}-{secret}", digest=_digest(secret))


def parse_key(text: str) -> PresentedKey | None:
    """The parts of a key; None if the text is not of its form."""
    found = _KEY.fullmatch(text)
    return None if found is None else PresentedKey(id=found[1], digest=_digest(found[2]))


def is_one_of(digest: bytes, held: Sequence[bytes]) -> bool:
    """Whether a digest is among those held; takes as long when none is held, so that time tells no id."""
    right = False
    for one in held or (_NOBODYS,):
        right |= hmac.compare_digest(digest, one)
    return right and bool(held)


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
