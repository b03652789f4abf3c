"""What a document is by its bytes."""

from __future__ import annotations

import gzip

import pytest

from documents.kinds import MOST_MEMBERS, Kind, kind_of, refuse_bomb
from runtime.errors import Permanent
from tests.support import hostile_documents as made

PDF = made.pdf([["A line"]])
HTML = b"<!DOCTYPE html><html><body><h1>Title</h1></body></html>"


@pytest.mark.parametrize(
    ("content", "name", "kind"),
    [
        (PDF, "a.pdf", Kind.PDF),
        (b"\xef\xbb\xbf\n" + PDF, "a.pdf", Kind.PDF),
        (made.docx("Hello"), "a.docx", Kind.DOCX),
        (made.xlsx({"One": [["a"]]}), "a.xlsx", Kind.XLSX),
        (made.pptx_of([("Title", "text")]), "a.PPTX", Kind.PPTX),
        (HTML, "a.html", Kind.HTML),
        (b"<p>no head</p>", "a.htm", Kind.HTML),
        (b"# Title", "a.md", Kind.MARKDOWN),
        (b"Title\n=====", "a.rst", Kind.TEXT),
        (b"a,b\n1,2\n", "a.csv", Kind.CSV),
        (b"a\tb\n1\t2\n", "a.tsv", Kind.CSV),
        (b"print(1)\n", "a.py", Kind.TEXT),
        (b"a,b\n1,2\n", "without extension", Kind.TEXT),
        ("Grüße".encode("utf-16"), "a.txt", Kind.TEXT),
        ("Grüße aus Köln".encode("latin-1"), "a.txt", Kind.TEXT),
    ],
)
def test_the_kind_is_what_bytes_and_name_agree_on(content: bytes, name: str, kind: Kind) -> None:
    assert kind_of(content, name) == (kind, None)


@pytest.mark.parametrize(
    ("content", "name", "kind", "note"),
    [
        (PDF, "a.txt", Kind.PDF, "named .txt but is a PDF"),
        (HTML, "a.md", Kind.HTML, "named .md but is HTML"),
        (made.docx("Hello"), "a.pdf", Kind.DOCX, "named .pdf but is a DOCX"),
        (made.xlsx({"One": [["a"]]}), "a.docx", Kind.XLSX, "named .docx but is an XLSX"),
        (b"just text", "a.pdf", Kind.TEXT, "named .pdf but is text"),
        ("<html>Grüße</html>".encode("utf-16"), "a.txt", Kind.HTML, "named .txt but is HTML"),
        (b"A text about the mark %PDF-1.4 of PDF files", "a.pdf", Kind.TEXT, "named .pdf but is text"),
    ],
)
def test_a_mislabelled_file_is_what_it_is_and_has_a_note(content: bytes, name: str, kind: Kind, note: str) -> None:
    assert kind_of(content, name) == (kind, note)


@pytest.mark.parametrize(
    ("content", "name", "code", "said"),
    [
        (b"", "a.txt", "empty_document", "a.txt is empty (0 bytes)"),
        (made.ENCRYPTED_OFFICE, "a.docx", "encrypted_document", "save it without one"),
        (made.OLE2, "a.doc", "unsupported_document", "save it as .docx"),
        (made.PNG, "a.pdf", "unsupported_document", "a.pdf is a PNG image"),
        (gzip.compress(b"text", mtime=0), "a.txt", "unsupported_document", "a gzip archive"),
        (b"\x7fELF" + bytes(60), "a.docx", "unsupported_document", "a program"),
        (rb"{\rtf1 text}", "a.doc", "unsupported_document", "saved as .docx"),
        (made.zipped({"inner.zip": made.zipped({"a.txt": b"x"})}), "a.docx", "unsupported_document", "a zip archive"),
        (bytes(range(256)) * 4, "a.txt", "unsupported_document", "neither a known document nor text"),
        (made.docx("Hello")[:-200], "a.docx", "corrupt_document", "perhaps cut short"),
        (made.overlapping_docx(), "a.docx", "archive_bomb", "lie upon each other"),
        (made.zip_of_many_parts(MOST_MEMBERS), "a.docx", "archive_bomb", "more than 20,000 parts"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_name_and_a_remedy(
    content: bytes, name: str, code: str, said: str
) -> None:
    with pytest.raises(Permanent) as refused:
        kind_of(content, name)
    assert refused.value.code == code
    assert str(refused.value).startswith(name)
    assert said in str(refused.value)


def test_an_archive_may_become_as_large_as_allowed_and_no_larger() -> None:
    content = made.docx("Hello", parts={"word/more.xml": bytes(100_000)})
    refuse_bomb(content, "a.docx", unpacked_bytes=110_000)
    with pytest.raises(Permanent, match="STOKER_DOCUMENTS__UNPACKED_BYTES") as refused:
        refuse_bomb(content, "a.docx", unpacked_bytes=100_000)
    assert refused.value.code == "archive_bomb"
