"""What headers say of limits, and what refusals say of our account, in the words that providers use."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest

from inference.connections import Answer
from inference.rate_headers import rates_seen, retry_after_s
from inference.refusals import is_about_quota, is_about_the_key
from models.endpoints import RatesSeen
from runtime.clock import utc_now


def seen(**headers: str) -> RatesSeen | None:
    return rates_seen(
        Answer(200, [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()], b"")
    )


def test_openais_headers_are_read() -> None:
    assert seen(
        Content_Type="application/json",
        X_RateLimit_Limit_Requests="60",
        X_RateLimit_Remaining_Requests="59",
        X_RateLimit_Reset_Requests="1s",
        X_RateLimit_Limit_Tokens="150000",
        X_RateLimit_Remaining_Tokens="149984",
        X_RateLimit_Reset_Tokens="20ms",
    ) == RatesSeen(60, 59, 1.0, 150000, 149984, 0.02)


@pytest.mark.parametrize(
    ("reset", "seconds"),
    [("1s", 1.0), ("20ms", 0.02), ("1m0.5s", 60.5), ("0h0m7.66s", 7.66), ("12", 12.0), ("1.5", 1.5), ("soon", None)],
)
def test_durations_are_read_as_they_are_written(reset: str, seconds: float | None) -> None:
    found = seen(x_ratelimit_remaining_requests="1", x_ratelimit_reset_requests=reset)

    assert found is not None
    assert found.reset_requests_s == (None if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize("number", ["9" * 5000, "1e308", "inf", "nan", "1e16"])
def test_a_number_beyond_all_limits_says_nothing(number: str) -> None:
    assert seen(x_ratelimit_limit_requests=number, x_ratelimit_reset_requests=f"{number}h") is None
    assert retry_after_s(Answer(429, [(b"Retry-After", number.encode())], b"")) is None


def test_more_digits_than_python_reads_say_nothing() -> None:
    digits = "9" * 5000
    assert seen(RateLimit=f'"x";r={digits};t=7', RateLimit_Policy=f'"x";q={digits};w={digits}') is None


def test_a_wish_of_more_than_a_day_is_taken_for_a_day() -> None:
    an_epoch = b"1764446400"
    assert retry_after_s(Answer(429, [(b"Retry-After", an_epoch)], b"")) == 86_400


@pytest.mark.parametrize(
    "headers",
    [
        {"x_ratelimit_remaining_requests": "1", "x_ratelimit_reset_requests": "100000000000000"},
        {"x_ratelimit_remaining_requests": "1", "x_ratelimit_reset_requests": "1000000d"},
        {"anthropic_ratelimit_requests_remaining": "1", "anthropic_ratelimit_requests_reset": "9999-01-01T00:00:00Z"},
        {"RateLimit": '"x";r=1;t=100000000000000'},
        {"RateLimit_Remaining": "1", "RateLimit_Reset": "1764446400"},
    ],
)
def test_a_reset_is_in_a_day_at_most(headers: dict[str, str]) -> None:
    assert seen(**headers) == RatesSeen(None, 1, 86_400)


def test_a_limit_of_a_day_is_not_taken_for_one_of_a_minute() -> None:
    assert seen(
        x_ratelimit_limit_requests="14400",
        x_ratelimit_remaining_requests="14370",
        x_ratelimit_reset_requests="2m59.5s",
        x_ratelimit_limit_tokens="18000",
        x_ratelimit_remaining_tokens="17997",
        x_ratelimit_reset_tokens="7.66s",
    ) == RatesSeen(None, 14370, 179.5, 18000, 17997, 7.66)


def test_anthropics_headers_are_read() -> None:
    moment = (utc_now() + timedelta(seconds=30)).strftime("%Y-%m-%dT%H:%M:%SZ")

    found = seen(
        anthropic_ratelimit_requests_limit="50",
        anthropic_ratelimit_requests_remaining="49",
        anthropic_ratelimit_requests_reset=moment,
        anthropic_ratelimit_input_tokens_limit="20000",
        anthropic_ratelimit_input_tokens_remaining="19000",
    )

    assert found is not None
    assert (found.limit_requests, found.remaining_requests) == (50, 49)
    assert (found.limit_tokens, found.remaining_tokens) == (20000, 19000)
    assert found.reset_requests_s is not None
    assert 25 < found.reset_requests_s <= 30


@pytest.mark.parametrize(
    "headers",
    [
        {"RateLimit": '"default";r=50;t=30', "RateLimit_Policy": '"default";q=100;w=60, "day";q=9;w=86400'},
        {"RateLimit_Limit": "100", "RateLimit_Remaining": "50", "RateLimit_Reset": "30"},
        {"RateLimit_Limit": "100, 100;w=60", "RateLimit_Remaining": "50", "RateLimit_Reset": "30"},
    ],
)
def test_the_drafts_of_the_ietf_are_read(headers: dict[str, str]) -> None:
    assert seen(**headers) == RatesSeen(limit_requests=100, remaining_requests=50, reset_requests_s=30.0)


@pytest.mark.parametrize(
    "headers", [{}, {"Server": "uvicorn"}, {"x_ratelimit_limit_requests": "many"}, {"RateLimit": "?!"}]
)
def test_headers_without_a_limit_say_nothing(headers: dict[str, str]) -> None:
    assert seen(**headers) is None


def error(message: str = "", **more: object) -> bytes:
    return json.dumps({"error": {"message": message, **more}}).encode()


POOR = "Your credit balance is too low to access the Anthropic API."


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (429, error("You exceeded your current quota", type="insufficient_quota", code="insufficient_quota")),
        (400, error(code="billing_hard_limit_reached")),
        (400, error(POOR, type="invalid_request_error")),
        (402, b"anything"),
        (402, error("This request requires more credits", code=402)),
        (403, error("Your team has used all available credits or reached its monthly spending limit")),
        (403, b'{"statusCode":403,"message":"Out of call volume quota. Quota will be replenished in 7 days."}'),
        (429, b'{"error":"Insufficient balance"}'),
    ],
)
def test_a_spent_account_is_told_by_its_words(status: int, body: bytes) -> None:
    assert is_about_quota(status, body)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (429, error("Rate limit reached; add a payment method at …/account/billing", code="rate_limit_exceeded")),
        (429, error("exceeded call rate limit; go to https://aka.ms/oai/quotaincrease", code="429")),
        (400, error(f"cannot read the prompt: '{POOR}'")),
        (500, error(code="insufficient_quota")),
        (429, b"\xff not json"),
        (429, b'{"error":' * 100_000),
    ],
)
def test_too_many_requests_or_a_prompt_about_money_is_no_spent_account(status: int, body: bytes) -> None:
    assert not is_about_quota(status, body)


def test_a_refused_key_is_told_from_a_refused_prompt() -> None:
    assert is_about_the_key(401, b"")
    assert is_about_the_key(403, error("You do not have access to this project"))
    assert not is_about_the_key(403, error("Your input was flagged", code=403))
    assert not is_about_the_key(403, error("no", code="content_policy_violation"))
    assert not is_about_the_key(404, error("no such model"))
