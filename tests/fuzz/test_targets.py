"""Each target of the fuzzer, for a moment: its seeds, some changes of them, and some made long. `make fuzz` goes on."""

from __future__ import annotations

import random
from typing import Final

import pytest

from tests.fuzz.mutations import mutated, stretched
from tests.fuzz.registry import all_targets

CHANGED: Final = 60
STRETCHED: Final = 3
LONG_BYTES: Final = 20_000  # of the stretched ones here


@pytest.mark.parametrize("name", all_targets())
def test_a_target_holds_for_its_seeds_and_what_is_made_of_them(name: str) -> None:
    target, rng = all_targets()[name], random.Random(name)
    for seed in target.seeds:
        target.run(seed)
    for _ in range(CHANGED):
        target.run(mutated(rng.choice(target.seeds), rng, head_bytes=target.head_bytes, is_json=target.is_json))
    for _ in range(STRETCHED):
        target.run(stretched(rng.choice(target.seeds), rng, head_bytes=target.head_bytes, most_bytes=LONG_BYTES))
