"""stoker_client over a network that fails: repeated requests, broken downloads, a gateway started and gone."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import pytest
import stoker_client
from stoker_client import NoGateway, Refused, embedded
from stoker_client.gateway import Gateway, Place
from stoker_client.progress import Progress
from stoker_client.stopping import Stop, Stopped

from tests.support.own_services import free_port
from tests.support.waiting import wait_until

Act = Callable[[BaseHTTPRequestHandler], None]
KEY: Final = "sk-secret"
PYTHON: Final = sys.executable


class FailingGateway:
    """A server that does to each request what the next act says, and remembers what came."""

    def __init__(self) -> None:
        self.acts: list[Act] = []
        self.seen: list[tuple[str, str, dict[str, str], bytes]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _act(self) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                outer.seen.append((self.command, self.path, dict(self.headers), self.rfile.read(size)))
                outer.acts.pop(0)(self)

            do_GET = do_POST = do_DELETE = _act

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        self.place = Place(url=f"http://127.0.0.1:{self._server.server_address[1]}/v1", api_key=KEY)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def answer(status: int, body: Any = None, **headers: str) -> Act:
    def act(handler: BaseHTTPRequestHandler) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    return act


def refusal(status: int, code: str, **headers: str) -> Act:
    return answer(status, {"error": {"message": "as it is", "code": code, "param": None}}, **headers)


def broken(sent: bytes, *, of: int) -> Act:
    """Some bytes of more, and then nothing: the connection is gone."""

    def act(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(of))
        handler.end_headers()
        handler.wfile.write(sent)
        handler.wfile.flush()
        handler.close_connection = True

    return act


def dropped(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True


@pytest.fixture
def failing() -> Iterator[FailingGateway]:
    server = FailingGateway()
    yield server
    server.close()


@pytest.fixture
def gateway(failing: FailingGateway) -> Iterator[Gateway]:
    with Gateway(lambda: failing.place, stop=Stop(), progress=Progress(shown=False)) as made:
        yield made


def test_what_passes_is_tried_again_and_what_is_refused_is_raised_at_once(
    failing: FailingGateway, gateway: Gateway
) -> None:
    made = {"id": "batch_1"}
    failing.acts = [dropped, answer(503, b"<html>"), refusal(429, "slow", Retry_After="0.3"), answer(200, made)]
    began = time.monotonic()
    assert gateway.create({"a": 1}, key="k") == made
    assert time.monotonic() - began > 0.3, "Retry-After is obeyed"
    assert {(headers["Idempotency-Key"], body) for _, _, headers, body in failing.seen} == {("k", b'{"a":1}')}
    failing.acts = [refusal(409, "wrong_state", x_should_retry="false"), refusal(422, "key_reused")]
    for status, code in ((409, "wrong_state"), (422, "key_reused")):
        with pytest.raises(Refused, match=f"answered {status}: as it is") as raised:
            gateway.cancel("batch_1")
        assert (raised.value.status_code, raised.value.code) == (status, code)
    failing.acts = [answer(200, b"<html>a login page</html>"), answer(307, b"")]
    for message in ("its answer is no JSON; check base_url", "answered 307"):
        with pytest.raises(Refused, match=message):
            gateway.batch("batch_1")


def test_an_upload_begins_anew_and_is_whole(failing: FailingGateway, gateway: Gateway) -> None:
    failing.acts = [dropped, answer(200, {"id": "file-1"})]
    content = b'{"custom_id":"row-1"}\n' * 10_000
    assert gateway.upload(io.BytesIO(content), name="rows.jsonl") == "file-1"
    first, second = (body for *_, body in failing.seen)
    assert content in first and content in second and b'filename="rows.jsonl"' in second


def test_a_broken_download_goes_on_after_its_last_line(failing: FailingGateway, gateway: Gateway) -> None:
    lines = [
        json.dumps({"line": number, "said": "a\u2028b"}, ensure_ascii=False).encode() + b"\n" for number in range(1, 6)
    ]
    whole = b"".join(lines)
    failing.acts = [
        broken(whole[: len(lines[0]) * 2 + 9], of=len(whole)),
        refusal(503, "service_unreachable"),
        broken(lines[2], of=len(whole)),
        answer(200, b"".join(lines[3:])),
    ]
    found = list(gateway.lines("file-1", line_of=lambda line: int(line["line"])))
    assert [line["line"] for line in found] == [1, 2, 3, 4, 5] and found[0]["said"] == "a\u2028b"
    paths = [path.removeprefix("/v1/files/file-1/content") for _, path, *_ in failing.seen]
    assert paths == ["", "?after_line=2", "?after_line=2", "?after_line=3"]


def test_of_two_that_submit_the_same_at_once_both_have_one_batch(failing: FailingGateway) -> None:
    counts = {"total": 1, "completed": 0, "failed": 0}
    theirs = {"id": "batch_theirs", "status": "validating", "request_counts": counts}
    failing.acts = [
        answer(200, {"data": []}),
        answer(200, {"id": "file-ours"}),
        refusal(422, "key_reused"),
        answer(200, {"data": [theirs]}),
        answer(200, {"deleted": True}),
    ]
    place = {"base_url": failing.place.url, "api_key": KEY}
    batch = stoker_client.submit(["a"], model="m", progress=False, **place)  # type: ignore[arg-type]
    assert batch.id == "batch_theirs"
    assert [path.partition("?")[0] for _, path, *_ in failing.seen[-2:]] == ["/v1/batches", "/v1/files/file-ours"]
    cancelled = {"id": "batch_1", "status": "cancelled"}
    failing.acts = [answer(200, {"data": [cancelled]}), answer(200, {"data": [theirs]})]
    assert stoker_client.submit(["a"], model="m", progress=False, **place).id == "batch_theirs"  # type: ignore[arg-type]
    first, second = (path.rpartition("-") for _, path, *_ in failing.seen[-2:])
    assert (first[0], first[2], second[2]) == (second[0], "1", "2"), "after one that was given up comes the next number"


def test_what_validation_holds_against_a_row_is_told_of_that_row(failing: FailingGateway) -> None:
    counts = {"total": 3, "completed": 0, "failed": 0}
    found = [
        {"code": "invalid_request", "message": "is too long", "param": "body.messages", "line": 2},
        {"code": "invalid_request", "message": "12 more problems; mend these", "param": None, "line": None},
    ]
    shared = {"code": "invalid_request", "message": "must be less", "param": "body.max_tokens"}
    batch = {"id": "batch_1", "status": "failed", "request_counts": counts, "usage": {"output_tokens": 0}}
    place = {"base_url": failing.place.url, "api_key": KEY}
    for problems, expected in (
        (found, [(3, "body.messages: is too long"), (None, "12 more problems; mend these")]),
        (
            [*found, *({**shared, "line": line} for line in (1, 3))],
            [(None, "max_output_tokens: must be less"), (3, "body.messages: is too long")],
        ),
    ):
        running = batch | {"status": "validating"}
        failing.acts = [answer(200, {"data": [running]}), answer(200, batch | {"errors": {"data": problems}})]
        with pytest.raises(stoker_client.BatchFailed) as raised:
            stoker_client.run(["a", None, "b"], model="m", skip_nulls=True, progress=False, **place)  # type: ignore[arg-type]
        assert [(one.row, one.message) for one in raised.value.problems] == expected


def test_where_nothing_answers_the_remedy_is_named_and_no_key(failing: FailingGateway) -> None:
    nowhere = Place(url=f"http://127.0.0.1:{free_port()}/v1", api_key=KEY)
    assert KEY not in repr(nowhere)
    with (
        Gateway(lambda: nowhere, stop=Stop(), progress=Progress(shown=False), first_s=0.2) as silent,
        pytest.raises(NoGateway, match=r"no gateway answers at .*start one there .*`stoker up`") as raised,
    ):
        silent.models()
    assert KEY not in str(raised.value)
    failing.acts = [answer(200, {"data": []}), *[refusal(503, "service_unreachable")] * 20]
    with Gateway(lambda: failing.place, stop=Stop(), progress=Progress(shown=False), patience_s=0.3) as away:
        assert away.models() == []
        with pytest.raises(Refused, match="503: as it is"):
            away.models()


def test_who_waits_no_more_is_heard_at_once(failing: FailingGateway) -> None:
    stop = Stop()
    failing.acts = [refusal(429, "slow", Retry_After="60")]
    with Gateway(lambda: failing.place, stop=stop, progress=Progress(shown=False)) as waiting:
        threading.Timer(0.1, stop.set).start()
        began = time.monotonic()
        with pytest.raises(Stopped):
            waiting.models()
        assert time.monotonic() - began < 5


STAND_IN: Final = """#!/bin/sh
echo "$$ $*" >> "{folder}/starts"
echo '{{"url": "{url}", "key_file": "{folder}/key"}}'
cat > "{folder}/eof"
echo "$$" >> "{folder}/ends"
"""
DEAF: Final = """#!/bin/sh
trap '' TERM
echo $$ > "{folder}/pid"
echo '{{"url": "http://127.0.0.1:9/v1", "key_file": "{folder}/key"}}'
exec sleep 600
"""
STARTER: Final = """
import os, sys, time
from stoker_client import embedded
from stoker_client.progress import Progress
from stoker_client.stopping import Stop
sys.executable = sys.argv[1]
print(embedded.place(stop=Stop(), progress=Progress(shown=False)).url, flush=True)
child = os.fork()
if child:
    print(child, flush=True)
time.sleep(60)
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Writes the program `stoker` that stands beside the interpreter, as it is installed."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    for name in ("STOKER_URL", "STOKER_API_KEY"):
        monkeypatch.delenv(name, raising=False)

    def write(text: str) -> None:
        (tmp_path / "stoker").write_text(text)
        (tmp_path / "stoker").chmod(0o755)

    yield write
    embedded.end()


def test_stoker_is_started_once_and_anew_when_it_has_ended(
    failing: FailingGateway, program: Callable[[str], None], tmp_path: Path
) -> None:
    (tmp_path / "key").write_text(f"{KEY}\n")
    program(STAND_IN.format(folder=tmp_path, url=failing.place.url))
    failing.acts = [answer(200, {"data": [{"id": "one"}, {"id": "two"}]})] * 4
    starts = tmp_path / "starts"
    for _ in range(2):
        with pytest.raises(stoker_client.BadInput, match="model: there are one, two; name one of them"):
            stoker_client.run(["a"], progress=False)
    [started] = starts.read_text().splitlines()
    pid, *words = started.split()
    assert words == ["up", "--json", "--until-eof"]
    assert failing.seen[0][2]["Authorization"] == f"Bearer {KEY}"
    embedded.end()
    assert (tmp_path / "ends").read_text().split() == [pid], "it read the end of its input"
    for count in (2, 3):
        with pytest.raises(stoker_client.BadInput):
            stoker_client.run(["a"], progress=False)
        assert len(starts.read_text().splitlines()) == count
        os.kill(int(starts.read_text().split()[-4]), signal.SIGKILL)


def test_stoker_ends_with_the_process_that_started_it_however_that_dies(
    program: Callable[[str], None], tmp_path: Path
) -> None:
    (tmp_path / "key").write_text(KEY)
    program(STAND_IN.format(folder=tmp_path, url="http://127.0.0.1:9/v1"))
    with subprocess.Popen([PYTHON, "-c", STARTER, tmp_path / "python"], stdout=subprocess.PIPE) as starter:
        assert starter.stdout is not None and starter.stdout.readline() == b"http://127.0.0.1:9/v1\n"
        child = int(starter.stdout.readline())
        assert not (tmp_path / "ends").exists()
        starter.kill()
    try:
        wait_until((tmp_path / "ends").exists, 10, "it has ended, though a child that was forked lives on")
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_stoker_that_does_not_end_is_made_to(program: Callable[[str], None], tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY)
    program(DEAF.format(folder=tmp_path))
    assert embedded.place(stop=Stop(), progress=Progress(shown=False)).api_key == KEY
    pid = int((tmp_path / "pid").read_text())
    embedded.end(wait_s=0.2, terminate_s=0.2)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_stoker_that_does_not_start_is_told_with_what_it_said(program: Callable[[str], None]) -> None:
    with pytest.raises(NoGateway, match=r"no program `stoker`.*STOKER_URL.*pip install -e '\.\[demo,gateway\]'"):
        stoker_client.run(["a"], progress=False)
    program("#!/bin/sh\necho 'no checkpoint: run make demo' >&2\nexit 2\n")
    with pytest.raises(NoGateway, match=r"exit status 2\):\nno checkpoint: run make demo\nMend that"):
        stoker_client.run(["a"], progress=False)
    program("#!/bin/sh\necho 'up'\nexec cat\n")
    with pytest.raises(NoGateway, match="install versions of both that go together"):
        stoker_client.run(["a"], progress=False)
