"""Questions with the passage of a document that answers each, as the authors of Debian's documentation wrote them.

    python -m benchmarks.retrieval_questions [--folder .checkpoints/debian-docs]

FAQs of Perl, Python, Git and Debian: a question is a heading that ends in "?", its answer is what stands below. The
headings are taken out of the documents, else finding the answer would be finding the question; the headings above them
stay. Around the FAQs stand manuals from the same packages, about the same things. No label is ours.

The packages come through `apt-get download` into a folder (no root, nothing is installed). The same packages give the
same questions: their versions are in the result.
"""

from __future__ import annotations

import argparse
import html
import io
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bs4 import BeautifulSoup, Tag
from markitdown import MarkItDown

FOLDER: Final = Path(__file__).parents[1] / ".checkpoints" / "debian-docs"
LEAST_ANSWER_CHARS: Final = 80  # shorter ones are "See the next question."
MOST_QUESTIONS_QUOTED: Final = 2  # a manual that has more of the questions word for word is a table of contents

_PERL: Final = "usr/share/perl/5.*/pod"
_PYTHON: Final = "usr/share/doc/python3.11/html"
_GIT: Final = "usr/share/doc/git-doc"
_PERL_MANUALS: Final = "data debug form ipc mod obj opentut re ref sec sub syn uniintro var"
_GIT_MANUALS: Final = (
    "-branch -checkout -commit -merge -push -rebase -reset -stash attributes core-tutorial everyday ignore submodules "
    "tutorial workflows"
)
# Package, and the files of it: FAQs and manuals. Indexes and tables of contents, which quote the questions, are left
# out.
PACKAGES: Final[dict[str, tuple[str, ...]]] = {
    "perl-doc": (
        f"{_PERL}/perlfaq[1-9].pod",
        f"{_PERL}/perlunifaq.pod",
        *(f"{_PERL}/perl{name}.pod" for name in _PERL_MANUALS.split()),
    ),
    "python3.11-doc": (
        f"{_PYTHON}/faq/[!i]*.html",
        f"{_PYTHON}/faq/installed.html",
        f"{_PYTHON}/tutorial/[!i]*.html",
        f"{_PYTHON}/howto/[!il]*.html",
    ),
    "debian-faq": ("usr/share/doc/debian/FAQ/[!i]*.en.html",),
    "debian-reference-en": ("usr/share/debian-reference/ch0[1-6].en.html",),
    "developers-reference": (  # without the page that has all of the others
        "usr/share/developers-reference/[!dis]*.html",
        "usr/share/developers-reference/developer-duties.html",
    ),
    "git-doc": (f"{_GIT}/gitfaq.html", *(f"{_GIT}/git{name}.html" for name in _GIT_MANUALS.split())),
}

_FURNITURE: Final = "nav, script, style, .headerlink, .navheader, .navfooter, .toc, .contents, .sphinxsidebar, .footer"
_NUMBER = re.compile(r"^[\d.]+\s+")
_MARKER = re.compile(r"STOKER(START|END)(\d+)MARK\s*")
_POD_LINE = re.compile(r"^=(\w+)[ \t]*(.*)", re.S)
_POD_CODE = re.compile(r"([A-Z])(?:<<+\s+(.*?)\s+>>+|<([^<>]*)>)", re.S)
# While codes are replaced, signs that would look like one stand as characters that no document has.
_POD_SIGNS: Final = {"lt": "\ue000", "gt": "\ue001", "sol": "\ue002", "verbar": "\ue003"}
_HEADINGS: Final = ("h1", "h2", "h3", "h4", "h5", "h6")


@dataclass(frozen=True, slots=True)
class Document:
    """`source`: package/file."""

    source: str
    markdown: str


@dataclass(frozen=True, slots=True)
class Question:
    """Its answer is `documents[document].markdown[start:end]`."""

    text: str
    document: int
    start: int
    end: int

    @property
    def chars(self) -> int:
        """The answer's length."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """`packages`: each with the version that the documents are of."""

    documents: list[Document]
    questions: list[Question]
    packages: dict[str, str]


def main() -> None:
    """Say what the set has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    found = question_set(parser.parse_args().folder)
    for package, version in found.packages.items():
        places = [at for at, document in enumerate(found.documents) if document.source.startswith(f"{package}/")]
        chars = sum(len(found.documents[at].markdown) for at in places)
        asked = sum(question.document in places for question in found.questions)
        print(f"{package} {version}: {len(places)} documents, {chars:,} characters, {asked} questions")
    print(f"{len(found.documents)} documents, {len(found.questions)} questions")


def question_set(folder: Path = FOLDER) -> QuestionSet:
    """All documents and questions, in the order of PACKAGES and of their files' names."""
    documents: list[Document] = []
    questions: list[Question] = []
    versions = {}
    for package, patterns in PACKAGES.items():
        root, versions[package] = unpacked(package, folder)
        for path in [path for pattern in patterns for path in sorted(root.glob(pattern))]:
            marked, asked = from_pod(path.read_text()) if path.suffix == ".pod" else from_html(path.read_bytes())
            markdown, spans = without_markers(marked)
            questions += [
                Question(text, len(documents), *spans[place])
                for place, text in enumerate(asked)
                if spans[place][1] - spans[place][0] >= LEAST_ANSWER_CHARS
            ]
            documents.append(Document(f"{package}/{path.name}", markdown))
    asked_once = [question for question in questions if [other.text for other in questions].count(question.text) == 1]
    return QuestionSet(*without_contents(documents, asked_once), versions)


def unpacked(package: str, folder: Path) -> tuple[Path, str]:
    """Where a Debian package's files are, fetched if they are not there yet, and its version."""
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.glob(f"{package}_*.deb")):
        subprocess.run(["apt-get", "download", "-q", package], cwd=folder, check=True, capture_output=True)
    [archive] = folder.glob(f"{package}_*.deb")
    root = folder / package
    if not root.is_dir():
        subprocess.run(["dpkg-deb", "-x", str(archive), f"{root}.part"], check=True)
        Path(f"{root}.part").rename(root)
    asked = subprocess.run(["dpkg-deb", "-f", str(archive), "Version"], check=True, capture_output=True, text=True)
    return root, asked.stdout.strip()


def from_html(page: bytes) -> tuple[str, list[str]]:
    """A page's Markdown with markers around its answers, and the questions, which are no longer in it."""
    soup = BeautifulSoup(page, "html.parser")
    body = soup.select_one("[role=main]") or soup.body or soup
    for tag in body.select(_FURNITURE):
        tag.decompose()
    asked: list[str] = []
    for heading in body.find_all([*_HEADINGS, "dt"]):
        text = _NUMBER.sub("", " ".join(heading.get_text().split()))
        answer = answer_of(heading)
        if not text.endswith("?") or answer is None:
            continue
        answer.insert(0, paragraph(soup, f"STOKERSTART{len(asked)}MARK"))
        answer.append(paragraph(soup, f"STOKEREND{len(asked)}MARK"))
        heading.decompose()
        asked.append(text)
    found = MarkItDown().convert_stream(
        io.BytesIO(f"<html><body>{body}</body></html>".encode()), file_extension=".html"
    )
    return found.markdown, asked


def answer_of(heading: Tag) -> Tag | None:
    """What stands under a heading: the section that it is the title of, or the text of a term."""
    if heading.name == "dt":
        return heading.find_next_sibling("dd")
    section = heading.find_parent(["section", "div"], class_=lambda name: name in ("section", "sect1", "sect2"))
    return section or heading.find_parent("section")


def paragraph(soup: BeautifulSoup, text: str) -> Tag:
    """A new one."""
    made = soup.new_tag("p")
    made.string = text
    return made


def from_pod(pod: str) -> tuple[str, list[str]]:
    """Perl's documentation as Markdown, with markers around the answers, and the questions."""
    asked: list[str] = []
    parts: list[str] = []
    open_: tuple[int, int] | None = None  # the question that is being answered, and its heading's level
    for level, text in pod_blocks(pod):
        if level and open_ and level <= open_[1]:
            parts.append(f"STOKEREND{open_[0]}MARK")
            open_ = None
        if level and text.endswith("?") and open_ is None:
            open_ = len(asked), level
            parts.append(f"STOKERSTART{len(asked)}MARK")
            asked.append(text)
        else:
            parts.append(f"{'#' * level} {text}" if level else text)
    if open_:
        parts.append(f"STOKEREND{open_[0]}MARK")
    return "\n\n".join(parts) + "\n", asked


def pod_blocks(pod: str) -> Iterator[tuple[int, str]]:
    """Headings with their level, and paragraphs, items and code with level 0."""
    is_text = False
    for block in re.split(r"\n(?:[ \t]*\n)+", pod):
        command = _POD_LINE.match(block.lstrip("\n"))
        if command is None:
            if is_text:
                yield 0, block if block[:1] in (" ", "\t") else plain(block)
            continue
        name, text = command[1], plain(command[2])
        if name not in ("for", "encoding"):
            is_text = name not in ("begin", "cut")
        if name.startswith("head"):
            yield int(name[4:]), " ".join(text.split())
        elif name == "item":
            yield 0, f"- {text.lstrip('* ')}"


def plain(text: str) -> str:
    """Without POD's codes: C<code> is `code`, X<index> nothing, L<text|link> its text."""
    before = ""
    while before != text:
        before, text = text, _POD_CODE.sub(_plain_code, text)
    for name, sign in _POD_SIGNS.items():
        text = text.replace(sign, html.unescape(f"&{name};"))
    return text.strip()


def _plain_code(code: re.Match[str]) -> str:
    text = code[2] if code[2] is not None else code[3]
    if code[1] == "C":
        return f"`{text}`"
    if code[1] == "L":
        return text.partition("|")[0]
    if code[1] == "E":
        return _POD_SIGNS.get(text, text)
    return "" if code[1] in "XZ" else text


def without_markers(marked: str) -> tuple[str, dict[int, tuple[int, int]]]:
    """The Markdown as the system gets it, and from where to where in it each question's answer goes."""
    parts: list[str] = []
    starts: dict[int, int] = {}
    ends: dict[int, int] = {}
    at = length = 0
    for marker in _MARKER.finditer(marked):
        parts.append(marked[at : marker.start()])
        length += len(parts[-1])
        at = marker.end()
        (starts if marker[1] == "START" else ends)[int(marker[2])] = length
    markdown = "".join(parts) + marked[at:]
    return markdown, {
        place: (start, start + len(markdown[start : ends[place]].rstrip())) for place, start in starts.items()
    }


def without_contents(
    documents: Sequence[Document], questions: Sequence[Question]
) -> tuple[list[Document], list[Question]]:
    """Without the documents that no question is about and that quote more than MOST_QUESTIONS_QUOTED of them."""
    about = {question.document for question in questions}
    kept = [
        at
        for at, document in enumerate(documents)
        if at in about or sum(asked.text in document.markdown for asked in questions) <= MOST_QUESTIONS_QUOTED
    ]
    places = {at: place for place, at in enumerate(kept)}
    moved = [Question(asked.text, places[asked.document], asked.start, asked.end) for asked in questions]
    return [documents[at] for at in kept], moved


if __name__ == "__main__":
    main()
