"""Documents from real servers on the loopback, and all the ways that must not lead there."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Address, ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import trustme

from documents.fetch import Address, Fetched, fetch, is_public
from runtime.errors import Permanent, Transient

LOOPBACK = IPv4Address("127.0.0.1")
DRIP_S = 0.05


class Site(BaseHTTPRequestHandler):
    """What the tests fetch; each path is a behaviour."""

    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.seen.append(self.path)
        path = urlsplit(self.path).path
        if path.startswith("/to/"):
            self._answer(302, b"", {"Location": self.path.removeprefix("/to/")})
        elif path.startswith("/status/"):
            self._answer(int(path.rpartition("/")[2]), b"no", {"Retry-After": "7"})
        elif path == "/again":
            self._answer(302, b"", {"Location": "/again"})
        elif path == "/endless":
            self._endless()
        elif path == "/drip":
            self._drip()
        elif path == "/cut":
            self._answer(200, b"half", {"Content-Length": "100"})
        elif path == "/gzip":
            self._answer(200, b"x", {"Content-Encoding": "gzip"})
        else:
            self._answer(200, b"content", self.server.headers)

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def _endless(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            while True:
                self.wfile.write(b"1000\r\n" + bytes(4096) + b"\r\n")
        except OSError:
            self.close_connection = True

    def _drip(self) -> None:
        """A head that never ends, a byte at a time."""
        try:
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
            while not self.server.is_over.wait(DRIP_S):
                self.wfile.write(b"x")
        except OSError:
            self.close_connection = True


class Server(ThreadingHTTPServer):
    """A site, what it was asked for, and what it adds to its answers."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Site)
        self.seen: list[str] = []
        self.headers: dict[str, str] = {}
        self.is_over = threading.Event()

    def url(self, path: str = "/", host: str = "127.0.0.1", scheme: str = "http") -> str:
        return f"{scheme}://{host}:{self.server_port}{path}"


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    thread = threading.Thread(target=server.serve_forever, args=[0.01])
    thread.start()
    try:
        yield server
    finally:
        server.is_over.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(Server()) as started:
        yield started


def is_loopback(address: Address) -> bool:
    return address == LOOPBACK


def fetched(url: str, *, most_bytes: int = 1000, timeout_s: float = 5) -> Fetched:
    return fetch(url, most_bytes=most_bytes, timeout_s=timeout_s, is_allowed=is_loopback)


def refusal(url: str, **limits: Any) -> tuple[str, str]:
    with pytest.raises(Permanent) as refused:
        fetched(url, **limits)
    return refused.value.code, str(refused.value)


def test_a_document_comes_with_its_name_and_its_final_address(server: Server) -> None:
    assert fetched(server.url("/to//folder/a%20b.pdf?x=1")) == Fetched(
        b"content", "a b.pdf", server.url("/folder/a%20b.pdf?x=1")
    )
    assert server.seen == ["/to//folder/a%20b.pdf?x=1", "/folder/a%20b.pdf?x=1"]


def test_a_path_in_any_letters_is_asked_for_as_it_must_be(server: Server) -> None:
    assert fetched(server.url("/Grüße und mehr.txt?q=ä")).name == "Grüße und mehr.txt"
    assert server.seen == ["/Gr%C3%BC%C3%9Fe%20und%20mehr.txt?q=%C3%A4"]


@pytest.mark.parametrize(
    ("path", "headers", "name"),
    [
        ("/download", {"Content-Disposition": 'attachment; filename="report.docx"'}, "report.docx"),
        ("/download", {"Content-Disposition": "attachment; filename*=UTF-8''Gr%C3%BC%C3%9Fe.pdf"}, "Grüße.pdf"),
        ("/download", {"Content-Disposition": 'attachment; filename="../../etc/passwd.txt"'}, "passwd.txt"),
        ("/download", {"Content-Disposition": 'attachment; filename="C:\\\\a\\\\b.txt"'}, "b.txt"),
        ("/download", {"Content-Type": "application/pdf"}, "download.pdf"),
        ("/page", {"Content-Type": "text/html; charset=utf-8"}, "page.html"),
        ("/download", {"Content-Type": "application/octet-stream"}, "download"),
        ("/", {}, "document"),
    ],
)
def test_the_name_is_what_the_server_or_the_path_says(
    server: Server, path: str, headers: dict[str, str], name: str
) -> None:
    server.headers = headers
    assert fetched(server.url(path)).name == name


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "127.1",
        "0.0.0.0",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[64:ff9b::127.0.0.1]",
        "[2002:7f00:1::]",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.0.1",
        "100.64.0.1",
        "169.254.169.254",
        "168.63.129.16",
        "224.0.0.1",
        "[fe80::1]",
        "[fd00:ec2::254]",
    ],
)
def test_no_spelling_of_an_address_within_is_connected_to(server: Server, host: str) -> None:
    with pytest.raises(Permanent) as refused:
        fetch(server.url("/secret", host), most_bytes=1000, timeout_s=5)
    assert refused.value.code == "private_address"
    assert "no public address; send the file itself" in str(refused.value)
    assert server.seen == []


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8"])
def test_public_addresses_are_public(address: str) -> None:
    assert is_public(ip_address(address))


@pytest.mark.parametrize("goal", ["http://169.254.169.254/latest", "http://127.0.0.2/", "//10.0.0.1/", "http://[::1]/"])
def test_a_redirect_from_an_allowed_host_to_a_private_one_is_refused(server: Server, goal: str) -> None:
    assert refusal(server.url(f"/to/{goal}"))[0] == "private_address"


def test_a_name_with_a_public_and_a_private_address_is_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def both(*_: object, **__: object) -> list[Any]:
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, server.server_port)) for host in ("8.8.8.8", "127.0.0.1")
        ]

    monkeypatch.setattr(socket, "getaddrinfo", both)
    with pytest.raises(Permanent, match=r"127\.0\.0\.1, which is no public address"):
        fetch(server.url(host="both.test"), most_bytes=1000, timeout_s=5)
    assert server.seen == []


def test_a_name_is_resolved_once_and_that_address_is_used(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def turning(host: str, *_: object, **__: object) -> list[Any]:
        asked.append(host)
        address = "127.0.0.1" if len(asked) == 1 else "10.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, server.server_port))]

    monkeypatch.setattr(socket, "getaddrinfo", turning)
    assert fetched(server.url("/a.txt", "rebinding.test")).content == b"content"
    assert asked == ["rebinding.test"]


def test_proxies_of_the_environment_are_not_used(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("all_proxy", "http://127.0.0.1:1")
    assert fetched(server.url("/a.txt")).content == b"content"


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://host/a",
        "gopher://host/a",
        "a.pdf",
        "http://",
        "http://user:password@127.0.0.1/",
        "http://user@127.0.0.1/",
        "http://127.0.0.1:99999/",
        "http://[::1/",
        "http://a b/",
        "http://a\\@b/",
        "http://" + "a" * 70 + ".test/",
        "http://a..b/",
    ],
)
def test_what_is_no_url_of_the_web_is_refused(url: str) -> None:
    code, message = refusal(url)
    assert code == "bad_url"
    assert "password@" not in message


def test_a_redirect_to_another_scheme_is_refused(server: Server) -> None:
    assert refusal(server.url("/to/file:///etc/passwd"))[0] == "bad_url"


def test_redirects_have_an_end(server: Server) -> None:
    code, message = refusal(server.url("/again"))
    assert (code, "more than 5 redirects" in message) == ("fetch_failed", True)
    assert len(server.seen) == 6


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 204, 206])
def test_an_answer_without_the_document_is_permanent(server: Server, status: int) -> None:
    code, message = refusal(server.url(f"/status/{status}?signature=secret"))
    assert (code, f"answered {status}" in message) == ("fetch_failed", True)
    assert "secret" not in message


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_an_answer_that_may_change_is_transient_and_says_when(server: Server, status: int) -> None:
    with pytest.raises(Transient, match=f"answered {status}") as later:
        fetched(server.url(f"/status/{status}"))
    assert later.value.retry_after_s == 7


def test_a_body_larger_than_allowed_is_left(server: Server) -> None:
    assert fetched(server.url("/a"), most_bytes=7).content == b"content"
    code, message = refusal(server.url("/a"), most_bytes=6)
    assert (code, "7 bytes, more than the 6 of STOKER_DOCUMENTS__FILE_BYTES" in message) == ("too_large", True)
    assert refusal(server.url("/endless"), most_bytes=100_000)[0] == "too_large"


def test_the_time_is_that_of_the_whole_however_slowly_it_comes(server: Server) -> None:
    start = time.monotonic()
    with pytest.raises(Transient, match="STOKER_DOCUMENTS__FETCH_S"):
        fetched(server.url("/drip"), timeout_s=0.5)
    assert time.monotonic() - start < 2


def test_a_connection_that_is_cut_or_refused_is_transient(server: Server) -> None:
    with pytest.raises(Transient, match="IncompleteRead"):
        fetched(server.url("/cut"))
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(Transient, match="ConnectionRefusedError"):
        fetched(f"http://127.0.0.1:{port}/")


def test_an_encoding_that_was_not_asked_for_is_refused(server: Server) -> None:
    assert refusal(server.url("/gzip"))[0] == "fetch_failed"


def test_a_host_that_does_not_exist_is_permanent(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> list[Any]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    code, message = refusal("http://nowhere.test/a.pdf")
    assert (code, "there is no host nowhere.test" in message) == ("fetch_failed", True)


@pytest.mark.parametrize(("named", "is_right"), [("127.0.0.1", True), ("other.test", False)])
def test_tls_proves_the_name_that_the_url_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str, is_right: bool
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(named).configure_cert(context)
    server = Server()
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    with serving(server):
        url = server.url("/a.txt", scheme="https")
        if is_right:
            assert fetched(url).content == b"content"
        else:
            code, message = refusal(url)
            assert (code, "TLS failed" in message) == ("fetch_failed", True)
    assert len(server.seen) == is_right
