"""Which entries are near: one Chroma collection a namespace, in a Chroma server. It holds ids and vectors only.

A filter on metadata is 10 to 30 times slower than a collection of its own (measured), so there is none. What it
answers is a hint: whether an entry may still answer is Postgres's to say. It may be emptied at any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

import chromadb
import httpx
import numpy as np
from chromadb.config import Settings as ChromaSettings
from chromadb.errors import ChromaError, NotFoundError
from numpy.typing import NDArray

from cache.score import Floats, Vectors
from runtime.errors import BadInput, ServiceUnreachable

TIMEOUT_S: Final = 5.0
ADDED_AT_ONCE: Final = 1_000


class IndexIsEmpty(Exception):
    """The server knows nothing of the namespace."""


@dataclass(frozen=True, slots=True)
class Near:
    """The nearest entries of one lookup, nearest first."""

    ids: NDArray[np.int64]
    cosines: Floats
