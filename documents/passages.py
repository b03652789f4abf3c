"""Passages: a document's Markdown cut along headings, paragraphs and sentences into what the embedder reads at once.

It must not embed, store or rank anything, and it changes no character: a passage is a slice of its document.

The semantic splitter asks some ten times for the size of every character. Answered by a tokenizer, that is 3.3 s of
CPU a megabyte; answered by words whose tokens are remembered, 1.0 s, and the same cuts. The tokenizer has the last
word: a part that has too many tokens after all is cut again.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from semantic_text_splitter import MarkdownSplitter
from tokenizers import Tokenizer

# Of 100, 150, 200 and 254 the one with which most answers are met in 1,000 tokens of a prompt, meaning and words fused:
# 81%, 74%, 72%, 65% (benchmarks.retrieval). They are met in fragments: these hold 52%, 54%, 57%, 55% of an answer.
MOST_TOKENS: Final = 100
_TITLE_CHARS: Final = 200  # of one heading in a path
# The splitter is quadratic in a text without a place to cut, so it sees parts of this length: 200,000 characters of
# Chinese without punctuation take 5.7 s in parts of 65,536, 1.8 s so.
_STRETCH_CHARS: Final = 16_384
# An unknown word of 10,000 letters is one token to the embedder, and thousands to the engine. Prose has 4 to 5.
_MOST_CHARS_A_TOKEN: Final = 8
_REMEMBERED_CHARS: Final = 32  # of a word; longer ones are rare, and many
_MOST_REMEMBERED: Final = 200_000  # words: some 30 MB. Documents of 4 MB about programming have 23,000
_BYTES_A_TOKEN: Final = 4  # without a tokenizer
_SEPARATOR: Final = " > "
# As BERT's tokenizer cuts before it looks into words: each Chinese character and each sign is one.
_WORD = re.compile(r"[^\W_\u3400-\u9fff]+|[\u3400-\u9fff]|[^\w\s]|_")
_MARK = re.compile(r"^ {0,3}(?:(?P<hashes>#{1,6})(?=[ \t\r]|$)|(?P<fence>`{3,}|~{3,})|(?P<rule>=+|-+)[ \t\r]*$)", re.M)


@dataclass(frozen=True, slots=True)
class Passage:
    """`text` is the document's Markdown from `start` to `end`, in characters; `page` counts from 1.

    `heading`: the path of the headings at or above its start. `digest`: SHA-256 of heading and text."""

    place: int
    start: int
    end: int
    tokens: int
    page: int | None
    heading: str | None
    text: str
    digest: bytes


@dataclass(frozen=True, slots=True)
class _Heading:
    """From its line's `start` to the `end` of it or of the rule below; `path`: level and title, its own the last."""

    start: int
    end: int
    path: tuple[tuple[int, str], ...]


@dataclass(frozen=True, slots=True)
class _Span:
    start: int
    end: int
    tokens: int


class Splitter:
    """Cuts documents; made once from the embedder's tokenizer.json, or for none: then bytes / 4 stand for tokens."""

    def __init__(self, tokenizer: Path | None, *, most_tokens: int = MOST_TOKENS) -> None:
        counter = _Tokens(tokenizer) if tokenizer else _Bytes()
        self._most = most_tokens
        self._count = counter.counts
        self._splitter = MarkdownSplitter.from_callback(counter.size, max(1, most_tokens - counter.special), trim=False)

    def cut(self, markdown: str, *, pages: Sequence[int] = ()) -> list[Passage]:
        """Its passages in order, none over `most_tokens` (special tokens included) unless it is one character.

        They do not overlap, and have every character between them but white space and headings that stand in the
        next one's path. `pages`: the characters at which the pages start, ascending."""
        headings = _headings(markdown)
        spans = [
            span
            for start, end in _stretches(markdown, headings)
            for span in self._spans(markdown, start, end, self._splitter)
        ]
        starts = [heading.start for heading in headings]
        joined = self._joined(markdown, spans, headings)
        return [_passage(place, span, markdown, starts, headings, pages) for place, span in enumerate(joined)]

    def _spans(self, markdown: str, start: int, end: int, splitter: MarkdownSplitter) -> Iterator[_Span]:
        """What a part of the text is cut into; without the white space around each."""
        parts = splitter.chunk_indices(markdown[start:end])
        places = [_trimmed(markdown, start + at, start + at + len(part)) for at, part in parts]
        places = [(first, last) for first, last in places if first < last]
        counts = self._count([markdown[first:last] for first, last in places])
        for (first, last), tokens in zip(places, counts, strict=True):
            if tokens <= self._most or last - first == 1:
                yield _Span(first, last, tokens)
            else:
                even = (last - first) // -(-tokens // self._most)
                yield from self._spans(markdown, first, last, MarkdownSplitter(max(1, even), trim=False))

    def _joined(self, markdown: str, spans: Sequence[_Span], headings: Sequence[_Heading]) -> Iterator[_Span]:
        """The spans; one of headings only is joined to the next, or left out where the next one's path has it all."""
        starts = [heading.start for heading in headings]
        waiting: _Span | None = None
        for span in spans:
            here = span if waiting is None else self._both(markdown, waiting, span)
            if waiting is not None and here is span:
                path = _above(span.start, starts, headings)
                if not all(_is_said(heading, path) for heading in _within(waiting, starts, headings)):
                    yield waiting
            waiting = here if _is_headings(markdown, here, _within(here, starts, headings)) else None
            if waiting is None:
                yield here
        if waiting is not None:
            yield waiting

    def _both(self, markdown: str, one: _Span, other: _Span) -> _Span:
        """Both as one if that is not too long, else the other."""
        if other.end - one.start > self._most * _MOST_CHARS_A_TOKEN:
            return other
        [tokens] = self._count([markdown[one.start : other.end]])
        return _Span(one.start, other.end, tokens) if tokens <= self._most else other


def embedded_text(passage: Passage) -> str:
    """What is embedded for a passage: its text alone.

    With the heading path before it, recall@5 was 2.0 to 2.8 points lower at all four lengths (benchmarks.retrieval)."""
    return passage.text


class _Tokens:
    """The embedder's tokens. It cuts between words first, so a text's are its words' and the special ones."""

    def __init__(self, path: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(path))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._of_word: dict[str, int] = {}
        self.special = len(self._tokenizer.encode("").ids)

    def counts(self, texts: Sequence[str]) -> list[int]:
        """Exactly, with the special tokens."""
        return [len(found.ids) for found in self._tokenizer.encode_batch_fast(list(texts))]

    def size(self, text: str) -> int:
        """Without the special tokens; more where a token has too many characters."""
        found = _WORD.findall(text)
        try:
            tokens = sum(map(self._of_word.__getitem__, found))
        except KeyError:
            tokens = sum(map(self._word, found))
        return max(tokens, len(text) // _MOST_CHARS_A_TOKEN)

    def _word(self, word: str) -> int:
        tokens = self._of_word.get(word)
        if tokens is None:
            tokens = len(self._tokenizer.encode(word, add_special_tokens=False).ids)
            if len(word) <= _REMEMBERED_CHARS and len(self._of_word) < _MOST_REMEMBERED:
                self._of_word[word] = tokens
        return tokens


class _Bytes:
    """Of no embedder: an estimate."""

    special = 0

    def counts(self, texts: Sequence[str]) -> list[int]:
        return [self.size(text) for text in texts]

    def size(self, text: str) -> int:
        return -(-len(text.encode()) // _BYTES_A_TOKEN)


def _stretches(markdown: str, headings: Sequence[_Heading]) -> Iterator[tuple[int, int]]:
    """Parts of at most _STRETCH_CHARS, that end before a heading, else at the end of a paragraph, a line or a word."""
    starts = [heading.start for heading in headings]
    start = 0
    while len(markdown) - start > _STRETCH_CHARS:
        least, most = start + _STRETCH_CHARS // 2, start + _STRETCH_CHARS
        before = bisect_right(starts, most)
        places = (
            starts[before - 1] if before else 0,
            *(markdown.rfind(mark, least, most) + len(mark) for mark in ("\n\n", "\n", " ")),
        )
        end = next((place for place in places if place > least), most)
        yield start, end
        start = end
    if start < len(markdown):
        yield start, len(markdown)


def _trimmed(markdown: str, start: int, end: int) -> tuple[int, int]:
    """Without blank lines before it and white space after it; the first line's indentation stays, it may be code's."""
    text = markdown[start:end]
    blank = len(text) - len(text.lstrip())
    line = text.rfind("\n", 0, blank) + 1
    return start + (line or (blank if start and markdown[start - 1] != "\n" else 0)), start + len(text.rstrip())


def _headings(markdown: str) -> list[_Heading]:
    """All headings but those within fences of code: `# title`, and lines on their own with a rule of = or - below."""
    found: list[_Heading] = []
    fence = ""
    text = _after_front_matter(markdown)
    for mark in _MARK.finditer(markdown, text):
        end = _line_end(markdown, mark.end())
        if mark["fence"]:
            fence = _fence_after(fence, mark["fence"], markdown[mark.end() : end])
        elif fence:
            continue
        elif mark["hashes"]:
            title = _title(markdown[mark.end() : min(end, mark.end() + 2 * _TITLE_CHARS)])
            found.append(_under(found, mark.start(), end, (len(mark["hashes"]), title)))
        elif (line := _ruled(markdown, text, mark.start())) is not None:
            level = 1 if mark["rule"][0] == "=" else 2
            found.append(_under(found, line, end, (level, _title(markdown[line : mark.start()]))))
    return found


def _after_front_matter(markdown: str) -> int:
    """Where the text starts after a block between two lines of ---, whose last line is no heading."""
    end = markdown.find("\n---\n", 3) if markdown.startswith("---\n") else -1
    return end + 5 if end >= 0 else 0


def _under(before: Sequence[_Heading], start: int, end: int, entry: tuple[int, str]) -> _Heading:
    """A heading, with those before it that are still open, five at most, in its path."""
    open_ = tuple(above for above in (before[-1].path if before else ()) if above[0] < entry[0])
    return _Heading(start, end, (*open_, entry))


def _fence_after(fence: str, mark: str, rest: str) -> str:
    """The fence that is open after this line: a closing one is at least as long as the opening one, and alone."""
    if not fence:
        return "" if mark[0] == "`" and "`" in rest else mark
    return "" if mark.startswith(fence) and not rest.strip() else fence


def _title(line: str) -> str:
    """A heading's text, on one line and without the closing hashes."""
    title = line.strip()
    closed = title.rstrip("#")
    title = closed.strip() if not closed or closed[-1].isspace() else title
    return " ".join(title.split())[:_TITLE_CHARS]


def _ruled(markdown: str, text: int, rule: int) -> int | None:
    """Where the line above a rule starts if it is a heading: words on one line after a blank one, no list or table."""
    start = markdown.rfind("\n", max(text, rule - 2 * _TITLE_CHARS), max(text, rule - 1)) + 1
    line = markdown[start:rule].strip()
    is_alone = start <= text or not markdown[start - 2 : start].strip("\n")
    is_text = 0 < len(line) <= _TITLE_CHARS and line[0] not in "#|>-=*+`~"
    return start if is_alone and is_text else None


def _line_end(markdown: str, at: int) -> int:
    end = markdown.find("\n", at)
    return len(markdown) if end < 0 else end


def _above(at: int, starts: Sequence[int], headings: Sequence[_Heading]) -> tuple[tuple[int, str], ...]:
    """The path of the last heading that starts at or before `at`."""
    place = bisect_right(starts, at)
    return headings[place - 1].path if place else ()


def _within(span: _Span, starts: Sequence[int], headings: Sequence[_Heading]) -> Sequence[_Heading]:
    return headings[bisect_right(starts, span.start - 1) : bisect_right(starts, span.end - 1)]


def _is_headings(markdown: str, span: _Span, within: Sequence[_Heading]) -> bool:
    """Whether a span has nothing but headings."""
    at = span.start
    for heading in within:
        if markdown[at : heading.start].strip():
            return False
        at = heading.end
    return bool(within) and not markdown[at : span.end].strip()


def _is_said(heading: _Heading, path: Sequence[tuple[int, str]]) -> bool:
    """Whether a path has a heading, in full."""
    return heading.path[-1] in path and len(heading.path[-1][1]) < _TITLE_CHARS


def _passage(
    place: int,
    span: _Span,
    markdown: str,
    starts: Sequence[int],
    headings: Sequence[_Heading],
    pages: Sequence[int],
) -> Passage:
    text = markdown[span.start : span.end]
    heading = _SEPARATOR.join(title for _, title in _above(span.start, starts, headings) if title) or None
    digest = hashlib.sha256(f"{heading or ''}\n{text}".encode()).digest()
    page = max(1, bisect_right(pages, span.start)) if pages else None
    return Passage(place, span.start, span.end, span.tokens, page, heading, text, digest)
