"""The Markdown of a document's bytes, by markitdown's converters one by one, and where its pages begin.

It must not open a file or a connection, nor run outside the confined process: what it parses is hostile.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterable, Iterator
from io import BytesIO, StringIO
from typing import Any, Final

import pdfplumber
from bs4.dammit import EncodingDetector
from charset_normalizer import from_bytes
from markitdown import StreamInfo
from markitdown.converters import CsvConverter, DocxConverter, HtmlConverter, PptxConverter, XlsxConverter
from markitdown.converters._pdf_converter import _extract_form_content_from_words, _merge_partial_numbering_lines
from pdfminer.converter import TextConverter
from pdfminer.high_level import extract_text
from pdfminer.pdfdocument import PDFEncryptionError
from pdfminer.pdfinterp import PDFResourceManager
from pdfplumber.page import Page
from pdfplumber.utils.exceptions import MalformedPDFException, PdfminerException

from documents.kinds import Kind, encoding_mark, refuse_bomb
from documents.wire import Order, Text, too_much_text
from runtime.errors import Permanent

GUESS_BYTES: Final = 65_536  # what charset_normalizer takes 0.2 s for
_LINE_END: Final = re.compile(r"\r\n?|[\v\f\x85\u2028\u2029]")
_UNWANTED: Final = re.compile(r"[\x00-\x08\x0e-\x1f\x7f\ud800-\udfff\ufeff]")
_PERMALINK: Final = re.compile(r"\[[¶#§]\]\([^)\n]*\)")  # that documentation tools put behind headings
_BLANK_LINES: Final = re.compile(r"\n(?:[ \t]*\n){3,}")
_OFFICE: Final = {Kind.DOCX: DocxConverter, Kind.XLSX: XlsxConverter, Kind.PPTX: PptxConverter}
_UNREADABLE: Final = (PdfminerException, MalformedPDFException, LookupError, TypeError, ValueError, AttributeError)


def read(content: bytes, order: Order) -> Text:
    """The document as Markdown; only a PDF has pages, for sheets and slides are headings.

    Raises Permanent with one of the codes of documents.wire, and whatever the parsers raise.
    """
    markdown, starts = _joined(_parts_of(content, order), order)
    if not markdown:
        raise Permanent(f"{order.name} holds no text, perhaps a scan: run OCR on it first", code="no_text")
    return Text(markdown=markdown, pages=starts if order.kind is Kind.PDF else ())


def normalised(text: str) -> str:
    """The text with \\n for every line end, without control characters and lone surrogates, two blank lines at most."""
    return _BLANK_LINES.sub("\n\n\n", _UNWANTED.sub("", _LINE_END.sub("\n", text))).strip()


def decoded(content: bytes, *, declared: str | None = None) -> str:
    """Text of any encoding: by its mark, else UTF-8, else what it declares, else the likeliest by its letters."""
    encoding = encoding_mark(content)
    if encoding is not None:
        return content.decode(encoding, errors="replace")
    try:
        return content.decode()
    except UnicodeDecodeError:
        pass
    try:
        return content.decode(declared or "ascii")
    except (UnicodeDecodeError, LookupError):
        return content.decode(_guessed(content[:GUESS_BYTES]), errors="replace")


def _guessed(sample: bytes) -> str:
    """The encoding whose letters fit best; of several that fit alike Western European, the most common one."""
    guesses = from_bytes(sample)
    best = guesses.best()
    western = next((guess for guess in guesses if guess.encoding == "cp1252"), None)
    if best is None or (western and (western.chaos, western.coherence) == (best.chaos, best.coherence)):
        return "cp1252"
    return best.encoding


def _joined(parts: Iterable[str], order: Order) -> tuple[str, tuple[int, ...]]:
    """The parts with an empty line between them, and where each begins; an empty one where the last ended."""
    texts: list[str] = []
    starts: list[int] = []
    length = size_bytes = 0
    for part in parts:
        text = normalised(part)
        gap = 2 if length and text else 0
        starts.append(length + gap)
        if not text:
            continue
        texts.append(text)
        length += gap + len(text)
        size_bytes += gap + len(text.encode())
        if size_bytes > order.text_bytes:
            fault = too_much_text(order)
            raise Permanent(fault.message, code=fault.code)
    return "\n\n".join(texts), tuple(starts)


def _parts_of(content: bytes, order: Order) -> Iterator[str]:
    if order.kind is Kind.PDF:
        yield from _pages(content, order.name)
    elif order.kind in _OFFICE:
        refuse_bomb(content, order.name, unpacked_bytes=order.unpacked_bytes)
        yield _converted(_OFFICE[order.kind](), BytesIO(content))
    elif order.kind is Kind.HTML:
        declared = EncodingDetector.find_declared_encoding(content, is_html=True)
        yield _PERMALINK.sub("", _converted(HtmlConverter(), BytesIO(decoded(content, declared=declared).encode())))
    elif order.kind is Kind.CSV:
        yield _converted(CsvConverter(), BytesIO(_with_commas(decoded(content)).encode()))
    else:
        yield decoded(content)


def _converted(converter: Any, stream: BytesIO) -> str:
    return str(converter.convert(stream, StreamInfo(charset="utf-8")).markdown)


def _pages(content: bytes, name: str) -> Iterator[str]:
    """The pages one by one, as markitdown's PdfConverter reads them: tables by the words' places, else pdfminer.

    It has no pages in its result and parses each twice, so its two steps are done here, and its fallback: what
    pdfplumber cannot read, pdfminer may.
    """
    done = 0
    try:
        with pdfplumber.open(BytesIO(content), laparams={}) as pdf:
            for page in pdf.pages:
                table = _extract_form_content_from_words(page)
                text = _merge_partial_numbering_lines(_prose(page) if table is None else table)
                page.close()
                yield text
                done += 1
    except _UNREADABLE as error:
        if error.args and isinstance(error.args[0], PDFEncryptionError):
            raise Permanent(f"{name} needs a password; save it without one", code="encrypted_document") from error
        yield from extract_text(BytesIO(content)).split("\f")[done:-1]


def _prose(page: Page) -> str:
    text = StringIO()
    TextConverter(PDFResourceManager(), text).receive_layout(page.layout)
    return text.getvalue()


def _with_commas(text: str) -> str:
    """CSV of any delimiter, the one that the first line has most of, as CSV with commas."""
    first = text.partition("\n")[0]
    delimiter = max(",;\t|", key=first.count)
    if delimiter == ",":
        return text
    csv.field_size_limit(sys.maxsize)
    written = StringIO()
    csv.writer(written).writerows(csv.reader(StringIO(text, newline=""), delimiter=delimiter))
    return written.getvalue()
