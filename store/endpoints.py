"""SQL of registered endpoints: what `stoker endpoints add` was told, by name. There is no secret in it."""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import text
from sqlalchemy.orm import Session


def add_endpoint(session: Session, name: str, spec: dict[str, Any]) -> bool:
    """Store an endpoint's specification. False, and nothing changed, if the name is taken."""
    added = session.execute(
        text("""
        INSERT INTO endpoints (name, spec) VALUES (:name, CAST(:spec AS jsonb))
        ON CONFLICT (name) DO NOTHING RETURNING name"""),
        {"name": name, "spec": json.dumps(spec)},
    )
    return added.first() is not None


def replace_endpoint(session: Session, name: str, spec: dict[str, Any]) -> bool:
    """Give an endpoint another specification. False if there is none of this name."""
    changed = session.execute(
        text("UPDATE endpoints SET spec = CAST(:spec AS jsonb) WHERE name = :name RETURNING name"),
        {"name": name, "spec": json.dumps(spec)},
    )
    return changed.first() is not None


def remove_endpoint(session: Session, name: str) -> bool:
    """Forget an endpoint; what it has answered and cost stays. False if there is none of this name."""
    removed = session.execute(text("DELETE FROM endpoints WHERE name = :name RETURNING name"), {"name": name})
    return removed.first() is not None


def endpoint_rows(session: Session) -> list[tuple[str, dict[str, Any]]]:
    """(name, specification) of every endpoint, by name."""
    rows = session.execute(text("SELECT name, spec FROM endpoints ORDER BY name"))
    return [(row.name, row.spec) for row in rows]
