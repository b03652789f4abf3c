"""What submit learns of the lines that may be served semantically: their template, and whether they are enough.

It only reads; what it finds is stored with the batch, and said before the batch runs.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from cache.keys import read_body
from cache.payload import LONGEST_BARE, Affixes, SharedAffixes, declared, prompt_of
from models.line_settings import LineSettings, read_settings
from models.lines import ParsedLine
from runtime.errors import BadInput, Problem

# Fewer lookups bring too few audits for a bound of 1%: benchmarks/results/cache.json.
LEAST_TO_CERTIFY = 2_000


class SemanticLines:
    """Counts the lines of one batch whose mode is semantic, and finds what their prompts share."""

    def __init__(self) -> None:
        self._lines = self._servable = self._long = 0
        self._shared = SharedAffixes()

    def add(self, line: ParsedLine) -> None:
        """Hear of a line whose mode is semantic."""
        self._lines += 1
        texts = _texts(line)
        self._servable += line.may_share and texts is not None
        if line.stoker is not None and read_settings(line.stoker).template is not None:
            return
        if texts is not None:
            self._shared.add(texts[1])
            self._long += len(texts[1]) > LONGEST_BARE

    def __bool__(self) -> bool:
        """Whether there was one."""
        return self._lines > 0

    @property
    def options(self) -> dict[str, Any]:
        """What is to be kept with the batch: `affixes`, if its prompts share any."""
        affixes = self._affixes()
        return {"affixes": asdict(affixes)} if affixes != Affixes() else {}

    @property
    def notices(self) -> tuple[str, ...]:
        """Why lines of this batch may not be served, with the remedy."""
        found = []
        if self._lines and not self._servable:
            found.append(
                f"none of {self._lines:,} semantic lines may be served: they need temperature 0 or a seed "
                "(--set temperature=0), one answer, no tools, and one user's message of plain text"
            )
        elif self._lines and self._servable < LEAST_TO_CERTIFY:
            found.append(
                f"at most {self._servable:,} of {self._lines:,} semantic lines may be served: fewer than "
                f"{LEAST_TO_CERTIFY:,} are too few to certify by themselves, so only a namespace certified before "
                "serves; submit them in one larger batch"
            )
        if self._long and self._affixes() == Affixes():
            found.append(
                f"{self._long:,} lines have prompts of more than {LONGEST_BARE:,} characters that share no template: "
                "these are never served semantically; state stoker.template and stoker.variables in the lines"
            )
        return tuple(found)

    def _affixes(self) -> Affixes:
        """Without NUL, which jsonb cannot store: such an affix is none."""
        found = self._shared.affixes()
        return Affixes(*("" if "\0" in affix else affix for affix in (found.prefix, found.suffix)))


def template_problem(line: ParsedLine, settings: LineSettings, number: int) -> Problem | None:
    """What is wrong with the template that a line states; it must give exactly the text of its request."""
    if settings.template is None:
        return None
    texts = _texts(line)
    if texts is None:
        return Problem(
            number,
            "invalid_request",
            "stoker.template",
            "the request has no one text that it could give: use it with one user's message (and a system's), or one "
            "prompt, of plain text; else leave it out",
        )
    try:
        declared(texts[1], template=settings.template, variables=settings.variables or {})
    except BadInput as error:
        field, _, fault = str(error).partition(": ")
        return Problem(number, "invalid_request", field, fault)
    return None


def _texts(line: ParsedLine) -> tuple[str, str] | None:
    """As prompt_of; None too for a body that holds what Python cannot read, such as 1e999, or one nested too deeply."""
    try:
        return prompt_of(read_body(line.body))
    except (ValueError, RecursionError):
        return None
