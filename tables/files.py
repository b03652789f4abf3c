"""Which files a path of a user's stands for, and of what kind they are. Reads names and markers, never rows."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Final

from runtime.errors import BadInput


class Kind(StrEnum):
    """A file format; the value is how a message calls it."""

    PARQUET = "Parquet"
    CSV = "CSV"
    TSV = "TSV"
    JSONL = "JSONL"
    ARROW = "Arrow"


SUFFIXES: Final[Mapping[str, Kind]] = {
    ".parquet": Kind.PARQUET,
    ".pq": Kind.PARQUET,
    ".csv": Kind.CSV,
    ".tsv": Kind.TSV,
    ".jsonl": Kind.JSONL,
    ".ndjson": Kind.JSONL,
    ".arrow": Kind.ARROW,
    ".feather": Kind.ARROW,
    ".ipc": Kind.ARROW,
}
# What people have instead, and what they do about it.
REMEDIES: Final[Mapping[str, str]] = {
    ".json": "write one object a line (`jq -c '.[]' FILE > FILE.jsonl`)",
    ".xlsx": "save the sheet as CSV",
    ".xls": "save the sheet as CSV",
    ".gz": "unpack it first (`gunzip -k FILE`)",
    ".zip": "unpack it first",
    ".zst": "unpack it first (`zstd -d FILE`)",
    ".txt": "name it .csv or .tsv if it has a header and columns",
}
# What lies beside the files of a table and holds no rows: notes, and what Spark and Hadoop leave.
BESIDE: Final = frozenset({".md", ".crc"})


def kind_of(path: Path) -> Kind:
    """The kind that the suffix names, upper or lower case. Raises BadInput that lists the known suffixes."""
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        return SUFFIXES[suffix]
    remedy = f"; {REMEDIES[suffix].replace('FILE', path.name)}" if suffix in REMEDIES else ""
    raise BadInput(
        f"{path}: {suffix or 'a name without a suffix'} is no known kind of table ({known_suffixes()}){remedy}"
    )


def known_suffixes() -> str:
    return ", ".join(SUFFIXES)


def files_of(path: Path) -> tuple[Kind, tuple[Path, ...]]:
    """The files of a table in the order of their rows: one file, a folder's, or those of a saved Hugging Face dataset.

    Raises BadInput for a path that is missing, a folder of several kinds or of none, and layouts that are no one table.
    """
    if path.is_dir():
        if (path / "dataset_dict.json").is_file():
            raise BadInput(_splits_of(path))
        if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
            return Kind.ARROW, _shards_of(path)
        return _folder(path)
    if not path.exists():
        raise BadInput(f"{path}: no such file or folder")
    return kind_of(path), (path,)


def _splits_of(path: Path) -> str:
    splits = _member(path / "dataset_dict.json", "splits")
    names = [name for name in splits if isinstance(name, str)]
    if not names:
        return f"{path}: a saved DatasetDict without splits; save a Dataset with save_to_disk"
    return f"{path}: a saved DatasetDict with the splits {', '.join(names)}; name one: {path / names[0]}"


def _shards_of(path: Path) -> tuple[Path, ...]:
    """The Arrow streams that `save_to_disk` lists in state.json, which is the order of the dataset's rows."""
    entries = _member(path / "state.json", "_data_files")
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries]
    files = tuple(path / name for name in names if isinstance(name, str))
    if not files or len(files) < len(names):
        raise BadInput(f"{path / 'state.json'}: lists no data files; save the dataset again with save_to_disk")
    for file in files:
        if not file.is_file():
            raise BadInput(f"{file}: missing, though {path / 'state.json'} lists it; copy the whole folder again")
    return files


def _member(path: Path, name: str) -> list[object]:
    try:
        found = json.loads(path.read_bytes())[name]
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path}: not as save_to_disk writes it ({error}); save the dataset again") from error
    return found if isinstance(found, list) else []


def _folder(path: Path) -> tuple[Kind, tuple[Path, ...]]:
    if (path / "_delta_log").is_dir():
        raise BadInput(f"{path}: a Delta table, whose files hold removed rows too; export it to Parquet first")
    kinds: dict[Kind, list[Path]] = {}
    for file in _walk(path):
        kinds.setdefault(kind_of(file), []).append(file)
    if not kinds:
        raise BadInput(f"{path}: no table in this folder; known are {known_suffixes()}")
    if len(kinds) > 1:
        examples = ", ".join(f"{kind} ({files[0].relative_to(path)})" for kind, files in kinds.items())
        raise BadInput(f"{path}: files of several kinds: {examples}; name a file, or a folder of one kind")
    return next(iter(kinds.items()))[0], tuple(next(iter(kinds.values())))


def _walk(path: Path) -> Iterator[Path]:
    """Files that may hold rows, by name; a folder's own before its subfolders'."""
    for folder, subfolders, names in os.walk(path):
        subfolders[:] = sorted(name for name in subfolders if name[0] not in "._")
        for name in subfolders:
            if "=" in name:
                raise BadInput(
                    f"{Path(folder, name)}: a column that is the name of a folder is not read; name one such folder, "
                    "or write the table with that column in its files"
                )
        for name in sorted(names):
            file = Path(folder, name)
            if name[0] not in "._" and file.suffix.lower() not in BESIDE and file.stat().st_size:
                yield file
