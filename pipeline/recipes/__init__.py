"""What can be done to a document: each module here is one recipe, found by its RECIPE."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Any

import msgspec

from pipeline.recipe import Recipe
from runtime.errors import BadInput


@cache
def recipes() -> Mapping[str, Recipe]:
    """All of them by name."""
    modules = [import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    return {module.RECIPE.name: module.RECIPE for module in modules}


def named_recipe(name: str) -> Recipe:
    """The recipe. Raises BadInput if there is none of this name."""
    found = recipes().get(name)
    if found is None:
        raise BadInput(f"no recipe {name}; there are {', '.join(sorted(recipes()))}")
    return found


def read_options(recipe: Recipe, options: Mapping[str, Any]) -> Any:
    """The recipe's options as it reads them. Raises BadInput naming the one that is wrong."""
    try:
        return msgspec.convert(dict(options), recipe.options)
    except ValueError as error:  # msgspec's too
        raise BadInput(f"recipe {recipe.name}: {error}") from error
