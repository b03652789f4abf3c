"""Webhooks to a real receiver on the loopback: what OpenAI's client makes of them, and where they must not go."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.webhooks import UnwrapWebhookEvent

from models.names import batch_name
from models.states import DeliveryState
from pipeline.webhooks import CAP_S, RETRY_AFTER_CAP_S, check_url, deliver_due, event_name, secret_text
from runtime.clock import utc_now
from runtime.settings import GatewaySettings, Settings
from store.database import Database
from store.deliveries import DeliveryRow, deliveries_of, rotate_secret, webhook_secret
from tests.support.batches import execute
from tests.support.waiting import wait_until
from tests.support.webhook_receiver import Received, Receiver, ended_batch, make_due, receiving

PRIVATE = Settings.model_construct(gateway=GatewaySettings(webhook_private=True))
PUBLIC = Settings.model_construct(gateway=GatewaySettings())
TRY_S = 0.3
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as started:
        yield started


def delivery(database: Database) -> DeliveryRow:
    """The only one there is."""
    with database.transaction() as session:
        (row,) = deliveries_of(session, tenant="local")
    return row


def one_round(database: Database, settings: Settings = PRIVATE) -> DeliveryRow:
    make_due(database)
    assert deliver_due(database, settings, try_s=TRY_S) == 1
    return delivery(database)


def secret_of(database: Database, tenant: str = "local") -> str:
    with database.transaction() as session:
        return secret_text(webhook_secret(session, tenant))


def unwrapped(received: Received, secret: str) -> UnwrapWebhookEvent:
    client = openai.OpenAI(api_key="unused", webhook_secret=secret)
    return client.webhooks.unwrap(received.body, received.headers)


def most(lower: float, upper: float) -> float:
    """Instead of chance: the longest wait."""
    return upper


@pytest.mark.parametrize("state", ["completed", "failed", "expired", "cancelled"])
def test_the_official_client_verifies_and_reads_it(database: Database, receiver: Receiver, state: str) -> None:
    batch_id = ended_batch(database, receiver.url("/hook?a=b"), state=state)
    row = one_round(database)
    (received,) = receiver.received
    event = unwrapped(received, secret_of(database))
    assert event.type == f"batch.{state}"
    assert event.model_dump()["data"] == {"id": batch_name(batch_id)}
    assert (event.id, event.object, event.created_at) == (
        event_name(row.id),
        "event",
        int(row.created_at.timestamp()),
    )
    assert (received.path, received.name) == ("/hook?a=b", event_name(row.id))
    assert (row.state, row.tries, row.status_code, row.error) == ("delivered", 1, 200, None)


def test_neither_another_tenants_secret_nor_a_changed_body_verifies(database: Database, receiver: Receiver) -> None:
    ended_batch(database, receiver.url())
    one_round(database)
    (received,) = receiver.received
    forged = Received(received.path, received.headers, received.body.replace(b"completed", b"cancelled"))
    for webhook, secret in ((received, secret_of(database, "other")), (forged, secret_of(database))):
        with pytest.raises(openai.InvalidWebhookSignatureError):
            unwrapped(webhook, secret)


def test_after_a_rotation_receivers_with_either_secret_can_verify(database: Database, receiver: Receiver) -> None:
    before = secret_of(database)
    with database.transaction() as session:
        after = secret_text(rotate_secret(session, "local"))
    ended_batch(database, receiver.url())
    one_round(database)
    for secret in (before, after):
        assert unwrapped(receiver.received[0], secret).type == "batch.completed"


def test_it_is_tried_with_growing_waits_under_one_id_until_the_last_try(
    database: Database, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random, "uniform", most)
    ended_batch(database, receiver.url("/status/500"))
    waits = []
    for _ in range(7):
        row = one_round(database)
        assert (row.state, row.status_code) == ("pending", 500)
        waits.append((row.next_at - utc_now()).total_seconds())
    assert waits == pytest.approx([4, 16, 64, 256, 1024, 4096, 16384], abs=3)
    row = one_round(database)
    assert (row.state, row.tries) == (DeliveryState.FAILED, 8)
    assert row.error == f"{receiver.url('/status/500')} answered 500 what?ever"
    assert {received.name for received in receiver.received} == {event_name(row.id)}
    assert len({received.body for received in receiver.received}) == 1
    assert unwrapped(receiver.received[-1], secret_of(database)).type == "batch.completed"
    make_due(database)
    assert deliver_due(database, PRIVATE) == 0


def test_an_early_try_and_a_very_late_one_wait_within_bounds(
    database: Database, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random, "uniform", most)
    patient = Settings.model_construct(gateway=GatewaySettings(webhook_private=True, webhook_tries=9999))
    ended_batch(database, receiver.url("/status/404"))
    execute(database, "UPDATE deliveries SET tries = 5000")
    row = one_round(database, patient)
    assert (row.next_at - utc_now()).total_seconds() == pytest.approx(CAP_S, abs=3)


@pytest.mark.parametrize(
    ("wish", "wait_s"),
    [
        ("120", 120.0),
        ("999999", RETRY_AFTER_CAP_S),
        ("in 90 s", 90.0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("Fri, 31 Dec 99999999999999999999 23:59:59 GMT", 0.0),
        ("soon", 0.0),
    ],
)
def test_the_receivers_wish_is_the_least_wait_within_an_hour(
    database: Database, receiver: Receiver, wish: str, wait_s: float
) -> None:
    if wish == "in 90 s":
        wish = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    receiver.headers = {"Retry-After": wish}
    ended_batch(database, receiver.url("/status/429"))
    row = one_round(database)
    assert wait_s - 3 < (row.next_at - utc_now()).total_seconds() < wait_s + 5


@pytest.mark.parametrize(
    ("path", "state", "status", "error"),
    [
        ("/status/410", "failed", 410, "wants no more"),
        ("/status/302", "pending", 302, "redirects are not followed; give the address they lead to"),
        ("/silent", "pending", None, "not done in 0.3 s"),
    ],
)
def test_what_a_receiver_does_is_seen_in_its_delivery(
    database: Database, receiver: Receiver, path: str, state: str, status: int | None, error: str
) -> None:
    receiver.headers = {"Location": receiver.url("/elsewhere")}
    ended_batch(database, receiver.url(f"{path}"))
    row = one_round(database)
    assert (row.state, row.status_code) == (state, status)
    assert error in (row.error or "")
    assert [received.path for received in receiver.received] == [path]


def test_a_receiver_that_is_down_is_tried_later(database: Database) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    ended_batch(database, f"http://127.0.0.1:{port}/?token=secret")
    row = one_round(database)
    assert (row.state, "ConnectionRefusedError" in (row.error or "")) == ("pending", True)
    assert "secret" not in (row.error or "")


def test_a_slow_receiver_holds_no_other(database: Database, receiver: Receiver) -> None:
    for _ in range(20):
        ended_batch(database, receiver.url("/silent"), tenant="slow")
    with ThreadPoolExecutor() as pool:
        rounds = pool.submit(deliver_due, database, PRIVATE, try_s=5.0)
        wait_until(lambda: len(receiver.received) >= 4, 5.0, "slow ones are under way")
        ended_batch(database, receiver.url("/quick"))
        wait_until(lambda: delivery(database).state is DeliveryState.DELIVERED, 4.0, "the quick one's row")
        assert sum(received.path == "/silent" for received in receiver.received) == 4
        execute(database, "UPDATE deliveries SET state = 'failed' WHERE state = 'pending'")  # no more of them
        receiver.is_over.set()
        assert rounds.result() == 5


def test_two_deliverers_at_once_send_each_delivery_once(database: Database, receiver: Receiver) -> None:
    batches = [ended_batch(database, receiver.url(), tenant=f"tenant-{number % 5}") for number in range(30)]
    with ThreadPoolExecutor() as pool:
        rounds = [pool.submit(deliver_due, database, PRIVATE) for _ in range(2)]
        assert sum(one.result() for one in rounds) == 30
    assert len({received.name for received in receiver.received}) == len(receiver.received) == len(batches)


def test_what_a_killed_sender_had_taken_goes_out_again_under_its_id(
    database: Database, postgres_url: str, receiver: Receiver
) -> None:
    ended_batch(database, receiver.url("/silent"))
    program = (
        "import sys\n"
        "from tests.pipeline.test_webhooks import PRIVATE\n"
        "from pipeline.webhooks import deliver_due\n"
        "from store.database import Database\n"
        "deliver_due(Database(sys.argv[1]), PRIVATE)\n"
    )
    sender = subprocess.Popen([sys.executable, "-c", program, postgres_url], cwd=REPOSITORY)
    try:
        wait_until(lambda: receiver.received, 20.0, "the webhook has gone out")
    finally:
        os.kill(sender.pid, signal.SIGKILL)
        sender.wait()
    assert deliver_due(database, PRIVATE) == 0  # its lease still holds
    assert delivery(database).state is DeliveryState.PENDING
    execute(database, "UPDATE deliveries SET url = :url", url=receiver.url("/hook"))
    row = one_round(database)
    assert (row.state, row.tries) == (DeliveryState.DELIVERED, 2)
    assert [received.name for received in receiver.received] == [event_name(row.id)] * 2


def test_a_delivery_under_which_senders_die_is_given_up(database: Database, receiver: Receiver) -> None:
    ended_batch(database, receiver.url())
    execute(database, "UPDATE deliveries SET tries = 11")
    row = one_round(database)
    assert (row.state, "senders that died" in (row.error or "")) == (DeliveryState.FAILED, True)
    assert receiver.received == []


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "2130706433", "[::ffff:127.0.0.1]", "[64:ff9b::127.0.0.1]", "169.254.169.254", "localhost"]
)
def test_no_private_address_is_connected_to(database: Database, receiver: Receiver, host: str) -> None:
    url = receiver.url("/hook", host).replace("http:", "https:")
    ended_batch(database, url)
    row = one_round(database, PUBLIC)
    assert row.state is DeliveryState.FAILED
    assert "STOKER_GATEWAY__WEBHOOK_PRIVATE allows others" in (row.error or "")
    assert receiver.received == []


def test_a_name_with_a_private_address_among_its_own_is_refused(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = socket.getaddrinfo

    def both(host: str, *arguments: Any, **options: Any) -> list[Any]:
        if host != "both.test" or options.get("flags"):
            return real(host, *arguments, **options)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 443)) for address in ("8.8.8.8", "10.0.0.1")]

    monkeypatch.setattr(socket, "getaddrinfo", both)
    ended_batch(database, "https://both.test/hook")
    row = one_round(database, PUBLIC)
    assert (row.state, "leads to 10.0.0.1, which is no public address" in (row.error or "")) == ("failed", True)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("https://receiver.test/hook?token=1", None),
        ("https://8.8.8.8:8443/", None),
        ("http://receiver.test/", "is not https"),
        ("ftp://receiver.test/", "no http or https URL"),
        ("https://", "no http or https URL"),
        ("https://user:password@receiver.test/", "leave it out"),
        ("https://receiver.test:99999/", "is no URL"),
        ("https://receiver.test/a b", "spaces, control characters"),
        ("https://receiver.test/\x00", "spaces, control characters"),
        ("https://receiver.test/\ud800", "spaces, control characters"),
        ("https://receiver.test/" + "a" * 2048, "over 2048 characters"),
        ("https://10.0.0.1/", "no public address"),
        ("https://0x7f000001/", "no public address"),
        ("https://[::ffff:10.0.0.1]/", "no public address"),
        ("https://[fd00::1]/", "no public address"),
    ],
)
def test_what_a_url_lacks_is_said_at_the_batchs_creation(url: str, problem: str | None) -> None:
    found = check_url(url, PUBLIC)
    assert (found is None) if problem is None else (found is not None and problem in found)
    assert "password@" not in (found or "")


@pytest.mark.parametrize("url", ["http://10.0.0.1/", "https://localhost/", "http://receiver.internal:8080/hook"])
def test_the_setting_allows_private_addresses_and_plain_http(url: str) -> None:
    assert check_url(url, PRIVATE) is None
