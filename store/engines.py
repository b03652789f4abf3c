"""The register of engines: one row for each kind, version, set of flags and checkpoint ever used."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from sqlalchemy import text
from sqlalchemy.orm import Session

_CHECKPOINT = "coalesce(description ->> 'checkpoint_digest', description ->> 'url', digest)"


def register_engine(session: Session, description: dict[str, Any]) -> int:
    """The id of this engine's row, made if it is new; equal descriptions share one row."""
    canonical = json.dumps(description, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    return int(
        session.execute(
            text("""
        INSERT INTO engines (digest, description) VALUES (:digest, CAST(:description AS jsonb))
        ON CONFLICT (digest) DO UPDATE SET digest = excluded.digest RETURNING id"""),
            {"digest": digest, "description": canonical},
        ).scalar_one()
    )


def checkpoint_of(session: Session, engine_id: int) -> str:
    """What of an engine decides its answers: its checkpoint's digest, or where an engine that is not ours runs.

    Flags and versions are left out: they change speed, and answers within the engine's own noise.
    """
    found: str = session.execute(
        text(f"SELECT {_CHECKPOINT} FROM engines WHERE id = :id"), {"id": engine_id}
    ).scalar_one()
    return found


def adapters_of(session: Session, engine_id: int) -> dict[str, str]:
    """The LoRA adapters that an engine serves: name → what decides its answers."""
    found = session.execute(
        text("SELECT description -> 'adapters' FROM engines WHERE id = :id"), {"id": engine_id}
    ).scalar_one()
    return dict(found or {})


def checkpoints(session: Session) -> set[str]:
    """What decided answers, of every engine that there ever was: `checkpoint_of` each, and with its adapters."""
    adapters = "jsonb_each_text(coalesce(description -> 'adapters', '{}')) AS a"
    return set(
        session.scalars(
            text(f"""
        SELECT {_CHECKPOINT} FROM engines UNION
        SELECT {_CHECKPOINT} || '+' || a.value FROM engines CROSS JOIN LATERAL {adapters}""")
        )
    )
