"""Which passages are found for a question: by meaning, by words in Postgres, by both fused; how long passages are best.

    python -m benchmarks.retrieval [--folder .checkpoints/debian-docs] [--postgres URL]

The questions are benchmarks.retrieval_questions'. A passage answers one if it has half of the answer, or the answer
half of it. Recall@5 is the share of the questions with such a passage among the first five. "In 1,000 tokens" is the
same of as many as have no more tokens than that together, since longer passages answer more easily and cost a prompt
more; "of the answer" is how much of it these have, on average. MRR is the mean of 1 / the rank of the first one, to
rank 100. Brackets are 95% of 2,000 bootstraps over the questions; the methods' differences are of the same questions.

Rank functions are chosen by every other question; `recall_held_out` is of the others. Passages are searched exactly, in
one numpy product. Embeddings are kept in the folder between runs. Writes benchmarks/results/retrieval.json.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg import sql
from rich.console import Console
from rich.table import Table

import cache.embedder
from benchmarks.banking77 import EMBEDDER
from benchmarks.paired import Ratio, by_turns, keep_run, made_with
from benchmarks.retrieval_questions import FOLDER, Question, QuestionSet, question_set
from benchmarks.rows import Row
from cache.embedder import TOKENS_AT_ONCE, OnnxEmbedder
from cache.score import Vectors
from documents.fusion import fuse
from documents.passages import MOST_TOKENS, Passage, Splitter, embedded_text

COMMAND: Final = "`python -m benchmarks.retrieval`"
LENGTHS: Final = (100, 150, 200, 254)
FOUND: Final = 100  # passages of each ranking that are looked at
TOP: Final = 5
PROMPT_TOKENS: Final = 1_000
DEPTHS: Final = (20, 50, 100)
DEPTH: Final = 50
BOOTSTRAPS: Final = 2_000
EMBEDDED: Final = 128  # passages of a round of the rates
TURNS: Final = 3
EMBEDDED_AT_ONCE: Final = 2_000  # between two writes of the vectors that are kept

# A question as the OR of its lexemes. A cast, since to_tsquery would stem the stems again.
BY_RANK: Final = f"""
SELECT place FROM passage, (SELECT replace(plainto_tsquery('english', %(question)s)::text, '&', '|')::tsquery AS query)
    AS asked
WHERE words @@ query ORDER BY $score DESC, place LIMIT {FOUND}"""
# ts_rank knows no rare words. Here each lexeme has its own rank, times the logarithm of how rare it is.
BY_RARITY: Final = f"""
WITH lexeme AS (
    SELECT quote_literal(word)::tsquery AS query
    FROM unnest(tsvector_to_array(to_tsvector('english', %(question)s))) AS word
), counted AS (
    SELECT query, (SELECT count(*) FROM passage WHERE words @@ query) AS passages FROM lexeme
), asked AS MATERIALIZED (
    SELECT query, ln((SELECT count(*) FROM passage)::float8 / passages) AS rarity FROM counted WHERE passages > 0
)
SELECT place FROM passage JOIN asked ON words @@ query
GROUP BY place ORDER BY sum(rarity * $score) DESC, place LIMIT {FOUND}"""
TEXT_ONLY, BOTH_ALIKE, HEADING_FIRST, HEADING_LITTLE = "{0,0,1,0}", "{0,0,1,1}", "{0,0,0.4,1}", "{0,0,1,0.4}"
# Weights are those of D, C, B, A: the text is B and the headings are A. Flags: 1 divides by 1 + log(length), 2 by the
# length, 8 by the number of different words.
FURTHER: Final = {
    "in 1,000 tokens": "recall_in_1000_tokens",
    "of the answer": "answer_in_1000_tokens",
    "of 50": "recall_of_50",
}
DENSE_HEADINGS: Final = "dense, headings before the text"
PATH_CHARS: Final = 160  # of the heading path: some 40 tokens

Floats = NDArray[np.float64]
Rankings = list[list[int]]


@dataclass(frozen=True, slots=True)
class Cut:
    """All documents' passages of one length; of each question which `answers` it, and the share of it that each has."""

    most_tokens: int
    passages: list[Passage]
    answers: list[frozenset[int]]
    shares: list[dict[int, float]]
    cut_s: float


@dataclass(frozen=True, slots=True)
class Rank:
    """A rank function of Postgres, its weights and flags. `rarity`: the sum of each lexeme's ts_rank times its idf."""

    function: str
    weights: str
    flags: int

    @property
    def name(self) -> str:
        return f"{self.function} {self.weights} {self.flags}"

    @property
    def select(self) -> str:
        """The best passages for %(question)s, best first."""
        score = f"{self.function.replace('rarity', 'ts_rank')}('{self.weights}', words, query, {self.flags})"
        statement = BY_RARITY if self.function == "rarity" else BY_RANK
        return statement.replace("$score", score)


RANKS: Final = tuple(
    Rank(function, weights, flags)
    for function in ("ts_rank", "ts_rank_cd", "rarity")
    for weights, flags in (
        *((TEXT_ONLY, flags) for flags in (0, 1, 2, 8)),
        *((weights, flags) for weights in (BOTH_ALIKE, HEADING_FIRST, HEADING_LITTLE) for flags in (0, 1)),
    )
)


def main() -> None:
    """Measure, print, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--postgres", default="postgresql://postgres@127.0.0.1:5432")
    options = parser.parse_args()
    asked = question_set(options.folder)
    print(f"{len(asked.documents)} documents, {len(asked.questions)} questions", flush=True)
    report: dict[str, Any] = {"made_with": {**made_with("onnxruntime", "semantic-text-splitter"), **asked.packages}}
    report |= {"documents": len(asked.documents), "questions": len(asked.questions), "found": FOUND}
    report["rates"] = rates(cut_of(asked, MOST_TOKENS).passages)
    with database(options.postgres) as connection:
        report["made_with"]["postgres"] = connection.info.parameter_status("server_version")
        report |= measured(connection, asked, options.folder)
    report["table"] = [row.as_json() for row in table_rows(report)]
    show(report)
    keep_run("retrieval", report, parser, options)


def measured(connection: psycopg.Connection[Any], asked: QuestionSet, folder: Path) -> dict[str, Any]:
    """At the default length every rank function, depth and weight; then every length, with what was chosen."""
    embedder = OnnxEmbedder(EMBEDDER)
    texts = [question.text for question in asked.questions]
    bench = Bench(connection, embedder, folder, texts, embedder.embed(texts))
    cut = cut_of(asked, MOST_TOKENS)
    dense = bench.dense(cut, embedded_text)
    store(connection, cut)
    ranks = [rank_row(cut, rank, *bench.searched(rank), dense) for rank in RANKS]
    chosen = {kind: best_of(ranks, is_rarity=is_rarity) for kind, is_rarity in (("text", False), ("rarity", True))}
    lengths = [length_row(one := cut_of(asked, length), bench.methods(one, chosen)) for length in LENGTHS]
    methods = bench.methods(cut, chosen)
    return {
        "ranks": ranks,
        "chosen": {kind: {"rank": rank.name, "sql": rank.select} for kind, rank in chosen.items()},
        "lengths": lengths,
        "fusions": fusions(cut, methods),
        "differences": differences(cut, methods),
    }


@dataclass(frozen=True, slots=True)
class Bench:
    """What finds passages for all questions: `texts` and their `vectors`."""

    connection: psycopg.Connection[Any]
    embedder: OnnxEmbedder
    folder: Path
    texts: Sequence[str]
    vectors: Vectors

    def methods(self, cut: Cut, chosen: Mapping[str, Rank]) -> dict[str, Rankings]:
        """What every method finds, by its name."""
        store(self.connection, cut)
        found = {"dense": self.dense(cut, embedded_text), DENSE_HEADINGS: self.dense(cut, with_headings)}
        for kind, rank in chosen.items():
            found[kind] = self.searched(rank)[0]
            found[f"dense + {kind}"] = fused([found["dense"], found[kind]], depth=DEPTH)
        return found

    def dense(self, cut: Cut, text_of: Callable[[Passage], str]) -> Rankings:
        """The passages of the highest cosine."""
        vectors = embedded([text_of(passage) for passage in cut.passages], self.embedder, self.folder)
        order = np.argsort(-(self.vectors @ vectors.T), axis=1, kind="stable")[:, :FOUND]
        return [[int(place) for place in row] for row in order]

    def searched(self, rank: Rank) -> tuple[Rankings, float]:
        """What Postgres finds among the passages that are stored, and the milliseconds that a question takes."""
        began, statement = time.monotonic(), sql.SQL(rank.select)
        rows = [self.connection.execute(statement, {"question": text}).fetchall() for text in self.texts]
        return [[place for (place,) in found] for found in rows], 1000 * (time.monotonic() - began) / len(self.texts)


def with_headings(passage: Passage) -> str:
    """The end of its heading path, and its text."""
    return f"{passage.heading[-PATH_CHARS:]}\n{passage.text}" if passage.heading else passage.text


def rank_row(cut: Cut, rank: Rank, found: Rankings, ms: float, dense: Rankings) -> dict[str, Any]:
    """What a rank function finds, alone and fused with what is found by meaning."""
    both = figures(cut, fused([dense, found], depth=DEPTH))
    row = {**asdict(rank), "name": rank.name, "ms": round(ms, 1), "alone": figures(cut, found), "fused": both}
    print(rank.name, f"{row['ms']} ms", *(f"{row[way]['recall']:.3f}" for way in ("alone", "fused")), flush=True)
    return row


def best_of(ranks: Sequence[dict[str, Any]], *, is_rarity: bool) -> Rank:
    """The one whose fusion has the best recall and MRR of the first half of the questions."""
    rows = [row for row in ranks if (row["function"] == "rarity") is is_rarity]
    best = max(rows, key=lambda row: float(row["fused"]["recall_chosen_by"] + row["fused"]["mrr_chosen_by"]))
    return Rank(best["function"], best["weights"], best["flags"])


def cut_of(asked: QuestionSet, most_tokens: int) -> Cut:
    """The passages of all documents, and those that answer each question."""
    splitter = Splitter(EMBEDDER / "tokenizer.json", most_tokens=most_tokens)
    began = time.monotonic()
    passages: list[Passage] = []
    firsts = [0]
    for document in asked.documents:
        passages += splitter.cut(document.markdown)
        firsts.append(len(passages))
    cut_s = time.monotonic() - began
    answers, shares = [], []
    for question in asked.questions:
        places = range(firsts[question.document], firsts[question.document + 1])
        chars = {at: found for at in places if (found := overlap(question, passages[at])) > 0}
        answers.append(frozenset(at for at in chars if 2 * chars[at] >= min(question.chars, len(passages[at].text))))
        shares.append({at: found / question.chars for at, found in chars.items()})
    return Cut(most_tokens, passages, answers, shares, cut_s)


def overlap(question: Question, passage: Passage) -> int:
    """How many characters of the answer a passage of its document has; less than 0 where it is apart."""
    return min(question.end, passage.end) - max(question.start, passage.start)


def embedded(texts: Sequence[str], embedder: OnnxEmbedder, folder: Path) -> Vectors:
    """Their vectors: those that the folder has not yet are computed and kept there."""
    names = [hashlib.sha256(f"{embedder.id}\0{text}".encode()).hexdigest() for text in texts]
    path = folder / "vectors.npz"
    known: dict[str, Any] = {}
    if path.is_file():
        with np.load(path) as kept:
            known = dict(zip(kept["names"].tolist(), kept["vectors"], strict=True))
    missing = {name: text for name, text in zip(names, texts, strict=True) if name not in known}
    for at in range(0, len(missing), EMBEDDED_AT_ONCE):
        part = list(missing)[at : at + EMBEDDED_AT_ONCE]
        known |= zip(part, embedder.embed([missing[name] for name in part]), strict=True)
        np.savez(path, names=np.array(list(known)), vectors=np.array(list(known.values()), np.float32))
    return np.array([known[name] for name in names], np.float32)


@contextmanager
def database(url: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection to a database of its own, which is dropped after the block."""
    name = sql.Identifier(f"stoker_bench_{uuid4().hex[:8]}")
    with psycopg.connect(url, dbname="postgres", autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {}").format(name))
        try:
            with psycopg.connect(url, dbname=name.as_string(admin).strip('"'), autocommit=True) as connection:
                yield connection
        finally:
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(name))


def store(connection: psycopg.Connection[Any], cut: Cut) -> None:
    """The passages as rows with their words, the headings of weight A and the text of weight B, and the index."""
    connection.execute("DROP TABLE IF EXISTS passage")
    connection.execute(
        "CREATE TABLE passage (place int PRIMARY KEY, heading text, body text NOT NULL, words tsvector "
        "GENERATED ALWAYS AS (setweight(to_tsvector('english', coalesce(heading, '')), 'A') || "
        "setweight(to_tsvector('english', body), 'B')) STORED)"
    )
    with connection.cursor() as cursor, cursor.copy("COPY passage (place, heading, body) FROM STDIN") as copy:
        for place, passage in enumerate(cut.passages):
            copy.write_row((place, passage.heading, passage.text.replace("\0", "")))
    connection.execute("CREATE INDEX ON passage USING gin (words)")
    connection.execute("VACUUM ANALYZE passage")


def fused(methods: Sequence[Rankings], *, depth: int) -> Rankings:
    """The methods' rankings of each question, to a depth, fused."""
    return [
        [place for place, _ in fuse([ranking[:depth] for ranking in rankings], most=FOUND)]
        for rankings in zip(*methods, strict=True)
    ]


def figures(cut: Cut, found: Rankings) -> dict[str, Any]:
    """Recall and MRR of all questions, with their intervals, and of both halves."""
    hits, ranks, prompts = hits_of(cut, found), ranks_of(cut, found), in_prompt(cut, found)
    held = [sum(share.get(at, 0.0) for at in prompt) for share, prompt in zip(cut.shares, prompts, strict=True)]
    return {
        "recall": round(float(hits.mean()), 4),
        "recall_interval": interval(hits),
        "recall_chosen_by": round(float(hits[::2].mean()), 4),
        "recall_held_out": round(float(hits[1::2].mean()), 4),
        "mrr": round(float(ranks.mean()), 4),
        "mrr_interval": interval(ranks),
        "mrr_chosen_by": round(float(ranks[::2].mean()), 4),
        "recall_in_1000_tokens": round(float(hits_of(cut, prompts, top=FOUND).mean()), 4),
        "answer_in_1000_tokens": round(statistics.mean(held), 4),
        "recall_of_50": round(float(hits_of(cut, found, top=50).mean()), 4),
    }


def hits_of(cut: Cut, found: Rankings, *, top: int = TOP) -> Floats:
    """1 for each question that is answered by one of the first."""
    pairs = zip(cut.answers, found, strict=True)
    return np.array([not right.isdisjoint(ranking[:top]) for right, ranking in pairs], np.float64)


def in_prompt(cut: Cut, found: Rankings) -> Rankings:
    """Of each ranking the first that have no more than PROMPT_TOKENS together."""
    ends = [np.cumsum([cut.passages[place].tokens for place in ranking]) for ranking in found]
    lengths = [int(np.searchsorted(end, PROMPT_TOKENS, side="right")) for end in ends]
    return [ranking[:length] for ranking, length in zip(found, lengths, strict=True)]


def ranks_of(cut: Cut, found: Rankings) -> Floats:
    """1 / rank of each question's first passage that answers it, 0 where there is none."""
    pairs = zip(cut.answers, found, strict=True)
    return np.array(
        [next((1 / rank for rank, place in enumerate(ranking, 1) if place in right), 0.0) for right, ranking in pairs]
    )


def interval(values: Floats) -> list[float]:
    """95% of the means of bootstraps over the questions."""
    draw = np.random.default_rng(0)
    means = values[draw.integers(len(values), size=(BOOTSTRAPS, len(values)))].mean(axis=1)
    return [round(float(bound), 4) for bound in np.percentile(means, (2.5, 97.5))]


def length_row(cut: Cut, found: dict[str, Rankings]) -> dict[str, Any]:
    """One length: what it is cut into, and what every method makes of it."""
    return {
        "most_tokens": cut.most_tokens,
        "passages": len(cut.passages),
        "mean_tokens": round(statistics.mean(passage.tokens for passage in cut.passages), 1),
        "cut_chars_per_s": round(sum(len(passage.text) for passage in cut.passages) / cut.cut_s),
        "unanswerable": sum(not right for right in cut.answers),
        "methods": {name: figures(cut, rankings) for name, rankings in found.items()},
    }


def fusions(cut: Cut, found: dict[str, Rankings]) -> list[dict[str, Any]]:
    """Depths and weights of the fusion; a ranking that is there twice weighs twice."""
    rows = []
    for kind in ("text", "rarity"):
        for dense, words in ((1, 1), (2, 1), (3, 1), (1, 2)):
            for depth in DEPTHS:
                ranking = fused([found["dense"]] * dense + [found[kind]] * words, depth=depth)
                rows.append({"of": f"dense × {dense} + {kind} × {words}", "depth": depth, **figures(cut, ranking)})
    return rows


def differences(cut: Cut, found: dict[str, Rankings]) -> list[dict[str, Any]]:
    """Of the methods, question by question."""
    pairs = (
        ("dense + text", "dense"),
        ("dense + rarity", "dense"),
        ("dense + rarity", "rarity"),
        ("dense + rarity", "dense + text"),
        ("rarity", "text"),
        ("dense", "text"),
        (DENSE_HEADINGS, "dense"),
    )
    rows = []
    for one, other in pairs:
        recall = hits_of(cut, found[one]) - hits_of(cut, found[other])
        ranks = ranks_of(cut, found[one]) - ranks_of(cut, found[other])
        means = {"recall": round(float(recall.mean()), 4), "mrr": round(float(ranks.mean()), 4)}
        intervals = {"recall_interval": interval(recall), "mrr_interval": interval(ranks)}
        rows.append({"of": f"{one} − {other}", **means, **intervals})
    return rows


def rates(passages: Sequence[Passage]) -> list[dict[str, Any]]:
    """Passages a second by ways of using two cores and by how many are computed together, beside the first way's.

    Milliseconds of CPU do not depend on who else uses the cores, as the rates do."""
    texts = [embedded_text(passage) for passage in passages[:: max(1, len(passages) // EMBEDDED)]][:EMBEDDED]
    spawned = multiprocessing.get_context("spawn")
    rows = []
    with ExitStack() as stack:
        processes = stack.enter_context(ProcessPoolExecutor(2, spawned, initializer=start_embedder))
        threads = stack.enter_context(ThreadPoolExecutor(2))
        whole, halves = OnnxEmbedder(EMBEDDER, threads=2), [OnnxEmbedder(EMBEDDER, threads=1) for _ in range(2)]
        for at_once in (256, 512, 1024, 4096):
            ways = {
                "one, threads=2": Way(threads, [whole.embed], texts, at_once),
                "one, threads=1": Way(threads, [halves[0].embed], texts, at_once),
                "two threads of threads=1": Way(threads, [half.embed for half in halves], texts, at_once),
                "two processes of threads=1": Way(processes, [EmbedHere(at_once)] * 2, texts, at_once),
            }
            found = by_turns(ways, pairs=TURNS)
            for name, way in ways.items():
                beside = Ratio.of(found[name], found["one, threads=2"])
                row = {"way": name, "tokens_at_once": at_once, "passages_per_s": statistics.median(found[name])}
                rows.append({**row, "beside_one_threads_2": asdict(beside), "cpu_ms": statistics.median(way.cpu_ms)})
                print(rows[-1], flush=True)
    return rows


@dataclass(frozen=True, slots=True)
class Way:
    """A way to embed: each embedder its share of the texts. What is called gives texts a second."""

    executor: Executor
    embedders: Sequence[Callable[[Sequence[str]], object]]
    texts: Sequence[str]
    at_once: int
    cpu_ms: list[float] = field(default_factory=list)

    def __call__(self) -> float:
        vars(cache.embedder)["TOKENS_AT_ONCE"] = self.at_once
        began, cpu_began = time.monotonic(), time.process_time()
        shares = [self.texts[at :: len(self.embedders)] for at in range(len(self.embedders))]
        runs = [self.executor.submit(embed, share) for embed, share in zip(self.embedders, shares, strict=True)]
        elsewhere_s = sum(found for run in runs if isinstance(found := run.result(), float))
        cpu_s = time.process_time() - cpu_began + elsewhere_s
        self.cpu_ms.append(round(1000 * cpu_s / len(self.texts), 2))
        return round(len(self.texts) / (time.monotonic() - began), 2)


_HERE: list[OnnxEmbedder] = []  # of a process of the rates


def start_embedder() -> None:
    """In a process of its own."""
    _HERE.append(OnnxEmbedder(EMBEDDER, threads=1))


@dataclass(frozen=True, slots=True)
class EmbedHere:
    """Embeds in the process that it is called in, and gives its seconds of CPU."""

    at_once: int

    def __call__(self, texts: Sequence[str]) -> float:
        vars(cache.embedder)["TOKENS_AT_ONCE"] = self.at_once
        began = time.process_time()
        _HERE[0].embed(texts)
        return time.process_time() - began


def table_rows(report: dict[str, Any]) -> list[Row]:
    """The figures of the table."""
    [length] = [length for length in report["lengths"] if length["most_tokens"] == MOST_TOKENS]
    figure = (
        f"{report['questions']} questions of Debian's FAQs about {length['passages']:,} passages of manuals: an answer "
        "is among the first five by meaning, by ts_rank, by rare words, by meaning and rare words fused"
    )
    shown = [f"{length['methods'][name]['recall']:.1%}" for name in ("dense", "text", "rarity", "dense + rarity")]
    [two] = [r for r in report["rates"] if r["way"][:7] == "two thr" and r["tokens_at_once"] == TOKENS_AT_ONCE]
    rate = f"{two['passages_per_s']:.0f} a second, {two['cpu_ms']:.0f} ms of CPU each"
    found = Row(figure, f"{', '.join(shown[:-1])}, **{shown[-1]}**", COMMAND, headline=True)
    return [found, Row("passages of that length embedded by two threads", rate, COMMAND)]


def show(report: dict[str, Any]) -> None:
    """Print the main tables."""
    console = Console(width=160)
    table = Table("passages of", "method", "recall@5", "95%", "MRR", "95%", *FURTHER)
    for length in report["lengths"]:
        for name, row in length["methods"].items():
            table.add_row(f"≤ {length['most_tokens']} ({length['passages']:,})", name, *cells(row))
    console.print(table)
    table = Table("fused", "depth", "recall@5", "95%", "MRR", "95%", *FURTHER)
    for row in report["fusions"]:
        table.add_row(row["of"], str(row["depth"]), *cells(row))
    console.print(table)
    for row in report["differences"]:
        console.print(f"{row['of']}: recall {row['recall']:+.3f} {row['recall_interval']}, MRR {row['mrr']:+.3f}")


def cells(row: dict[str, Any]) -> list[str]:
    """A method's figures."""
    spans = {name: "{:.3f} to {:.3f}".format(*row[f"{name}_interval"]) for name in ("recall", "mrr")}
    main = [f"{row['recall']:.3f}", spans["recall"], f"{row['mrr']:.3f}", spans["mrr"]]
    return [*main, *(f"{row[name]:.3f}" for name in FURTHER.values())]


if __name__ == "__main__":
    main()
