"""Flower starts only with a password; what it shows of a hint."""

from __future__ import annotations

import asyncio
import base64

import pytest
from celery import Celery

from models.messages import AnswerSingle, RunShard
from runtime.errors import BadInput
from runtime.settings import BrokerSettings, FlowerSettings, Settings
from store.rate_limits import RateLimits
from worker.celery_app import make_app
from worker.flower import PROXIES, PROXIES_VARIABLE, asking, make_flower


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        (FlowerSettings(), "STOKER_FLOWER__PASSWORD"),
        (FlowerSettings(password="né né né"), "ASCII"),
        (FlowerSettings(user="a:b", password="let me in"), "colon"),
    ],
)
def test_without_a_password_that_can_be_checked_nobody_is_let_in(settings: FlowerSettings, remedy: str) -> None:
    with pytest.raises(BadInput, match=remedy):
        make_flower(Celery(), settings)


def test_a_hint_says_which_shard_of_which_batch_it_is_about() -> None:
    hint = RunShard(shard_id=12, batch_id="01a227f3-e102-7605-940d-33d5aaaaaaaa")

    assert hint.shown == "shard 12 of batch_01a227f3e102"


def test_single_requests_send_no_events_which_would_flood_it() -> None:
    app = make_app(Settings.model_construct(broker=BrokerSettings(url="amqp://guest@127.0.0.1:1//")))

    assert not app.tasks[AnswerSingle.wire_name].send_events
    assert app.tasks[RunShard.wire_name].send_events


@pytest.mark.parametrize(
    ("proxies", "peer", "forwarded", "asks"),
    [
        (PROXIES, "127.0.0.1", "", "127.0.0.1"),
        (PROXIES, "127.0.0.1", "203.0.113.9", "203.0.113.9"),
        (PROXIES, "127.0.0.1", "198.51.100.1, 203.0.113.9", "203.0.113.9"),  # the first is what the client said
        (PROXIES, "10.244.1.7", "203.0.113.9", "10.244.1.7"),
        ("10.244.0.0/16", "10.244.1.7", "198.51.100.1, 203.0.113.9, 10.244.2.2", "203.0.113.9"),
        ("nonsense, *", "10.244.1.7", "198.51.100.1, 203.0.113.9", "198.51.100.1"),
        (PROXIES, "127.0.0.1", ",", "127.0.0.1"),
    ],
)
def test_an_address_is_believed_of_a_proxy_only(proxies: str, peer: str, forwarded: str, asks: str) -> None:
    assert asking(peer, forwarded, proxies) == asks


class Counted(RateLimits):
    """Whose wrong passwords were counted; 10.0.0.9 is refused."""

    def __init__(self) -> None:
        self.addresses: list[str] = []

    def refused_s(self, address: str, digest: bytes | None) -> float:
        """As if it had guessed."""
        return 7.0 if address == "10.0.0.9" else 0.0

    def failed(self, address: str) -> None:
        """Keep it."""
        self.addresses.append(address)


def test_behind_a_proxy_each_address_is_counted_and_no_body_of_a_refused_one_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(PROXIES_VARIABLE, raising=False)
    limits = Counted()
    assert asyncio.run(_answers_to(["10.0.0.8", "10.0.0.9"], limits)) == [b"401", b"429"]
    assert limits.addresses == ["10.0.0.8"]


async def _answers_to(clients: list[str], limits: RateLimits) -> list[bytes]:
    """The status that each gets who sends the head of a body of 50 MB, and the body never."""
    app = make_flower(Celery(), FlowerSettings(password="let me in", port=0), limits=limits)
    server = app.listen(0, "127.0.0.1")
    port = next(iter(server._sockets.values())).getsockname()[1]
    wrong = base64.b64encode(b"stoker:guess").decode()
    statuses = []
    try:
        for client in clients:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            head = f"POST /api/workers HTTP/1.1\r\nHost: x\r\nAuthorization: Basic {wrong}\r\nX-Forwarded-For: {client}"
            writer.write(f"{head}\r\nContent-Length: 50000000\r\n\r\nx".encode())
            statuses.append((await asyncio.wait_for(reader.readline(), 10)).split()[1])
            writer.close()
    finally:
        server.stop()
        await server.close_all_connections()
    return statuses
