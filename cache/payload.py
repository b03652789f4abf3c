"""The part of a request that varies: a payload in a template. Only payloads are embedded and compared.

Whole prompts of one template are 0.94 alike whatever they ask (measured), so a long prompt whose template is not
known has no payload, and is never answered semantically.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from models.jobs import Affixes as Affixes
from runtime.errors import BadInput

SLOT: Final = re.compile(r"\{([A-Za-z_]\w*)\}")
LONGEST_BARE: Final = 1024  # characters (some 256 tokens) of a prompt that may be its own payload
LEAST_AFFIX: Final = 16  # characters that a prefix or suffix must have to count
BLANK: Final = "\x00"
BETWEEN: Final = "\n"


@dataclass(frozen=True, slots=True)
class Split:
    """A prompt as a template, with BLANK where its payload was, and the payload."""

    template: str
    payload: str


def prompt_of(fields: Mapping[str, Any]) -> tuple[str, str] | None:
    """(What stands before the user's text, the text) of a request with one turn of plain text; else None.

    What stands before is who speaks, and the system's message, as JSON; nothing before a plain prompt. More
    turns are conversations, whose state we do not know.
    """
    prompt = fields.get("prompt")
    if isinstance(prompt, str):
        return "", prompt
    messages = fields.get("messages")
    if not isinstance(messages, list) or not 1 <= len(messages) <= 2:
        return None
    texts = []
    for message, roles in zip(messages, (("system", "developer"), ("user",))[-len(messages) :], strict=True):
        plain = isinstance(message, dict) and message.keys() <= {"role", "content"}
        if not plain or message.get("role") not in roles or not isinstance(message.get("content"), str):
            return None
        texts.append(message["content"])
    before = [[message["role"], text] for message, text in zip(messages[:-1], texts[:-1], strict=True)]
    return msgspec.json.encode([*before, messages[-1]["role"]]).decode() + BETWEEN, texts[-1]


def slots_of(template: str) -> tuple[str, ...]:
    """The slots of a template, each once, in the order of their first use."""
    return tuple(dict.fromkeys(SLOT.findall(template)))


def declared(prompt: str, *, template: str, variables: Mapping[str, str]) -> Split:
    """The split that a line states. Raises BadInput unless template and variables give just the prompt."""
    slots = SLOT.findall(template)
    missing = sorted(set(slots) - variables.keys())
    unused = sorted(variables.keys() - set(slots))
    if not slots:
        raise BadInput("stoker.template: has no slot; write {name} where a variable stands")
    if missing or unused:
        wrong = f"no value for {', '.join(missing)}" if missing else f"no slot for {', '.join(unused)}"
        raise BadInput(f"stoker.variables: {wrong}; give each slot of stoker.template one value")
    if SLOT.sub(lambda slot: variables[slot.group(1)], template) != prompt:
        raise BadInput("stoker.template: does not give the text of the request with these variables; make them agree")
    return split_declared(template, variables)


def split_declared(template: str, variables: Mapping[str, str]) -> Split:
    """The template with each slot blanked, and the slots' values in the order of their first use."""
    blanked = SLOT.sub(lambda slot: BLANK + slot.group(1) + BLANK, template)
    values = [variables[slot] for slot in slots_of(template)]
    return Split(blanked, values[0] if len(values) == 1 else msgspec.json.encode(values).decode())


class SharedAffixes:
    """The prefix and suffix that prompts share, cut back to where a word ends; too short ones are none.

    Prompts come one by one; the memory is that of the longest shared part.
    """

    def __init__(self) -> None:
        self._prefix: str | None = None
        self._suffix = ""
        self._shortest = 0
        self._differ = False

    def add(self, prompt: str) -> None:
        """Hear of one more prompt."""
        if self._prefix is None:
            self._prefix = self._suffix = prompt
            self._shortest = len(prompt)
            return
        self._differ = self._differ or prompt != self._prefix
        self._shortest = min(self._shortest, len(prompt))
        if not prompt.startswith(self._prefix):
            self._prefix = _common_prefix(self._prefix, prompt)
        if not prompt.endswith(self._suffix):
            self._suffix = _common_prefix(self._suffix[::-1], prompt[::-1])[::-1]

    def affixes(self) -> Affixes:
        """What all prompts so far share."""
        if self._prefix is None or not self._differ:
            return Affixes()
        prefix = _to_word(self._prefix)
        most = self._shortest - len(prefix)  # the suffix begins where the shortest prompt's prefix has ended
        suffix = _to_word(self._suffix[::-1][:most])[::-1]
        return Affixes(*(affix if len(affix) >= LEAST_AFFIX else "" for affix in (prefix, suffix)))


def split(prompt: str, affixes: Affixes) -> Split | None:
    """The prompt between its batch's prefix and suffix; None if it does not fit, or is too long to be a payload."""
    end = len(prompt) - len(affixes.suffix)
    if not (prompt.startswith(affixes.prefix) and prompt.endswith(affixes.suffix) and len(affixes.prefix) <= end):
        return None
    payload = prompt[len(affixes.prefix) : end]
    if not payload.strip() or len(payload) > LONGEST_BARE:
        return None
    return Split(affixes.prefix + BLANK + affixes.suffix, payload)


def _common_prefix(one: str, other: str) -> str:
    least = min(len(one), len(other))
    return one[: next((at for at in range(least) if one[at] != other[at]), least)]


def _to_word(affix: str) -> str:
    """Cut back to the last character that is no part of a word."""
    end = len(affix)
    while end and (affix[end - 1].isalnum() or affix[end - 1] == "_"):
        end -= 1
    return affix[:end]
