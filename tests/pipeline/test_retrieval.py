"""Jobs that name a collection: what the engine is asked, what results tell, and when an answer may serve again."""

from __future__ import annotations

import asyncio
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from cache.index import Index
from documents.kinds import Kind
from documents.passages import Splitter
from documents.prompt import FRAME_TOKENS
from inference.endpoint import Endpoint
from inference.router import Router
from inference.routes import Route
from models.lines import SubmitOptions
from pipeline.cached import ExactCache
from pipeline.embedders import LocalEmbedder
from pipeline.export import write_lines
from pipeline.feed import FeedContext, FeedReport, feed
from pipeline.heartbeat import Heartbeat
from pipeline.ingest import IngestContext, ingest
from pipeline.retrieval import Retrieval
from pipeline.search import Library
from pipeline.submit import dry_run
from runtime.errors import InvalidFile
from runtime.settings import CacheSettings, Settings
from store.database import Database
from store.documents import NewDocument, add_document, extend_document_leases, made_collection
from store.engines import register_engine
from store.recent import RecentAnswers
from store.step_states import StepStates
from tests.support.batches import EMBEDDINGS, batch_row, chat, dispatch_all, execute
from tests.support.conversing import ShownEndpoint, answer, store_lines, talk
from tests.support.own_services import OwnChroma, server_folder
from tests.support.scripted_endpoint import ScriptedEndpoint

MOON = "The moon is made of basalt and of anorthosite."
PARCEL = "A parcel to Norway takes nine days and costs 14 euros."
SOUP = "Cook the lentils for twenty minutes, then add the vinegar."
NOBODY = "http://127.0.0.1:1"
PARCELS = "How long does a parcel to Norway take?"
PASSAGE = re.compile(r'<passage (\d+) \w+ source="([^"]*)"(?: place="([^"]*)")?>\n(.*?)\n</passage \1 \w+>', re.DOTALL)


@dataclass(frozen=True)
class Plain:
    """A document that is text already."""

    markdown: str
    kind: Kind = Kind.TEXT
    pages: tuple[int, ...] = ()
    note: str | None = None


@pytest.fixture(scope="module")
def embed() -> LocalEmbedder:
    return LocalEmbedder(CacheSettings())


@pytest.fixture(scope="module")
def chroma() -> Iterator[OwnChroma]:
    with server_folder() as folder, OwnChroma(folder / "chroma") as server:
        yield server


@pytest.fixture
def engine() -> Iterator[ShownEndpoint]:
    """It cites the first passage, and one that is not there."""
    with ShownEndpoint(lambda number, _: answer(f"answer {number}, as [1] and [9] say")) as server:
        yield server


class Worker:
    """What a worker child has, and a reader of documents, in this process."""

    def __init__(self, database: Database, engine_url: str, embed: LocalEmbedder, *, redis_url: str, chroma_url: str):
        self.database = database
        self.engine_url = engine_url
        self.embed = embed
        self.redis_url = redis_url
        self.index = Index(chroma_url)
        self.retrieval: Retrieval | None = Retrieval(Library(database, self.index, embed), window_tokens=4096)
        with database.transaction() as session:
            self.engine_id = register_engine(session, {"checkpoint_digest": "1234"})

    def read(self, *, collection: str = "c", tenant: str = "local", **contents: str) -> None:
        """Add documents by name, or change them, and read them as the documents node does, but for converting."""
        for name, content in contents.items():
            encoded = content.encode()
            document = NewDocument(f"/docs/{name}.txt", encoded, sha256(encoded).hexdigest(), len(encoded))
            with self.database.transaction() as session:
                into = made_collection(session, tenant, collection)
                add_document(session, document, tenant=tenant, collection_id=into)

        def fetch(url: str) -> Any:
            raise AssertionError(url)

        with Heartbeat(self.database, lease_s=30.0, interval_s=10.0, extend=extend_document_leases) as heartbeat:
            context = IngestContext(
                database=self.database,
                heartbeat=heartbeat,
                convert=lambda content, _: Plain(content.decode()),
                fetch=fetch,
                splitter=Splitter(CacheSettings().embedder / "tokenizer.json"),
                embed=self.embed,
                index=self.index,
                settings=Settings.model_construct(),
                draining=lambda: False,
            )
            asyncio.run(ingest(context))

    def run(self, folder: Path, *lines: dict[str, Any], tenant: str = "local") -> list[dict[str, Any]]:
        """The result lines of a batch of these lines, in their order."""
        batch_id = store_lines(self.database, folder, lines, tenant=tenant)
        assert self.feed().jobs == len(lines)
        return lines_of(self.database, batch_id)

    def feed(self) -> FeedReport:
        """Run what is dispatched."""
        return asyncio.run(self._feed())

    def feed_again(self) -> FeedReport:
        """Run what waits for a later try."""
        execute(self.database, "UPDATE job_tries SET not_before = clock_timestamp()")
        execute(self.database, "UPDATE shards SET not_before = clock_timestamp() WHERE not_before IS NOT NULL")
        dispatch_all(self.database)
        return self.feed()

    async def _feed(self) -> FeedReport:
        exact = ExactCache(RecentAnswers(self.redis_url), CacheSettings(), engine_id=lambda: self.engine_id)
        states = StepStates(self.redis_url)
        connections = Endpoint(self.engine_url, api_key=None, timeout_s=10.0, connections=8)
        try:
            with Heartbeat(self.database, lease_s=30.0, interval_s=5.0) as heartbeat:
                async with asyncio.timeout(30), connections as server:
                    context = FeedContext(
                        database=self.database,
                        heartbeat=heartbeat,
                        router=Router(engine=Route(server, places=8)),
                        settings=Settings.model_construct(),
                        holder="test",
                        engine="engine",
                        worker="worker",
                        draining=lambda: False,
                        engine_id=lambda: self.engine_id,
                        cache=exact,
                        steps=states,
                        retrieval=self.retrieval,
                    )
                    return await feed(context)
        finally:
            exact.close()
            states.close()


@pytest.fixture
def worker(
    database: Database, engine: ShownEndpoint, embed: LocalEmbedder, redis_url: str, chroma: OwnChroma
) -> Worker:
    """With a collection of three documents."""
    made = Worker(database, engine.url, embed, redis_url=redis_url, chroma_url=chroma.url)
    made.read(moon=MOON, parcel=PARCEL, soup=SOUP)
    return made


def ask(question: str, *, body: dict[str, Any] | None = None, **stoker: Any) -> dict[str, Any]:
    """A line about a collection, that of three documents unless another is named."""
    return {"body": body or chat(question, temperature=0), "stoker": {"collection": "c", **stoker}}


def lines_of(database: Database, batch_id: UUID) -> list[dict[str, Any]]:
    written = io.BytesIO()
    write_lines(database, batch_id, output=written, errors=written)
    found = [json.loads(line) for line in written.getvalue().splitlines()]
    return sorted(found, key=lambda line: str(line["custom_id"]))


def names(line: dict[str, Any]) -> list[str]:
    """The documents of a result's passages."""
    return [Path(passage["source"]).stem for passage in line["stoker"]["passages"]]


def test_passages_stand_before_the_question_and_the_result_lists_them(
    worker: Worker, engine: ShownEndpoint, tmp_path: Path
) -> None:
    worker.read(handbook=f"# Post\n\n{PARCEL.replace('nine', 'ten')}")
    body = chat(PARCELS, temperature=0)
    body["messages"].insert(0, {"role": "system", "content": "Be brief."})
    [line] = worker.run(tmp_path, ask("", body=body, top_k=2))
    system, prompt = engine.texts()
    assert system == "Be brief."
    assert prompt.endswith(f"\n\n{PARCELS}")
    shown = {name: (number, place, said) for number, name, place, said in PASSAGE.findall(prompt)}
    assert shown.keys() == {"parcel.txt", "handbook.txt"}
    assert shown["parcel.txt"][1:] == ("", PARCEL)
    assert shown["handbook.txt"][1] == "Post"
    told = {Path(one["source"]).name: one for one in line["stoker"]["passages"]}
    assert {name: str(one["n"]) for name, one in told.items()} == {name: one[0] for name, one in shown.items()}
    parcel = told["parcel.txt"]
    assert (parcel["start"], parcel["end"], parcel["page"], parcel["heading"]) == (0, len(PARCEL), None, None)
    assert len(parcel["digest"]) == 64
    assert line["stoker"]["citations"] == [1]
    assert (line["stoker"]["source"], line["stoker"]["outcome"]) == ("engine", "succeeded")


def test_the_same_question_is_asked_again_when_its_passages_have_changed_and_only_then(
    worker: Worker, engine: ShownEndpoint, tmp_path: Path
) -> None:
    line = ask(PARCELS, top_k=1)
    [first] = worker.run(tmp_path, line)
    worker.read(moon="The moon is made of cheese.", more="Bees dance to tell the way to flowers.")
    [again] = worker.run(tmp_path, line)
    assert (len(engine.bodies), again["stoker"]["source"]) == (1, "exact"), "what it is about is as it was"
    assert again["response"]["body"] == first["response"]["body"]
    for member in ("passages", "citations"):
        assert again["stoker"][member] == first["stoker"][member] != []
    worker.read(parcel=PARCEL.replace("nine", "eleven"))
    [changed] = worker.run(tmp_path, line)
    assert (len(engine.bodies), changed["stoker"]["source"]) == (2, "engine")
    assert "eleven days" in engine.texts()[-1]
    assert changed["stoker"]["passages"][0]["digest"] != first["stoker"]["passages"][0]["digest"]


def test_a_question_is_another_with_other_passages_of_the_same_words(
    worker: Worker, engine: ShownEndpoint, tmp_path: Path
) -> None:
    worker.run(tmp_path, ask(PARCELS, top_k=1))
    worker.run(tmp_path, ask(PARCELS, top_k=2))
    worker.run(tmp_path, {"body": chat(PARCELS, temperature=0)})
    assert len(engine.bodies) == 3


def test_what_a_line_says_of_its_passages_holds(worker: Worker, engine: ShownEndpoint, tmp_path: Path) -> None:
    with worker.database.transaction() as session:
        rows = session.execute(text("SELECT content, tokens FROM passages")).all()
    tokens: dict[str, int] = {content: count for content, count in rows}
    budget = tokens[PARCEL] + FRAME_TOKENS + len("parcel.txt") // 3
    found = worker.run(
        tmp_path,
        ask(PARCELS),
        ask(PARCELS, top_k=1),
        ask(f"{PARCELS} Say it.", context_tokens=budget),
        ask(PARCELS, context_tokens=16),
        ask("Answer.", query="What is the moon made of?", top_k=1),
        ask(
            "",
            body={"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": PARCELS}]}]},
            top_k=1,
        ),
    )
    tight = found.pop(3)
    assert tight["error"]["code"] == "window_too_small", "it does not run without its passages"
    everything, first, fits, other, parts = map(names, found)
    assert (everything[0], sorted(everything)) == ("parcel", ["moon", "parcel", "soup"])
    assert (first, fits, other, parts) == (["parcel"], ["parcel"], ["moon"], ["parcel"])
    prompts = [body["messages"][-1]["content"] for body in engine.bodies]
    assert PARCELS not in prompts
    assert any(isinstance(one, list) and [part["type"] for part in one] == ["text", "text"] for one in prompts)


def test_completions_have_passages_too(worker: Worker, tmp_path: Path) -> None:
    said = {"choices": [{"text": "nine days [1]", "finish_reason": "stop"}], "usage": {}}
    file_line = {"url": "/v1/completions", "body": {"model": "m", "prompt": PARCELS}}
    with ShownEndpoint(lambda *_: said) as engine:
        worker.engine_url = engine.url
        [line] = worker.run(tmp_path, file_line | {"stoker": {"collection": "c", "top_k": 1}})
    [body] = engine.bodies
    assert PASSAGE.findall(body["prompt"])[0][1:] == ("parcel.txt", "", PARCEL)
    assert body["prompt"].endswith(f"\n\n{PARCELS}")
    assert (names(line), line["stoker"]["citations"]) == (["parcel"], [1])


def test_jobs_that_cannot_have_passages_end_with_the_reason_and_stop_no_other(
    worker: Worker, engine: ShownEndpoint, tmp_path: Path
) -> None:
    worker.read(collection="secret", tenant="other", moon="The code is 1234.")
    found = worker.run(
        tmp_path,
        ask(PARCELS),
        ask("What is the code?", collection="secret"),
        ask("What is the code?", collection="none"),
        ask("", body={"model": "m", "messages": [{"role": "system", "content": "only"}]}),
        {"body": chat("plain")},
    )
    codes = [line["error"] and line["error"]["code"] for line in found]
    assert codes == [None, "collection_not_found", "collection_not_found", "invalid_request", None]
    assert "no collection secret; `stoker documents list` shows them" in found[1]["error"]["message"]
    assert "need a user message with text" in found[3]["error"]["message"]
    assert not any("1234" in str(body) for body in engine.bodies)
    assert worker.run(tmp_path, ask("the code?", collection="secret"), tenant="other")[0]["error"] is None


def test_a_number_that_cannot_be_read_ends_its_job_and_no_other(worker: Worker, tmp_path: Path) -> None:
    batch_id = store_lines(worker.database, tmp_path, [ask(PARCELS, body=chat("x", seed=77_077)), ask(PARCELS)])
    execute(worker.database, "UPDATE jobs SET body = replace(body, '77077', '1e999')")  # submit lets it pass
    assert worker.feed().jobs == 2
    bad, good = lines_of(worker.database, batch_id)
    assert (bad["error"]["code"], good["error"]) == ("invalid_request", None)
    assert "Number out of range" in bad["error"]["message"]


def test_a_worker_without_a_way_to_documents_says_what_it_lacks(
    worker: Worker, engine: ShownEndpoint, tmp_path: Path
) -> None:
    worker.retrieval = None
    line, conversation, plain = worker.run(tmp_path, ask(PARCELS), talk("one", collection="c"), {"body": chat("plain")})
    for one in (line, conversation):
        assert one["error"]["code"] == "retrieval_unavailable"
        assert "STOKER_CACHE__CHROMA_URL" in one["error"]["message"]
    assert (plain["error"], len(engine.bodies)) == (None, 1)


def test_without_chroma_jobs_are_answered_with_the_same_passages(
    worker: Worker, engine: ShownEndpoint, tmp_path: Path
) -> None:
    [with_chroma] = worker.run(tmp_path, ask(PARCELS))
    library = Library(worker.database, Index(NOBODY, timeout_s=1.0), worker.embed)
    worker.retrieval = Retrieval(library, window_tokens=4096)
    [without] = worker.run(tmp_path, ask(PARCELS))
    assert without["stoker"]["passages"] == with_chroma["stoker"]["passages"]
    assert (without["stoker"]["source"], len(engine.bodies)) == ("exact", 1)


def test_another_embedders_vectors_are_not_compared(worker: Worker, engine: ShownEndpoint, tmp_path: Path) -> None:
    execute(worker.database, "UPDATE collections SET embedder = 'another'")
    [line] = worker.run(tmp_path, ask(PARCELS))
    assert (line["error"]["code"], engine.bodies) == ("other_embedder", [])


def test_a_shard_of_plain_jobs_and_others_has_each_answered_as_it_asks(
    worker: Worker, engine: ShownEndpoint, tmp_path: Path
) -> None:
    lines = [{"body": chat(PARCELS)}, ask(PARCELS, top_k=1), talk(PARCELS), ask("Soup?", query="lentils", top_k=1)]
    plain, parcel, conversation, soup = worker.run(tmp_path, *lines)
    assert "passages" not in plain["stoker"]
    assert (names(parcel), names(soup)) == (["parcel"], ["soup"])
    assert "passages" not in conversation["stoker"]["conversation"]
    assert sum(prompt == PARCELS for [prompt] in map(engine.texts, range(4))) == 2


def test_equal_lines_follow_none_since_their_passages_may_differ(
    worker: Worker, engine: ShownEndpoint, tmp_path: Path
) -> None:
    batch_id = store_lines(worker.database, tmp_path, [ask(PARCELS, top_k=1)] * 3)
    row = batch_row(worker.database, batch_id)
    assert (row["total"], row["followers"]) == (3, 0)
    assert worker.feed().jobs + worker.feed_again().jobs == 3
    assert [names(line) for line in lines_of(worker.database, batch_id)] == [["parcel"]] * 3
    assert len(engine.bodies) == 1, "they have one key in the exact cache"


def test_embeddings_with_a_collection_are_refused_at_submit(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    line = {"custom_id": "1", "method": "POST", "url": EMBEDDINGS, "body": {"model": "m", "input": "x"}}
    file.write_text(json.dumps(line | {"stoker": {"collection": "c"}}))
    with pytest.raises(InvalidFile) as caught:
        dry_run(
            file,
            options=SubmitOptions(max_output_tokens=64),
            settings=Settings.model_construct(),
            served_models=None,
        )
    assert str(caught.value.problems[0]).startswith("line 1: stoker.collection: has no sense for embeddings")


def test_each_turn_of_a_conversation_has_its_own_passages_and_the_history_none(
    worker: Worker, engine: ShownEndpoint, tmp_path: Path
) -> None:
    moon = "What is the moon made of?"
    [line] = worker.run(tmp_path, talk(PARCELS, moon, collection="c", top_k=1))
    [first], [*before, second] = engine.texts(0), engine.texts(1)
    assert before == [PARCELS, "answer 1, as [1] and [9] say"]
    assert [one[1] for one in PASSAGE.findall(first)] == ["parcel.txt"]
    assert [one[1] for one in PASSAGE.findall(second)] == ["moon.txt"]
    conversation = line["stoker"]["conversation"]
    assert [message["content"] for message in conversation["messages"]][::2] == [PARCELS, moon]
    assert [[Path(one["source"]).stem for one in turn] for turn in conversation["passages"]] == [["parcel"], ["moon"]]
    assert conversation["citations"] == [[1], [1]]
    [later] = worker.run(tmp_path, talk("And now?", conversation=conversation["id"]))
    assert engine.texts()[:-1] == [message["content"] for message in conversation["messages"]]
    assert later["error"] is None


@pytest.mark.parametrize("changed", [True, False])
def test_turns_are_asked_again_from_the_first_whose_passages_have_changed_between_attempts(
    worker: Worker, tmp_path: Path, changed: bool
) -> None:
    turns = [PARCELS, "What is the moon made of? [[fail 1 times]]"]
    with ScriptedEndpoint() as own:
        worker.engine_url = own.url
        batch_id = store_lines(worker.database, tmp_path, [talk(*turns, collection="c", top_k=1)])
        assert worker.feed().jobs == 0
        worker.read(parcel=PARCEL.replace("nine", "eleven" if changed else "nine"))
        assert worker.feed_again().jobs == 1
        asked = own.calls().prompts
    assert sorted(asked.values()) == ([1, 1, 2] if changed else [1, 2])
    [line] = lines_of(worker.database, batch_id)
    [first, _] = line["stoker"]["conversation"]["passages"]
    told = line["stoker"]["conversation"]["messages"][1]["content"]
    assert (changed, len(first)) == ("eleven days" in told, 1), "what is told is what was shown"
