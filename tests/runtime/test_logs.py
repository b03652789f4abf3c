"""Logs as a process writes them, and what is taken out of them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any
from uuid import UUID

import pytest
from pydantic import BaseModel, ValidationError

from models.keys import make_key
from runtime import entry
from runtime.errors import BadInput
from runtime.redaction import MARK, Redaction, secrets_of
from runtime.settings import BrokerSettings, EngineSettings, FlowerSettings, PostgresSettings, Settings
from tests.support.processes import REPOSITORY, clean_environment

PROMPT = "my husband's name is Herbert"
HOSTILE = r"\x1b]52;c;ZXZpbA==\x07\x9b2J\u202e"
WRITER = f"""
import logging
from runtime.logs import configure_logs, get_logger
from runtime.settings import LogSettings

configure_logs(LogSettings(format="FORMAT"), secrets=["correct horse"])
log = get_logger("ours")
log.info("shards_fed", batch_id="0193", jobs=190, messages=[{{"content": "{PROMPT}"}}], tokens=512)
logging.getLogger("theirs").warning("opens %s", "amqp://stoker:hunter22@rabbitmq:5672/stoker")
secret = "correct horse"
try:
    raise ValueError(f"no answer to {{secret}}") from OSError("{HOSTILE}")
except ValueError:
    log.exception("broke", answer="{PROMPT}")
"""


class Line(BaseModel):
    body: int


def written(form: str) -> str:
    """What a process with these logs writes."""
    command = [sys.executable, "-c", WRITER.replace("FORMAT", form)]
    ended = subprocess.run(
        command, cwd=REPOSITORY, env=clean_environment(), capture_output=True, text=True, check=True, timeout=60
    )
    assert ended.stdout == ""
    return ended.stderr


def redacted(**fields: Any) -> dict[str, Any]:
    return dict(Redaction()(None, "info", fields))


def test_a_pipe_gets_one_json_object_a_record_without_prompts_and_secrets() -> None:
    text = written("auto")
    ours, theirs, broke = (json.loads(line) for line in text.splitlines())

    assert (ours["event"], ours["batch_id"], ours["jobs"], ours["tokens"]) == ("shards_fed", "0193", 190, 512)
    assert ours["messages"] == MARK
    assert theirs["event"] == f"opens amqp://stoker:{MARK}@rabbitmq:5672/stoker"
    assert broke["answer"] == MARK
    assert broke["exception"].endswith(f"ValueError: no answer to {MARK}")

    assert not any(secret in text for secret in (PROMPT, "hunter22", "correct horse"))


def test_a_terminal_shows_the_traceback_without_what_variables_hold() -> None:
    text = written("human")

    assert "shards_fed" in text and "Traceback" in text
    assert not any(secret in text for secret in (PROMPT, "hunter22", "correct horse"))
    assert "]52;c;ZXZpbA==" in text
    assert not any(order in text for order in ("\x1b]", "\x07", "\x9b", "\u202e"))


def test_an_error_that_ends_a_process_orders_no_terminal_about(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(_: Settings) -> None:
        raise BadInput("\x1b]0;title\x07")

    monkeypatch.setattr(entry, "configure_logs", lambda *_, **__: None)
    with pytest.raises(SystemExit):
        entry.run_process(work)
    assert capsys.readouterr().err == "stoker: \ufffd]0;title\ufffd\n"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Authorization: Bearer abc.def-123", f"Authorization: Bearer {MARK}"),
        ("redis://:p@ss@redis:6379/0 is away", f"redis://:{MARK}@redis:6379/0 is away"),
        ('{"api_key": "abcd1234"}', f'{{"api_key": "{MARK}"}}'),
        ("401 for sk-proj-0123456789abcdef", f"401 for sk-{MARK}"),
        (
            'null value\nDETAIL:  Failing row contains (7, a\nprompt).\nCONTEXT:  COPY jobs, line 1: "a"\n[SQL: x]',
            f"null value\nDETAIL:  {MARK}\nCONTEXT:  COPY {MARK}\n[SQL: x]",
        ),
        ("CONTEXT:  while locking tuple (0,1)", "CONTEXT:  while locking tuple (0,1)"),
        ("GET https://host/path?at=a@b answered 200", "GET https://host/path?at=a@b answered 200"),
        (
            "generated tokens: 1500, unexpected end of token stream",
            "generated tokens: 1500, unexpected end of token stream",
        ),
    ],
)
def test_what_looks_like_a_secret_or_a_row_goes_and_the_text_around_it_stays(text: str, kept: str) -> None:
    assert Redaction().text(text) == kept


def test_a_key_of_ours_and_what_pydantic_quotes_go() -> None:
    key = make_key().text
    assert key[20:] not in Redaction().text(f"wrong key {key}")
    with pytest.raises(ValidationError) as caught:
        Line.model_validate({"body": PROMPT})
    assert "Herbert" in str(caught.value) and "Herbert" not in Redaction().text(str(caught.value))


def test_fields_are_known_by_their_names_whatever_they_hold_and_counts_stay() -> None:
    event = redacted(
        event="answered", prompt=PROMPT, request_body=b"{}", response={"choices": []}, access_token="x", prompts=3,
        prompt_tokens=9, document="7f", reason="timeout", batch=UUID(int=7), last={"content": PROMPT, "n": 1},
    )  # fmt: skip

    hidden = {name for name, value in event.items() if value == MARK}
    assert hidden == {"prompt", "request_body", "response", "access_token"}
    assert (event["prompts"], event["prompt_tokens"], event["document"], event["reason"]) == (3, 9, "7f", "timeout")
    assert event["batch"] == str(UUID(int=7)) and event["last"] == {"content": MARK, "n": 1}


def test_every_secret_of_the_settings_is_known_also_as_a_url_writes_it() -> None:
    settings = Settings.model_construct(
        postgres=PostgresSettings(url="postgresql://stoker:pg%40secret@db/stoker"),
        broker=BrokerSettings(url="amqp://guest:guest@127.0.0.1//"),
        engine=EngineSettings(url="http://engine:8000", api_key="engine-key"),
        flower=FlowerSettings(password="petals and stems"),
    )
    text = Redaction(secrets_of(settings)).text("pg@secret pg%40secret engine-key petals and stems, says a guest")

    assert text == f"{MARK} {MARK} {MARK} {MARK}, says a guest"


def test_a_long_text_costs_little_and_is_cut() -> None:
    assert len(Redaction(["no such secret"]).text("token ab+/" * 1_000_000)) < 33_000


@pytest.mark.parametrize(
    "beginning",
    [
        "input_value=",
        "input_value=1, input_type",
        "[parameters: ",
        "[parameters: 1] ",
        "DETAIL:  ",
        "a://",
        "a://b:",
        "a.",
        "Bearer ",
        "token: '",
        "sk-",
        "sk_a ",
        "api_key",
    ],
)
def test_a_line_of_beginnings_without_ends_costs_about_what_any_line_does(beginning: str) -> None:
    redaction = Redaction(["no such secret"])

    def cost_s(text: str) -> float:
        costs = []
        for _ in range(3):
            began = time.perf_counter()
            redaction.text(text)
            costs.append(time.perf_counter() - began)
        return min(costs)

    plain = ("token " + "plain words, " * 3_000)[:32_000]
    assert cost_s(("token " + beginning * 32_000)[:32_000]) < 15 * cost_s(plain)  # 3 times at the most


def test_a_value_whose_end_is_missing_goes_too() -> None:
    text = f"1 error [type=int_type, input_value={PROMPT}\n[SQL: x]\n[parameters: ('{PROMPT}'"

    assert Redaction().text(text) == f"1 error [type=int_type, input_value={MARK}\n[SQL: x]\n[parameters: {MARK}"
