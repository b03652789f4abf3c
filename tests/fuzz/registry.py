"""All targets by name, in the order in which they are run."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Final

from tests.fuzz.target import Target

MODULES: Final = ("answers", "files", "requests")


def all_targets() -> Mapping[str, Target]:
    """Every target."""
    return {name: target for module in MODULES for name, target in _targets_in(module).items()}


def named(name: str) -> Target:
    """One of them; as few modules as possible are imported, for each is instrumented."""
    found = (_targets_in(module).get(name) for module in MODULES)
    return next(target for target in found if target is not None)


def _targets_in(module: str) -> Mapping[str, Target]:
    targets: Mapping[str, Target] = import_module(f"tests.fuzz.{module}").TARGETS
    return targets
