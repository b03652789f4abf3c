"""Documents good and bad through real confined processes."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest

from documents.convert import Converter, check_size
from documents.kinds import Kind
from runtime.children import birth_of
from runtime.errors import Permanent, Transient
from runtime.settings import DocumentSettings
from tests.support import hostile_documents as made
from tests.support.processes import MARK, REPOSITORY, clean_environment, kill_marked, marked, new_mark
from tests.support.waiting import wait_until

PAGES = [["The first page.", "It has (two) lines."], ["The second."], [], ["The fourth."]]
SLOW = """
import sys
from documents.convert import Converter
from runtime.settings import DocumentSettings
with Converter(DocumentSettings()) as converter:
    converter.convert(sys.stdin.buffer.read(), "slow.pdf")
"""


@pytest.fixture(scope="module")
def converter() -> Iterator[Converter]:
    """With the limits as they come, for documents that meet none."""
    with Converter(DocumentSettings()) as opened:
        yield opened


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A server on the loopback that accepts nothing by itself: who connects to it waits in its queue."""
    with socket.create_server(("127.0.0.1", 0)) as opened:
        opened.setblocking(False)
        yield opened


def refusal(converter: Converter, content: bytes, name: str) -> tuple[str, str]:
    with pytest.raises(Permanent) as refused:
        converter.convert(content, name)
    return refused.value.code, str(refused.value)


def readers_of(mark: str) -> list[int]:
    """The processes below the one that forks, which is below the marked one."""
    everyone = {process.pid: process.parent for process in marked(mark)}
    return [pid for pid, parent in everyone.items() if everyone.get(parent) in everyone]


def test_a_pdfs_pages_begin_where_the_result_says(converter: Converter) -> None:
    converted = converter.convert(made.pdf(PAGES), "a.pdf")
    starts = [*converted.pages, len(converted.markdown)]
    pages = [converted.markdown[start:end].strip() for start, end in pairwise(starts)]
    assert pages == ["\n".join(lines) for lines in PAGES]


def test_a_table_in_a_pdf_is_a_table_and_pages_stay_right(converter: Converter) -> None:
    cells = [(72 + column * 130, 700 - row * 20, f"r{row}c{column}") for row in range(6) for column in range(4)]
    table = " ".join(f"BT /F1 10 Tf {x} {y} Td ({text}) Tj ET" for x, y, text in cells).encode()
    converted = converter.convert(made.pdf_of_streams([table, b"BT /F1 12 Tf 72 700 Td (After it) Tj ET"]), "a.pdf")
    assert converted.markdown.startswith("| r0c0 | r0c1 | r0c2 | r0c3 |")
    assert converted.markdown[converted.pages[1] :] == "After it"


@pytest.mark.parametrize(
    ("content", "name", "markdown"),
    [
        (made.docx("First", "Second"), "a.docx", "First\n\nSecond"),
        (made.xlsx({"One": [["a"], [1]], "Two": [["b"], [2]]}), "a.xlsx", "## One\n| a |\n| --- |\n| 1 |\n\n## Two\n"),
        (made.pptx_of([("Title", "text"), ("Next", "more")]), "a.pptx", "<!-- Slide number: 1 -->\n# Title\ntext"),
        (b"<html><head><style>x</style></head><body><h1>T</h1><p>p</p></body></html>", "a.html", "# T\n\np"),
        ('<meta charset="iso-8859-2"><p>Zażółć</p>'.encode("iso-8859-2"), "a.html", "Zażółć"),
        (b"a;b\n1,5;2\n", "a.csv", "| a | b |\n| --- | --- |\n| 1,5 | 2 |"),
        (b"a\tb\n1\t2\n", "a.tsv", "| a | b |\n| --- | --- |\n| 1 | 2 |"),
        ("Grüße".encode("utf-16"), "a.txt", "Grüße"),
        (b"\xef\xbb\xbfwith a mark", "a.txt", "with a mark"),
        ("Grüße aus Köln, naïve Straßencafés".encode("latin-1"), "a.txt", "Grüße aus Köln, naïve Straßencafés"),
        ("Съешь же ещё этих мягких французских булок".encode("cp1251"), "a.txt", "Съешь же ещё этих мягких"),
        (b"one\r\n\r\n\r\n\r\n \r\ntwo\x1b\x7f\rthree\n", "a.md", "one\n\n\ntwo\nthree"),
    ],
)
def test_every_kind_becomes_clean_markdown(converter: Converter, content: bytes, name: str, markdown: str) -> None:
    converted = converter.convert(content, name)
    assert converted.markdown.startswith(markdown)
    assert (converted.pages, converted.note) == ((), None)


def test_a_mislabelled_file_is_read_as_what_it_is(converter: Converter) -> None:
    converted = converter.convert(made.pdf([["Hello"]]), "a.txt")
    assert (converted.markdown, converted.kind, converted.note) == ("Hello", Kind.PDF, "named .txt but is a PDF")


@pytest.mark.parametrize(
    ("content", "name", "code", "said"),
    [
        (made.pdf(PAGES, password="secret"), "a.pdf", "encrypted_document", "needs a password; save it without one"),
        (made.pdf([[], []]), "a.pdf", "no_text", "run OCR on it first"),
        (b" \n\n", "a.txt", "no_text", "holds no text"),
        (made.pdf(PAGES)[:150], "a.pdf", "corrupt_document", "cannot be read as PDF (PSEOF"),
        (b"%PDF-1.4\n" + bytes(range(256)) * 40, "a.pdf", "corrupt_document", "PDFSyntaxError"),
        (made.docx_of_xml(b"<no"), "a.docx", "corrupt_document", "cannot be read as DOCX"),
        (made.xlsx({"One": [["a"]]}).replace(b"xl/workbook", b"xl/workbxxx"), "a.xlsx", "corrupt_document", "KeyError"),
        (made.docx_of_many_laughs(), "a.docx", "corrupt_document", "amplification"),
        (b"x" * (16 * 1024**2 + 1), "a.txt", "too_much_text", "4,194,304 bytes of STOKER_DOCUMENTS__TEXT_BYTES"),
        (b"", "a.txt", "empty_document", "0 bytes"),
        (made.PNG, "a.pdf", "unsupported_document", "a PNG image"),
    ],
)
def test_a_bad_document_ends_with_its_name_its_cause_and_a_remedy(
    converter: Converter, content: bytes, name: str, code: str, said: str
) -> None:
    found, message = refusal(converter, content, name)
    assert found == code
    assert message.startswith(name)
    assert said in message
    assert ";" in message or ":" in message


def test_an_archive_of_a_gigabyte_is_not_unpacked(converter: Converter) -> None:
    content = made.docx_bomb()
    assert len(content) < 10_000_000
    code, message = refusal(converter, content, "a.docx")
    assert code == "archive_bomb"
    assert re.search(r"becomes 1,073,74\d,\d{3} bytes", message)


def test_a_file_too_large_is_refused_by_its_size_alone(tmp_path: Path) -> None:
    path = made.sparse_file(tmp_path / "large.pdf", 500 * 1024**2)
    with pytest.raises(Permanent, match=r"large.pdf has 524,288,000 bytes, more than the 67,108,864") as refused:
        check_size(path.stat().st_size, path.name, DocumentSettings())
    assert refused.value.code == "too_large"
    assert "STOKER_DOCUMENTS__FILE_BYTES" in str(refused.value)
    assert refusal(Converter(DocumentSettings(file_bytes=10)), b"x" * 11, "a.txt")[0] == "too_large"


def test_a_slow_document_ends_in_time_and_its_process_with_it() -> None:
    mark = new_mark()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MARK, mark)
        with Converter(DocumentSettings(convert_s=1)) as converter:
            code, message = refusal(converter, made.slow_pdf(), "slow.pdf")
            wait_until(lambda: len(marked(mark)) == 1, 5, "only the process that forks is left")
    assert (code, "1 s of STOKER_DOCUMENTS__CONVERT_S" in message) == ("conversion_timeout", True)
    assert not marked(mark)


def test_a_document_that_takes_too_much_memory_ends_alone() -> None:
    with Converter(DocumentSettings(convert_memory_bytes=350 * 1024**2)) as converter:
        code, message = refusal(converter, made.wide_xlsx(), "wide.xlsx")
        assert converter.convert(b"still here", "a.txt").markdown == "still here"
    assert code == "conversion_memory"
    assert "STOKER_DOCUMENTS__CONVERT_MEMORY_BYTES" in message


def test_documents_are_converted_at_the_same_time(converter: Converter) -> None:
    def convert(number: int) -> str:
        return converter.convert(made.docx(f"Number {number}"), f"{number}.docx").markdown

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(convert, range(24))) == [f"Number {number}" for number in range(24)]


def test_a_name_of_any_bytes_is_shown_as_text(converter: Converter) -> None:
    code, message = refusal(converter, b" ", os.fsdecode(b"a\0\xff\n.txt"))
    assert (code, message.startswith("a???.txt holds no text")) == ("no_text", True)


def test_a_large_document_passes_both_ways(converter: Converter) -> None:
    text = "".join(f"Line {number} of a long text\n" for number in range(120_000))
    assert converter.convert(text.encode(), "a.txt").markdown == text.strip()


def test_nothing_is_left_when_the_process_that_converts_is_killed() -> None:
    mark = new_mark()
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW], cwd=REPOSITORY, env={**clean_environment(), MARK: mark}, stdin=subprocess.PIPE
    )
    try:
        assert process.stdin is not None
        with process.stdin:
            process.stdin.write(made.slow_pdf())
        wait_until(lambda: readers_of(mark), 30, "a reader runs")
        births = {seen.pid: seen.birth for seen in marked(mark)}
        assert len(births) == 3
        process.kill()
        process.wait()
        wait_until(lambda: all(birth_of(pid) != birth for pid, birth in births.items()), 5, "nothing is left")
        assert not marked(mark)
    finally:
        kill_marked(mark)


def test_the_process_that_forks_may_die_and_is_started_again() -> None:
    mark = new_mark()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MARK, mark)
        with Converter(DocumentSettings()) as converter, ThreadPoolExecutor(1) as thread:
            (server,) = [process.pid for process in marked(mark)]
            slow = thread.submit(converter.convert, made.slow_pdf(), "slow.pdf")
            wait_until(lambda: len(marked(mark)) == 2, 5, "a reader runs")
            os.kill(server, signal.SIGKILL)
            with pytest.raises(Transient, match=r"slow.pdf; try again"):
                slow.result()
            assert converter.convert(b"again", "a.txt").markdown == "again"
    assert not marked(mark)


def test_a_reader_has_no_network_of_its_own_and_no_settings() -> None:
    mark = new_mark()
    is_left = may_leave_network()
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(1) as thread:
        patch.setenv(MARK, mark)
        patch.setenv("STOKER_POSTGRES__URL", "postgresql://user:secret@host/name")
        with Converter(DocumentSettings()) as converter:
            slow = thread.submit(converter.convert, made.slow_pdf(), "slow.pdf")
            wait_until(lambda: len(marked(mark)) == 2, 5, "a reader runs")
            for process in marked(mark):
                assert network_of(process.pid) != network_of("self") or not is_left
                assert b"secret" not in Path(f"/proc/{process.pid}/environ").read_bytes()
        with pytest.raises(Transient):
            slow.result()


def test_a_document_reaches_no_server_and_no_file(
    converter: Converter, listener: socket.socket, tmp_path: Path
) -> None:
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/picture.png"
    secret = tmp_path / "secret"
    secret.write_text("the secret")
    assert converter.convert(made.docx_with_linked_picture(url), "a.docx").markdown.startswith("before")
    html = f'<html><body>text<img src="{url}"><link href="{url}"><iframe src="{url}"></iframe></body></html>'
    assert converter.convert(html.encode(), "a.html").markdown.startswith("text")
    with pytest.raises(BlockingIOError):
        listener.accept()
    try:
        assert "the secret" not in converter.convert(made.docx_that_reads(secret), "a.docx").markdown
    except Permanent as error:
        assert "the secret" not in str(error)


CONNECTING = "import socket; socket.create_connection(('127.0.0.1', {port}), 5).close()"


def attempt(deed: str, *, after: str) -> subprocess.CompletedProcess[str]:
    """A process that gives up what `after` says and then tries the deed."""
    script = f"from documents.confinement import confine, leave_network\n{after}\n{deed}\nprint('done')"
    return subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=30, check=False
    )


def network_of(pid: int | str) -> str:
    return str(Path(f"/proc/{pid}/ns/net").readlink())


def may_leave_network() -> bool:
    deed = "import pathlib; print(pathlib.Path('/proc/self/ns/net').readlink())"
    return network_of("self") not in attempt(deed, after="leave_network()").stdout


def test_without_a_network_a_live_server_cannot_be_reached(listener: socket.socket) -> None:
    if not may_leave_network():
        pytest.skip("this machine allows no network namespaces")
    deed = CONNECTING.format(port=listener.getsockname()[1])
    assert attempt(deed, after="").stdout == "done\n"
    assert f"Errno {errno.ENETUNREACH}" in attempt(deed, after="leave_network()").stderr


@pytest.mark.parametrize(
    "deed",
    [
        CONNECTING.format(port="{port}"),
        "import socket; socket.getaddrinfo('localhost', 80)",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}/')",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
        "import os; os.fork()",
        "import os; os.execv('/bin/true', ['true'])",
        "import os; os.posix_spawn('/bin/true', ['true'], {{}})",
        "import os; os.kill(os.getppid(), 9)",
        "import os; os.remove('{file}')",
        "import ctypes; ctypes.CDLL(None)",
        "open('{file}', 'w')",
        "open('{file}')",
        "open('/etc/passwd')",
        "import pathlib, sysconfig; open(pathlib.Path(sysconfig.get_path('purelib'), 'new.py'), 'w')",
    ],
)
def test_a_confined_process_may_do_nothing_but_read_libraries(
    deed: str, listener: socket.socket, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    deed = deed.format(port=listener.getsockname()[1], file=file)
    tried = attempt(deed, after="confine(memory_bytes=1 << 30, cpu_s=30)")
    assert "PermissionError: a document's reader may not" in tried.stderr
    assert (tried.stdout, file.read_text()) == ("", "kept")


def test_a_confined_process_imports_and_ends_at_its_limit_of_processor_time() -> None:
    confined = "confine(memory_bytes=1 << 30, cpu_s={})"
    assert attempt("import colorsys", after=confined.format(30)).stdout == "done\n"
    assert attempt("while True: pass", after=confined.format(1)).returncode == -signal.SIGXCPU
    assert "MemoryError" in attempt("bytearray(1 << 31)", after=confined.format(30)).stderr


def test_a_converter_may_be_entered_by_a_thread_that_ends() -> None:
    converter = Converter(DocumentSettings())
    entering = threading.Thread(target=converter.__enter__)
    entering.start()
    entering.join()
    with converter:
        assert converter.convert(b"text", "a.txt").markdown == "text"
