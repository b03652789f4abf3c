"""The code of an earlier commit in a folder of its own, run with the libraries of this environment."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.support.processes import MARK, REPOSITORY, code_environment, new_mark

VERSIONS: Final = Path("migrations/versions")
COMMAND_S = 180.0


@dataclass(frozen=True, slots=True)
class Code:
    """One state of the repository. `revision`: the newest one that it knows."""

    folder: Path
    commit: str

    @property
    def revision(self) -> str:
        return revisions_in(self.folder)[-1]

    @property
    def has_schedules(self) -> bool:
        """Whether it has control workers."""
        return (self.folder / "worker" / "beat.py").exists()

    @property
    def knows_of_others(self) -> bool:
        """Whether it knows that a schema may be newer than itself."""
        return (self.folder / "store" / "revisions.py").exists()

    def run(self, *words: str | Path, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        """`stoker …` of this code, to its end."""
        return subprocess.run(
            [sys.executable, "-m", "scripts.stoker", *(str(word) for word in words)],
            cwd=self.folder,
            env={**code_environment(self.folder), **env, MARK: new_mark()},
            text=True,
            input="",
            capture_output=True,
            check=False,
            timeout=COMMAND_S,
        )

    def place_of(self, module: str) -> Path:
        """The file that a process of this code imports a module from."""
        asked = subprocess.run(
            [sys.executable, "-c", f"import {module}; print({module}.__file__)"],
            cwd="/",
            env=code_environment(self.folder),
            text=True,
            capture_output=True,
            check=True,
        )
        return Path(asked.stdout.strip())


def this_code() -> Code:
    """What stands in this checkout now."""
    return Code(REPOSITORY, _git("rev-parse", "--short=7", "HEAD"))


def checked_out(commit: str, folder: Path) -> Code:
    """A commit's files in that folder, which is made. Raises ValueError if there is no such commit here."""
    folder.mkdir(parents=True)
    name = _git("rev-parse", "--short=7", "--verify", f"{commit}^{{commit}}")
    packed = subprocess.run(["git", "archive", name], cwd=REPOSITORY, capture_output=True, check=True)
    subprocess.run(["tar", "-x", "-C", str(folder)], input=packed.stdout, check=True)
    return Code(folder, name)


def before_revisions(count: int) -> list[str]:
    """The commits before each of the newest `count` revisions was added, newest first. Needs the git history."""
    return [_before(file) for file in sorted((REPOSITORY / VERSIONS).glob("[0-9]*.py"))[::-1][:count]]


def revisions_in(folder: Path) -> list[str]:
    """The revisions that the code in a folder knows, oldest first."""
    return sorted(file.name.partition("_")[0] for file in (folder / VERSIONS).glob("[0-9]*.py"))


def _before(file: Path) -> str:
    added = _git("log", "--diff-filter=A", "--format=%H", "-1", "--", str(file.relative_to(REPOSITORY)))
    return f"{added}^" if added else "HEAD"  # not committed yet


def _git(*words: str) -> str:
    asked = subprocess.run(["git", *words], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if asked.returncode != 0:
        raise ValueError(f"git {' '.join(words)}: {asked.stderr.strip()}; an upgrade needs the git history")
    return asked.stdout.strip()
