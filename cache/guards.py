"""What two payloads must have in common before one may answer for the other, however near their vectors are.

Vectors hardly see numbers, names of things, or a "not": these are compared as they are written.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Final

Signature = tuple[tuple[str, ...], ...]

_QUOTED: Final = re.compile(r'"([^"]+)"|“([^”]+)”|«([^»]+)»|`([^`]+)`')
_ADDRESS: Final = re.compile(r"\b(?:https?://|www\.)\S+|\b[\w.+-]+@[\w-]+\.[\w.]+|(?<!\w)[/~](?:[\w.-]+/)+[\w.-]*")
_NAMED_DATE: Final = re.compile(
    r"\b(?:monday|tuesday|wednesday|thursday|friday|saturday|sunday|january|february|march|april|june|july|august"
    r"|september|october|november|december|today|tomorrow|yesterday)\b"
)
_ID: Final = re.compile(r"\b(?=\w*\d)(?=\w*[^\W\d_])\w+(?:[-_]\w+)*\b|\b[A-Z]{2,}\b")
_NUMBER: Final = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:[.:/-]\d+)*")
_SIGN: Final = re.compile(r"[%€$£¥]")
_NEGATION: Final = re.compile(r"\b(?:not|no|never|none|nobody|nothing|neither|nor|without|cannot|except)\b|n['’]t\b")
# Not "one": it is mostly a pronoun.
_NUMBER_WORDS: Final = {
    "zero": "0",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
    "eleven": "11",
    "twelve": "12",
    "thirteen": "13",
    "fourteen": "14",
    "fifteen": "15",
    "sixteen": "16",
    "seventeen": "17",
    "eighteen": "18",
    "nineteen": "19",
    "twenty": "20",
    "thirty": "30",
    "forty": "40",
    "fifty": "50",
    "sixty": "60",
    "hundred": "100",
    "thousand": "1000",
}
_WORDS: Final = re.compile(r"[^\W\d_]+")


def normalised(payload: str) -> str:
    """The payload with one form for each character and each stretch of white space; letters keep their case."""
    return " ".join(unicodedata.normalize("NFKC", payload).split())


def signature(payload: str) -> Signature:
    """What must be equal, in its order: quoted strings, addresses, ids, numbers, signs, dates by name, negations."""
    text = normalised(payload)
    quoted = ["".join(groups) for groups in _QUOTED.findall(text)]
    addresses = [found.rstrip(".,;:!?") for found in _ADDRESS.findall(text)]
    plain = _ADDRESS.sub(" ", text)
    ids = _ID.findall(plain)
    lower = plain.lower()
    numbers = [found.replace(",", "") for found in _NUMBER.findall(_ID.sub(" ", plain))]
    numbers += [_NUMBER_WORDS[word] for word in _WORDS.findall(lower) if word in _NUMBER_WORDS]
    signs = _SIGN.findall(plain)
    negations = len(_NEGATION.findall(lower))
    return (
        tuple(quoted),
        tuple(addresses),
        tuple(ids),
        tuple(numbers),
        tuple(signs),
        tuple(_NAMED_DATE.findall(lower)),
        (str(negations),),
    )
