"""`FILE --prompt …`: a table's rows become the lines of a batch, one each, and its results the table's columns.

Imported where a table is met: pyarrow takes a while, and may not be installed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from models.states import CacheMode
from pipeline.answer_forms import AnswerForm
from pipeline.export import write_lines
from pipeline.serving import only_served
from pipeline.table_lines import Prompt, write_rows
from pipeline.table_results import TableAsked, asked_of, open_asked, write_table
from runtime.errors import BadInput
from scripts.lookup import TENANT
from scripts.preview import Preview, ask_to_go_on
from scripts.result_files import check_writable, errors_beside, replacing, write_manifest
from scripts.source import Lines, Source, Terms
from scripts.terminal import bar, say
from store.batches import BatchProgress
from store.database import Database
from tables.reading import Table, open_table


@dataclass(frozen=True)
class TableSource(Source):
    """A table, and what is asked of each of its rows; `prefix` stands before the names of result columns."""

    table: Table
    prompt: Prompt
    prefix: str
    skips_nulls: bool

    @property
    def title(self) -> str:
        """The table's path."""
        return str(self.table.path)

    @property
    def validates_answers(self) -> bool:  # type: ignore[override]
        """Whether their form was stated."""
        return self.prompt.form is not None

    def common(self, mode: CacheMode) -> Mapping[str, Any]:
        """The prompt's template is the semantic cache's."""
        return {"template": self.prompt.template} if mode is CacheMode.SEMANTIC else {}

    @property
    def asked(self) -> TableAsked:
        """What its batch is to keep, but for the digest of the table, which takes reading it."""
        return TableAsked(str(self.table.path.absolute()), "", self.prompt.template, self.prefix, self.prompt.form)

    @contextmanager
    def lines(self, terms: Terms) -> Iterator[Lines]:
        """A line for each row. Raises BadInput for nulls that are not to be skipped."""
        model = terms.how.model or only_served(terms.served)
        asked = replace(self.asked, sha256=self.table.digest())
        with tempfile.TemporaryFile(dir=terms.folder) as file:  # without a name: nothing is left of it, however we end
            with bar("reading the table", total=self.table.rows) as show:
                try:
                    written = write_rows(
                        self.table,
                        self.prompt,
                        file,
                        model=model,
                        states_variables=terms.how.cache_mode(terms.settings) is CacheMode.SEMANTIC,
                        skips_nulls=self.skips_nulls,
                        sample=terms.sample,
                        on_progress=show,
                    )
                except OSError as error:
                    place = terms.folder or tempfile.gettempdir()
                    raise BadInput(
                        f"{place}: the rows' lines cannot be written there ({error.strerror}); they take about what "
                        "the prompts do: make room, or set TMPDIR"
                    ) from error
            self.table.check_unchanged()
            if written.nulls:
                nulls = ", ".join(f"{name} in {count:,}" for name, count in written.nulls.items())
                say(f"{written.rows:,} rows: {written.lines:,} are run; the others have nulls: {nulls}")
            lines = Path(f"/proc/self/fd/{file.fileno()}")
            yield Lines(lines, asked.stored(), count=written.lines, sample=written.sample)

    def check_output(self, output: Path, *, previews: bool) -> None:
        """That the table can be written there with the result columns, and that no file of it would be written over."""
        del previews
        self.asked.check(output, self.table)
        for file in self.table.files:
            check_writable(output, beside=file, of_table=True)

    def write_files(self, database: Database, progress: BatchProgress, output: Path) -> list[tuple[str, str]]:
        """The table with its results, error lines if there are any, and the manifest."""
        write_kept(database, progress, output)
        places = [("results", str(output))]
        errors = errors_beside(output, of_table=True)
        if progress.failed:
            with replacing(errors) as bad:
                write_lines(database, progress.id, output=None, errors=bad)
            places.append(("errors", str(errors)))
        else:
            errors.unlink(missing_ok=True)  # of an earlier run
        return [*places, ("manifest", str(write_manifest(database, progress, output)))]

    def ask_to_go_on(self, database: Database, preview: BatchProgress, *, of: Lines, slots: int, yes: bool) -> bool:
        """Show each answer beside its input, and what all rows would take."""
        return ask_to_go_on(Preview(database, preview, of=of.count, slots=slots), yes=yes)


def table_source(
    path: Path, template: str, system: str | None, form: AnswerForm | None, *, prefix: str, skips_nulls: bool
) -> TableSource:
    """The table at this path. Raises BadInput if it cannot be read, or lacks what the prompt names."""
    table = open_table(path)
    if {"custom_id", "method", "url", "body"} <= set(table.column_names):
        raise BadInput(f"{path}: is a batch file of requests, not a table; leave --prompt out")
    prompt = Prompt(template, system, form)
    prompt.check(table.column_names)
    return TableSource(table, prompt, prefix, skips_nulls)


def write_kept(database: Database, progress: BatchProgress, output: Path, *, moved: Path | None = None) -> int:
    """Write the table that a batch was made of, which may have moved, with its results: how many rows.

    Raises BadInput if the table has changed, or cannot be written there.
    """
    asked = asked_of(progress)
    table = open_asked(asked, moved)
    asked.check(output, table)
    with bar("writing the table", total=table.rows) as show:
        write_table(database, progress, table, output, asked=asked, tenant=TENANT, on_progress=show)
    return table.rows
