"""Answers as event streams: what an engine may say that no event can hold."""

from __future__ import annotations

import pytest

from api.errors import ApiError
from api.express import _response
from models.singles import SingleAnswer, SingleRequest
from models.states import Trust

CHOICE = '{"object":"chat.completion","choices":[%s]}'


@pytest.mark.parametrize(
    "response",
    [
        CHOICE % '{"message":{"tool_calls":[1]}}',
        CHOICE % '{"message":"x"}',
        CHOICE % '{"message":{},"logprobs":1e999}',
        CHOICE % ('{"message":{},"seed":%s}' % ("9" * 5_000)),
    ],
)
def test_an_answer_that_no_event_can_hold_is_the_engines_fault(response: str) -> None:
    single = SingleRequest("/v1/chat/completions", "m", b"{}", Trust.OWN, streams=True, with_usage=True)
    with pytest.raises(ApiError) as caught:
        _response(single, SingleAnswer(status_code=200, response=response))
    assert (caught.value.status_code, caught.value.answer.error.code) == (502, "invalid_response")
