"""Packing embedding jobs and taking the reply apart: each job must get what it would have got alone."""

from __future__ import annotations

import json
import struct
from base64 import b64decode
from collections.abc import Sequence
from typing import Any

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from inference.embeddings import PATH, Pack, pack
from inference.endpoint import Endpoint, Reply
from models.jobs import Job, JobResult
from models.states import Outcome
from tests.support.scripted_answers import embeddings, prompts_of, vector_of
from tests.support.scripted_endpoint import ScriptedEndpoint


def job(seq: int, given: object, **fields: object) -> Job:
    return Job(seq=seq, body=json.dumps({"model": "m", "input": given, **fields}), tries=0)


def packed(jobs: Sequence[Job], *, max_tokens: int = 10_000, max_inputs: int = 100) -> list[Pack]:
    return pack(jobs, max_tokens=max_tokens, max_inputs=max_inputs)


def answered(part: Pack, *orders: str, tokens: int | None = None) -> list[JobResult]:
    """The pack's results when the scripted endpoint answers; `tokens` stands for what it counted."""
    body = json.loads(part.body)
    answer = embeddings(body, prompts_of(body, PATH), list(orders))
    if tokens is not None:
        answer["usage"] = {"prompt_tokens": tokens, "total_tokens": tokens}
    return part.split(Reply(status_code=200, body=json.dumps(answer).encode(), duration_ms=5))


def vectors_in(result: JobResult, *, as_base64: bool = False) -> list[list[float]]:
    response = json.loads(result.response or "")
    assert response["object"] == "list"
    entries = {entry["index"]: entry for entry in response["data"]}
    assert list(entries) == list(range(len(response["data"])))
    assert all(entry["object"] == "embedding" for entry in response["data"])
    found = [entry["embedding"] for entry in entries.values()]
    return [_floats(text) for text in found] if as_base64 else found


def float32(numbers: Sequence[float]) -> list[float]:
    return list(struct.unpack(f"<{len(numbers)}f", struct.pack(f"<{len(numbers)}f", *numbers)))


def _floats(text: str) -> list[float]:
    content = b64decode(text, validate=True)
    return list(struct.unpack(f"<{len(content) // 4}f", content))


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
ids = st.lists(st.integers(0, 50_000), min_size=1, max_size=20)
inputs = texts | ids | st.lists(texts, min_size=1, max_size=5) | st.lists(ids, min_size=1, max_size=5)
bodies = st.fixed_dictionaries(
    {"model": st.sampled_from(["m", "n"]), "input": inputs},
    optional={
        "encoding_format": st.sampled_from(["float", "base64", None]),
        "dimensions": st.sampled_from([4, 8]),
    },
)


def _as_list(given: Any) -> list[Any]:
    return [given] if isinstance(given, str) or isinstance(given[0], int) else given


@given(
    asked=st.lists(bodies, max_size=12),
    max_tokens=st.integers(1, 60),
    max_inputs=st.integers(1, 8),
    tokens=st.integers(0, 2000),
    ignores_base64=st.booleans(),
)
def test_whatever_the_sizes_each_job_gets_its_vectors_and_the_usage_sums_up(
    asked: list[dict[str, Any]], max_tokens: int, max_inputs: int, tokens: int, ignores_base64: bool
) -> None:
    jobs = [Job(seq=seq, body=json.dumps(body), tries=0) for seq, body in enumerate(asked)]

    parts = packed(jobs, max_tokens=max_tokens, max_inputs=max_inputs)

    assert sorted(one.seq for part in parts for one in part.jobs) == list(range(len(jobs)))
    for part in parts:
        assert len(part.jobs) == 1 or sum(part.token_estimates) <= max_tokens
        assert len(part.jobs) == 1 or sum(part.input_counts) <= max_inputs
        orders = ["plain floats"] if ignores_base64 else []
        orders += ["swap"] if len(part.jobs) > 1 else []  # the reply to a job alone is passed on as it is
        results = answered(part, *orders, tokens=tokens)
        assert [result.seq for result in results] == [one.seq for one in part.jobs]
        assert sum(result.usage.prompt_tokens for result in results) == tokens
        for result in results:
            body = asked[result.seq]
            is_own_reply = len(part.jobs) == 1 and ignores_base64
            as_base64 = body.get("encoding_format") == "base64" and not is_own_reply
            expected = [float32(vector_of(str(text))) for text in _as_list(body["input"])]
            assert vectors_in(result, as_base64=as_base64) == expected
            response = json.loads(result.response or "")
            assert response["model"] == body["model"]
            assert response["usage"]["prompt_tokens"] == result.usage.prompt_tokens
            assert response["usage"]["total_tokens"] == result.usage.prompt_tokens


def test_a_packed_job_gets_the_very_response_that_it_would_have_got_alone() -> None:
    jobs = [job(1, "one two"), job(2, ["three", "four five"]), job(3, "six", encoding_format="base64")]
    (together,) = packed(jobs)

    tokens = sum(len(text.split()) for text in ("one two", "three", "four five", "six"))
    results = answered(together, tokens=tokens)

    for single, result in zip(together.singles(), results, strict=True):
        alone = json.loads(answered(single)[0].response or "")
        mine = json.loads(result.response or "")
        assert alone.keys() == mine.keys()
        assert alone["data"] == mine["data"]
        assert alone["model"] == mine["model"]


def test_a_pack_asks_for_base64_and_a_job_alone_for_what_its_owner_wrote() -> None:
    (together,) = packed([job(1, "a", user="u"), job(2, ["b", "c"], user="u")])
    assert json.loads(together.body) == {
        "model": "m", "user": "u", "input": ["a", "b", "c"], "encoding_format": "base64",
    }  # fmt: skip

    one = Job(seq=1, body='{ "model":"m",  "input":"caf\\u00e9" }', tries=0)
    assert packed([one])[0].body == one.body.encode()


def test_short_texts_share_a_request_with_short_ones() -> None:
    lengths = [400, 8, 300, 12, 4, 350]
    parts = packed([job(seq, "x" * length) for seq, length in enumerate(lengths)], max_inputs=3)

    assert [[one.seq for one in part.jobs] for part in parts] == [[4, 1, 3], [2, 5, 0]]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (job(1, "a"), job(2, "b", dimensions=8)),
        (job(1, "a"), Job(seq=2, body='{"model": "n", "input": "b"}', tries=0)),
        (job(1, "a"), job(2, [1, 2])),
        (job(1, ["a"]), job(2, [[1, 2]])),
        (job(1, "a", embed_dtype="float16"), job(2, "b", embed_dtype="float16")),
        (job(1, "a", encoding_format="bytes"), job(2, "b", encoding_format="bytes")),
        (job(1, "a", encoding_format=["float"]), job(2, "b", encoding_format=["float"])),
        (job(1, []), job(2, [])),
        (job(1, [[]]), job(2, [[]])),
        (job(1, None), job(2, None)),
        (job(1, ["a", 1]), job(2, ["b", 1])),
        (job(1, [True]), job(2, [False])),
        (Job(seq=1, body='{"model": "m"}', tries=0), Job(seq=2, body="[]", tries=0)),
        (Job(seq=1, body='{"input": "\\ud83d"}', tries=0), Job(seq=2, body="{", tries=0)),
    ],
)
def test_what_cannot_be_asked_together_is_asked_alone(one: Job, other: Job) -> None:
    parts = packed([one, other])

    assert sorted((part.jobs[0].seq, part.body.decode()) for part in parts) == [(1, one.body), (2, other.body)]


def test_token_ids_go_together_in_both_their_forms() -> None:
    (together,) = packed([job(1, [1, 2, 3]), job(2, [[4], [5, 6]])])

    assert json.loads(together.body)["input"] == [[4], [5, 6], [1, 2, 3]]


def test_a_job_over_the_bounds_stands_alone_and_whole() -> None:
    parts = packed([job(1, ["a"] * 9), job(2, "b"), job(3, "c")], max_inputs=4)

    assert sorted([one.seq for one in part.jobs] for part in parts) == [[1], [2, 3]]


def test_the_remainder_of_usage_goes_to_the_largest_fractions() -> None:
    (together,) = packed([job(1, list(range(1, 3))), job(2, list(range(1, 4))), job(3, list(range(1, 6)))])

    tokens = {result.seq: result.usage.prompt_tokens for result in answered(together, tokens=14)}
    assert tokens == {1: 3, 2: 4, 3: 7}  # 2.8, 4.2, 7.0


@pytest.mark.parametrize(
    "body",
    [
        b"<html>",
        b"[]",
        b'{"data": []}',
        b'{"data": [{"index": 0, "embedding": [1]}]}',
        b'{"data": [{"index": 0, "embedding": [1]}, {"index": 0, "embedding": [1]}]}',
        b'{"data": [{"index": 0, "embedding": [1]}, {"index": 2, "embedding": [1]}]}',
        b'{"data": [{"index": 0, "embedding": "AAAA"}, {"index": 1, "embedding": "AAAA"}]}',
        b'{"data": [{"index": 0, "embedding": "????"}, {"index": 1, "embedding": "????"}]}',
        b'{"data": [{"index": 0, "embedding": null}, {"index": 1, "embedding": null}]}',
        b'{"data": [{"index": 0, "embedding": {}}, {"index": 1, "embedding": {}}]}',
        b"[" * 100_000,
    ],
)
def test_an_unusable_reply_fails_every_job_of_the_pack(body: bytes) -> None:
    (together,) = packed([job(1, "a"), job(2, "b")])

    results = together.split(Reply(status_code=200, body=body, duration_ms=5))

    assert [(result.outcome, result.error_code) for result in results] == [(Outcome.FAILED, "invalid_response")] * 2


def test_a_rejected_pack_is_asked_singly_and_only_the_guilty_job_fails() -> None:
    jobs = [job(1, "good"), job(2, "bad [[status 400]]"), job(3, "fine")]

    async def work() -> tuple[Reply, list[JobResult]]:
        async with Endpoint(server.url, api_key=None, timeout_s=10, connections=4) as endpoint:
            (together,) = packed(jobs)
            first = await endpoint.post(PATH, together.body, request_id="r")
            singles = together.singles()
            replies = [await endpoint.post(PATH, single.body, request_id="r") for single in singles]
            return first, [
                result for single, reply in zip(singles, replies, strict=True) for result in single.split(reply)
            ]

    with ScriptedEndpoint() as server:
        first, results = uvloop.run(work())

    assert first.status_code == 400
    assert {result.seq: result.outcome for result in results} == {
        1: Outcome.SUCCEEDED,
        2: Outcome.FAILED,
        3: Outcome.SUCCEEDED,
    }
