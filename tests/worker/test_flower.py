"""Flower starts only with a password; what it shows of a hint."""

from __future__ import annotations

import pytest
from celery import Celery

from models.messages import AnswerSingle, RunShard
from runtime.errors import BadInput
from runtime.settings import BrokerSettings, FlowerSettings, Settings
from worker.celery_app import make_app
from worker.flower import make_flower


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
