"""The page in headless Chromium, at a desktop's and a phone's width, over a real gateway with real rows."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import uvicorn
from playwright.sync_api import Browser, Page, expect, sync_playwright

from api.app import create_app
from api.gateway import Gateway
from api.server import open_gateway
from models.file_names import upload_name
from models.jobs import JobResult, Usage, failed
from models.names import batch_name
from models.states import Outcome, Scope
from pipeline.keys import issue_key
from runtime.clock import uuid7
from runtime.settings import GatewaySettings, PostgresSettings, RedisSettings, Settings
from store.budgets import open_batch_budget
from store.presence import WorkerPresence
from store.shards import write_results
from tests.conftest import empty_database
from tests.support.batches import LEASE_S, batch_row, chat, claimed, dispatch_all, execute, rows, store_batch
from tests.support.own_services import free_port
from tests.support.waiting import wait_until

CHROMIUM = shutil.which("chromium")
DESKTOP, PHONE = (1280, 800), (390, 844)
LONG_MS = 20_000
HOSTILE = """<img src=x onerror="document.title='owned'"><script>document.title='owned'</script>"""
VIEWS = ("batches", "workers", "cache", "budgets", "webhooks")

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium: `python -m tests.support.packages chromium` as root, or your system's package"
)


@dataclass(frozen=True, slots=True)
class House:
    """A gateway at `url` with a few batches, and keys to it."""

    url: str
    gateway: Gateway
    batch: UUID
    """Runs: two answers, one of them to a hostile line, one failure, one line that waits."""
    ended: UUID
    refused: UUID
    keys: dict[str, str]


@dataclass(slots=True)
class Watched:
    """A page, and what it must never have done."""

    page: Page
    faults: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def house(postgres_template: str, _redis_database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("page")
    with ExitStack() as stack:
        settings = Settings(
            home=folder / "home",
            postgres=PostgresSettings(url=stack.enter_context(empty_database(postgres_template))),
            redis=RedisSettings(url=_redis_database),
            gateway=GatewaySettings(),
        )
        gateway = open_gateway(settings, stack)
        url = stack.enter_context(served(gateway))
        keys = {
            "all": key(gateway, "operator", set(Scope), day_tokens=1_000_000),
            "reader": key(gateway, "reader", {Scope.READ}),
            "other": key(gateway, "other", set(Scope), tenant="other"),
        }
        gateway.board.announce(
            WorkerPresence(name="gpu-1", children=2, models=["m"], engine="vllm", healthy=False, running=3, waiting=1,
                           tokens_per_s=812.0, kv_use=0.25)
        )  # fmt: skip
        yield House(url, gateway, running(gateway, folder), ended(gateway, folder), refused(gateway, folder), keys)


@contextmanager
def served(gateway: Gateway) -> Iterator[str]:
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(create_app(gateway), port=port, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started, 30, "the gateway serves")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def key(gateway: Gateway, name: str, scopes: set[Scope], *, tenant: str = "local", **limits: int) -> str:
    with gateway.database.transaction() as session:
        return issue_key(session, tenant=tenant, name=name, scopes=scopes, **limits).key.text


def running(gateway: Gateway, folder: Path) -> UUID:
    prompts = ("question 0", HOSTILE, "question 2", "question 3")
    batch_id = store_batch(gateway.database, folder, [chat(prompt) for prompt in prompts])
    execute(gateway.database, "UPDATE jobs SET custom_id = :text WHERE batch_id = :id AND seq = 1", text=HOSTILE,
            id=batch_id)  # fmt: skip
    name(gateway, batch_id, f"{HOSTILE}.jsonl")
    taken = claimed(gateway.database, dispatch_all(gateway.database)[0])
    results = [answer(0, "the first answer"), answer(1, HOSTILE), failed(2, code="timeout", message="no answer in time")]
    with gateway.database.transaction() as session:
        open_batch_budget(session, batch_id, 1_000)
        assert write_results(session, taken, results, engine_id=None, lease_s=LEASE_S) == 3
    return batch_id


def ended(gateway: Gateway, folder: Path) -> UUID:
    batch_id = store_batch(gateway.database, folder, [chat("again 0"), chat("again 1")])
    taken = claimed(gateway.database, dispatch_all(gateway.database)[0])
    with gateway.database.transaction() as session:
        write_results(
            session,
            taken,
            [answer(0, "yes"), failed(1, code="timeout", message="late")],
            engine_id=None,
            lease_s=LEASE_S,
        )
    name(gateway, batch_id, "yesterday.jsonl")
    execute(gateway.database, "UPDATE batches SET state = 'completed', ending = 'completed', ended_at = now() "
            "WHERE id = :id", id=batch_id)  # fmt: skip
    execute(gateway.database, "INSERT INTO deliveries (tenant, batch_id, url, event) VALUES "
            "('local', :id, 'https://example.org/hook', 'batch.completed')", id=batch_id)  # fmt: skip
    return batch_id


def refused(gateway: Gateway, folder: Path) -> UUID:
    batch_id = store_batch(gateway.database, folder, [chat("never")])
    problems = [{"code": "invalid_json", "message": "no JSON object", "param": None, "line": 12}]
    name(gateway, batch_id, "refused.jsonl")
    execute(
        gateway.database,
        "UPDATE batches SET state = 'failed', ending = 'failed', ended_at = now(), input_file_id = :file, "
        "problems = CAST(:problems AS jsonb) WHERE id = :id",
        id=batch_id,
        file=upload_name(uuid7()),
        problems=json.dumps(problems),
    )
    return batch_id


def answer(seq: int, content: str) -> JobResult:
    said = {"model": "m", "choices": [{"index": 0, "message": {"role": "assistant", "content": content}}],
            "usage": {"prompt_tokens": 7, "completion_tokens": 5}}  # fmt: skip
    return JobResult(seq=seq, outcome=Outcome.SUCCEEDED, status_code=200, response=json.dumps(said), usage=Usage(7, 5))


def name(gateway: Gateway, batch_id: UUID, text: str) -> None:
    execute(gateway.database, "UPDATE batches SET input_name = :text WHERE id = :id", text=text, id=batch_id)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@contextmanager
def opened(browser: Browser, house: House, who: str | None = "all", size: tuple[int, int] = DESKTOP, **options: Any) -> Iterator[Page]:
    """A page that is logged in; it may neither ask another host, nor complain, nor run what is text."""
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **options)
    context.set_default_timeout(LONG_MS)
    faults: list[str] = []
    context.on("request", lambda request: request.url.startswith((house.url, "blob:")) or faults.append(request.url))
    context.on("console", lambda said: said.type in ("error", "warning") and faults.append(said.text))
    context.on("weberror", lambda error: faults.append(str(error.error)))
    page = context.new_page()
    page.goto(house.url)
    if who is not None:
        log_in(page, house.keys[who])
        expect(page.get_by_role("heading", level=1)).to_have_text("Batches")
    yield page
    assert page.title() != "owned"
    assert not [fault for fault in faults if "401" not in fault]
    context.close()


def log_in(page: Page, text: str) -> None:
    page.get_by_label("Key", exact=True).fill(text)
    page.get_by_role("button", name="Log in").click()


def go(page: Page, path: str) -> None:
    page.evaluate("path => { location.hash = `#/${path}`; }", path)


def row(page: Page, text: str) -> Any:
    return page.get_by_role("row").filter(has_text=text)
