"""What a batch is made of, as a command sees it: lines for a while, and where its results go."""

from __future__ import annotations

import importlib.util
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from models.states import CacheMode
from runtime.errors import BadInput, extra_remedy
from runtime.settings import Settings
from scripts.result_files import check_writable, write_files
from scripts.submit_options import How
from store.batches import BatchProgress
from store.database import Database


@dataclass(frozen=True, slots=True)
class Lines:
    """A batch file, for a while; `about` is kept with its batch.

    Of a table `count` says how many lines there are, and `sample` has some of them as they were drawn.
    """

    path: Path
    about: Mapping[str, Any] = field(default_factory=dict)
    count: int = 0
    sample: Sequence[bytes] = ()

    @contextmanager
    def sampled(self) -> Iterator[Lines]:
        """The sample, as a batch file of its own."""
        with tempfile.NamedTemporaryFile(prefix="stoker-", suffix=".jsonl") as file:
            file.write(b"".join(self.sample))
            file.flush()
            yield Lines(Path(file.name), self.about, len(self.sample))


@dataclass(frozen=True, slots=True)
class Terms:
    """What lines are made with; `served` are the models that are sure to be answered, None where nothing is known.

    Of a table so many rows are `sample`d, and the file lies in `folder`, as it may be large.
    """

    settings: Settings
    database: Database
    how: How
    served: frozenset[str] | None
    sample: int = 0
    folder: Path | None = None


class Source(ABC):
    """One of FileSource, RecipeSource, TableSource."""

    needs_chroma = False
    validates_answers = False

    @property
    @abstractmethod
    def title(self) -> str:
        """What its batch is called."""

    @abstractmethod
    def lines(self, terms: Terms) -> AbstractContextManager[Lines]:
        """Its lines. Raises BadInput for what is wrong with it."""

    def common(self, mode: CacheMode) -> Mapping[str, Any]:
        """Settings of all its lines, where they state none themselves."""
        del mode
        return {}

    def check_output(self, output: Path, *, previews: bool) -> None:
        """Raises BadInput if the results cannot be written there, before anything runs."""
        check_writable(output)
        if previews:
            raise click.UsageError("--preview is for a table, with --prompt")

    def write_files(self, database: Database, progress: BatchProgress, output: Path) -> list[tuple[str, str]]:
        """Write the results, and what goes beside them: (what, path) of each file."""
        return write_files(database, progress, output)

    def ask_to_go_on(self, database: Database, preview: BatchProgress, *, of: Lines, slots: int, yes: bool) -> bool:
        """Show the batch of a preview, of these lines, and ask whether the rest is wanted."""
        raise NotImplementedError


def expect_tables() -> None:
    """Raises BadInput if tables cannot be read here."""
    if importlib.util.find_spec("pyarrow") is None:
        raise BadInput(f"tables need pyarrow: {extra_remedy('tables')}")
