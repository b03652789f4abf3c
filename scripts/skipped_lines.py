"""What `--skip-bad` left out: the first lines to stderr, all of them to a file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import msgspec

from runtime.errors import BadInput, Problem
from scripts.result_files import check_other_file
from scripts.terminal import say

SAID_LINES = 20


class SkippedLines:
    """Hears of each line that is left out, and keeps none of them in memory."""

    def __init__(self, sink: BinaryIO | None) -> None:
        self.count = 0
        self._sink = sink

    def __call__(self, problem: Problem) -> None:
        self.count += 1
        if self.count <= SAID_LINES:
            say(f"skipped: {problem}")
        if self._sink is not None:
            self._sink.write(msgspec.json.encode(problem) + b"\n")


@contextmanager
def skipped_lines(path: Path | None) -> Iterator[SkippedLines]:
    """Report skipped lines to `path`, if any; says at the end how many there were and where they stand.

    A file is left only where lines were skipped.
    """
    if path is None:
        report = SkippedLines(None)
        yield report
    else:
        part = path.with_name(path.name + ".part")
        try:
            with part.open("wb") as sink:
                report = SkippedLines(sink)
                yield report
            if report.count:  # the same submit again reads no line: what it said the first time stays
                part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    if report.count > SAID_LINES:
        say(f"… and {report.count - SAID_LINES:,} more")
    if report.count:
        say(f"{report.count:,} bad lines were left out" + (f"; all of them: {path}" if path else ""))


def skipped_file(file: Path, wish: Path | None) -> Path | None:
    """Where the skipped lines go: as wished, else beside the input if that can be written; None: nowhere."""
    if wish is not None:
        if not wish.parent.is_dir():
            raise BadInput(f"--skipped {wish}: the folder {wish.parent} does not exist")
        check_other_file(wish, file, option="--skipped")
        return wish
    beside = file.with_name(file.name.removesuffix(".jsonl") + ".skipped.jsonl")
    return None if str(file) == "-" or not os.access(file.parent, os.W_OK) else beside
