"""The page in headless Chromium, at a desktop's and a phone's width, over a real gateway with real rows."""

from __future__ import annotations

import json
import re
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
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, Request, expect, sync_playwright
from starlette.testclient import TestClient

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
# Texts whose contrast to what lies behind them is below WCAG AA: 4.5, large ones 3.
FAINT = """() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgb = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (colour) => colour.slice(0, 3).map((one) => one / 255)
    .map((one) => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4)
    .reduce((sum, one, place) => sum + one * [0.2126, 0.7152, 0.0722][place], 0);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const colour = rgb(getComputedStyle(node).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255];
  };
  const isText = (node) => [...node.childNodes].some((one) => one.nodeType === 3 && one.data.trim());
  return [...document.querySelectorAll('body *')]
    .filter((node) => isText(node) && node.checkVisibility() && !node.disabled).filter((node) => {
      const style = getComputedStyle(node);
      const [a, b] = [light(rgb(style.color)), light(behind(node))];
      const isLarge = parseFloat(style.fontSize) >= 18.66 && style.fontWeight >= 600;
      return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) < (isLarge ? 3 : 4.5);
    }).map((node) => `${node.tagName}.${node.className}: ${node.textContent.slice(0, 40)}`);
}"""
VIEWS = ("batches", "workers", "cache", "budgets", "webhooks")

pytestmark = pytest.mark.skipif(
    CHROMIUM is None,
    reason="no chromium: `python -m tests.support.packages chromium` as root, or your system's package",
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
    keys: dict[str, str] = field(repr=False)


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
        yield House(url, gateway, running(gateway, folder), ended(gateway, folder), refused(gateway, folder), keys)


@contextmanager
def served(gateway: Gateway) -> Iterator[str]:
    port = free_port()
    server = uvicorn.Server(
        uvicorn.Config(create_app(gateway), port=port, log_config=None, timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started, 30, "the gateway serves")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def key(
    gateway: Gateway, name: str, scopes: set[Scope], *, tenant: str = "local", day_tokens: int | None = None
) -> str:
    with gateway.database.transaction() as session:
        return issue_key(session, tenant=tenant, name=name, scopes=scopes, day_tokens=day_tokens).key.text


def running(gateway: Gateway, folder: Path) -> UUID:
    prompts = ("question 0", HOSTILE, "question 2", "question 3")
    batch_id = store_batch(gateway.database, folder, [chat(prompt) for prompt in prompts])
    execute(gateway.database, "UPDATE jobs SET custom_id = :text WHERE batch_id = :id AND seq = 1", text=HOSTILE,
            id=batch_id)  # fmt: skip
    name(gateway, batch_id, f"{HOSTILE}.jsonl")
    taken = claimed(gateway.database, dispatch_all(gateway.database)[0])
    results = [
        answer(0, "the first answer"),
        answer(1, HOSTILE),
        failed(2, code="timeout", message="no answer in time"),
    ]
    with gateway.database.transaction() as session:
        open_batch_budget(session, batch_id, 1_000)
        assert write_results(session, taken, results, engine_id=None, lease_s=LEASE_S) == 3
    return batch_id


def ended(gateway: Gateway, folder: Path, called: str = "yesterday.jsonl") -> UUID:
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
    name(gateway, batch_id, called)
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
    expect.set_options(timeout=LONG_MS)
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@contextmanager
def opened(
    browser: Browser, house: House, who: str | None = "all", size: tuple[int, int] = DESKTOP, **options: Any
) -> Iterator[Page]:
    """A page that is logged in; it may neither ask another host, nor complain, nor run what is text.

    That an answer was a refusal the browser says itself.
    """
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **options)
    context.set_default_timeout(LONG_MS)
    faults: list[str] = []

    def asked(request: Request) -> None:
        if not request.url.startswith((house.url, "blob:")):
            faults.append(f"asks {request.url}")

    def told(message: ConsoleMessage) -> None:
        is_refusal = message.text.startswith("Failed to load resource: the server responded")
        if message.type in ("error", "warning") and not is_refusal:
            faults.append(message.text)

    context.on("request", asked)
    context.on("console", told)
    context.on("weberror", lambda error: faults.append(str(error.error)))
    if who is not None:
        keep = f"sessionStorage.setItem('stoker.key', '{house.keys[who]}')"
        context.add_init_script(f"if (location.protocol === 'http:') {keep}")
    page = context.new_page()
    page.goto(house.url)
    expect(page.get_by_role("heading", level=1)).to_have_text("Log in" if who is None else "Batches")
    yield page
    assert page.title() != "owned"
    assert not faults
    context.close()


def log_in(page: Page, text: str) -> None:
    page.get_by_label("Key", exact=True).fill(text)
    page.get_by_role("button", name="Log in").click()


def go(page: Page, path: str) -> None:
    page.evaluate("path => { location.hash = `#/${path}`; }", path)


def row(page: Page, text: str) -> Locator:
    return page.get_by_role("row").filter(has_text=text)


def test_nobody_sees_anything_without_a_right_key(browser: Browser, house: House) -> None:
    with opened(browser, house, who=None) as page:
        log_in(page, "sk-stoker-wrong")
        expect(page.get_by_role("alert")).to_contain_text("no right key")
        log_in(page, house.keys["all"])
        expect(row(page, "yesterday.jsonl")).to_be_visible()
        page.reload()
        expect(row(page, "yesterday.jsonl")).to_be_visible()
        page.get_by_role("button", name="Log out").click()
        expect(page.get_by_label("Key", exact=True)).to_be_visible()
        assert page.evaluate("sessionStorage.length") == 0


def test_another_tenant_is_told_what_to_do_first(browser: Browser, house: House) -> None:
    with opened(browser, house, "other", PHONE) as page:
        for path, words in {
            "batches": "-F purpose=batch",
            "workers": "stoker worker",
            "cache": "--cache semantic",
            "budgets": "stoker keys create",
            "webhooks": '"webhook": {"url"',
        }.items():
            go(page, path)
            expect(page.get_by_role("main")).to_contain_text(words)
        go(page, f"batches/{batch_name(house.batch)}")
        expect(page.get_by_role("alert")).to_contain_text("no batch")


def test_progress_follows_the_rows_without_a_reload(browser: Browser, house: House) -> None:
    shard = "UPDATE shards SET {} WHERE batch_id = :id"
    with opened(browser, house) as page:
        line = row(page, "onerror")
        expect(line).to_contain_text("3 of 4")
        bar = line.get_by_role("progressbar")
        expect(bar).to_have_attribute("aria-valuetext", "3 of 4 jobs done: 2 answered by an engine, 1 failed")
        page.get_by_role("link", name="yesterday.jsonl").focus()
        execute(house.gateway.database, shard.format("done = 4, truncated = 1, served = 1"), id=house.batch)
        expect(line).to_contain_text("4 of 4")
        expect(line).to_contain_text("1 truncated")
        expect(bar).to_have_attribute("aria-valuenow", "100")
        assert page.evaluate("document.activeElement.textContent") == "yesterday.jsonl", "the focus stays"
    execute(house.gateway.database, shard.format("done = 3, truncated = 0, served = 0"), id=house.batch)


def test_one_batch_shows_its_errors_jobs_and_budget_and_hostile_texts_stay_texts(
    browser: Browser, house: House
) -> None:
    with opened(browser, house) as page:
        page.get_by_role("link", name="onerror").click()
        expect(page.get_by_role("heading", level=1)).to_have_text(f"{HOSTILE}.jsonl")
        main = page.get_by_role("main")
        expect(main.get_by_role("img", name="3 results from")).to_be_visible()
        expect(page.get_by_role("table", name="Errors by kind")).to_contain_text("no answer in time")
        expect(page.get_by_role("table", name="Budgets")).to_contain_text("1,000")
        jobs = page.get_by_role("table", name="Jobs", exact=True).get_by_role("row")
        expect(jobs).to_have_count(5)
        page.get_by_role("button", name="failed 1").click()
        expect(jobs).to_have_count(2)
        page.get_by_role("button", name="all 4").click()
        page.get_by_role("link", name="onerror").click()
        expect(page.get_by_role("heading", level=1)).to_have_text(HOSTILE)
        for part in ("Prompt", "Answer"):
            heading = page.get_by_role("heading", name=part, exact=True)
            expect(main.locator("section").filter(has=heading)).to_contain_text(HOSTILE)
        assert page.evaluate("document.querySelectorAll('main img, main script').length") == 0
        page.get_by_role("link", name="Line after").click()
        expect(main).to_contain_text("no answer in time")
        page.get_by_role("link", name="Line after").click()
        expect(main).to_contain_text("It has not run yet")
        go(page, f"batches/{batch_name(house.refused)}")
        refusals = page.get_by_role("table", name="What is wrong with the file")
        expect(refusals).to_contain_text("12")
        expect(refusals).to_contain_text("no JSON object")


def test_results_are_downloaded_with_the_key_under_a_harmless_name(browser: Browser, house: House) -> None:
    with opened(browser, house) as page:
        go(page, f"batches/{batch_name(house.batch)}")
        with page.expect_download() as download:
            page.get_by_role("button", name="Results").click()
        assert re.fullmatch(r"[\w.-]+\.out\.jsonl", download.value.suggested_filename)
        lines = [json.loads(line) for line in download.value.path().read_text().splitlines()]
        assert [line["custom_id"] for line in lines] == ["id-0", HOSTILE]


def test_cancel_resume_and_retry_ask_and_then_do_it(browser: Browser, house: House, tmp_path: Path) -> None:
    database = house.gateway.database
    partly = ended(house.gateway, tmp_path, "partly.jsonl")
    mine = store_batch(database, tmp_path, [chat("to be cancelled")])
    name(house.gateway, mine, "mistake.jsonl")
    execute(database, "UPDATE batches SET paused_reason = 'all failed' WHERE id = :id", id=mine)
    with opened(browser, house, size=PHONE) as page:
        line = row(page, "mistake.jsonl")
        expect(line).to_contain_text("all failed")
        line.get_by_role("button", name="Resume").click()
        page.get_by_role("dialog").get_by_role("button", name="Resume the batch").click()
        expect(line).to_contain_text("in progress")
        assert batch_row(database, mine)["paused_reason"] is None
        line.get_by_role("button", name="Cancel").click()
        page.keyboard.press("Escape")
        line.get_by_role("button", name="Cancel").click()
        assert batch_row(database, mine)["state"] == "in_progress"
        page.get_by_role("dialog").get_by_role("button", name="Cancel the batch").click()
        expect(line).to_contain_text("cancelling")
        assert batch_row(database, mine)["state"] == "cancelling"
        row(page, "partly.jsonl").get_by_role("button", name="Retry").click()
        page.get_by_role("dialog").get_by_role("button", name="Make the batch").click()
        expect(page.get_by_role("main")).to_contain_text(f"Retries{batch_name(partly)}")
        assert rows(database, "SELECT total FROM batches WHERE retry_of = :id", id=partly) == [(1,)]


def test_only_an_admin_sees_workers_and_a_reader_can_do_nothing(browser: Browser, house: House) -> None:
    with opened(browser, house, "reader") as page:
        expect(row(page, "onerror").get_by_role("button", name="Cancel")).to_be_disabled()
        go(page, "workers")
        expect(page.get_by_role("alert")).to_contain_text("only a key with the scope admin sees them")
    readings = {"running": 3, "waiting": 1, "tokens_per_s": 812.0, "kv_use": 0.25}
    house.gateway.board.announce(
        WorkerPresence(name="gpu-1", children=2, models=["m"], engine="vllm", healthy=False, **readings)
    )
    with opened(browser, house) as page:
        go(page, "workers")
        line = row(page, "gpu-1")
        for words in ("unhealthy", "812/s", "25%", "no GPU"):
            expect(line).to_contain_text(words)
        expect(line.get_by_role("meter", name="KV cache in use")).to_have_attribute("aria-valuenow", "25")
    house.gateway.board.withdraw("gpu-1")


def test_a_key_that_ends_is_asked_for_again_and_a_silent_gateway_is_told(browser: Browser, house: House) -> None:
    late = key(house.gateway, "late", set(Scope))
    yesterday = f"batches/{batch_name(house.ended)}"
    with opened(browser, house, who=None) as page:
        log_in(page, late)
        expect(row(page, "yesterday.jsonl")).to_be_visible()
        away: Any = {"status": 503, "headers": {"Retry-After": "1"}, "json": {"error": {"message": "away"}}}
        page.route("**/v1/**", lambda route: route.fulfill(**away))
        expect(page.get_by_role("status")).to_contain_text("The gateway does not answer, trying again")
        page.unroute("**/v1/**")
        expect(page.get_by_role("status")).to_be_hidden()
        go(page, yesterday)
        expect(page.get_by_role("heading", level=1)).to_have_text("yesterday.jsonl")
        execute(house.gateway.database, "UPDATE api_keys SET revoked_at = now() WHERE name = 'late'")
        page.get_by_role("button", name="failed 1").click()
        expect(page.get_by_role("alert")).to_contain_text("The key no longer works")
        log_in(page, house.keys["all"])
        expect(page.get_by_role("heading", level=1)).to_have_text("yesterday.jsonl")
        expect(page.get_by_role("button", name="failed 1")).to_have_attribute("aria-pressed", "true")


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_every_view_fits_and_is_readable_in_both_themes(browser: Browser, house: House, size: tuple[int, int]) -> None:
    batch = f"batches/{batch_name(house.batch)}"
    with opened(browser, house, size=size, reduced_motion="reduce") as page:
        for path in (*VIEWS, batch, f"{batch}/jobs/2", f"batches/{batch_name(house.refused)}"):
            go(page, path)
            page.locator(".view > :nth-child(2)").wait_for()
            assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth"), f"{path} scrolls sideways"
            for scheme in ("dark", "light"):
                page.emulate_media(color_scheme=scheme)
                assert page.evaluate(FAINT) == [], f"{path} has texts of too little contrast when {scheme}"


def test_a_chosen_theme_is_kept(browser: Browser, house: House) -> None:
    theme = "getComputedStyle(document.documentElement).colorScheme"
    with opened(browser, house, who=None, color_scheme="light") as page:
        log_in(page, house.keys["all"])
        page.get_by_role("button", name="Change to the dark theme").click()
        assert page.evaluate(theme) == "dark"
        page.reload()
        page.get_by_role("button", name="Change to the light theme").click()
        assert page.evaluate(theme) == "light dark" and page.evaluate("localStorage.length") == 0


def test_the_page_may_run_and_ask_nothing_but_its_own_gateway(house: House) -> None:
    client = TestClient(create_app(house.gateway))
    answered = client.get("/")
    policy = answered.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy
    assert (answered.headers["x-content-type-options"], answered.headers["cache-control"]) == ("nosniff", "no-cache")
    assert client.get("/", headers={"If-None-Match": answered.headers["etag"]}).status_code == 304
    assert client.get("/page/..%2fpage.py").status_code == 404
    for name in re.findall(r'(?:src|href)="(page/[^"]+)"', answered.text):
        assert client.get(f"/{name}").status_code == 200, name
