"""Conversations in one worker child: what is sent turn by turn, and what the result tells."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from models.names import read_request_name, request_name
from pipeline.cached import ExactCache
from pipeline.converse import TOKENS_PER_BYTE
from pipeline.export import write_lines
from runtime.settings import CacheSettings
from store.database import Database
from store.engines import register_engine
from store.recent import RecentAnswers
from tests.support.batches import execute, results_of
from tests.support.conversing import Child, ShownEndpoint, answer, said, store_lines, talk, told_of
from tests.support.scripted_endpoint import ScriptedEndpoint

SYSTEM = {"role": "system", "content": "Be brief."}


def numbered(number: int, _: dict[str, Any]) -> dict[str, Any]:
    return answer(f"reply {number}")


def usage_of(database: Database, batch_id: UUID, seq: int = 0) -> tuple[int, int]:
    with database.transaction() as session:
        row = session.execute(
            text("SELECT prompt_tokens, completion_tokens FROM results WHERE batch_id = :id AND seq = :seq"),
            {"id": batch_id, "seq": seq},
        ).one()
    return row[0], row[1]


def result_line(database: Database, batch_id: UUID) -> dict[str, Any]:
    output, errors = io.BytesIO(), io.BytesIO()
    write_lines(database, batch_id, output=output, errors=errors)
    line: dict[str, Any] = json.loads(output.getvalue() + errors.getvalue())
    return line


def test_every_turn_is_sent_with_all_that_was_said_before_it(database: Database, tmp_path: Path) -> None:
    with ShownEndpoint(numbered) as endpoint:
        line = talk("one", "two", "three", body={"messages": [SYSTEM], "temperature": 0.5})
        batch_id = store_lines(database, tmp_path, [line])
        assert Child(database, endpoint.url).feed().jobs == 1
    assert [endpoint.texts(number) for number in range(3)] == [
        ["Be brief.", "one"],
        ["Be brief.", "one", "reply 1", "two"],
        ["Be brief.", "one", "reply 1", "two", "reply 2", "three"],
    ]
    assert {(body["model"], body["temperature"], body["max_tokens"]) for body in endpoint.bodies} == {
        ("scripted", 0.5, 64)
    }
    asked = [f"{request_name(batch_id, 0)}_turn-{number}" for number in (1, 2, 3)]
    assert [name.rpartition("-")[0] for name in endpoint.request_ids] == asked
    shown = result_line(database, batch_id)
    assert shown["response"]["body"] == answer("reply 3")
    assert (shown["stoker"]["outcome"], shown["stoker"]["source"]) == ("succeeded", "engine")
    conversation = shown["stoker"]["conversation"]
    assert (conversation["id"], conversation["turns"], conversation["dropped_turns"]) == (shown["id"], 3, 0)
    assert said(conversation) == [*endpoint.texts(), "reply 3"]
    assert [message["role"] for message in conversation["messages"]] == ["system", *(["user", "assistant"] * 3)]
    assert usage_of(database, batch_id) == (30, 6)


@pytest.mark.parametrize(
    ("turns", "outcome"),
    [
        (["fine", "a b c d e f", "fine"], "truncated"),
        (["[[empty]]", "fine"], "empty"),
        (["a b c d e f", "[[empty]]"], "empty"),
    ],
)
def test_a_conversation_is_worth_what_its_worst_turn_is(
    database: Database, tmp_path: Path, turns: list[str], outcome: str
) -> None:
    with ScriptedEndpoint() as endpoint:
        batch_id = store_lines(database, tmp_path, [talk(*turns, body={"max_tokens": 4})])
        Child(database, endpoint.url).feed()
        assert endpoint.calls().count == len(turns), "it goes on all the same"
    [result] = results_of(database, batch_id)
    assert (result.outcome, told_of(database, batch_id)["turns"]) == (outcome, len(turns))


def test_a_refused_turn_ends_it_as_a_refusal_with_the_turns_before(database: Database, tmp_path: Path) -> None:
    with ScriptedEndpoint() as endpoint:
        batch_id = store_lines(database, tmp_path, [talk("one", "two [[status 422]]", "three")])
        Child(database, endpoint.url).feed()
        assert endpoint.calls().count == 2
    shown = result_line(database, batch_id)
    assert (shown["response"]["status_code"], shown["stoker"]["outcome"]) == (422, "failed")
    assert shown["response"]["body"]["error"]["message"] == "as the script says"
    assert said(shown["stoker"]["conversation"]) == ["one", "echo: one"]
    assert usage_of(database, batch_id) == (1, 2), "the first turn was generated"


def test_a_reply_that_calls_a_tool_ends_it(database: Database, tmp_path: Path) -> None:
    def calls(number: int, _: dict[str, Any]) -> dict[str, Any]:
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        return answer("", finish="tool_calls", tool_calls=[call]) if number == 2 else answer("fine")

    with ShownEndpoint(calls) as endpoint:
        batch_id = store_lines(database, tmp_path, [talk("one", "two", "three")])
        Child(database, endpoint.url).feed()
    [result] = results_of(database, batch_id)
    assert (len(endpoint.bodies), result.outcome, result.error_code) == (2, "failed", "tool_calls_in_conversation")
    assert (told_of(database, batch_id)["turns"], usage_of(database, batch_id)) == (1, (20, 4))


def test_what_does_not_fit_into_the_window_is_left_out_oldest_first(database: Database, tmp_path: Path) -> None:
    def counting(number: int, body: dict[str, Any]) -> dict[str, Any]:
        """A token for each character of a text."""
        size = sum(len(message["content"]) for message in body["messages"])
        return answer(f"{number}" + "r" * 49, prompt_tokens=size) | {
            "usage": {"prompt_tokens": size, "completion_tokens": 50}
        }

    window, turns = 500, [f"{number}" + "t" * 49 for number in range(12)]
    with ShownEndpoint(counting) as endpoint:
        line = talk(*turns, body={"messages": [SYSTEM], "max_tokens": 50}, window_tokens=window)
        batch_id = store_lines(database, tmp_path, [line])
        Child(database, endpoint.url).feed()
    sizes = [sum(map(len, endpoint.texts(number))) for number in range(12)]
    assert max(sizes[1:]) + 50 <= window, "the first reply told how many bytes a token has"
    assert sizes[-1] > window - 50 - 200, "and no more is left out than need be"
    assert all(endpoint.texts(number)[0] == "Be brief." for number in range(12))
    assert [endpoint.texts(number)[-1] for number in range(12)] == turns
    assert endpoint.texts()[1] in turns, "turns are left out whole"
    told = told_of(database, batch_id)
    assert told["dropped_turns"] == turns.index(endpoint.texts()[1])
    assert said(told)[1::2] == turns, "the history is whole"


def test_a_turn_that_does_not_fit_is_the_engines_to_judge(database: Database, tmp_path: Path) -> None:
    with ShownEndpoint(numbered) as endpoint:
        long = "x" * int(200 / TOKENS_PER_BYTE)
        batch_id = store_lines(database, tmp_path, [talk("short", long, body={"messages": [SYSTEM]})])
        Child(database, endpoint.url).feed(context_tokens=128)
    assert endpoint.texts() == ["Be brief.", long]
    assert told_of(database, batch_id)["dropped_turns"] == 1


def test_an_ended_conversation_is_continued_by_its_id(database: Database, tmp_path: Path) -> None:
    with ShownEndpoint(numbered) as endpoint:
        child = Child(database, endpoint.url)
        first = store_lines(database, tmp_path, [talk("one", body={"messages": [SYSTEM]})])
        child.feed()
        second = store_lines(database, tmp_path, [talk("two", conversation=request_name(first, 0))])
        child.feed()
        assert endpoint.texts() == ["Be brief.", "one", "reply 1", "two"]
        third = store_lines(database, tmp_path, [talk("three", conversation=request_name(second, 0))])
        child.feed()
    assert said(told_of(database, third)) == ["Be brief.", "one", "reply 1", "two", "reply 2", "three", "reply 3"]
    assert told_of(database, third)["turns"] == 1


@pytest.mark.parametrize(
    "name",
    [
        lambda first: request_name(first, 9),
        lambda first: request_name(first, 1),
        lambda first: request_name(UUID(int=7), 0),
        lambda _: "batch_req_nonsense",
    ],
    ids=["no such line", "no conversation", "no such batch", "no id"],
)
def test_an_unknown_conversation_is_an_error(database: Database, tmp_path: Path, name: Callable[[UUID], str]) -> None:
    with ShownEndpoint(numbered) as endpoint:
        child = Child(database, endpoint.url)
        plain = {"body": {"model": "scripted", "messages": [SYSTEM, {"role": "user", "content": "plain"}]}}
        first = store_lines(database, tmp_path, [talk("one"), plain])
        child.feed()
        batch_id = store_lines(database, tmp_path, [talk("two", conversation=name(first))])
        child.feed()
    [result] = results_of(database, batch_id)
    assert (result.outcome, result.error_code, len(endpoint.bodies)) == ("failed", "conversation_not_found", 2)


@pytest.mark.parametrize("deleted", [False, True])
def test_a_conversation_of_another_tenant_or_a_deleted_batch_is_unknown(
    database: Database, tmp_path: Path, deleted: bool
) -> None:
    with ShownEndpoint(numbered) as endpoint:
        child = Child(database, endpoint.url)
        first = store_lines(database, tmp_path, [talk("a secret")], tenant="one")
        child.feed()
        if deleted:
            execute(database, "UPDATE batches SET deleted_at = clock_timestamp()")
        tenant = "one" if deleted else "two"
        names = [request_name(first, 0), request_name(UUID(int=7), 0)]
        batch_id = store_lines(database, tmp_path, [talk("and?", conversation=name) for name in names], tenant=tenant)
        child.feed()
    theirs, nobodys = results_of(database, batch_id)
    assert theirs.error_code == nobodys.error_code == "conversation_not_found"
    assert (theirs.error_message or "").replace(names[0], "") == (nobodys.error_message or "").replace(names[1], "")


def test_no_answer_to_an_equal_body_stands_for_a_conversation(
    database: Database, tmp_path: Path, redis_url: str
) -> None:
    body = {"temperature": 0, "messages": [{"role": "user", "content": "hello"}]}
    with ShownEndpoint(numbered) as endpoint:
        child = Child(database, endpoint.url, redis_url=redis_url)
        with database.transaction() as session:
            child.engine_id = register_engine(session, {"checkpoint_digest": "1234"})
        child.cache = ExactCache(RecentAnswers(redis_url), CacheSettings(), engine_id=lambda: child.engine_id)
        store_lines(database, tmp_path, [{"body": {"model": "scripted", **body}}])
        child.feed()
        batch_id = store_lines(database, tmp_path, [talk("and?", body=body), talk("and?", body=body)])
        store_lines(database, tmp_path, [{"body": {"model": "scripted", **body}}])
        assert child.feed().jobs == 3
        child.cache.close()
    assert len(endpoint.bodies) == 3, "the plain line was served, and no conversation followed the other"
    assert [said(told_of(database, batch_id, seq))[:2] for seq in (0, 1)] == [["hello", "and?"]] * 2


@pytest.mark.parametrize("order", ["surrogate", "nul"])
def test_a_reply_that_is_hard_to_store_goes_into_the_next_prompt(
    database: Database, tmp_path: Path, order: str
) -> None:
    with ScriptedEndpoint() as endpoint:
        batch_id = store_lines(database, tmp_path, [talk(f"one [[{order}]]", "two")])
        assert Child(database, endpoint.url).feed().jobs == 1
    [result] = results_of(database, batch_id)
    assert (result.outcome, result.status_code) == ("succeeded", 200)
    assert said(told_of(database, batch_id))[-1] == "echo: two"


def test_a_request_name_is_read_back() -> None:
    batch_id = UUID(int=12345)
    assert read_request_name(request_name(batch_id, 77)) == (batch_id, 77)
    for name in ("", "batch_req_", f"batch_{batch_id.hex}", f"{request_name(batch_id, 77)} ", "batch_req_" + "g" * 34):
        assert read_request_name(name) is None
