"""What can be done to a document: each module here is one recipe, found by its RECIPE."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from functools import cache, lru_cache
from importlib import import_module
from typing import Any

import msgspec

from cache.keys import read_body
from documents.prompt import question_of
from models.line_problems import SHOWN_CHARACTERS
from models.line_settings import LineSettings
from models.lines import ParsedLine
from pipeline.recipe import Recipe
from runtime.errors import BadInput, Permanent, Problem


@cache
def recipes() -> Mapping[str, Recipe]:
    """All of them by name."""
    modules = [import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    return {module.RECIPE.name: module.RECIPE for module in modules}


def named_recipe(name: str) -> Recipe:
    """The recipe. Raises BadInput if there is none of this name."""
    found = recipes().get(name)
    if found is None:
        raise BadInput(f"no recipe {name[:SHOWN_CHARACTERS]}; there are {', '.join(sorted(recipes()))}")
    return found


def read_options(recipe: Recipe, options: Mapping[str, Any]) -> Any:
    """The recipe's options as it reads them. Raises BadInput naming the one that is wrong."""
    try:
        return _options(recipe.options, msgspec.json.encode(options))
    except (ValueError, RecursionError) as error:  # msgspec's are ValueErrors
        known = ", ".join(field.name for field in msgspec.structs.fields(recipe.options)) or "none"
        raise BadInput(f"{error} (recipe {recipe.name}; its options: {known})") from error


def recipe_problem(line: ParsedLine, settings: LineSettings, number: int) -> Problem | None:
    """What is wrong with the recipe that a line states, if it states one."""
    if settings.recipe is None:
        return None
    field = "stoker.recipe"
    try:
        recipe = named_recipe(settings.recipe)
        field = "stoker.options"
        read_options(recipe, settings.options or {})
        field = "body"
        question_of(read_body(line.body))
    except (BadInput, Permanent, ValueError, RecursionError) as error:
        return Problem(number, "invalid_request", field, str(error))
    return None


@lru_cache(maxsize=64)  # the lines of a batch often have the same, and a schema of 32 KB takes 10 ms
def _options(kind: type[msgspec.Struct], encoded: bytes) -> Any:
    return msgspec.json.decode(encoded, type=kind)
