"""Real documents of several kinds, from Debian's packages, read by the documents node: seconds, passages, failures.

    python -m benchmarks.documents [--folder .checkpoints/debian-docs] [--most-kb 100] [--keep FOLDER]

Services of its own, Chroma among them, one worker of the documents node with a child for each core, and the command
line as a user types it: `stoker documents add`, the same again, and searches whose answers are known. A search counts
as found if one of its five passages is of the document that it is known to be in. --keep leaves the documents there.
Writes benchmarks/results/documents.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from benchmarks.paired import keep, made_with
from benchmarks.place import own_place
from benchmarks.retrieval_questions import FOLDER, unpacked
from benchmarks.rows import Row
from pipeline.adding import EXTENSIONS
from runtime.settings import Settings, environment_of
from scripts.local import local_worker
from tests.support.own_services import OwnChroma, server_folder

COLLECTION: Final = "debian"
COMMAND: Final = "`python -m benchmarks.documents`"
PACKAGES: Final = (
    "debian-policy",
    "debian-faq",
    "developers-reference",
    "texlive-latex-base-doc",
    "r-cran-openxlsx",
    "r-cran-readxl",
    "xlsx2csv",
    "python3-docx",
)
# What is asked, and a part of the path of the document that answers it.
SEARCHES: Final = (
    ("how long may the single line synopsis of a package be", "ch-binary"),
    ("what is the difference between Depends and Recommends", "ch-relationships"),
    ("which exit status should an init script return", "ch-opersys"),
    ("how do I become a Debian developer", "developers-reference"),
    ("why is it called Debian and how is it pronounced", "debian-faq"),
    ("where does the name stable, testing and unstable come from", "debian-faq"),
    ("typeset a table that breaks across pages", "texlive"),
    ("petal length and width of iris setosa", "xls"),
)


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the packages are kept")
    parser.add_argument("--most-kb", type=int, default=100, help="larger documents are left out")
    parser.add_argument("--keep", type=Path, help="where to leave the documents")
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stoker-documents-")))
        versions = gathered(options.folder, folder, most_bytes=options.most_kb * 1000)
        place = stack.enter_context(own_place())
        chroma = stack.enter_context(OwnChroma(stack.enter_context(server_folder()) / "chroma"))
        cache = place.settings.cache.model_copy(update={"chroma_url": chroma.url})
        settings = place.settings.model_copy(update={"cache": cache})
        stack.enter_context(local_worker(settings, name="documents", node="documents"))
        report = measured(settings, folder)
    table = rows_of(report)
    for row in table:
        print(" | ".join(row.cells), flush=True)
    whole = {"made_with": made_with("chromadb", "markitdown"), "packages": versions, **report}
    print(keep("documents", whole | {"table": [row.as_json() for row in table]}))


def gathered(cached: Path, folder: Path, *, most_bytes: int) -> dict[str, str]:
    """The packages' documents, copied into a folder each, and the packages' versions."""
    versions = {}
    for package in PACKAGES:
        root, versions[package] = unpacked(package, cached)
        for path in sorted(root.rglob("*")):
            if not path.is_file() or path.suffix.lower() not in EXTENSIONS or path.stat().st_size > most_bytes:
                continue
            place = folder / package / path.relative_to(root)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
    return versions


def measured(settings: Settings, folder: Path) -> dict[str, Any]:
    """What adding, adding again and searching gave."""
    kinds = Counter(path.suffix.lower() for path in folder.rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    first = _stoker(settings, "documents", "add", str(folder), "-c", COLLECTION, "--json")
    again = _stoker(settings, "documents", "add", str(folder), "-c", COLLECTION, "--json")
    searches = []
    for query, expected in SEARCHES:
        began = time.monotonic()
        hits = _stoker(settings, "documents", "search", query, "-c", COLLECTION, "--json")
        sources = [hit["source"].removeprefix(f"{folder}/") for hit in hits]
        rank = next((place for place, source in enumerate(sources, 1) if expected in source), None)
        searches.append({"query": query, "rank": rank, "first": sources[0], "s": round(time.monotonic() - began, 2)})
    failures = [{"source": row["source"], "code": row["error_code"]} for row in first.pop("failures")]
    again.pop("failures")
    return {
        "kinds": dict(kinds),
        "bytes": size,
        "first": first,
        "again": again,
        "failures": failures,
        "searches": searches,
    }


def rows_of(report: dict[str, Any]) -> list[Row]:
    """The rows of the table."""
    first, again, searches = report["first"], report["again"], report["searches"]
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(report["kinds"].items(), key=lambda pair: -pair[1]))
    codes = Counter(row["code"] for row in report["failures"])
    failed = ", ".join(f"{count} {code}" for code, count in codes.items()) or "none"
    found = sum(row["rank"] is not None for row in searches)
    return [
        Row(
            f"{first['documents']} documents of Debian packages ({kinds}; {report['bytes'] / 1e6:.0f} MB): read in",
            f"**{first['seconds']:.0f} s**, {first['passages']:,} passages, "
            f"{first['passages'] / first['seconds']:.0f} a second; failed: {failed}",
            COMMAND,
            headline=True,
        ),
        Row(
            "the same again: unchanged, in",
            f"{again['unchanged']} of {again['documents']}, {again['seconds']:.1f} s",
            COMMAND,
        ),
        Row("searches for what is known to be there: found among five", f"{found} of {len(searches)}", COMMAND),
    ]


def _stoker(settings: Settings, *words: str) -> Any:
    """What a command prints as JSON; a progress line every now and then would need a terminal, so say what runs."""
    print(f"stoker {' '.join(words)}", file=sys.stderr, flush=True)
    command = [str(Path(sys.executable).with_name("stoker")), *words]
    done = subprocess.run(
        command, env={**os.environ, **environment_of(settings)}, capture_output=True, text=True, check=False
    )
    if done.returncode not in (0, 1):
        raise SystemExit(f"{' '.join(command)}: {done.stderr}")
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
