"""The command line of a schedule, checked as its run would read it, and without running it.

It must know no command itself: click says what a command takes, and the commands' own checks say the rest.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from contextlib import chdir
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import click

from pipeline.adding import gather
from pipeline.schedules import filled_in, has_slots
from runtime.errors import BadInput
from scripts.sources import source_of
from scripts.submit_options import how_of

RUNNABLE: Final = ("submit", "documents add", "documents rebuild", "cache certify", "cost", "purge")
_PROGRAM: Final = "stoker"
_BARE_SLOT: Final = re.compile(r"\{(?:due|date|time|now)\}")
_SLOT: Final = re.compile(r"\{due:([^{}]*)\}")
_DIRECTIVE: Final = re.compile(r"%(.?)")
_DIRECTIVES: Final = "aAbBcdeDfFgGhHIjmMnpRsStTuUVwWxXyYzZ%"
_STANDARD_INPUT: Final = {"-", "--from-file=-"}


def checked_line(words: Sequence[str], *, folder: Path, due: datetime) -> list[str]:
    """The command line after `stoker`, as a run at `due` in `folder` would take it.

    Raises BadInput for a command that a schedule does not run, a wrong option and a file that is not there; one whose
    name has a due time in it may still come.
    """
    line = list(words)
    if line[:1] == [_PROGRAM]:
        del line[0]
    name = next((one for one in RUNNABLE if line[: len(one.split())] == one.split()), None)
    if name is None:
        raise BadInput(
            f"a schedule runs {', '.join(RUNNABLE[:-1])} or {RUNNABLE[-1]}, not {' '.join(line[:2]) or 'nothing'}; "
            "write it after --, such as: stoker schedule add nightly --cron '0 2 * * *' -- submit questions.jsonl"
        )
    _check_slots(line)
    path, given = line[: len(name.split())], filled_in(line[len(name.split()) :], due)
    try:
        with chdir(folder):
            _check(path, given, may_come=has_slots(line))
    except click.UsageError as error:
        raise BadInput(f"stoker {name}: {error.format_message()}") from error
    return line


def _check_slots(line: Sequence[str]) -> None:
    """Raise BadInput for what looks like a due time that is to be filled in, and is none."""
    for word in line:
        if _BARE_SLOT.search(word):
            raise BadInput(f"{word!r}: write {{due:%Y-%m-%d}}, with how the due time is to look")
        for slot in _SLOT.findall(word):
            unknown = sorted(set(_DIRECTIVE.findall(slot)) - set(_DIRECTIVES))
            if unknown:
                raise BadInput(f"{word!r}: there is no %{unknown[0]}; write such as {{due:%Y-%m-%d}} or {{due:%H%M}}")


def _check(path: Sequence[str], given: list[str], *, may_come: bool) -> None:
    command, context = _found(path)
    if may_come:
        command = _without_paths(command)
    with command.make_context(path[-1], list(given), parent=context, help_option_names=[]) as made:
        params = made.params
    if _STANDARD_INPUT & set(given):
        raise BadInput("a scheduled run has no standard input: name a file")
    if path[-1] == "submit":
        _check_submit(params, may_come=may_come)
    elif path[-1] == "add" and not may_come:
        missing = gather(params["names"]).missing
        if missing:
            raise BadInput("; ".join(missing))


def _check_submit(params: dict[str, Any], *, may_come: bool) -> None:
    if params["force"] or params["key"] is not None:
        raise BadInput(
            "leave --force and --idempotency-key out: each run makes a batch of its own, and one that is repeated "
            "after a crash the same"
        )
    if params["dry_run"]:
        raise BadInput("--dry-run stores nothing; try it without a schedule")
    how_of(params)
    if not may_come:
        source_of(params)


def _found(path: Sequence[str]) -> tuple[click.Command, click.Context]:
    """The command of this path in the program that we are part of, and the context that it stands in."""
    context = click.get_current_context().find_root()
    command = context.command
    for place, word in enumerate(path):
        assert isinstance(command, click.Group)  # noqa: S101  # RUNNABLE names commands of groups
        if place:
            context = click.Context(command, info_name=command.name, parent=context)
        found = command.get_command(context, word)
        assert found is not None  # noqa: S101  # as above
        command = found
    return command, context


def _without_paths(command: click.Command) -> click.Command:
    """The command, whose files need not be there."""
    relaxed = copy.copy(command)
    relaxed.params = [_without_path(param) for param in command.params]
    return relaxed


def _without_path(param: click.Parameter) -> click.Parameter:
    if not isinstance(param.type, click.Path | click.File):
        return param
    relaxed = copy.copy(param)
    relaxed.type = click.Path(path_type=Path, allow_dash=True)
    return relaxed
