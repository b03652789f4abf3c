"""What budgets of tokens and budgets of money have in common: whose they are, when they begin, how they are shown.

The two stand in tables of one form, each with the caps of its kind among a key's columns. What is reserved and spent is
each kind's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.orm import Session

from models.states import BudgetPeriod

KEY_OF_BATCH: Final = "k.id = (SELECT key_id FROM batches WHERE id = :batch)"


@dataclass(frozen=True, slots=True)
class BudgetReport:
    """A budget as it is shown: of a key's running period, or of a batch."""

    key_id: str | None
    key_name: str | None
    batch_id: UUID | None
    period: BudgetPeriod
    began_at: datetime
    cap: int
    spent: int
    reserved: int


@dataclass(frozen=True, slots=True)
class BudgetTable:
    """Budgets of one kind: their table, and the columns of `api_keys` with a key's caps of a day and a month."""

    name: str
    day: str
    month: str

    @property
    def holds(self) -> str:
        """Of a batch `b`: whether it takes from such budgets."""
        return f"""(EXISTS (SELECT FROM {self.name} WHERE batch_id = b.id) OR b.key_id IS NOT NULL AND EXISTS (
    SELECT FROM api_keys WHERE id = b.key_id AND coalesce({self.day}, {self.month}) IS NOT NULL))"""

    @property
    def of_key(self) -> str:
        """Behind a key `k`: its caps `p` in their periods at this moment, which is one in the whole transaction."""
        return f"""CROSS JOIN LATERAL (VALUES ('day', date_trunc('day', now(), 'UTC'), k.{self.day}),
    ('month', date_trunc('month', now(), 'UTC'), k.{self.month})) AS p (period, began_at, cap)"""

    @property
    def rows_of_key(self) -> str:
        """The same, with the rows `u` of these periods, where they have begun."""
        return f"{self.of_key} JOIN {self.name} u ON {_ROW_OF_PERIOD}"

    def open(self, session: Session, batch_id: UUID, cap: int) -> None:
        """Let a batch take so much at most. Repeatable; the last call's cap holds."""
        session.execute(
            text(f"""
            INSERT INTO {self.name} (batch_id, period, began_at, cap)
            SELECT id, 'batch', created_at, :cap FROM batches WHERE id = :batch
            ON CONFLICT ON CONSTRAINT uq_{self.name}_owner DO UPDATE SET cap = excluded.cap"""),
            {"batch": batch_id, "cap": cap},
        )

    def set_caps(self, session: Session, key_id: str, *, day: int | None, month: int | None) -> bool:
        """Set a key's caps; what has begun of them is the caller's to change. False: there is no such key."""
        found = session.execute(
            text(f"UPDATE api_keys SET {self.day} = :day, {self.month} = :month WHERE id = :key RETURNING 1"),
            {"key": key_id, "day": day, "month": month},
        ).one_or_none()
        return found is not None

    def begin(self, session: Session, key: str, values: dict[str, str | UUID]) -> None:
        """Begin the running periods of the key `k` that has caps and `key` says which it is, where they have not."""
        session.execute(
            text(f"""
            INSERT INTO {self.name} (key_id, period, began_at, cap)
            SELECT k.id, p.period, p.began_at, p.cap FROM api_keys k {self.of_key}
            WHERE {key} AND p.cap IS NOT NULL AND NOT EXISTS (SELECT FROM {self.name} u WHERE {_ROW_OF_PERIOD})
            ORDER BY p.period ON CONFLICT DO NOTHING"""),
            values,
        )

    def ids_for(self, session: Session, batch_id: UUID) -> list[int]:
        """The budgets that hold for a batch now; its key's new periods are begun.

        The key is held, so that its caps change before this or after, never in between.
        """
        batch: dict[str, str | UUID] = {"batch": batch_id}
        session.execute(text(f"SELECT 1 FROM api_keys k WHERE {KEY_OF_BATCH} FOR SHARE"), batch)
        self.begin(session, KEY_OF_BATCH, batch)
        return list(
            session.scalars(
                text(f"""
        SELECT id FROM {self.name} WHERE batch_id = :batch UNION ALL
        SELECT u.id FROM api_keys k {self.rows_of_key} WHERE {KEY_OF_BATCH} AND p.cap IS NOT NULL"""),
                batch,
            )
        )

    def lock_of_key(self, session: Session, key_id: str) -> list[tuple[int, str, str, int, int, int]]:
        """The budgets that a key has now, locked: id, key, period, cap, spent, reserved. New periods are begun."""
        caps = session.execute(
            text(
                f"SELECT 1 FROM api_keys WHERE id = :key AND coalesce({self.day}, {self.month}) IS NOT NULL FOR SHARE"
            ),
            {"key": key_id},
        ).one_or_none()
        if caps is None:
            return []
        self.begin(session, "k.id = :key", {"key": key_id})
        rows = session.execute(
            text(f"""
        SELECT u.id, u.key_id, u.period, u.cap, u.spent, u.reserved FROM api_keys k {self.rows_of_key}
        WHERE k.id = :key AND p.cap IS NOT NULL ORDER BY u.id FOR NO KEY UPDATE OF u"""),
            {"key": key_id},
        )
        return [(id_, key, period, cap, spent, reserved) for id_, key, period, cap, spent, reserved in rows]

    def of_tenant(self, session: Session, tenant: str) -> list[BudgetReport]:
        """The tenant's: of its keys in the running periods, then of its batches that have not ended."""
        of_batch = "b.tenant = :tenant AND b.ended_at IS NULL"
        return self._reports(session, of_batch, "k.tenant = :tenant", {"tenant": tenant})

    def of_batch(self, session: Session, batch_id: UUID) -> list[BudgetReport]:
        """Those that a batch takes from: its key's in the running periods, and its own."""
        return self._reports(session, "b.id = :batch", KEY_OF_BATCH, {"batch": batch_id})

    def _reports(
        self, session: Session, of_batch: str, of_key: str, values: dict[str, str | UUID]
    ) -> list[BudgetReport]:
        rows = session.execute(
            text(f"""
        (SELECT k.id, k.name, CAST(NULL AS uuid), p.period, p.began_at, p.cap, coalesce(u.spent, 0),
            coalesce(u.reserved, 0)
        FROM api_keys k {self.of_key} LEFT JOIN {self.name} u ON {_ROW_OF_PERIOD}
        WHERE {of_key} AND p.cap IS NOT NULL AND k.revoked_at IS NULL ORDER BY k.name, k.id, p.period)
        UNION ALL
        (SELECT b.key_id, k.name, b.id, u.period, u.began_at, u.cap, u.spent, u.reserved
        FROM {self.name} u JOIN batches b ON b.id = u.batch_id LEFT JOIN api_keys k ON k.id = b.key_id
        WHERE {of_batch} AND b.deleted_at IS NULL ORDER BY b.id)"""),
            values,
        ).all()
        return [BudgetReport(row[0], row[1], row[2], BudgetPeriod(row[3]), *row[4:]) for row in rows]


_ROW_OF_PERIOD: Final = "u.key_id = k.id AND u.batch_id IS NULL AND u.period = p.period AND u.began_at = p.began_at"
TOKENS: Final = BudgetTable("budgets", "day_tokens", "month_tokens")
MONEY: Final = BudgetTable("money_budgets", "day_money", "month_money")
