"""Schemas laid over each other: what several files or blocks of one table hold together."""

from __future__ import annotations

import re
from typing import Final

import pyarrow as pa

# One for the column, then one for each field within it that leads to the two types.
UNLIKE: Final = re.compile(
    r"Unable to merge: Field (.*?) has incompatible types: (.+?) vs (.+?)(?=$|: Unable|: Cannot)"
)


class Unlike(Exception):
    """A column has two types that no type holds: its name or path, its type so far, its type here."""

    def __init__(self, column: str, before: str, here: str) -> None:
        super().__init__(f"column {column} is {here} here and {before} before")
        self.column = column
        self.before = before
        self.here = here


def merged(one: pa.Schema, other: pa.Schema) -> pa.Schema:
    """`one` with what `other` has more: columns at the end, integers become floats, nulls become anything.

    The metadata is that of `one`. Raises Unlike.
    """
    try:
        return pa.unify_schemas([one, other], promote_options="permissive")
    except pa.ArrowException as error:
        found = UNLIKE.findall(str(error))
        if not found:
            raise
        _, before, here = found[-1]
        raise Unlike(".".join(name for name, _, _ in found), before, here) from error
