"""What is known of a quantized checkpoint: stoker-card.json for programs, README.md for people. It measures nothing."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

Card = dict[str, Any]

_FRONT_MATTER = re.compile(r"\A---\n(.*?\n)---\n", re.DOTALL)
_LICENCE_LINE = re.compile(r"^license(?:_name|_link)?:.*$", re.MULTILINE)
_LICENCE_FILE = re.compile(r"^(licen[cs]e|notice|copying)([.-].*)?$", re.IGNORECASE)


def size_of(folder: Path) -> int:
    """Bytes of the weights that are loaded: safetensors, or PyTorch's where there are none; no other files."""
    weights = list(folder.glob("*.safetensors")) or list(folder.glob("*.bin"))
    return sum(file.stat().st_size for file in weights)


def not_measured(reason: str) -> dict[str, Any]:
    """A figure's two sides where neither is known."""
    return {"before": f"not measured: {reason}", "after": f"not measured: {reason}"}


def rows_of(card: Card) -> list[tuple[str, str, str]]:
    """The card's figures: label, before, after; floats and sizes as people read them."""
    speed = card["tokens_per_s"]
    spread = "" if "ratio" not in speed else " ({ratio:.2f}x, {ratio_least:.2f} to {ratio_most:.2f})".format(**speed)
    sides = [
        ("weights in bytes", card["size_bytes"]),
        (f"perplexity on {card['perplexity_tokens']:,} held-out tokens", card["perplexity"]),
        (f"tokens/s{spread}", speed),
    ]
    return [(label, _text(figure["before"]), _text(figure["after"])) for label, figure in sides]


def write_card(folder: Path, card: Card, *, source: Path) -> None:
    """Write both files; the licence of `source` goes along: its files, and its README's line of front matter."""
    (folder / "stoker-card.json").write_text(json.dumps(card, indent=2) + "\n")
    rows = "".join(f"| {' | '.join(row)} |\n" for row in rows_of(card))
    facts = "".join(f"- {name}: {json.dumps(value)}\n" for name, value in _facts(card).items())
    front = [
        f"base_model: {json.dumps(card['base_model'])}",
        *_licence(source, folder),
        f"tags: [{card['scheme']}, compressed-tensors]",
    ]
    head = "\n".join(["---", *front, "---", "", f"# {card['base_model']}, {card['scheme']}"])
    table = f"| figure | before | after |\n|---|---|---|\n{rows}"
    (folder / "README.md").write_text(f"{head}\n\n{table}\n{facts}")


def _facts(card: Card) -> dict[str, Any]:
    """What no row of the table shows."""
    facts = {name: value for name, value in card.items() if not isinstance(value, dict)}
    speed = card["tokens_per_s"]
    return facts | {f"tokens_per_s.{name}": speed[name] for name in ("engine", "how") if name in speed}


def _licence(source: Path, folder: Path) -> list[str]:
    """Copy the licence files and return the lines that name the licence."""
    files = sorted(file for file in source.iterdir() if file.is_file() and _LICENCE_FILE.match(file.name))
    for file in files:
        shutil.copyfile(file, folder / file.name)
    readme = source / "README.md"
    found = _FRONT_MATTER.match(readme.read_text(errors="replace")) if readme.is_file() else None
    said = _LICENCE_LINE.findall(found[1]) if found else []
    if said or not files:
        return said
    return ["license: other", f"license_link: {files[0].name}"]


def _text(figure: object) -> str:
    return f"{figure:,}" if isinstance(figure, int | float) else str(figure)
