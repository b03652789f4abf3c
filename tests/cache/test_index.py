"""The client of Chroma, beside a server that somebody else wrote to."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from chromadb.utils.embedding_functions import known_embedding_functions

from cache.index import Index
from tests.support.own_services import OwnChroma, server_folder

COLLECTIONS = "/api/v2/tenants/default_tenant/databases/default_database/collections"
HOSTILE = {"type": "known", "name": "named", "config": {"model_name": "theirs", "trust_remote_code": True}}


@pytest.fixture
def chroma() -> Iterator[OwnChroma]:
    with server_folder() as folder, OwnChroma(folder / "chroma") as server:
        yield server


@pytest.fixture
def made() -> Iterator[list[dict[str, Any]]]:
    """With what arguments the client made the class that a collection names."""
    arguments: list[dict[str, Any]] = []

    class Named:
        @staticmethod
        def build_from_config(config: dict[str, Any]) -> None:
            arguments.append(config)

    known = dict(known_embedding_functions)
    known_embedding_functions["named"] = Named
    yield arguments
    known_embedding_functions.clear()
    known_embedding_functions.update(known)


@pytest.mark.filterwarnings("ignore:Could not reconstruct embedding function")
def test_a_class_that_a_collection_names_is_never_made(chroma: OwnChroma, made: list[dict[str, Any]]) -> None:
    body = {"name": "theirs", "configuration": {"hnsw": {"space": "cosine"}, "embedding_function": HOSTILE}}
    request = urllib.request.Request(
        chroma.url + COLLECTIONS, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert json.load(answer)["configuration_json"]["embedding_function"] == HOSTILE, "Chroma keeps what it is told"
    index, vectors = Index(chroma.url), np.eye(4, 384, dtype=np.float32)
    index.make("theirs")
    index.add("theirs", range(4), vectors)
    assert [one.ids[0] for one in index.nearest("theirs", vectors, count=1)] == [0, 1, 2, 3]
    assert index.size("theirs") == 4
    assert made == []
