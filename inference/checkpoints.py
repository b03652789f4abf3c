"""What can be said of model weights on disk without loading them: name, digest, whether they are quantized."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from runtime.errors import BadInput

WHOLE_FILE_BYTES = 4 * 1024**3  # hashing runs at about 1 GB/s: beyond this a start would wait for it
_SCHEME_SUFFIX = re.compile(r"[-_.](gguf|bf16|fp16|fp8|w8a8|w4a16|awq|gptq|int8|int4|q\d\w*)$", re.IGNORECASE)


def alias_of(checkpoint: Path) -> str:
    """The name jobs use unless one is set: the folder's or file's, without its quantization.

    So `smollm2-135m-w8a8` and `smollm2-135m-gguf` both serve `smollm2-135m`, and one file runs on either.
    """
    is_file = checkpoint.suffix == ".gguf"
    name = checkpoint.parent.name or checkpoint.stem if is_file else checkpoint.name
    return _SCHEME_SUFFIX.sub("", name) or name


def digest_of(checkpoint: Path) -> str:
    """`sha256:…` over all files of the checkpoint; `sizes:…` over names and sizes beyond 4 GB of weights."""
    files = sorted(checkpoint.rglob("*")) if checkpoint.is_dir() else [checkpoint]
    files = [file for file in files if file.is_file()]
    is_small = sum(file.stat().st_size for file in files) <= WHOLE_FILE_BYTES
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        if is_small:
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return f"{'sha256' if is_small else 'sizes'}:{digest.hexdigest()}"


def quantization_of(folder: Path) -> str | None:
    """The quantization method that a Hugging Face folder's config.json names, or None for 16-bit weights.

    Raises BadInput if the folder is no checkpoint.
    """
    method = _quantization(folder).get("quant_method")
    return str(method) if method else None


def has_experts(folder: Path) -> bool:
    """Whether it is a mixture of experts, by its config.json."""
    config = _config(folder)
    return any(config.get(name) for name in ("num_experts", "num_local_experts", "n_routed_experts"))


def is_packed(folder: Path) -> bool:
    """Whether its weights are packed, several in a word, as those of 4 bits are (AWQ, GPTQ, W4A16)."""
    found = _quantization(folder)
    formats = [group.get("format") for group in (found.get("config_groups") or {}).values()]
    return found.get("quant_method") in {"awq", "gptq"} or "pack-quantized" in [found.get("format"), *formats]


def quantized_sibling(folder: Path, *, packed: bool = True) -> Path | None:
    """A quantized checkpoint of the same name beside this one, if there is one; `packed`: it may be one of these."""
    siblings = sorted(folder.parent.glob(f"{alias_of(folder)}-*"))
    same = (path for path in siblings if alias_of(path) == alias_of(folder) and (path / "config.json").is_file())
    return next((path for path in same if quantization_of(path) and (packed or not is_packed(path))), None)


def _quantization(folder: Path) -> dict[str, Any]:
    return _config(folder).get("quantization_config") or {}


def _config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{folder} is no checkpoint: no readable config.json; name a Hugging Face folder "
            "or a .gguf file in STOKER_ENGINE__CHECKPOINT"
        ) from error
    return config
