"""The command line of a schedule: what would fail each night is refused when it is added."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import click
import pytest

from runtime.errors import BadInput
from scripts import scheduled_line
from scripts.stoker import cli

DUE = datetime(2026, 6, 1, tzinfo=UTC)


def checked_line(words: list[str], *, folder: Path) -> list[str]:
    """As `stoker schedule add` checks it."""
    with click.Context(cli):
        return scheduled_line.checked_line(words, folder=folder, due=DUE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a batch file and a document."""
    (tmp_path / "q.jsonl").write_text("{}\n")
    (tmp_path / "a.md").write_text("text")
    return tmp_path


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("gateway", "a schedule runs submit, documents add, .* cost or purge, not gateway"),
        ("documents remove --all -c x", "not documents remove"),
        ("schedule add x", "not schedule add"),
        ("submit nowhere.jsonl", "stoker submit: .*nowhere.jsonl"),
        ("submit q.jsonl --modle m", "stoker submit: No such option .*--modle"),
        ("submit q.jsonl --max-output-tokens many", "not a valid integer"),
        ("submit q.jsonl --budget-money 5", "add --trust external"),
        ("submit q.jsonl --labels a,b", "are for a table"),
        ("submit", "give either FILE"),
        ("submit -", "no standard input"),
        ("submit q.jsonl --force", "leave --force and --idempotency-key out"),
        ("submit q.jsonl --idempotency-key k", "leave --force and --idempotency-key out"),
        ("submit q.jsonl --dry-run", "stores nothing"),
        ("submit --help", "No such option"),
        ("submit q-{due:%Y}.jsonl --modle m", "No such option"),
        ("submit q-{due}.jsonl", "write {due:%Y-%m-%d}, with how"),
        ("submit q-{due:%Q}.jsonl", "there is no %Q; write such as {due:%Y-%m-%d}"),
        ("submit --recipe nothing --documents x", "nothing"),
        ("documents add nowhere.md -c x", "nowhere.md: no such file"),
        ("documents add a.md", "Missing option '--collection'"),
        ("documents add --from-file - -c x", "no standard input"),
        ("purge --older-than yesterday", "is no duration"),
        ("purge", "Missing option '--older-than'"),
        ("cost --by moon", "is not one of"),
        ("cache certify seven", "not a valid integer"),
    ],
)
def test_a_command_that_would_fail_each_night_is_refused(folder: Path, command: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        checked_line(command.split(), folder=folder)


@pytest.mark.parametrize(
    "command",
    [
        "stoker submit q.jsonl --set x={due:%Y-%m-%d}",
        "submit answers-{due:%Y-%m-%d}.jsonl --model m",  # it is there when its day comes
        "documents add a.md https://example.com/x -c handbook --prune",
        "documents add new-{due:%d} -c handbook",
        "documents rebuild -c handbook",
        "cache certify",
        "cost --by day --json",
        "purge --older-than 30d",
    ],
)
def test_a_command_that_can_run_is_taken(folder: Path, command: str) -> None:
    assert " ".join(checked_line(command.split(), folder=folder)) == command.removeprefix("stoker ")
