"""A batch file as submit reads it: line by line in flat memory, good lines out, problems counted.

It must not store anything, and it never keeps more than one line and what `duplicates` holds.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from io import BufferedReader, FileIO
from pathlib import Path
from stat import S_ISREG

from models.line_problems import SHOWN_CHARACTERS
from models.line_settings import LineSettings, read_settings
from models.lines import LineRules, ParsedLine, parse_line
from pipeline.duplicates import LOW_BITS, SETTLE_LINES, DigestBuckets, duplicates
from pipeline.forms import check_form
from pipeline.recipes import recipe_problem
from pipeline.semantic_lines import template_problem
from pipeline.serving import EXTERNAL_REMEDY, ServedModels
from runtime.errors import BadInput, InvalidFile, Problem

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
BUFFER_BYTES = 1024 * 1024
PROGRESS_EVERY_LINES = 4096
KEPT_PROBLEMS = 20
NAMED_MODELS = 20
MOST_FORMS = 64  # different schemas that a validating file's lines state: each is compiled, and takes 0.3 s at the most
SKIPPED_SUSPECTS = 100_000  # ids that several lines use: 15 MB of ids and line numbers

Progress = Callable[[int, int], None]


class BatchFile:
    """One open batch file. Iterating gives its good lines while no line is bad.

    After the first bad line it gives no more, reads on to count all problems, and raises InvalidFile; so
    does a custom_id that two lines share, a model that is not served, and a file without a line. Blank
    lines are skipped, as other readers of the format do. `endpoint` is known once a line was given;
    `skipped` counts the bad lines that were left out, none here.
    """

    def __init__(
        self,
        file: BufferedReader,
        *,
        rules: LineRules,
        served_models: ServedModels | None,
        on_progress: Progress | None,
        endpoint: str | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.skipped = 0
        self._has_line = False
        self._file = file
        self._rules = rules
        self._models = served_models
        self._allowed = None if served_models is None else served_models.allowed(rules.options.trust)
        self._on_progress = on_progress
        self._stat = os.fstat(file.fileno())
        self._problems: list[Problem] = []
        self._total_problems = 0
        self._missing_models: dict[str, tuple[int, int]] = {}  # name: its first line, its lines
        self._forms: set[int] = set()

    @property
    def size_bytes(self) -> int:
        """The file's size when it was opened."""
        return self._stat.st_size

    def digest(self) -> str:
        """The sha256 of the whole file, in hex."""
        self._file.seek(0)
        return hashlib.file_digest(self._file, "sha256").hexdigest()

    def __iter__(self) -> Iterator[ParsedLine]:
        with DigestBuckets() as digests:
            [keep], rules, served = digests.appends, self._rules, self._allowed
            for number, raw in self._raw_lines():
                line = parse_line(raw, number, rules=rules, endpoint=self.endpoint)
                if isinstance(line, Problem):
                    self._refuse(line)
                    continue
                if problem := self._stated_problem(line, number):
                    self._refuse(problem)
                    continue
                if self.endpoint is None:
                    self.endpoint = line.url
                if served is not None and line.model not in served:
                    self._miss_model(line.model, number)
                digest = hash(line.custom_id)
                keep[digest & LOW_BITS](digest)
                if number % SETTLE_LINES == 0:
                    digests.settle()
                if not self._total_problems:
                    self._has_line = True
                    yield line
            self._find_duplicates(digests)
        self._finish()

    def _raw_lines(self) -> Iterator[tuple[int, bytes]]:
        self._file.seek(0)
        lines = read_lines(self._file, line_bytes=self._rules.line_bytes)
        return lines if self._on_progress is None else self._reported(lines, self._on_progress)

    def _reported(self, lines: Iterator[tuple[int, bytes]], on_progress: Progress) -> Iterator[tuple[int, bytes]]:
        for number, raw in lines:
            yield number, raw
            if number % PROGRESS_EVERY_LINES == 0:
                on_progress(self._file.tell(), self.size_bytes)

    def _ids(self) -> Iterator[tuple[int, str]]:
        for number, raw in self._raw_lines():
            line = parse_line(raw, number, rules=self._rules, endpoint=self.endpoint)
            if isinstance(line, ParsedLine) and self._stated_problem(line, number) is None:
                yield number, line.custom_id

    def _stated_problem(self, line: ParsedLine, number: int) -> Problem | None:
        """What is wrong with the template or recipe that a good line states, or the schema that it is to be held to."""
        settings = None if line.stoker is None else read_settings(line.stoker)
        if self._rules.options.validate_answers and (fault := self._form_fault(line, settings)):
            return Problem(number, "invalid_request", "body.response_format", fault)
        if settings is None:
            return None
        return template_problem(line, settings, number) or recipe_problem(line, settings, number)

    def _form_fault(self, line: ParsedLine, settings: LineSettings | None) -> str | None:
        if settings is not None and settings.has_steps:
            return "answers of a conversation or a recipe are not validated; leave validate_answers out"
        try:
            form = check_form(line.body)
        except ValueError as error:
            return str(error)
        if form is not None and form not in self._forms:
            if len(self._forms) == MOST_FORMS:
                return f"schema: the lines before have {MOST_FORMS} others; use fewer in one file, or split it"
            self._forms.add(form)
        return None

    def _refuse(self, problem: Problem, *, count: int = 1) -> None:
        self._total_problems += count
        if len(self._problems) < KEPT_PROBLEMS:
            self._problems.append(problem)

    def _miss_model(self, model: str, number: int) -> None:
        self._total_problems += 1
        first, lines = self._missing_models.get(model, (number, 0))
        if lines or len(self._missing_models) < NAMED_MODELS:
            self._missing_models[model] = (first, lines + 1)

    def _find_duplicates(self, digests: DigestBuckets) -> None:
        suspects = digests.suspects()
        self._total_problems += suspects.unchecked
        if not suspects.digests:
            return
        found: list[Problem] = []
        for twice in duplicates(self._ids(), suspects):
            self._total_problems += 1
            if len(found) < KEPT_PROBLEMS:
                found.append(_duplicate(twice.custom_id, line=twice.line, first_line=twice.first_line))
        self._problems += found

    def _finish(self) -> None:
        """Raises InvalidFile or, if the file was written to meanwhile, BadInput."""
        now = os.fstat(self._file.fileno())
        if (now.st_size, now.st_mtime_ns) != (self._stat.st_size, self._stat.st_mtime_ns):
            raise BadInput("the file changed while it was read; submit it again when it is complete")
        if not (self._has_line or self._total_problems):
            self._refuse(Problem(None, "empty_file", None, "has no lines; write one request a line"))
        if self._total_problems:
            problems = [*self._problems, *self._model_problems()]
            problems.sort(key=lambda problem: problem.line or 0)
            raise InvalidFile(problems[:KEPT_PROBLEMS], total=self._total_problems)
        if self._on_progress is not None:
            self._on_progress(self.size_bytes, self.size_bytes)

    def _model_problems(self) -> Iterator[Problem]:
        for model, (first, lines) in self._missing_models.items():
            yield self._not_served(model, first, lines=lines)

    def _not_served(self, model: str, number: int, *, lines: int) -> Problem:
        count = f"{lines:,} line{'s' if lines > 1 else ''}"
        called = f'is "{model[:SHOWN_CHARACTERS]}"'
        if self._models is not None and model in self._models.external:
            told = f"{called}, served by external endpoints only ({count}); {EXTERNAL_REMEDY}"
        else:
            served = ", ".join(sorted(self._allowed or ())) or "none"
            told = (
                f"{called}, not served ({count}); served: {served}; name one of these in the lines, "
                "or submit with --model NAME"
            )
        return Problem(number, "model_not_found", "body.model", told)


class SkippingBatchFile(BatchFile):
    """A batch file of which bad lines are left out; `on_skipped` hears of each, in their order.

    Of lines that share a custom_id the first stays. The file is parsed twice, because only the first reading
    tells which ids come twice. A file without a good line is refused all the same, with its first problems.
    """

    def __init__(
        self,
        file: BufferedReader,
        *,
        rules: LineRules,
        served_models: ServedModels | None,
        on_progress: Progress | None,
        on_skipped: Callable[[Problem], None],
    ) -> None:
        super().__init__(file, rules=rules, served_models=served_models, on_progress=on_progress)
        self._on_skipped = on_skipped

    def __iter__(self) -> Iterator[ParsedLine]:
        suspects = self._suspects()
        first_lines: dict[str, int] = {}
        for number, line in self._parsed_lines(self._raw_lines()):
            problem = line if isinstance(line, Problem) else self._repeated(line, number, suspects, first_lines)
            if problem is not None:
                self.skipped += 1
                self._on_skipped(problem)
                if self.endpoint is None:
                    self._refuse(problem)
            elif isinstance(line, ParsedLine):
                self._has_line = True
                yield line
        self._finish()

    def _suspects(self) -> frozenset[int]:
        """The digests of ids that come twice. Raises BadInput when they are too many to hold."""
        with DigestBuckets() as digests:
            self._file.seek(0)
            [keep] = digests.appends
            for number, line in self._parsed_lines(read_lines(self._file, line_bytes=self._rules.line_bytes)):
                if isinstance(line, ParsedLine):
                    digest = hash(line.custom_id)
                    keep[digest & LOW_BITS](digest)
                if number % SETTLE_LINES == 0:
                    digests.settle()
            suspects = digests.suspects(most=SKIPPED_SUSPECTS)
        if suspects.unchecked:
            raise BadInput(
                f"more than {SKIPPED_SUSPECTS:,} custom_ids are used by several lines; "
                "--skip-bad does not go that far: give every line its own"
            )
        return suspects.digests

    def _parsed_lines(self, lines: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, ParsedLine | Problem]]:
        """Every line with its number, good or bad by itself; the first good one states the endpoint."""
        served = self._allowed
        for number, raw in lines:
            line = parse_line(raw, number, rules=self._rules, endpoint=self.endpoint)
            if isinstance(line, ParsedLine):
                if problem := self._stated_problem(line, number):
                    line = problem
                elif served is not None and line.model not in served:
                    line = self._not_served(line.model, number, lines=1)
                elif self.endpoint is None:
                    self.endpoint = line.url
            yield number, line

    def _repeated(
        self, line: ParsedLine, number: int, suspects: frozenset[int], first_lines: dict[str, int]
    ) -> Problem | None:
        if hash(line.custom_id) not in suspects:
            return None
        first_line = first_lines.setdefault(line.custom_id, number)
        return None if first_line == number else _duplicate(line.custom_id, line=number, first_line=first_line)


@contextmanager
def opened(path: Path) -> Iterator[BufferedReader]:
    """The file at `path`, to be read several times. Raises BadInput if that cannot be done."""
    try:
        if not S_ISREG(path.stat().st_mode):
            raise BadInput(f"{path}: is not a regular file; give a .jsonl file, or - for standard input")
        file: BufferedReader = BufferedReader(FileIO(path), BUFFER_BYTES)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; check the path and its permissions") from error
    with file:
        yield file


def read_lines(file: BufferedReader, *, line_bytes: int) -> Iterator[tuple[int, bytes]]:
    """(number from 1, bytes with the newline) of each line that is not blank, from where the file stands.

    Of a line of more than `line_bytes` only the first two more are given; the rest is skipped piece by piece.
    """
    most = line_bytes + 2  # a line of the full length and CR LF
    for number, raw in enumerate(iter(partial(file.readline, most), b""), 1):
        if len(raw) == most and not raw.endswith(b"\n"):
            _skip_line(file)
        line = raw.removeprefix(BYTE_ORDER_MARK) if number == 1 else raw
        if line and not line.isspace():
            yield number, line


def _skip_line(file: BufferedReader) -> None:
    while (piece := file.readline(BUFFER_BYTES)) and not piece.endswith(b"\n"):
        pass


def _duplicate(custom_id: str, *, line: int, first_line: int) -> Problem:
    return Problem(
        line,
        "duplicate_custom_id",
        "custom_id",
        f'is "{custom_id}", which line {first_line} has; give every line its own',
    )
