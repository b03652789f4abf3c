"""What a command line may name as the source of a batch, and what it is told where that is wrong."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from runtime.errors import BadInput
from scripts.source import Source
from scripts.sources import with_source


@click.command()
@with_source
def name(source: Source) -> None:
    click.echo(f"{type(source).__name__} {source.title}")


@click.command()
@with_source
def check(source: Source) -> None:
    source.check_output(Path("out.parquet"), previews=False)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where commands run: with a table, lines, and files for options."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text("text,n\na,1\n")
    (tmp_path / "lines.jsonl").write_text('{"custom_id": "1", "method": "POST", "url": "/", "body": {}}\n')
    (tmp_path / "semicolons.csv").write_text("a;b\n1;2\n")
    (tmp_path / "labels.txt").write_text("yes, really\n\nno\n")
    (tmp_path / "schema.json").write_text("{")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ("lines.jsonl", "FileSource lines.jsonl"),
        ("-", "FileSource -"),
        ("t.csv --prompt {text}{n} --labels @labels.txt", "TableSource t.csv"),
        ("t.csv --prompt {text} --regex [ab]", "TableSource t.csv"),
        ("- --prompt {text}", "standard input is for lines; a table is a file or a folder"),
        ("t.csv", "t.csv: is a table; say what is asked of each row with --prompt"),
        (".", ".: is a table; say what is asked of each row with --prompt"),
        ("t.csv --labels a,b", "t.csv: is a table; say what is asked of each row with --prompt"),
        ("t.csv --prompt {text} --labels a,,b", "--labels a,,b: one of them is empty; leave the comma out"),
        ("lines.jsonl --prompt {a}", "lines.jsonl: is a batch file of requests, not a table; leave --prompt out"),
        ("semicolons.csv --prompt {a}", "the table has a;b (it seems to be separated by ';'"),
        ("t.csv --prompt {txt}", "--prompt: no column txt; the table has text, n"),
        ("t.csv --prompt {text} --labels a,b --regex x", "--labels and --regex: an answer has one form; give one"),
        ("t.csv --prompt {text} --labels @no.txt", "--labels @no.txt: cannot be read"),
        ("t.csv --prompt {text} --schema schema.json", "schema.json: is no JSON"),
        ("t.csv --prompt {text} --collection c", "--collection, --instruction and --option are for --recipe"),
        ("lines.jsonl --labels a,b", "--labels and --schema are for a table, with --prompt, and for --recipe"),
        (
            "lines.jsonl --system x",
            "--system, --regex, --result-prefix and --skip-nulls are for a table, with --prompt",
        ),
        ("--recipe summarize --documents d", "RecipeSource summarize d"),
        (
            "--recipe summarize --documents d --prompt x",
            "--prompt is for a table; what is asked of documents is --inst",
        ),
        ("--recipe summarize", "--recipe and --documents go together"),
        ("", "give either FILE, with --prompt if it is a table, or --recipe with --documents"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_a_source_is_what_its_options_say_or_refused_with_the_remedy(arguments: str, shown: str) -> None:
    said = CliRunner().invoke(name, arguments.split())
    text = str(said.exception) if isinstance(said.exception, BadInput) else " ".join(said.output.split())
    assert shown in text.replace("Error: ", "")


def test_no_file_beside_the_results_takes_the_place_of_the_table(folder: Path) -> None:
    (folder / "out.errors.jsonl").write_text('{"text": "a"}\n')
    said = CliRunner().invoke(check, ["out.errors.jsonl", "--prompt", "{text}"])
    assert isinstance(said.exception, BadInput) and "out.errors.jsonl: is the input itself" in str(said.exception)
