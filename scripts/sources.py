"""The source that a command line names: a file of lines, a table with a prompt, documents with a recipe."""

from __future__ import annotations

import functools
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from models.lines import parse_sets
from pipeline.answer_forms import AnswerForm, labels_form, regex_form, schema_form
from runtime.errors import BadInput
from scripts.documents_commands import CollectionName
from scripts.recipe_source import recipe_source
from scripts.result_files import check_writable
from scripts.source import Lines, Source, Terms, expect_tables


@dataclass(frozen=True)
class FileSource(Source):
    """A file of lines; `-` is standard input."""

    file: Path

    @property
    def title(self) -> str:
        """The file's name, as it was given."""
        return str(self.file)

    @contextmanager
    def lines(self, terms: Terms) -> Iterator[Lines]:
        """The file itself."""
        del terms
        with seekable(self.file) as path:
            yield Lines(path)

    def check_output(self, output: Path, *, previews: bool) -> None:
        """As others, and that no result takes the place of the file."""
        super().check_output(output, previews=previews)
        check_writable(output, beside=self.file)


@contextmanager
def seekable(file: Path) -> Iterator[Path]:
    """The file itself; standard input (`-`) as a temporary file."""
    if str(file) != "-":
        yield file
        return
    with tempfile.NamedTemporaryFile(prefix="stoker-", suffix=".jsonl") as spooled:
        shutil.copyfileobj(sys.stdin.buffer, spooled)
        spooled.flush()
        yield Path(spooled.name)


def with_source(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with an argument FILE and options of tables and recipes, which it gets as `source`."""

    @functools.wraps(command)
    def inner(*args: Any, **given: Any) -> Any:
        stated = {name: given.pop(name) for name in _Stated.__dataclass_fields__}
        return command(*args, source=source_of(stated), **given)

    for option in reversed(_OPTIONS):
        inner = option(inner)
    return click.argument("file", required=False, type=click.Path(path_type=Path, exists=True, allow_dash=True))(inner)


_OPTIONS = (
    click.option(
        "--prompt", metavar="TEXT", help="FILE is a table: ask this of each row, with {column} for its values."
    ),
    click.option("--system", metavar="TEXT", help="With --prompt: the system message."),
    click.option("--labels", metavar="A,B,C", help="The answers that are possible; @FILE has one a line."),
    click.option(
        "--schema",
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        help="A JSON schema that answers are held to; with --prompt its fields become columns.",
    ),
    click.option("--regex", metavar="PATTERN", help="With --prompt: answers match the whole of it (RE2)."),
    click.option("--result-prefix", metavar="TEXT", default="", help="With --prompt: before the names of new columns."),
    click.option("--skip-nulls", is_flag=True, help="With --prompt: rows with a null in a slot are not run."),
    click.option("--recipe", metavar="NAME", help="Do this to documents, one line each: see `stoker recipes`."),
    click.option("--documents", multiple=True, metavar="PATH|URL", help="Files, folders or URLs. Repeatable."),
    click.option("--collection", "-c", type=CollectionName(), help="Where documents are added; index and ask need it."),
    click.option("--instruction", metavar="TEXT", help="What is asked of each document; for `ask`, the question."),
    click.option("--option", "options", multiple=True, metavar="NAME=VALUE", help="Another option of the recipe."),
)


@dataclass(frozen=True, slots=True)
class _Stated:
    file: Path | None
    prompt: str | None
    system: str | None
    labels: str | None
    schema: Path | None
    regex: str | None
    result_prefix: str
    skip_nulls: bool
    recipe: str | None
    documents: tuple[str, ...]
    collection: str | None
    instruction: str | None
    options: tuple[str, ...]


def source_of(params: Mapping[str, Any]) -> Source:
    """The source that a command's parameters name. Raises UsageError and BadInput for what is wrong with it."""
    stated = _Stated(**{name: params[name] for name in _Stated.__dataclass_fields__})
    if (stated.recipe is None) == (stated.file is None):
        raise click.UsageError("give either FILE, with --prompt if it is a table, or --recipe with --documents")
    if bool(stated.recipe) != bool(stated.documents):
        raise click.UsageError("--recipe and --documents go together")
    if stated.recipe is None and (stated.collection or stated.instruction or stated.options):
        raise click.UsageError(
            "--collection, --instruction and --option are for --recipe; lines of a FILE state them under `stoker`"
        )
    of_tables = stated.system or stated.regex or stated.result_prefix or stated.skip_nulls
    if stated.prompt is None and of_tables:
        raise click.UsageError("--system, --regex, --result-prefix and --skip-nulls are for a table, with --prompt")
    if stated.recipe is not None:
        return _recipe(stated)
    assert stated.file is not None  # noqa: S101  # else there is a recipe
    if stated.prompt is not None:
        return _table(stated, stated.file, stated.prompt)
    file = _lines_file(stated.file)
    if stated.labels or stated.schema:
        raise click.UsageError(
            "--labels and --schema are for a table, with --prompt, and for --recipe; lines of a FILE state their "
            "response_format, and --validate-answers holds answers to it"
        )
    return FileSource(file)


def _lines_file(file: Path) -> Path:
    if file.is_dir() or (file.suffix and file.suffix.lower() in _TABLES):
        raise click.UsageError(f"{file}: is a table; say what is asked of each row with --prompt 'Classify: {{text}}'")
    return file


_TABLES = frozenset({".parquet", ".pq", ".csv", ".tsv", ".arrow", ".feather", ".ipc"})


def _table(stated: _Stated, file: Path, template: str) -> Source:
    if str(file) == "-":
        raise click.UsageError("standard input is for lines; a table is a file or a folder")
    expect_tables()
    from scripts.table_source import table_source  # noqa: PLC0415  # pyarrow is an extra, and takes a while

    return table_source(
        file, template, stated.system, _form(stated), prefix=stated.result_prefix, skips_nulls=stated.skip_nulls
    )


def _form(stated: _Stated) -> AnswerForm | None:
    forms = {"--labels": stated.labels, "--schema": stated.schema, "--regex": stated.regex}
    given = [name for name, value in forms.items() if value is not None]
    if len(given) > 1:
        raise click.UsageError(f"{' and '.join(given)}: an answer has one form; give one of them")
    if stated.labels is not None:
        return labels_form(_labels(stated.labels))
    if stated.schema is not None:
        return schema_form(_json(stated.schema), named=f"--schema {stated.schema}")
    return None if stated.regex is None else regex_form(stated.regex)


def _recipe(stated: _Stated) -> Source:
    if stated.prompt is not None:
        raise click.UsageError("--prompt is for a table; what is asked of documents is --instruction")
    if unnamed := next((option for option in stated.options if not option.partition("=")[1]), None):
        raise BadInput(f"--option {unnamed}: write --option NAME=VALUE, such as --option top_k=8")
    options = parse_sets(stated.options)
    if stated.labels is not None:
        options["labels"] = _labels(stated.labels)
    if stated.schema is not None:
        options["schema"] = _json(stated.schema)
    return recipe_source(stated.recipe or "", stated.documents, stated.collection, stated.instruction, options)


def _labels(stated: str) -> list[str]:
    if not stated.startswith("@"):
        labels = [label.strip() for label in stated.split(",")]
        if "" in labels:
            raise BadInput(f"--labels {stated}: one of them is empty; leave the comma out")
        return labels
    try:
        lines = Path(stated[1:]).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"--labels {stated}: cannot be read ({error}); @FILE is a text file, one label a line"
        ) from error
    return [line.strip() for line in lines if line.strip()]


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise BadInput(f"{file}: is no JSON: {error}") from error
