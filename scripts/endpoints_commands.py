"""Commands about registered endpoints: add, list, check, remove. A key is never given here, only where it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import click

from models.endpoints import EndpointSpec, Prices, RatesSeen
from models.states import Trust
from pipeline.endpoints import KEY_REMEDY, KnownEndpoint, directory, endpoints_in, read_endpoint
from pipeline.probing import EndpointLook, look_at
from runtime.errors import EXIT_UNREACHABLE, BadInput, NotFound, ServiceUnreachable
from runtime.settings import Settings
from scripts.local import connected
from scripts.lookup import opened_database
from scripts.terminal import emit, emit_json, emit_table, say
from store.endpoints import add_endpoint, remove_endpoint, replace_endpoint
from store.presence import PresenceBoard

_as_json = click.option("--json", "as_json", is_flag=True)


def _refuse_key(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    """A key on a command line stands in the shell's history, and every process of the machine can read it."""
    del ctx
    if value is not None:
        raise BadInput(
            f"{param.opts[0]}: a key does not belong on a command line; take it back there, and {KEY_REMEDY}"
        )


@click.group()
def endpoints() -> None:
    """Endpoints beside the workers' own engines: other servers of yours, and managed providers."""


@endpoints.command()
@click.argument("name")
@click.argument("url")
@click.option(
    "--model",
    "models",
    metavar="ALIAS[=THEIRS]",
    multiple=True,
    required=True,
    help="What jobs call a model, and what it is called there. Repeatable.",
)
@click.option("--serves", type=click.Choice(["generation", "embeddings"]), help="Without: generation.")
@click.option(
    "--trust",
    type=click.Choice([trust.value for trust in Trust]),
    help="own: a machine of yours, any batch may go there. external: only batches submitted with --trust external. "
    "Without: external.",
)
@click.option(
    "--auth", type=click.Choice(["bearer", "api-key", "x-api-key"]), help="The header of its key. Without: bearer."
)
@click.option("--key-env", metavar="NAME", help="The environment variable of the workers that has its key.")
@click.option("--key-file", type=click.Path(path_type=Path), help="The file on the workers' machines that has its key.")
@click.option("--key", "--api-key", "--token", hidden=True, expose_value=False, callback=_refuse_key)
@click.option("--input-price", metavar="MONEY", help="For a million prompt tokens, in STOKER_COST__CURRENCY.")
@click.option("--output-price", metavar="MONEY", help="For a million output tokens.")
@click.option("--cached-price", metavar="MONEY", help="For a million prompt tokens that it had cached.")
@click.option("--hour-price", metavar="MONEY", help="What an own one's machine costs an hour.")
@click.option("--requests-per-minute", type=int, help="The most that it may be asked, by all workers together.")
@click.option("--tokens-per-minute", type=int, help="The most tokens, of prompts and answers, by all workers together.")
@click.option("--concurrency", type=int, help="The most requests at once, of all workers; without: it is found out.")
@click.option("--weight", type=float, help="Its share beside others that are alike. Without: 1.")
@click.option("--replace", is_flag=True, help="State an endpoint that is there anew.")
@_as_json
@click.pass_obj
def add(settings: Settings, /, name: str, url: str, *, replace: bool, as_json: bool, **stated: Any) -> None:
    """Add the endpoint NAME at URL, such as https://api.example.com/v1. Jobs may name its models within a minute."""
    spec = read_endpoint(_fields(name, url, stated), place=f"stoker endpoints add {name}")
    for known in endpoints_in(settings.endpoints.file):
        if known.spec.name == name:
            raise BadInput(f"the endpoint {name} is stated in {known.file}; change it there, or take another name")
    row = spec.model_dump(mode="json", exclude_none=True)
    with opened_database(connected(settings)) as database, database.transaction() as session:
        is_new = add_endpoint(session, name, row)
        if not is_new and not replace:
            raise BadInput(f"there is an endpoint {name}; --replace states it anew, `stoker endpoints remove` ends it")
        if not is_new:
            replace_endpoint(session, name, row)
    if as_json:
        emit_json(row)
        return
    emit(name)
    say(f"{name} is added; `stoker endpoints check {name}` asks it, and jobs may name its models within a minute")


@endpoints.command("list")
@_as_json
@click.pass_obj
def list_command(settings: Settings, as_json: bool) -> None:
    """List endpoints: their models, prices and limits, and how many live workers can use each."""
    settings = connected(settings)
    with opened_database(settings) as database:
        known = directory(database, settings)
    using, workers = _using(settings)
    if as_json:
        emit_json([_figures(one, using) for one in known])
        return
    if not known:
        say("no endpoints beside the workers' engines; `stoker endpoints add` adds one, see docs/endpoints.md")
        return
    rows = [_row(one, using, workers, currency=settings.cost.currency) for one in known]
    emit_table(f"endpoints (prices in {settings.cost.currency} for a million tokens)", _COLUMNS, rows)


@endpoints.command()
@click.argument("name", required=False)
@_as_json
@click.pass_context
def check(ctx: click.Context, name: str | None, as_json: bool) -> None:
    """Ask NAME, or every endpoint, for one token of each model. Exit code 3 if one does not answer.

    The key is looked for here, where the command runs; the workers need it too.
    """
    settings = connected(ctx.obj)
    with opened_database(settings) as database:
        specs = [known.spec for known in directory(database, settings) if name in (None, known.spec.name)]
    if name is not None and not specs:
        raise _unknown(name)
    looks = look_at(specs)
    if as_json:
        emit_json([_look_figures(look) for look in looks])
    elif looks:
        emit_table("endpoints checked", _CHECK_COLUMNS, [row for look in looks for row in _check_rows(look)])
    else:
        say("no endpoints beside the workers' engines; `stoker endpoints add` adds one")
    for look in looks:
        for advice in [*look.faults, *_advice(look)]:
            say(f"{look.spec.name}: {advice}")
    ctx.exit(0 if all(look.is_well for look in looks) else EXIT_UNREACHABLE)


@endpoints.command()
@click.argument("name")
@_as_json
@click.pass_obj
def remove(settings: Settings, name: str, as_json: bool) -> None:
    """Forget the endpoint NAME: workers send nothing new there after half a minute. What it cost stays known."""
    with opened_database(connected(settings)) as database, database.transaction() as session:
        if not remove_endpoint(session, name):
            in_file = any(known.spec.name == name for known in endpoints_in(settings.endpoints.file))
            if in_file:
                raise BadInput(f"the endpoint {name} is stated in {settings.endpoints.file}; take it out there")
            raise _unknown(name)
    if as_json:
        emit_json({"removed": name})
        return
    say(f"{name} is removed")


def _unknown(name: str) -> NotFound:
    return NotFound(f"no endpoint {name:.80}; `stoker endpoints list` shows them")


def _fields(name: str, url: str, stated: Mapping[str, Any]) -> dict[str, Any]:
    """An EndpointSpec's fields, as far as they were stated."""
    fields = {field: value for field, value in stated.items() if value is not None and not field.endswith("_price")}
    fields["models"] = _aliases(stated["models"])
    asked = {kind: stated[f"{kind}_price"] for kind in ("input", "output", "cached")}
    prices = {kind: value for kind, value in asked.items() if value is not None}
    if prices:
        fields["prices"] = prices
    if stated["hour_price"] is not None:
        fields["hour_price"] = stated["hour_price"]
    if stated["key_file"] is not None:
        fields["key_file"] = stated["key_file"].absolute()
    return {"name": name, "url": url, **fields}


def _aliases(pairs: Sequence[str]) -> dict[str, str]:
    """What jobs call a model → what the endpoint calls it."""
    aliases: dict[str, str] = {}
    for pair in pairs:
        alias, _, theirs = pair.partition("=")
        if alias in aliases:
            raise BadInput(f"--model {pair}: {alias} is stated twice; an alias stands for one model of an endpoint")
        aliases[alias] = theirs or alias
    return aliases


def _using(settings: Settings) -> tuple[Counter[str] | None, int]:
    """(how many live workers can use each endpoint, how many there are); None while Redis does not answer."""
    board = PresenceBoard(settings.require_redis())
    try:
        workers = board.workers()
    except ServiceUnreachable:
        return None, 0
    finally:
        board.close()
    return Counter(name for worker in workers for name in worker.endpoints), len(workers)


_COLUMNS: Final = ("endpoint", "models", "trust", "price", "limits", "key", "workers", "url")


def _row(known: KnownEndpoint, using: Counter[str] | None, workers: int, *, currency: str) -> tuple[object, ...]:
    spec = known.spec
    models = [alias if alias == theirs else f"{alias} = {theirs}" for alias, theirs in spec.models.items()]
    able = "unknown" if using is None else f"{using[spec.name]} of {workers}"
    price = _price(spec.prices) if spec.is_priced else "none"
    if spec.hour_price is not None:
        price = f"{spec.hour_price} {currency} an hour"
    return (
        spec.name,
        "\n".join(models),
        spec.trust.value,
        price,
        "\n".join(_limits(spec)) or "none stated",
        spec.key_env or spec.key_file or "none",
        able,
        spec.url if known.file is None else f"{spec.url}\n(in {known.file})",
    )


def _price(prices: Prices) -> str:
    cached = "" if prices.cached is None else f", cached {prices.cached}"
    return f"in {prices.input}, out {prices.output}{cached}"


def _limits(spec: EndpointSpec) -> list[str]:
    stated = (
        (spec.requests_per_minute, "requests a minute"),
        (spec.tokens_per_minute, "tokens a minute"),
        (spec.concurrency, "at once"),
    )
    return [f"{limit:,} {what}" for limit, what in stated if limit is not None]


def _figures(known: KnownEndpoint, using: Counter[str] | None) -> dict[str, Any]:
    spec = known.spec.model_dump(mode="json")
    workers = None if using is None else using[known.spec.name]
    return {**spec, "file": None if known.file is None else str(known.file), "workers": workers}


_CHECK_COLUMNS: Final = ("endpoint", "model", "answers", "ms", "states usage", "limits in its headers")


def _check_rows(look: EndpointLook) -> list[tuple[object, ...]]:
    if not look.aliases:
        return [(look.spec.name, ", ".join(look.spec.models), "no", "", "", "")]
    return [
        (
            look.spec.name,
            one.alias,
            "no" if one.fault else "yes",
            "" if one.answer_ms is None else f"{one.answer_ms:,}",
            "" if one.fault else ("yes" if one.usage else "no"),
            _seen(one.seen),
        )
        for one in look.aliases
    ]


def _seen(seen: RatesSeen | None) -> str:
    if seen is None:
        return "none"
    stated = ((seen.limit_requests, "requests"), (seen.limit_tokens, "tokens"))
    return ", ".join(f"{limit:,} {what} a minute" for limit, what in stated if limit is not None) or "none"


def _advice(look: EndpointLook) -> Sequence[str]:
    """What works, but not as well as it might."""
    said: list[str] = []
    missing = [] if look.listed is None else sorted(set(look.spec.models.values()) - set(look.listed))
    if missing and look.is_well:
        said.append(f"answers, but does not list {', '.join(missing)} among its models")
    silent = [one.alias for one in look.aliases if not one.fault and not one.usage]
    if silent and look.spec.is_priced:
        said.append(f"does not state the usage of {', '.join(silent)}: each answer is taken to cost the most it could")
    return said


def _look_figures(look: EndpointLook) -> dict[str, Any]:
    return {
        "name": look.spec.name,
        "url": look.spec.url,
        "well": look.is_well,
        "faults": look.faults,
        "advice": list(_advice(look)),
        "connect_ms": look.connect_ms,
        "listed": look.listed,
        "models": [asdict(one) for one in look.aliases],
    }
