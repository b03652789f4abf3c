"""The express node's task."""

from __future__ import annotations

import asyncio

from models.messages import AnswerSingle
from pipeline.express import Answering
from runtime.logs import get_logger

log = get_logger(__name__)


def answer_singles(answering: Answering, loop: asyncio.AbstractEventLoop, message: AnswerSingle) -> None:
    """Take the single requests that wait; they are answered in the child's loop, which runs on when this has ended.

    Safe to run twice and to die at any line: the message is only a hint, and a request that was taken and is not
    answered is another's as soon as its lease ends. So the message may be acknowledged before the answers are there.
    """
    claimed = asyncio.run_coroutine_threadsafe(answering.claim(), loop).result()
    log.debug("singles_claimed", hint=message.wire_name, requests=claimed)
