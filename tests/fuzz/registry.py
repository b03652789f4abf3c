"""All targets by name, in the order in which they are run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from tests.fuzz import answers, files, requests
from tests.fuzz.target import Target

TARGETS: Final[Mapping[str, Target]] = {**requests.TARGETS, **answers.TARGETS, **files.TARGETS}
