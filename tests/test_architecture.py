"""What import-linter and ruff do not say of the repository's shape."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
WHEEL = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
PACKAGES = tuple(WHEEL["packages"])
MODULE_LINES = 500
TEST_MODULE_LINES = 600  # a subject stays in one file
FUNCTION_LINES = 60
# Names that say nothing, or that would hide a module which we or our dependencies import.
FORBIDDEN_FOLDERS = frozenset(
    {
        "utils",
        "util",
        "helpers",
        "helper",
        "common",
        "core",
        "misc",
        "lib",
        "shared",
        "managers",
        "celery",
        "kombu",
        "redis",
        "alembic",
        "queue",
        "types",
        "logging",
        "platform",
        "inspect",
        "http",
    }
)


def tracked_sources() -> Iterator[Path]:
    """Every Python file that git knows or would take."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return (path for name in listed.splitlines() if (path := REPOSITORY / name).is_file())


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_name_means_the_repositorys_package(package: str) -> None:
    found = importlib.util.find_spec(package)
    assert found is not None
    assert found.origin == str(REPOSITORY / package / "__init__.py")


def test_every_package_of_the_repository_is_in_the_wheel() -> None:
    folders = {path.parent.name for path in REPOSITORY.glob("*/__init__.py")} - {"tests", "benchmarks"}
    assert folders == set(PACKAGES)


def test_no_folder_has_a_name_that_says_nothing_or_hides_another_module() -> None:
    folders = {part for path in tracked_sources() for part in path.relative_to(REPOSITORY).parts[:-1]}
    assert folders & FORBIDDEN_FOLDERS == set()


def test_no_module_is_longer_than_500_lines() -> None:
    lengths = {str(path.relative_to(REPOSITORY)): len(path.read_text().splitlines()) for path in tracked_sources()}
    bounds = {name: TEST_MODULE_LINES if name.startswith("tests/") else MODULE_LINES for name in lengths}
    assert {name: lines for name, lines in lengths.items() if lines > bounds[name]} == {}


def test_no_function_is_longer_than_60_lines() -> None:
    long = {}
    for path in tracked_sources():
        if "versions" in path.parts:  # a migration's length is its schema's
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > FUNCTION_LINES:
                    long[f"{path.relative_to(REPOSITORY)}:{node.name}"] = lines
    assert long == {}


def test_commands_and_workers_load_without_the_libraries_of_the_semantic_cache() -> None:
    program = (
        "import sys\n"
        "blocked = {'numpy', 'chromadb', 'onnxruntime', 'tokenizers'}\n"
        "class Without:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in blocked: raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Without())\n"
        "import scripts.stoker, worker.child, pipeline.feed\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
