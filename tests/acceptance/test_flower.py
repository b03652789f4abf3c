"""Flower as a process of its own beside a real worker with a batch running, in headless Chromium."""

from __future__ import annotations

import base64
import http.client
import json
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from store.rate_limits import WRONG_KEYS_PER_MINUTE
from tests.acceptance.chats import prompts, write_chats
from tests.support.own_services import free_port
from tests.support.processes import Command, WorkerProcess, stoker
from tests.support.waiting import wait_until

CHROMIUM = shutil.which("chromium")
PASSWORD = "let me in"
READY_S = 60.0
LONG_MS = 20_000
JOBS = 6400  # more than the test waits for: 80 s at 16 in flight of 0.2 s

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: `python -m tests.support.packages chromium`")


def login(user: str = "stoker", password: str = PASSWORD) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


def test_flower_shows_workers_and_readable_tasks_to_who_has_the_password(env: dict[str, str], tmp_path: Path) -> None:
    write_chats(tmp_path / "in.jsonl", prompts(JOBS))
    port = free_port()
    env |= {
        "STOKER_FLOWER__PORT": str(port),
        "STOKER_FLOWER__PASSWORD": PASSWORD,
        "STOKER_WORKER__YIELD_S": "1",  # tasks end while the batch runs
    }
    with Command("flower", env=env) as flower, WorkerProcess("one", env=env, folder=tmp_path) as worker:
        wait_until(lambda: _answers(port), READY_S, "Flower answers")
        batch = stoker("submit", tmp_path / "in.jsonl", env=env).stdout.strip()
        with browser_page() as page:
            page.goto(f"http://127.0.0.1:{port}/tasks")
            expect(page.get_by_role("row").filter(has_text="STARTED").first).to_be_visible()
            row = page.get_by_role("row").filter(has_text="SUCCESS").first
            expect(row).to_contain_text("stoker.run_shard")
            expect(row).to_contain_text(re.compile(rf"shard \d+ of {batch[:18]}"))
            expect(row).to_contain_text(re.compile(r"shards: \d+, jobs: \d+, [\d.]+ jobs/s"))
            expect(row).to_contain_text(worker.name)
            page.goto(f"http://127.0.0.1:{port}/workers")
            expect(page.get_by_role("row").filter(has_text=worker.name)).to_contain_text("Online")
            page.goto(f"http://127.0.0.1:{port}/broker")
            expect(page.get_by_role("row").filter(has_text="generation")).to_be_visible()
        _expect_closed_doors(port)
        _expect_no_harm(port)
        _expect_no_guessing(port)
        flower.process.send_signal(signal.SIGTERM)
        ended = flower.wait(10)
    assert ended.returncode == 0
    assert PASSWORD not in ended.stderr and "Traceback" not in ended.stderr


@contextmanager
def browser_page() -> Iterator[Page]:
    """A page whose browser knows the password."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        known = browser.new_context(
            viewport={"width": 1440, "height": 560}, http_credentials={"username": "stoker", "password": PASSWORD}
        )
        page = known.new_page()
        page.set_default_timeout(LONG_MS)
        expect.set_options(timeout=LONG_MS)
        yield page
        browser.close()


def _expect_closed_doors(port: int) -> None:
    for path in ("/", "/tasks", "/metrics", "/api/workers", "/login", "/no/such/page", "/static/css/flower.css"):
        for wrong in ({}, login(password="another"), login(password="né"), {"Authorization": "Basic x"}):
            status, headers, _ = _asked(port, path, **wrong)
            assert (status, headers["WWW-Authenticate"].split()[0]) == (401, "Basic"), path
    assert _asked(port, "/metrics", **login())[0] == 404
    assert _asked(port, "/api/worker/shutdown/one", method="POST")[0] == 401
    elsewhere = login() | {"Sec-Fetch-Site": "cross-site"}
    assert _asked(port, "/api/worker/shutdown/one", method="POST", **elsewhere)[0] == 403
    status, headers, body = _asked(port, "/api/queues/length", **login())
    assert (status, headers["X-Frame-Options"]) == (200, "DENY")
    assert {queue["name"] for queue in json.loads(body)["active_queues"]} == {"generation", "stoker.dead"}
    assert _asked(port, "/healthcheck")[0] == 200


def _expect_no_guessing(port: int) -> None:
    guessing = "127.0.0.2"
    wrong = [_asked(port, "/api/workers", address=guessing, **login(password=f"guess {n}"))[0] for n in range(40)]
    assert set(wrong[:WRONG_KEYS_PER_MINUTE]) == {401} and wrong[-1] == 429
    status, headers, _ = _asked(port, "/api/workers", address=guessing, **login())
    assert status == 429 and int(headers["Retry-After"]) >= 1, "that it would have been right is not said"
    assert _asked(port, "/api/workers", address=guessing)[0] == 401, "whoever shows none is asked for one"
    assert _asked(port, "/api/workers", **login())[0] == 200, "another address"


def _expect_no_harm(port: int) -> None:
    for path in (
        *(
            f"/api/task/{what}/stoker.run_shard"
            for what in ("timeout", "rate-limit", "apply", "async-apply", "send-task")
        ),
        *(f"/api/worker/queue/{what}-consumer/one" for what in ("add", "cancel")),
        "/api/task/abort/1-a",
        "/api/task/revoke/1-a?terminate=true",
    ):
        status, _, body = _asked(port, path, method="POST", **login())
        assert (status, b"stoker cancel" in body) == (403, True), path
    assert _asked(port, "/api/task/revoke/1-a", method="POST", **login())[0] == 200
    assert _asked(port, "/api/worker/pool/grow/none", method="POST", **login())[0] == 404, "of Flower: no such worker"


def _asked(
    port: int, path: str, *, method: str = "GET", address: str = "127.0.0.1", **headers: str
) -> tuple[int, http.client.HTTPMessage, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10, source_address=(address, 0))
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def _answers(port: int) -> bool:
    try:
        return _asked(port, "/healthcheck")[0] == 200
    except OSError:
        return False
