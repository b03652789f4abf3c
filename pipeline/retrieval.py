"""Passages for jobs that name a collection: found for a whole shard at once, put into their prompts, told in results.

It stands before the exact cache, whose keys have the passages' digests: what a collection says of a question is part
of the question. A job whose passages cannot be had does not run without them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any, Final

import msgspec

from cache.answers import answer_text
from cache.keys import read_body
from documents.prompt import Source, citations, fitting, passages_block, put_in, question_of
from models.jobs import Job, JobResult, failed
from models.line_settings import LineSettings, read_settings
from pipeline.adding import is_url
from pipeline.search import Hit, Library
from runtime.errors import NotFound, Permanent, ServiceUnreachable, Transient
from store.shards import Claim

TOP_K: Final = 8
CONTEXT_TOKENS: Final = 1_024  # of passages where the line states no budget, if the window has room; chosen
FRAME_TOKENS: Final = 150  # of rules and the chat template
BYTES_A_TOKEN: Final = 3
# Of a long message; its end, where a question stands more often. The embedder reads some 1,000 characters.
QUERY_CHARACTERS: Final = 1_000


@dataclass(frozen=True, slots=True)
class Retrieved:
    """A job's body with passages in it; `digests` of these in their order, `told` is what the result says of each."""

    body: str
    digests: tuple[str, ...]
    told: Sequence[Mapping[str, Any]]

    def tell(self, result: JobResult) -> JobResult:
        """The result with its passages and which of them the answer cites."""
        answer = answer_text(result.response or "") or ""
        told = msgspec.json.decode(result.stoker) if result.stoker else {}
        told |= {"passages": self.told, "citations": citations(answer, len(self.told))}
        return replace(result, stoker=msgspec.json.encode(told).decode())


@dataclass(frozen=True, slots=True)
class _Wish:
    job: Job
    settings: LineSettings
    fields: dict[str, Any]
    query: str

    def budget_tokens(self, window_tokens: int) -> int:
        """How many tokens its passages may have: what the line says, else what its window or the engine's leaves."""
        if self.settings.context_tokens is not None:
            return self.settings.context_tokens
        output: int = self.fields.get("max_completion_tokens") or self.fields.get("max_tokens") or 0
        left = (
            (self.settings.window_tokens or window_tokens)
            - output
            - len(self.job.body.encode()) // BYTES_A_TOKEN
            - FRAME_TOKENS
        )
        return max(0, min(CONTEXT_TOKENS, left))


class Retrieval:
    """Finds what jobs ask for, in collections of their tenant. `window_tokens` is the engine's."""

    def __init__(self, library: Library, *, window_tokens: int) -> None:
        self._library = library
        self._window_tokens = window_tokens

    async def retrieve(self, claim: Claim, jobs: Sequence[Job]) -> dict[int, Retrieved | JobResult | Transient]:
        """For each of these jobs that names a collection, by seq: its prompt with passages, or why there is none."""
        found: dict[int, Retrieved | JobResult | Transient] = {}
        wishes: dict[tuple[str, int], list[_Wish]] = defaultdict(list)
        for job in jobs:
            settings = read_settings(job.stoker) if job.stoker else None
            if settings is None or settings.collection is None:
                continue
            try:
                fields = read_body(job.body)
                asked = question_of(fields)
            except (Permanent, ValueError, RecursionError) as error:  # such as 1e999, which no Python float is
                found[job.seq] = failed(job.seq, code="invalid_request", message=str(error))
            else:
                wishes[settings.collection, settings.top_k or TOP_K].append(
                    _Wish(job, settings, fields, _searchable(settings.query or asked))
                )
        for (collection, top_k), group in wishes.items():
            found |= await self._for_group(claim.tenant, collection, top_k, group)
        return found

    async def _for_group(
        self, tenant: str, collection: str, top_k: int, group: Sequence[_Wish]
    ) -> dict[int, Retrieved | JobResult | Transient]:
        try:
            hits = await self._library.search(
                [wish.query for wish in group], tenant=tenant, collection=collection, top_k=top_k
            )
        except NotFound as error:
            return {w.job.seq: failed(w.job.seq, code="collection_not_found", message=str(error)) for w in group}
        except Permanent as error:
            return {w.job.seq: failed(w.job.seq, code=error.code, message=str(error)) for w in group}
        except Transient as error:
            return {w.job.seq: error for w in group}
        except ServiceUnreachable as error:
            return {w.job.seq: Transient(str(error)) for w in group}
        return {
            wish.job.seq: _put_in(wish, found, tokens=wish.budget_tokens(self._window_tokens))
            for wish, found in zip(group, hits, strict=True)
        }


def shown(hit: Hit) -> tuple[Source, dict[str, Any]]:
    """A found passage as it stands in a prompt, and as a result tells of it."""
    passage = hit.passage
    name = passage.source if is_url(passage.source) else PurePath(passage.source).name
    place = f"page {passage.page}" if passage.page else passage.heading or ""
    told = {
        "document": passage.document_id,
        "source": passage.source,
        "page": passage.page,
        "heading": passage.heading,
        "start": passage.start,
        "end": passage.end,
        "score": round(hit.score, 4),
        "digest": passage.digest.hex(),
    }
    return Source(name, place, passage.text, passage.tokens), told


def _searchable(text: str) -> str:
    """Its end, without what Postgres would refuse."""
    return text[-QUERY_CHARACTERS:].replace("\0", " ").encode(errors="ignore").decode()


def _put_in(wish: _Wish, hits: Sequence[Hit], *, tokens: int) -> Retrieved | JobResult:
    """The body with those passages that fit the budget; as it was where none was found."""
    both = [shown(hit) for hit in hits]
    places = fitting([source for source, _ in both], tokens=tokens)
    if hits and not places:
        message = (
            f"{tokens:,} tokens are left for passages, and the shortest that was found has "
            f"{min(hit.passage.tokens for hit in hits):,}; lower max_tokens, shorten the prompt, or raise the window"
        )
        return failed(wish.job.seq, code="window_too_small", message=message)
    if not places:
        return Retrieved(wish.job.body, (), [])
    fields = put_in(wish.fields, passages_block([both[place][0] for place in places]))
    told = [{"n": number, **both[place][1]} for number, place in enumerate(places, 1)]
    return Retrieved(msgspec.json.encode(fields).decode(), tuple(one["digest"] for one in told), told)
