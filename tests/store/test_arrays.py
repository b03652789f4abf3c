"""Columns on their way to Postgres and back."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from runtime.errors import Unstorable
from store.arrays import Float4s, Int2s, Int4s, Int8s, Texts
from store.database import Database

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
KINDS: dict[str, tuple[type[list[Any]], st.SearchStrategy[Any]]] = {
    "int2": (Int2s, st.integers(-(2**15), 2**15 - 1)),
    "int4": (Int4s, st.integers(-(2**31), 2**31 - 1)),
    "int8": (Int8s, st.integers(-(2**63), 2**63 - 1)),
    "float4": (Float4s, st.floats(width=32, allow_nan=False)),
    "text": (Texts, TEXT),
}


def sent(database: Database, kind: str, column: list[Any]) -> list[Any]:
    shown = "CAST(v AS float8)" if kind == "float4" else "v"  # a float4 is written with the digits that tell it apart
    question = text(f"SELECT {shown} FROM unnest(CAST(:column AS {kind}[])) AS u (v)")
    with database.transaction() as session:
        return list(session.execute(question, {"column": column}).scalars())


@pytest.mark.parametrize("kind", KINDS)
def test_a_column_arrives_as_it_was_sent(database: Database, kind: str) -> None:
    column_type, values = KINDS[kind]

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.lists(st.none() | values))
    def arrives(column: list[Any]) -> None:
        assert sent(database, kind, column_type(column)) == column

    arrives()


def test_quotes_braces_and_backslashes_are_text_like_any_other(database: Database) -> None:
    column = ['{"a": "b\\"c"}', "NULL", "{}", "", " ", "é\u2028"]

    assert sent(database, "text", Texts(column)) == column


@pytest.mark.parametrize("value", ["a\0b", "\ud800"])
def test_what_postgres_cannot_store_is_said_as_unstorable(database: Database, value: str) -> None:
    with pytest.raises(Unstorable):
        sent(database, "text", Texts(["sound", value]))
