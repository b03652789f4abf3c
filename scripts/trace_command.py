"""`stoker trace`: what was recorded of a batch on this machine, as a tree."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import click
from rich.text import Text
from rich.tree import Tree

from models.names import PREFIX, batch_hex, batch_name
from runtime.errors import BadInput, NotFound, ServiceUnreachable
from runtime.settings import Settings
from runtime.trace_file import attributes_of, folder_of, read_spans
from runtime.tracing import BATCH_ID, Value
from scripts.local import connected, home_of
from scripts.lookup import named_batch, opened_database
from scripts.terminal import emit_json, emit_tree, say

FIRST_JOBS, FIRST_SHARDS = 3, 20  # that are shown of each; more of either would hide the rest
_FULL_NAME = len(PREFIX) + 32
_ROOT = "batch"


@dataclass(slots=True)
class Seen:
    """One recorded span, and what is shown under it."""

    id: str
    parent: str | None
    trace: str
    name: str
    started_ns: int
    ended_ns: int
    attributes: dict[str, Value]
    links: list[str]
    error: str | None
    under: list[Seen] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """How long it took."""
        return (self.ended_ns - self.started_ns) / 1e9


@click.command()
@click.argument("batch")
@click.option("--all", "show_all", is_flag=True, help="Every shard and every request, not only the first ones.")
@click.option("--json", "as_json", is_flag=True, help="The spans as a tree, all of them.")
@click.pass_obj
def trace(settings: Settings, batch: str, show_all: bool, as_json: bool) -> None:
    """Print what was recorded of BATCH on this machine, with STOKER_TRACE__TO=file: its way from submit to result.

    Shards have traces of their own; they stand under the batch that they belong to.
    """
    served = settings.model_copy(update={"home": home_of(settings)})
    name = _whole_name(served, batch)
    spans = [_seen(one) for one in read_spans(served, mentioning=batch_hex(name))]
    mine = [span for span in spans if span.attributes.get(BATCH_ID) == name]
    if not mine:
        raise NotFound(_nothing(served, name))
    top = grown(mine)
    if as_json:
        emit_json([_as_json(span) for span in top])
        return
    for span in top:
        tree = Tree(_line(span, began_ns=span.started_ns))
        _grow(tree, span, began_ns=span.started_ns, show_all=show_all)
        emit_tree(tree)
    if not any(span.name == _ROOT for span in top):
        say("the batch's own span is not there: it has not ended, or another machine's dispatcher wrote it")


def grown(spans: Sequence[Seen]) -> list[Seen]:
    """The spans that stand under no other, each with those under it, in the order of their beginnings.

    A shard's trace hangs under the last span that it links to and that is here: the task that ran it, else the batch.
    """
    by_id = {span.id: span for span in spans}
    top = []
    for span in sorted(by_id.values(), key=lambda one: one.started_ns):
        above = [span.parent, *reversed(span.links)] if span.parent is None else [span.parent]
        place = next((by_id[one] for one in above if one in by_id and by_id[one] is not span), None)
        if place is None:
            top.append(span)
        else:
            place.under.append(span)
    root = next((span for span in top if span.name == _ROOT), None)
    if root is not None:
        # Those whose parents were lost with a killed process are still the batch's.
        strays = [span for span in top if span is not root]
        root.under = sorted([*root.under, *strays], key=lambda one: one.started_ns)
        top = [root]
    return top


def _whole_name(settings: Settings, batch: str) -> str:
    """The name that a beginning stands for: of a batch that is recorded here, else of one that Postgres knows.

    A whole one is taken as it is. Raises NotFound and BadInput as `named_batch`.
    """
    begin = PREFIX + batch_hex(batch)
    if len(begin) == _FULL_NAME:
        return begin
    told = (str(attributes_of(span).get(BATCH_ID)) for span in read_spans(settings, mentioning=begin))
    here = {name for name in told if name.startswith(begin)}
    if len(here) > 1:
        raise BadInput(f"{batch} is the beginning of several batches; write more of it")
    if here:
        return here.pop()
    try:
        served = connected(settings)
    except ServiceUnreachable:
        raise NotFound(_nothing(settings, begin)) from None
    with opened_database(served) as database:
        return batch_name(named_batch(database, batch))


def _nothing(settings: Settings, name: str) -> str:
    if settings.trace.to not in ("off", "file"):
        return (
            f"{name} is not in {folder_of(settings)}: spans go to {settings.trace.to}, look there for trace "
            f"{batch_hex(name)}"
        )
    return (
        f"nothing is recorded of {name} in {folder_of(settings)}; set STOKER_TRACE__TO=file where workers and this "
        "command run, and submit again"
    )


def _seen(span: dict[str, Any]) -> Seen:
    status = span.get("status") or {}
    return Seen(
        id=span["spanId"],
        parent=span.get("parentSpanId"),
        trace=span["traceId"],
        name=span["name"],
        started_ns=int(span["startTimeUnixNano"]),
        ended_ns=int(span["endTimeUnixNano"]),
        attributes=attributes_of(span),
        links=[link["spanId"] for link in span.get("links", [])],
        error=status.get("message") if status.get("code") == 2 else None,
    )


def _grow(tree: Tree, span: Seen, *, began_ns: int, show_all: bool) -> None:
    """Add what is under a span: of its requests and shards the first ones, and how many more there are."""
    most = {"request": FIRST_JOBS, "shard": FIRST_SHARDS, "task": FIRST_SHARDS}
    shown: defaultdict[str, int] = defaultdict(int)
    left: defaultdict[str, list[Seen]] = defaultdict(list)
    for one in span.under:
        kind = _kind(one)
        if show_all or kind not in most or shown[kind] < most[kind] or one.error is not None:
            shown[kind] += 1
            _grow(tree.add(_line(one, began_ns=began_ns)), one, began_ns=began_ns, show_all=show_all)
        else:
            left[kind].append(one)
    for kind, ones in left.items():
        tree.add(Text(f"… and {len(ones):,} more {kind}s, {_tokens(ones)}--all shows them", style="dim"))


def _kind(span: Seen) -> str:
    if "gen_ai.operation.name" in span.attributes:
        return "request"
    if span.name in ("shard", "job"):
        return "shard" if span.name == "shard" else "request"
    return "task" if span.name.endswith(" generation") else span.name


def _tokens(spans: Iterable[Seen]) -> str:
    output = sum(int(str(span.attributes.get("gen_ai.usage.output_tokens", 0))) for span in spans)
    return f"{output:,} tokens out; " if output else ""


# Attributes that a line shows, by the name that it gives them.
_SHOWN = {
    "stoker.state": "",
    "stoker.shard.id": "shard ",
    "stoker.fence": "fence ",
    "stoker.job.seq": "job ",
    "stoker.job.step": "step ",
    "stoker.jobs": "jobs ",
    "stoker.results": "results ",
    "stoker.bytes": "bytes ",
    "stoker.passages": "passages ",
    "stoker.found.exact": "exact ",
    "stoker.found.semantic": "semantic ",
    "stoker.found.duplicate": "duplicate ",
    "stoker.missed": "to ask ",
    "stoker.endpoint": "by ",
    "gen_ai.usage.input_tokens": "tokens in ",
    "gen_ai.usage.output_tokens": "tokens out ",
    "stoker.process": "",
}


def _line(span: Seen, *, began_ns: int) -> Text:
    """Its name, when it began after the whole, how long it took, and what it states."""
    line = Text(span.name, style="bold")
    line.append(f"  {(span.started_ns - began_ns) / 1e9:+.2f} s", style="dim")
    line.append(f"  {_duration(span.seconds)}", style="cyan")
    for key, label in _SHOWN.items():
        if (value := span.attributes.get(key)) is not None:
            line.append(f"  {label}{value:,}" if isinstance(value, int) else f"  {label}{value}", style="default")
    if span.error is not None:
        line.append(f"  {span.error}", style="red")
    if span.name == _ROOT:
        line.append(f"  trace {span.trace}", style="dim")
    return line


def _duration(seconds: float) -> str:
    return f"{seconds * 1000:,.1f} ms" if seconds < 1 else f"{seconds:,.2f} s"


def _as_json(span: Seen) -> dict[str, Any]:
    return {
        "name": span.name,
        "trace_id": span.trace,
        "span_id": span.id,
        "seconds": span.seconds,
        "error": span.error,
        "attributes": span.attributes,
        "under": [_as_json(one) for one in span.under],
    }
