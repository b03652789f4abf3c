"""SQL of budgets of money: what priced endpoints may ask of a batch, and of a key in a day and a month of UTC."""

from __future__ import annotations

# Of a batch `b`: whether priced endpoints may be paid for it.
PAID = """(EXISTS (SELECT FROM money_budgets WHERE batch_id = b.id) OR b.key_id IS NOT NULL AND EXISTS (
    SELECT FROM api_keys WHERE id = b.key_id AND coalesce(day_money, month_money) IS NOT NULL))"""
