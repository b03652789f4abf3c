"""`--recipe R --documents …`: documents are read, and become the lines of a batch, one each."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from models.line_problems import CUSTOM_ID_CHARACTERS
from pipeline.adding import add_documents, gather, is_url
from pipeline.recipe import Recipe
from pipeline.recipes import named_recipe, read_options
from pipeline.recipes import recipes as known_recipes
from pipeline.serving import only_served
from runtime.errors import BadInput
from scripts.documents_commands import await_documents, say_gathered
from scripts.local import ensure_node
from scripts.lookup import TENANT
from scripts.source import Lines, Source, Terms
from scripts.terminal import bar, say
from store.documents import DocumentRow, list_documents, made_collection


@dataclass(frozen=True)
class RecipeSource(Source):
    """Documents, and what a recipe is to do to each."""

    needs_chroma = True

    recipe: Recipe
    documents: tuple[str, ...]
    collection: str | None
    instruction: str
    options: Mapping[str, Any]

    @property
    def title(self) -> str:
        """The recipe and its documents."""
        return f"{self.recipe.name} {' '.join(self.documents)}"

    @contextmanager
    def lines(self, terms: Terms) -> Iterator[Lines]:
        """One line for each document, in their order, once all are read or have failed.

        A worker of the documents node is started for it unless one is live. Raises BadInput where there is no document,
        or no model that is sure to be served.
        """
        database = terms.database
        named = terms.how.model or only_served(terms.served)
        found = gather(self.documents)
        say_gathered(found)
        if found.missing or not found.sources:
            raise BadInput("nothing was stored: name files, folders or URLs with --documents")
        with ExitStack() as stack:
            with database.transaction() as session:
                collection_id = None if self.collection is None else made_collection(session, TENANT, self.collection)
            with bar("storing documents", total=len(found.sources)) as show:
                added = add_documents(
                    database,
                    found.sources,
                    tenant=TENANT,
                    collection_id=collection_id,
                    limits=terms.settings.documents,
                    on_progress=show,
                )
            await_documents(database, added.ids, ensure_node(terms.settings, stack, "documents"))
        with database.transaction() as session:
            rows = {row.id: row for row in list_documents(session, tenant=TENANT, ids=added.ids)}
        with tempfile.NamedTemporaryFile("w", prefix="stoker-", suffix=".jsonl") as file:
            names = _names([rows[identifier].source for identifier in added.ids])
            for identifier, name in zip(added.ids, names, strict=True):
                file.write(json.dumps(_line(rows[identifier], name, self, model=named)) + "\n")
            file.flush()
            yield Lines(Path(file.name))


def recipe_source(
    name: str, documents: tuple[str, ...], collection: str | None, instruction: str | None, options: Mapping[str, Any]
) -> RecipeSource:
    """What was asked for. Raises BadInput for a recipe or options that are wrong, or if something is missing."""
    recipe = named_recipe(name)
    read_options(recipe, options)
    if recipe.needs_passages and collection is None:
        raise BadInput(f"recipe {name} searches documents: name a collection for them with --collection")
    said = instruction or recipe.instruction
    if not said:
        raise BadInput(f"recipe {name} needs --instruction: what is asked of each document")
    return RecipeSource(recipe, documents, collection, said, options)


@click.command()
def recipes() -> None:
    """What can be done to documents with `--recipe`."""
    for name, recipe in sorted(known_recipes().items()):
        say(f"{name}: {recipe.summary}")


def _line(row: DocumentRow, name: str, wish: RecipeSource, *, model: str) -> dict[str, Any]:
    digests = [] if row.digest is None else [f"sha256:{row.digest}"]
    stoker = {"recipe": wish.recipe.name, "document": row.id, "sources": [row.source, *digests]}
    return {
        "custom_id": name,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": model,
            "messages": [{"role": "user", "content": wish.instruction}],
            "max_tokens": wish.recipe.max_tokens,
            "temperature": 0,
        },
        "stoker": stoker | ({"options": wish.options} if wish.options else {}),
    }


def _names(sources: Sequence[str]) -> list[str]:
    """A custom_id for each source: its path below the folder that all files share, if that fits."""
    files = [source for source in sources if not is_url(source)]
    shared = os.path.commonpath([os.path.dirname(file) for file in files]) if files else ""  # noqa: PTH120
    names = [source if is_url(source) else os.path.relpath(source, shared) for source in sources]
    fits = len(set(names)) == len(names) and all(len(name) <= CUSTOM_ID_CHARACTERS for name in names)
    return names if fits else [f"document-{place}" for place in range(len(names))]
