"""What a document is by its bytes; its name is only a hint.

It must not unpack, parse or convert anything: of a zip archive it reads the directory alone.
"""

from __future__ import annotations

import codecs
import zipfile
from collections.abc import Iterable
from enum import StrEnum
from io import BytesIO
from itertools import pairwise
from pathlib import PurePath
from typing import Final

from runtime.errors import Permanent

MOST_MEMBERS: Final = 20_000  # a workbook of 1,000 sheets with drawings has some 4,000
SAMPLE_BYTES: Final = 65_536
HEAD_BYTES: Final = 1024  # readers of PDF search its mark so far
# Text has none but tab, line ends, form feed and escape; compressed or encrypted bytes have 1 in 10.
MOST_CONTROLS: Final = 0.01
ENCODED_MARKS: Final = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins with the mark of UTF-16
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class Kind(StrEnum):
    """What can be read."""

    PDF = "pdf"
    DOCX = "docx"
    XLSX = "xlsx"
    PPTX = "pptx"
    HTML = "html"
    MARKDOWN = "markdown"
    TEXT = "text"
    CSV = "csv"


_READ: Final = "PDF, DOCX, XLSX, PPTX, HTML, Markdown, text and CSV are read"
_EXTENSIONS: Final = {
    Kind.PDF: (".pdf",),
    Kind.DOCX: (".docx", ".docm", ".dotx"),
    Kind.XLSX: (".xlsx", ".xlsm", ".xltx"),
    Kind.PPTX: (".pptx", ".pptm", ".potx", ".ppsx"),
    Kind.HTML: (".html", ".htm", ".xhtml"),
    Kind.MARKDOWN: (".md", ".markdown"),
    Kind.CSV: (".csv", ".tsv"),
    Kind.TEXT: (".txt", ".text", ".rst"),
}
_KIND_OF_EXTENSION: Final = {extension: kind for kind, group in _EXTENSIONS.items() for extension in group}
_TITLES: Final = {
    Kind.PDF: "a PDF",
    Kind.DOCX: "a DOCX",
    Kind.XLSX: "an XLSX",
    Kind.PPTX: "a PPTX",
    Kind.HTML: "HTML",
    Kind.MARKDOWN: "Markdown",
    Kind.CSV: "CSV",
    Kind.TEXT: "text",
}
_OFFICE: Final = (("word/", Kind.DOCX), ("xl/", Kind.XLSX), ("ppt/", Kind.PPTX))
_OLE2: Final = bytes.fromhex("d0cf11e0a1b11ae1")
_HTML_STARTS: Final = ("<!doctype html", "<html", "<head", "<body")
_FOREIGN: Final = (
    (0, b"\x89PNG", "a PNG image"),
    (0, b"\xff\xd8\xff", "a JPEG image"),
    (0, b"GIF8", "a GIF image"),
    (0, b"II*\0", "a TIFF image"),
    (0, b"MM\0*", "a TIFF image"),
    (8, b"WEBP", "a WebP image"),
    (0, b"RIFF", "sound or video"),
    (0, b"OggS", "sound or video"),
    (0, b"ID3", "sound or video"),
    (4, b"ftyp", "sound, video or a HEIC image"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"BZh", "a bzip2 archive"),
    (0, b"\xfd7zXZ\0", "an xz archive"),
    (0, b"\x28\xb5\x2f\xfd", "a Zstandard archive"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (0, b"Rar!\x1a\x07", "a RAR archive"),
    (257, b"ustar", "a tar archive"),
    (0, b"\x7fELF", "a program"),
    (0, b"MZ\x90", "a program"),
    (0, b"SQLite format 3\0", "an SQLite database"),
    (0, b"PAR1", "a Parquet file"),
    (0, rb"{\rtf", "an RTF document, to be saved as .docx"),
    (0, b"%!PS", "a PostScript document, to be saved as .pdf"),
)


def kind_of(content: bytes, name: str) -> tuple[Kind, str | None]:
    """The kind by the bytes, and a note where the name says otherwise: `named .txt but is a PDF`.

    Raises Permanent: `empty_document`, `encrypted_document`, `archive_bomb`, `corrupt_document` for a
    damaged archive, and `unsupported_document` for all that is not read. The name decides only between
    kinds of text.
    """
    if not content:
        raise Permanent(f"{name} is empty (0 bytes); send the file again", code="empty_document")
    if content.startswith(_OLE2):
        raise _legacy_office(content, name)
    if content.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        kind = _office_kind(members_of(content, name), name)
    elif _is_pdf(content):
        kind = Kind.PDF
    else:
        _refuse_foreign(content, name)
        kind = _text_kind(content, name)
    return kind, _note(kind, name)


def members_of(content: bytes, name: str) -> list[zipfile.ZipInfo]:
    """The directory of a zip archive; `archive_bomb` if it is far too long or its parts lie upon each other."""
    # Counted before it is parsed: every entry begins with these bytes, and a million of them take 1 GB.
    if content.count(b"PK\x01\x02") > MOST_MEMBERS:
        raise _bomb(name, f"has more than {MOST_MEMBERS:,} parts")
    try:
        with zipfile.ZipFile(BytesIO(content)) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
        raise Permanent(
            f"{name} is a damaged archive, perhaps cut short: {error}; send or save it again", code="corrupt_document"
        ) from error
    in_order = sorted(members, key=lambda member: member.header_offset)
    if any(one.header_offset + one.compress_size > other.header_offset for one, other in pairwise(in_order)):
        raise _bomb(name, "has parts that lie upon each other")
    return members


def refuse_bomb(content: bytes, name: str, *, unpacked_bytes: int) -> None:
    """Raise `archive_bomb` if the parts of an archive are larger than that when unpacked.

    The sizes that they declare are enough: zipfile gives out no more than is declared.
    """
    declared = sum(member.file_size for member in members_of(content, name))
    if declared > unpacked_bytes:
        limit = f"more than the {unpacked_bytes:,} of STOKER_DOCUMENTS__UNPACKED_BYTES"
        raise _bomb(name, f"becomes {declared:,} bytes when unpacked, {limit}")


def encoding_mark(content: bytes) -> str | None:
    """The encoding that the text's byte order mark states."""
    return next((encoding for mark, encoding in ENCODED_MARKS if content.startswith(mark)), None)


def _bomb(name: str, fault: str) -> Permanent:
    return Permanent(f"{name} {fault}; split it, or save it anew in the program that made it", code="archive_bomb")


def _legacy_office(content: bytes, name: str) -> Permanent:
    if "EncryptedPackage".encode("utf-16-le") in content:
        return Permanent(f"{name} needs a password; save it without one", code="encrypted_document")
    return Permanent(
        f"{name} is legacy Office or an Outlook message: save it as .docx, .xlsx or .pptx", code="unsupported_document"
    )


def _office_kind(members: Iterable[zipfile.ZipInfo], name: str) -> Kind:
    names = [member.filename.lower() for member in members]
    if "[content_types].xml" in names and "xl/workbook.bin" not in names:
        for folder, kind in _OFFICE:
            if any(entry.startswith(folder) for entry in names):
                return kind
    raise _unsupported(name, "a zip archive and no DOCX, XLSX or PPTX; unpack it and send its documents")


def _is_pdf(content: bytes) -> bool:
    return b"%PDF-" in content[:HEAD_BYTES] and (
        content.lstrip(b"\0\t\n\r \xef\xbb\xbf").startswith(b"%PDF-") or b"startxref" in content[-HEAD_BYTES:]
    )


def _refuse_foreign(content: bytes, name: str) -> None:
    for offset, mark, title in _FOREIGN:
        if content.startswith(mark, offset):
            raise _unsupported(name, title)


def _text_kind(content: bytes, name: str) -> Kind:
    sample = content[:SAMPLE_BYTES]
    encoding = encoding_mark(sample)
    if encoding is None and _is_binary(sample):
        raise _unsupported(name, "neither a known document nor text")
    head = sample.decode(encoding or "latin-1", errors="ignore").lstrip().lower()
    if head.startswith(_HTML_STARTS) or (head.startswith("<?xml") and "<html" in head[:HEAD_BYTES]):
        return Kind.HTML
    named = _KIND_OF_EXTENSION.get(PurePath(name).suffix.lower(), Kind.TEXT)
    return named if named in (Kind.HTML, Kind.MARKDOWN, Kind.CSV) else Kind.TEXT


def _is_binary(sample: bytes) -> bool:
    controls = sum(map(sample.count, (bytes([code]) for code in range(32) if code not in b"\t\n\v\f\r\x1b")))
    return b"\0" in sample or controls > MOST_CONTROLS * len(sample)


def _note(kind: Kind, name: str) -> str | None:
    extension = PurePath(name).suffix.lower()
    named = _KIND_OF_EXTENSION.get(extension)
    if named is kind or not extension or (named is None and kind is Kind.TEXT):
        return None
    return f"named {extension} but is {_TITLES[kind]}"


def _unsupported(name: str, title: str) -> Permanent:
    return Permanent(f"{name} is {title}; {_READ}", code="unsupported_document")
