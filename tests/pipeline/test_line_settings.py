"""A line's own `stoker` object, and what submit makes of a batch that may be served semantically."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import text

from cache.keys import asks_for_one, is_deterministic, read_body
from cache.payload import Affixes
from cache.pilot import draw_pilot, pilot_size
from models.line_settings import LineSettings, cache_mode_of, read_settings
from models.lines import LineRules, ParsedLine, SubmitOptions, parse_line
from models.states import CacheMode
from pipeline.submit import FileEstimate, Submitted, dry_run, submit_file
from runtime.errors import InvalidFile
from runtime.settings import LimitSettings, Settings, ShardSettings
from store.database import Database
from tests.support.batches import CHAT, batch_row, chat, chats, shards_of

SETTINGS = Settings.model_construct(shard=ShardSettings(max_jobs=64), limits=LimitSettings(window_s=600))
TEMPLATE = "Name the queue of this message: {text}"
FILLED = {"template": TEMPLATE, "variables": {"text": "where is my parcel"}}


def write(folder: Path, bodies: Sequence[dict[str, Any]], *, stoker: Sequence[Any] = ()) -> Path:
    file = folder / "prompts.jsonl"
    own = [{"stoker": value} for value in stoker] + [{}] * (len(bodies) - len(stoker))
    lines = (
        json.dumps({"custom_id": f"id-{seq}", "method": "POST", "url": CHAT, "body": body} | more)
        for seq, (body, more) in enumerate(zip(bodies, own, strict=True))
    )
    file.write_text("\n".join(lines) + "\n")
    return file


def estimate(file: Path, *, cache: CacheMode = CacheMode.EXACT) -> FileEstimate:
    options = SubmitOptions(max_output_tokens=64, cache=cache)
    return dry_run(file, options=options, settings=SETTINGS, served_models=None)


def submit(database: Database, file: Path, *, cache: CacheMode = CacheMode.SEMANTIC) -> Submitted:
    options = SubmitOptions(max_output_tokens=64, cache=cache)
    return submit_file(database, file, options=options, settings=SETTINGS, served_models=None, reuse=False)


def stoker_of(database: Database, batch_id: UUID) -> list[str | None]:
    with database.transaction() as session:
        rows = session.scalars(text("SELECT stoker FROM jobs WHERE batch_id = :id ORDER BY seq"), {"id": batch_id})
        return list(rows)


def numbered(count: int) -> list[dict[str, Any]]:
    return [chat(f"Name the queue of message {number}.", temperature=0) for number in range(count)]


@pytest.mark.parametrize(
    ("stoker", "problem"),
    [
        (3, "stoker: is a number; write an object with any of cache, template, variables, sources"),
        ({"cach": "off"}, "stoker.cach: is unknown; known are cache, template, variables, sources"),
        ({"": 1}, "stoker.: is unknown; known are cache, template, variables, sources"),
        ({"cache": "on"}, 'stoker.cache: is "on"; it must be "off", "exact" or "semantic"'),
        ({"cache": True}, 'stoker.cache: is a boolean; it must be "off", "exact" or "semantic"'),
        ({"template": ""}, "stoker.template: is empty; it must be a string with slots, such as"),
        ({"template": ["x"]}, "stoker.template: is a list; it must be a string with slots, such as"),
        (
            {"variables": {"text": 1}},
            "stoker.variables: is an object; it must be an object of strings, one for each slot",
        ),
        ({"sources": []}, "stoker.sources: is empty; it must be a list of non-empty strings"),
        ({"sources": ["a", 1]}, "stoker.sources: is a list; it must be a list of non-empty strings"),
        ({"sources": ["a\0"]}, r"stoker.sources: holds \u0000, which Postgres cannot store; leave it out"),
        ({"template": TEMPLATE}, "stoker.variables: is missing, but stoker.template is there; give each of its slots"),
        ({"variables": {}}, "stoker.template: is missing, but stoker.variables is there; write the template"),
        ({**FILLED, "template": "no slot"}, "stoker.template: has no slot; write {name} where a variable stands"),
        ({**FILLED, "variables": {}}, "stoker.variables: no value for text; give each slot of stoker.template one"),
        ({**FILLED, "variables": {"text": "x", "more": "y"}}, "stoker.variables: no slot for more"),
        ({**FILLED, "variables": {"text": "x"}}, "stoker.template: does not give the text of the request with these"),
    ],
)
def test_a_bad_stoker_object_is_refused_with_its_line_field_and_remedy(
    tmp_path: Path, stoker: object, problem: str
) -> None:
    file = write(tmp_path, [chat("fine"), chat(TEMPLATE.format(text="where is my parcel"))], stoker=[None, stoker])
    with pytest.raises(InvalidFile) as caught:
        estimate(file)
    [found] = caught.value.problems
    assert str(found).startswith(f"line 2: {problem}")
    assert found.code == "invalid_request"


def test_a_template_of_a_conversation_is_refused(tmp_path: Path) -> None:
    turns = {**chat("a"), "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(InvalidFile) as caught:
        estimate(write(tmp_path, [turns], stoker=[FILLED]))
    assert "stoker.template: the request has no one text that it could give" in str(caught.value.problems[0])


def test_a_good_stoker_object_is_stored_beside_the_body_and_not_in_it(database: Database, tmp_path: Path) -> None:
    body = chat(TEMPLATE.format(text="where is my parcel"), max_tokens=8)
    own = {**FILLED, "cache": "exact", "sources": ["orders.pdf"]}
    batch_id = submit(
        database, write(tmp_path, [body, body, body], stoker=[own, None, {}]), cache=CacheMode.OFF
    ).batch_id
    first, second, third = stoker_of(database, batch_id)
    assert json.loads(first or "") == own
    assert (second, third) == (None, "{}")
    with database.transaction() as session:
        assert session.scalars(text("SELECT DISTINCT body FROM jobs")).all() == [json.dumps(body)]


@pytest.mark.parametrize(
    ("stoker", "batch", "expected"),
    [
        (None, "exact", "exact"),
        ("{}", "semantic", "semantic"),
        ('{"cache":"off"}', "semantic", "off"),
        ('{"cache":"semantic"}', "off", "semantic"),
    ],
)
def test_a_lines_own_mode_overrides_its_batchs(stoker: str | None, batch: str, expected: str) -> None:
    settings = LineSettings() if stoker is None else read_settings(stoker)
    assert cache_mode_of(settings, CacheMode(batch)) is CacheMode(expected)


def test_settings_are_read_as_they_were_stored() -> None:
    settings = read_settings(json.dumps(FILLED))
    assert settings == LineSettings(template=TEMPLATE, variables={"text": "where is my parcel"})


_FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([None, 0, 0.0, 0.7]),
        "seed": st.sampled_from([None, 0, 7]),
        "n": st.sampled_from([None, 1, 2]),
        "tools": st.sampled_from([None, [], [{"type": "function"}]]),
        "functions": st.sampled_from([None, [], [{"name": "f"}]]),
        "max_tokens": st.sampled_from([None, 5, 99]),
    },
)


@given(_FIELDS, st.booleans())
def test_submit_and_the_exact_cache_agree_which_requests_may_share_an_answer(
    fields: dict[str, Any], sampled: bool
) -> None:
    raw = json.dumps(
        {"custom_id": "a", "method": "POST", "url": CHAT, "body": chat("x", **fields)}, separators=(",", ":")
    )
    rules = LineRules(options=SubmitOptions(max_output_tokens=64), line_bytes=10_000, sampled=sampled)
    line = parse_line(raw.encode(), 1, rules=rules, endpoint=None)
    assert isinstance(line, ParsedLine)
    body = read_body(line.body)
    assert line.may_share == ((sampled or is_deterministic(body, endpoint=CHAT)) and asks_for_one(body))


def test_the_pilot_of_a_semantic_batch_is_drawn_uniformly_and_goes_first(database: Database, tmp_path: Path) -> None:
    bodies = numbered(2_000)
    bodies[1000:1100] = [bodies[0]] * 100
    submitted = submit(database, write(tmp_path, bodies))
    assert (submitted.total, submitted.followers, submitted.notices) == (2_000, 100, ())
    shards = shards_of(database, submitted.batch_id)
    seqs = [seq for shard in shards for seq in shard.seqs]
    assert sorted(seqs) == [*range(1000), *range(1100, 2_000)]
    pilot, rest = seqs[:600], seqs[600:]
    assert (pilot, rest) == (sorted(pilot), sorted(rest))
    assert [len(shard.seqs) for shard in shards[:10]] == [*[64] * 9, 24]
    assert 200 < sum(seq < 1000 for seq in pilot) < 420
    assert batch_row(database, submitted.batch_id)["shards_left"] == len(shards)


def test_the_pilot_is_600_lines_or_a_twentieth_and_the_same_for_the_same_batch() -> None:
    assert [pilot_size(lines) for lines in (10, 600, 12_000, 100_000)] == [10, 600, 600, 5_000]
    assert draw_pilot(5_000, seed=b"a") == draw_pilot(5_000, seed=b"a") != draw_pilot(5_000, seed=b"b")


def test_what_the_prompts_of_a_semantic_batch_share_is_kept_with_it(database: Database, tmp_path: Path) -> None:
    submitted = submit(database, write(tmp_path, numbered(3)))
    options = batch_row(database, submitted.batch_id)["options"]
    assert options["affixes"] == {"prefix": "Name the queue of message ", "suffix": ""}
    assert Affixes(**options["affixes"]).prefix
    exact = submit(database, write(tmp_path, numbered(3)), cache=CacheMode.EXACT)
    assert "affixes" not in batch_row(database, exact.batch_id)["options"]


def test_a_nul_in_what_prompts_share_is_no_template(database: Database, tmp_path: Path) -> None:
    bodies = [chat(f"a long beginning \0 and more of it {number}", temperature=0) for number in range(3)]
    assert "affixes" not in batch_row(database, submit(database, write(tmp_path, bodies)).batch_id)["options"]


def test_submit_says_that_a_small_batch_cannot_certify_by_itself(database: Database, tmp_path: Path) -> None:
    [notice] = submit(database, write(tmp_path, numbered(5))).notices
    assert notice.startswith("at most 5 of 5 semantic lines may be served")
    assert "fewer than 2,000" in notice and "only a namespace certified before serves" in notice
    [notice] = estimate(write(tmp_path, chats(3)), cache=CacheMode.SEMANTIC).notices
    assert notice.startswith("none of 3 semantic lines may be served: they need temperature 0 or a seed")
    assert estimate(write(tmp_path, numbered(5))).notices == ()


def test_submit_says_that_long_prompts_without_a_template_are_never_served_semantically(tmp_path: Path) -> None:
    long = [chat(f"{number} " * 600, temperature=0) for number in range(3)]
    notices = estimate(write(tmp_path, [*long, chat("short", temperature=0)]), cache=CacheMode.SEMANTIC).notices
    assert "3 lines have prompts of more than 1,024 characters that share no template" in notices[-1]
