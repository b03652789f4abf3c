"""Documents good and bad, made as bytes: PDF and DOCX by hand, XLSX and PPTX by their libraries. It reads none."""

from __future__ import annotations

import hashlib
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import openpyxl  # type: ignore[import-untyped]
import pptx

PNG = b"\x89PNG\r\n\x1a\n" + bytes(64)
OLE2 = bytes.fromhex("d0cf11e0a1b11ae1") + bytes(512)
ENCRYPTED_OFFICE = OLE2 + "EncryptedPackage".encode("utf-16-le") + bytes(512)
PDF_PADDING = bytes.fromhex("28bf4e5e4e758a4164004e56fffa01082e2e00b6d0683e802f0ca9fe6453697a")

_TYPES = """<?xml version="1.0" encoding="UTF-8"?>
<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">
<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>
<Default Extension="xml" ContentType="application/xml"/>
<Override PartName="/word/document.xml"
 ContentType="application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"/>
</Types>"""
_RELATIONSHIPS = """<?xml version="1.0" encoding="UTF-8"?>
<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">
<Relationship Id="rId1" Target="{target}" {mode}
 Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/{kind}"/>
</Relationships>"""
_WORD = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
_DOCUMENT = (
    '<?xml version="1.0" encoding="UTF-8"?>{head}'
    f'<w:document xmlns:w="{_WORD}"><w:body>{{body}}</w:body></w:document>'
)


def pdf(pages: Sequence[Sequence[str]], *, password: str | None = None) -> bytes:
    """A PDF with these lines on its pages; with a password its texts are encrypted (RC4 of 40 bits)."""
    streams = [
        b"BT /F1 12 Tf 72 720 Td 16 TL "
        + b" ".join(
            b"(" + line.encode("latin-1").replace(b"(", rb"\(").replace(b")", rb"\)") + b") '" for line in lines
        )
        + b" ET"
        for lines in pages
    ]
    return pdf_of_streams(streams, password=password)


def pdf_of_streams(streams: Sequence[bytes], *, password: str | None = None, deflated: bool = False) -> bytes:
    """A PDF with a page for each content stream; `deflated` says that they are zlib's output."""
    identity = b"0123456789abcdef"
    kids = " ".join(f"{4 + 2 * number} 0 R" for number in range(len(streams)))
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        f"<</Type/Pages/Kids[{kids}]/Count {len(streams)}>>".encode(),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica/Encoding/WinAnsiEncoding>>",
    ]
    secret = None if password is None else _PdfSecret(password, identity)
    for number, stream in enumerate(streams):
        page = f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents {5 + 2 * number} 0 R"
        objects.append(f"{page}/Resources<</Font<</F1 3 0 R>>>>>>".encode())
        body = stream if secret is None else secret.encrypt(stream, 5 + 2 * number)
        head = f"<</Length {len(body)}{'/Filter/FlateDecode' if deflated else ''}>>".encode()
        objects.append(head + b"\nstream\n" + body + b"\nendstream")
    trailer = f"/Size {len(objects) + 1}/Root 1 0 R/ID[<{identity.hex()}><{identity.hex()}>]".encode()
    return _pdf_file(objects, trailer + (b"" if secret is None else secret.dictionary))


def slow_pdf() -> bytes:
    """A small PDF that takes a minute and more to lay out."""
    text = b"".join(b"BT /F1 4 Tf %d %d Td (a) Tj ET\n" % (at * 37 % 600, at * 91 % 780) for at in range(60_000))
    return pdf_of_streams([zlib.compress(text)], deflated=True)


def docx(*paragraphs: str, head: str = "", parts: Mapping[str, bytes] | None = None) -> bytes:
    """A Word document; `head` comes before the root of its XML, `parts` are added to its archive."""
    body = "".join(f"<w:p><w:r><w:t>{text}</w:t></w:r></w:p>" for text in paragraphs)
    return docx_of_xml(_DOCUMENT.format(head=head, body=body).encode(), parts=parts)


def docx_of_xml(document: bytes, *, parts: Mapping[str, bytes] | None = None) -> bytes:
    """A Word document with this XML."""
    return zipped(
        {
            "[Content_Types].xml": _TYPES.encode(),
            "_rels/.rels": _RELATIONSHIPS.format(target="word/document.xml", mode="", kind="officeDocument").encode(),
            "word/document.xml": document,
            **(parts or {}),
        }
    )


def docx_with_linked_picture(url: str) -> bytes:
    """A Word document that wants its picture fetched."""
    picture = (
        '<w:p><w:r><w:t>before</w:t></w:r><w:r><w:drawing><wp:inline xmlns:wp="http://schemas.openxmlformats.org/'
        'drawingml/2006/wordprocessingDrawing"><a:graphic xmlns:a="http://schemas.openxmlformats.org/drawingml/2006/main">'
        '<a:graphicData><pic:pic xmlns:pic="http://schemas.openxmlformats.org/drawingml/2006/picture"><pic:blipFill>'
        '<a:blip xmlns:r="http://schemas.openxmlformats.org/officeDocument/2006/relationships" r:link="rId1"/>'
        "</pic:blipFill></pic:pic></a:graphicData></a:graphic></wp:inline></w:drawing></w:r></w:p>"
    )
    relationships = _RELATIONSHIPS.format(target=url, mode='TargetMode="External"', kind="image")
    return docx_of_xml(
        _DOCUMENT.format(head="", body=picture).encode(), parts={"word/_rels/document.xml.rels": relationships.encode()}
    )


def docx_bomb(size_bytes: int = 1024**3) -> bytes:
    """A Word document of some 1 MB whose text is that many zeros when unpacked."""
    archive = BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        file.writestr("[Content_Types].xml", _TYPES)
        with file.open("word/document.xml", "w", force_zip64=True) as part:
            zeros = bytes(1 << 20)
            for _ in range(size_bytes >> 20):
                part.write(zeros)
    return archive.getvalue()


def docx_of_many_laughs() -> bytes:
    """A Word document with the billion laughs in its numbering: ten entities, each ten times the one before."""
    names = [f"l{number}" for number in range(10)]
    entities = '<!ENTITY l0 "lollollollollollollollollollol">' + "".join(
        f'<!ENTITY {name} "{f"&{before};" * 10}">' for before, name in pairwise(names)
    )
    numbering = f'<!DOCTYPE w [{entities}]><w:numbering xmlns:w="{_WORD}">&l9;</w:numbering>'
    relationships = _RELATIONSHIPS.format(target="numbering.xml", mode="", kind="numbering")
    return docx(
        "text",
        parts={"word/numbering.xml": numbering.encode(), "word/_rels/document.xml.rels": relationships.encode()},
    )


def docx_that_reads(path: Path) -> bytes:
    """A Word document with an external entity: it wants this file's text for its own."""
    return docx("before &file; after", head=f'<!DOCTYPE w:document [<!ENTITY file SYSTEM "{path.as_uri()}">]>')


def overlapping_docx() -> bytes:
    """A Word document two of whose parts are the same bytes of the archive."""
    content = docx("twice", parts={"word/more.xml": bytes(100)})
    at = content.rindex(b"PK\x01\x02")
    return content[: at + 42] + struct.pack("<L", 0) + content[at + 46 :]


def zipped(parts: Mapping[str, bytes]) -> bytes:
    """A zip archive."""
    archive = BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in parts.items():
            file.writestr(name, content)
    return archive.getvalue()


def zip_of_many_parts(count: int) -> bytes:
    """A Word document with that many parts, all empty."""
    return docx("many", parts={f"word/{number}": b"" for number in range(count)})


def xlsx(sheets: Mapping[str, Sequence[Sequence[object]]]) -> bytes:
    """A workbook with these rows."""
    book = openpyxl.Workbook()
    book.remove(book.worksheets[0])
    for title, rows in sheets.items():
        sheet = book.create_sheet(title)
        for row in rows:
            sheet.append(list(row))
    content = BytesIO()
    book.save(content)
    return content.getvalue()


def wide_xlsx() -> bytes:
    """A workbook of 5 KB with one cell, the last that there is: its table has 17 billion."""
    book = openpyxl.Workbook()
    book.worksheets[0]["XFD1048576"] = "far"
    content = BytesIO()
    book.save(content)
    return content.getvalue()


def pptx_of(slides: Sequence[tuple[str, str]]) -> bytes:
    """A presentation with a title and a text on each slide."""
    presentation: Any = pptx.Presentation()
    for title, text in slides:
        slide = presentation.slides.add_slide(presentation.slide_layouts[1])
        slide.shapes.title.text = title
        slide.placeholders[1].text = text
    content = BytesIO()
    presentation.save(content)
    return content.getvalue()


def sparse_file(path: Path, size_bytes: int) -> Path:
    """A file of that size which takes no room."""
    with path.open("wb") as file:
        file.truncate(size_bytes)
    return path


class _PdfSecret:
    """The standard security handler, revision 2 (PDF 1.7, section 7.6)."""

    def __init__(self, password: str, identity: bytes) -> None:
        padded = (password.encode() + PDF_PADDING)[:32]
        owner = _rc4(hashlib.md5(padded).digest()[:5], padded)
        self._key = hashlib.md5(padded + owner + struct.pack("<i", -4) + identity).digest()[:5]
        user = _rc4(self._key, PDF_PADDING)
        self.dictionary = f"/Encrypt<</Filter/Standard/V 1/R 2/P -4/O<{owner.hex()}>/U<{user.hex()}>>>".encode()

    def encrypt(self, text: bytes, number: int) -> bytes:
        """A string of the object with this number."""
        return _rc4(hashlib.md5(self._key + struct.pack("<L", number)[:3] + bytes(2)).digest()[:10], text)


def _rc4(key: bytes, text: bytes) -> bytes:
    state = list(range(256))
    other = 0
    for at, byte in zip(range(256), cycle(key), strict=False):
        other = (other + state[at] + byte) % 256
        state[at], state[other] = state[other], state[at]
    one = other = 0
    out = bytearray()
    for byte in text:
        one = (one + 1) % 256
        other = (other + state[one]) % 256
        state[one], state[other] = state[other], state[one]
        out.append(byte ^ state[(state[one] + state[other]) % 256])
    return bytes(out)


def _pdf_file(objects: Sequence[bytes], trailer: bytes) -> bytes:
    content = bytearray(b"%PDF-1.4\n")
    offsets = []
    for number, body in enumerate(objects, start=1):
        offsets.append(len(content))
        content += f"{number} 0 obj\n".encode() + body + b"\nendobj\n"
    table = "".join(f"{offset:010d} 00000 n \n" for offset in offsets)
    start = len(content)
    content += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}".encode()
    return bytes(content + b"trailer\n<<" + trailer + f">>\nstartxref\n{start}\n%%EOF\n".encode())
