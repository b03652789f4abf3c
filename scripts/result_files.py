"""The files that commands write: each takes its place only when it is whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pipeline.export import manifest, write_lines
from runtime.errors import BadInput
from store.batches import BatchProgress
from store.database import Database


def check_writable(output: Path, *, beside: Path | None = None, of_table: bool = False) -> None:
    """Raises BadInput if the folder of an -o does not exist, or a file of its would replace the input `beside`."""
    if not output.parent.is_dir():
        raise BadInput(f"-o {output}: the folder {output.parent} does not exist")
    if beside is not None:
        for written in (output, errors_beside(output, of_table=of_table), _manifest_of(output)):
            check_other_file(written, beside, option="-o")


def check_other_file(written: Path, read: Path, *, option: str) -> None:
    """Raises BadInput if what is to be written is the file that is read."""
    if written.exists() and read.exists() and written.samefile(read):
        raise BadInput(f"{option} {written}: is the input itself; name another file")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the block ends well; until then `path` stays as it was."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as opened:
        yield opened
    part.replace(path)


def write_files(database: Database, progress: BatchProgress, output: Path) -> list[tuple[str, str]]:
    """Results, errors if there are any, and the manifest: (what, path) of each that was written."""
    errors = errors_beside(output)
    with replacing(output) as good, replacing(errors) as bad:
        _, failed = write_lines(database, progress.id, output=good, errors=bad)
    places = [("results", str(output))]
    if failed:
        places.append(("errors", str(errors)))
    else:
        errors.unlink()
    return [*places, ("manifest", str(write_manifest(database, progress, output)))]


def write_manifest(database: Database, progress: BatchProgress, output: Path) -> Path:
    """The manifest beside a result file; its path."""
    path = _manifest_of(output)
    path.write_text(json.dumps(manifest(database, progress), indent=2) + "\n")
    return path


def errors_beside(output: Path, *, of_table: bool = False) -> Path:
    """Where the error lines go; these are lines also where the results are a table."""
    return output.with_suffix(".errors" + (".jsonl" if of_table else output.suffix))


def _manifest_of(output: Path) -> Path:
    return output.with_suffix(".manifest.json")
