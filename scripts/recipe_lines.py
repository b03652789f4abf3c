"""`--recipe R --documents …`: documents are read, and become the lines of a batch, one each."""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from models.line_problems import CUSTOM_ID_CHARACTERS
from models.lines import parse_sets
from pipeline.adding import add_documents, gather, is_url
from pipeline.recipe import Recipe
from pipeline.recipes import named_recipe, read_options, recipes
from runtime.errors import BadInput
from runtime.settings import Settings
from scripts.documents_commands import CollectionName, await_documents, say_gathered
from scripts.local import ensure_node
from scripts.lookup import TENANT
from scripts.terminal import bar, say
from store.database import Database
from store.documents import DocumentRow, list_documents, made_collection


@dataclass(frozen=True, slots=True)
class RecipeWish:
    """What a command line says of a recipe."""

    recipe: Recipe
    documents: tuple[str, ...]
    collection: str | None
    instruction: str
    options: Mapping[str, Any]

    @property
    def title(self) -> str:
        """What its batch is called."""
        return f"{self.recipe.name} {' '.join(self.documents)}"


def with_recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with options of recipes, which it gets as `wish`: None where FILE is given instead."""

    @functools.wraps(command)
    def inner(
        *args: Any,
        recipe: str | None,
        documents: tuple[str, ...],
        collection: str | None,
        instruction: str | None,
        labels: str | None,
        schema: Path | None,
        options: tuple[str, ...],
        **rest: Any,
    ) -> Any:
        if (recipe is None) == (rest["file"] is None):
            raise click.UsageError("give either FILE or --recipe with --documents")
        if bool(recipe) != bool(documents):
            raise click.UsageError("--recipe and --documents go together")
        if recipe is None and (collection or instruction or labels or schema or options):
            raise click.UsageError(
                "--collection, --instruction, --labels, --schema and --option are for --recipe; "
                "lines of a FILE state them under `stoker`"
            )
        wish = None
        if recipe is not None:
            wish = _wish(recipe, documents, collection, instruction, _recipe_options(labels, schema, options))
        return command(*args, wish=wish, **rest)

    for option in reversed(_OPTIONS):
        inner = option(inner)
    return inner


@contextmanager
def recipe_lines(
    settings: Settings, database: Database, wish: RecipeWish, *, model: str | None, served: frozenset[str] | None
) -> Iterator[Path]:
    """A batch file with one line for each document, in their order, once all are read or have failed.

    A worker of the documents node is started for it unless one is live. Raises BadInput where there is no document,
    or no model that is sure to be served.
    """
    named = model or _only(served)
    found = gather(wish.documents)
    say_gathered(found)
    if found.missing or not found.sources:
        raise BadInput("nothing was stored: name files, folders or URLs with --documents")
    with ExitStack() as stack:
        with database.transaction() as session:
            collection_id = None if wish.collection is None else made_collection(session, TENANT, wish.collection)
        with bar("storing documents", total=len(found.sources)) as show:
            added = add_documents(
                database,
                found.sources,
                tenant=TENANT,
                collection_id=collection_id,
                limits=settings.documents,
                on_progress=show,
            )
        await_documents(database, added.ids, ensure_node(settings, stack, "documents"))
    with database.transaction() as session:
        rows = {row.id: row for row in list_documents(session, tenant=TENANT, ids=added.ids)}
    with tempfile.NamedTemporaryFile("w", prefix="stoker-", suffix=".jsonl") as file:
        names = _names([rows[identifier].source for identifier in added.ids])
        for identifier, name in zip(added.ids, names, strict=True):
            file.write(json.dumps(_line(rows[identifier], name, wish, model=named)) + "\n")
        file.flush()
        yield Path(file.name)


_OPTIONS = (
    click.option("--recipe", metavar="NAME", help="Do this to documents, one line each: see `stoker recipes`."),
    click.option("--documents", multiple=True, metavar="PATH|URL", help="Files, folders or URLs. Repeatable."),
    click.option("--collection", "-c", type=CollectionName(), help="Where documents are added; index and ask need it."),
    click.option("--instruction", metavar="TEXT", help="What is asked of each document; for `ask`, the question."),
    click.option("--labels", metavar="A,B,C", help="For classify: the answers that are possible."),
    click.option("--schema", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="For extract: a file."),
    click.option("--option", "options", multiple=True, metavar="NAME=VALUE", help="Another option of the recipe."),
)


@click.command("recipes")
def list_recipes() -> None:
    """What can be done to documents with `--recipe`."""
    for name, recipe in sorted(recipes().items()):
        say(f"{name}: {recipe.summary}")


def _recipe_options(labels: str | None, schema: Path | None, options: Sequence[str]) -> dict[str, Any]:
    if unnamed := next((option for option in options if not option.partition("=")[1]), None):
        raise BadInput(f"--option {unnamed}: write --option NAME=VALUE, such as --option top_k=8")
    given = parse_sets(options)
    if labels is not None:
        given["labels"] = [label.strip() for label in labels.split(",") if label.strip()]
    if schema is not None:
        try:
            given["schema"] = json.loads(schema.read_text())
        except ValueError as error:
            raise BadInput(f"{schema}: is no JSON: {error}") from error
    return given


def _wish(
    name: str, documents: tuple[str, ...], collection: str | None, instruction: str | None, options: Mapping[str, Any]
) -> RecipeWish:
    recipe = named_recipe(name)
    read_options(recipe, options)
    if recipe.needs_passages and collection is None:
        raise BadInput(f"recipe {name} searches documents: name a collection for them with --collection")
    said = instruction or recipe.instruction
    if not said:
        raise BadInput(f"recipe {name} needs --instruction: what is asked of each document")
    return RecipeWish(recipe, documents, collection, said, options)


def _line(row: DocumentRow, name: str, wish: RecipeWish, *, model: str) -> dict[str, Any]:
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


def _only(served: frozenset[str] | None) -> str:
    if served is None or len(served) != 1:
        known = f"; the workers serve {', '.join(sorted(served))}" if served else ", as no worker is live to tell"
        raise BadInput(f"say which model with --model{known}")
    [name] = served
    return name
