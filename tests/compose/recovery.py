"""A backup that compose makes in the middle of a batch, the loss of every volume, the restore: as docs/backup.md says.

To be used last: nothing of the containers before is left. `python -m tests.compose.recovery` does this alone, with the
images that `make compose-dry` has made.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from openai import OpenAI

from tests.compose.engine import engine, in_namespaces
from tests.compose.look import world
from tests.compose.project import FOLDER, Project, project
from tests.compose.proof import ANSWER_S, Step, _done, _is_whole, _step, _submitted
from tests.support.waiting import wait_until

STOKER_UID = 10001
NAMES = ("dispatch", "gateway", "worker-cpu")
UP_S = 600
GATEWAY = "http://127.0.0.1:8080/v1"


def lose_and_restore(made: Project, names: Sequence[str]) -> list[Step]:
    """Everything is up; at the end it is again, with what the backup had."""
    backups = FOLDER / "backups"
    backups.mkdir(mode=0o700)
    os.chown(backups, STOKER_UID, STOKER_UID)
    uploaded = FOLDER / "examples" / "prompts.jsonl"
    batch = _submitted(made, "--set", "max_tokens=96", "--cache", "off")
    key = made.cli("keys", "create", "--scope", "admin").stdout.decode().split()[-1]
    client = OpenAI(base_url=GATEWAY, api_key=key)
    file = client.files.create(file=uploaded, purpose="batch")
    wait_until(lambda: _done(made, batch) > 0, ANSWER_S, "the first results")
    done = _done(made, batch)
    steps = [_step(f"`run --rm -T backup` with {done} of 64 jobs done", lambda: made("run", "--rm", "-T", "backup"))]
    made("down", "--volumes")
    made("create", "--no-build")
    steps.append(_step("all volumes are lost; `run --rm restore` on new ones", lambda: _restored(made, backups)))
    made("up", "-d", "--no-build", "--wait", "--wait-timeout", str(UP_S), *names)
    return [
        *steps,
        _step("the batch goes on and ends, each line with one answer", lambda: _is_whole(made, batch)),
        _step(
            "a key and a file of before the backup",
            lambda: client.files.content(file.id).read() == uploaded.read_bytes(),
        ),
    ]


def _restored(made: Project, backups: Path) -> str:
    (backup,) = sorted(backups.iterdir())
    made("run", "--rm", "-T", "restore", "--check", f"/backups/{backup.name}")
    made("run", "--rm", "-T", "restore", f"/backups/{backup.name}", "/files")
    return backup.name


def main() -> int:
    """Start what a batch needs, and lose it."""
    if sys.argv[1:] != ["--inside"]:
        return in_namespaces("tests.compose.recovery", "--inside")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    with engine(building=False) as docker, world(), project(docker) as made:
        made("up", "-d", "--no-build", "--wait", "--wait-timeout", str(UP_S), *NAMES)
        steps = lose_and_restore(made, NAMES)
    return 0 if all(step["is_well"] for step in steps) else 1


if __name__ == "__main__":
    sys.exit(main())
