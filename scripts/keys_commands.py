"""Commands about keys of the gateway: create, list, revoke, rotate, rename, limit.

A key is printed once, to stdout, when it gets its secret.
"""

from __future__ import annotations

import re
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal

import click

from models.keys import remake_key
from models.money import money, shown
from models.states import Scope
from pipeline.keys import issue_key
from runtime.errors import BadInput, NotFound
from runtime.settings import Settings
from scripts.local import connected
from scripts.lookup import TENANT, opened_database
from scripts.submit_options import MoneyAmount, Window
from scripts.terminal import emit, emit_json, emit_table, say
from store.budgets import set_key_caps
from store.database import Session
from store.keys import (
    KeyReport,
    list_keys,
    name_key,
    named_keys,
    revoke_key,
    rotate_key,
    set_key_expiry,
    set_key_rate,
)
from store.money import set_key_money

LONGEST_NAME: Final = 200
LONGEST_LIFE_S: Final = 100 * 365 * 86_400.0
MOST_REQUESTS: Final = 1_000_000
MOST_TOKENS: Final = 10**15
_WHOLE_KEY: Final = re.compile(r"sk-([0-9a-f]{1,12})(-.*)?")


class Name(click.ParamType[str]):
    """A name that can be read and typed."""

    name = "NAME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value).strip()
        if not text or len(text) > LONGEST_NAME or not text.isprintable():
            self.fail(f"{value!r:.80} is no name; write 1 to {LONGEST_NAME} letters", param, ctx)
        return text


class KeyName(Name):
    """A key by its public id, the beginning of it, or its name; of a whole key the secret is dropped at once."""

    name = "KEY"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = super().convert(value, param, ctx)
        whole = _WHOLE_KEY.fullmatch(text)
        return text if whole is None else whole[1]


class Time(Window):
    """A duration from `least_s` to 100 years, in seconds."""

    def __init__(self, *, least_s: float = 1.0) -> None:
        self._least_s = least_s

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds = 0.0 if value == "0" else super().convert(value, param, ctx)
        if not self._least_s <= seconds <= LONGEST_LIFE_S:
            self.fail(f"{value!r:.80} is not from {self._least_s:g} s to 100 years", param, ctx)
        return seconds


class OrNone(click.ParamType[Any]):
    """What another type takes, or the word none."""

    def __init__(self, kind: click.ParamType[Any]) -> None:
        self._kind = kind
        self.name = f"{kind.name}|none"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value == "none" else self._kind.convert(value, param, ctx)


_REQUESTS = click.IntRange(1, MOST_REQUESTS)
_TOKENS = click.IntRange(1, MOST_TOKENS)
_MONEY = MoneyAmount()
_Number = int | Literal["none"] | None
_as_json = click.option("--json", "as_json", is_flag=True)
_key = click.argument("name", metavar="KEY", type=KeyName())


@click.group()
def keys() -> None:
    """Keys of the gateway, each of a tenant: KEY is a key's id, the beginning of it, or its name."""


@keys.command()
@click.option("--name", type=Name(), default="unnamed", help="To know it by.")
@click.option(
    "--tenant", type=Name(), default=TENANT, show_default=True, help="Whose it is; tenants see their own only."
)
@click.option(
    "--scope",
    "scopes",
    type=click.Choice([scope.value for scope in Scope]),
    multiple=True,
    help="submit: upload, create, cancel. read: list and download. admin: all, and the engines. Repeatable; "
    "without: submit and read.",
)
@click.option("--expires", type=Time(), help="After a time such as 90d; without: never.")
@click.option("--requests-per-minute", type=_REQUESTS, help="Without: STOKER_GATEWAY__REQUESTS_PER_MINUTE.")
@click.option("--tokens-per-day", type=_TOKENS, help="Its batches stop there until the next day (UTC).")
@click.option("--tokens-per-month", type=_TOKENS, help="Its batches stop there until the next month (UTC).")
@click.option(
    "--money-per-day",
    type=_MONEY,
    help="What priced endpoints may ask in a day (UTC), of batches and single requests.",
)
@click.option("--money-per-month", type=_MONEY, help="What they may ask in a month, in STOKER_COST__CURRENCY.")
@_as_json
@click.pass_obj
def create(
    settings: Settings,
    name: str,
    tenant: str,
    scopes: tuple[str, ...],
    expires: float | None,
    requests_per_minute: int | None,
    tokens_per_day: int | None,
    tokens_per_month: int | None,
    money_per_day: int | None,
    money_per_month: int | None,
    as_json: bool,
) -> None:
    """Make a key and print it: it cannot be read back."""
    with opened_database(connected(settings)) as database, database.transaction() as session:
        made = issue_key(
            session,
            tenant=tenant,
            name=name,
            scopes=[Scope(scope) for scope in scopes] or [Scope.SUBMIT, Scope.READ],
            requests_per_minute=requests_per_minute,
            day_tokens=tokens_per_day,
            month_tokens=tokens_per_month,
            day_money=money_per_day,
            month_money=money_per_month,
            expires_in=None if expires is None else timedelta(seconds=expires),
        )
    if as_json:
        known = {"id": made.key.id, "key": made.key.text, "tenant": tenant, "name": name}
        emit_json(known | {"scopes": made.scopes, "expires_at": _stated(made.expires_at)})
        return
    emit(made.key.text)
    until = "" if made.expires_at is None else f", until {_shown(made.expires_at)}"
    say(f"{made.key.id} of {tenant}: {', '.join(made.scopes)}{until}; keep the key, it is not shown again")


@keys.command("list")
@click.option("--tenant", type=Name(), default=TENANT, show_default=True)
@click.option("--all", "of_all", is_flag=True, help="Of all tenants.")
@_as_json
@click.pass_obj
def list_command(settings: Settings, tenant: str, of_all: bool, as_json: bool) -> None:
    """List keys, with their limits and their last use; never their secrets."""
    with opened_database(connected(settings)) as database, database.transaction() as session:
        found = list_keys(session, tenant=None if of_all else tenant)
    if as_json:
        emit_json([_figures(key, settings) for key in found])
        return
    if not found:
        say("no keys; `stoker keys create` makes one" if of_all else f"no keys of {tenant}; --all shows those of all")
        return
    shown = [place for place, column in enumerate(_COLUMNS) if of_all or column != "tenant"]
    rows = [_row(key, settings) for key in found]
    emit_table(
        "keys (times in UTC)",
        [_COLUMNS[place] for place in shown],
        [[row[place] for place in shown] for row in rows],
    )


@keys.command()
@_key
@click.pass_obj
def revoke(settings: Settings, name: str) -> None:
    """End KEY at once and for good. Its batches go on: `stoker cancel` ends those."""
    with opened_database(connected(settings)) as database, database.transaction() as session:
        key = _named(session, name)
        if not revoke_key(session, key.id):
            raise BadInput(f"{_called(key)} was revoked before; nothing is left to do")
    say(f"{_called(key)} is revoked: it is refused from now on, its batches go on")


@keys.command()
@_key
@click.option(
    "--grace", type=Time(least_s=0.0), default="24h", show_default=True, help="How long the old one holds too; 0: not."
)
@_as_json
@click.pass_obj
def rotate(settings: Settings, name: str, grace: float, as_json: bool) -> None:
    """Give KEY a new secret and print it; id, limits and batches stay."""
    with opened_database(connected(settings)) as database, database.transaction() as session:
        key = _named(session, name)
        made = remake_key(key.id)
        if not rotate_key(session, key.id, digest=made.digest, grace=timedelta(seconds=grace)):
            raise BadInput(f"{_called(key)} is {key.state}; make a new one with `stoker keys create`")
        rotated = _named(session, key.id)
    if as_json:
        emit_json({"key": made.text} | _figures(rotated, settings))
        return
    emit(made.text)
    until = rotated.previous_until
    say(
        f"{_called(key)} has a new secret; the old one "
        + ("is refused from now on" if until is None else f"holds until {_shown(until)}")
    )


@keys.command()
@_key
@click.argument("new_name", metavar="NEW_NAME", type=Name())
@click.pass_obj
def rename(settings: Settings, name: str, new_name: str) -> None:
    """Call KEY otherwise."""
    with opened_database(connected(settings)) as database, database.transaction() as session:
        key = _named(session, name)
        name_key(session, key.id, new_name)
    say(f"{key.id} of {key.tenant} is called {new_name} from now on")


@keys.command()
@_key
@click.option("--tokens-per-day", type=OrNone(_TOKENS), help="Holds for the running day too.")
@click.option("--tokens-per-month", type=OrNone(_TOKENS), help="Holds for the running month too.")
@click.option("--money-per-day", type=OrNone(_MONEY), help="Holds for the running day too.")
@click.option("--money-per-month", type=OrNone(_MONEY), help="Holds for the running month too.")
@click.option("--requests-per-minute", type=OrNone(_REQUESTS), help="none: the setting's.")
@click.option("--expires", type=OrNone(Time()), help="After a time from now, such as 90d.")
@click.pass_obj
def limit(
    settings: Settings,
    name: str,
    tokens_per_day: _Number,
    tokens_per_month: _Number,
    money_per_day: _Number,
    money_per_month: _Number,
    requests_per_minute: _Number,
    expires: float | Literal["none"] | None,
) -> None:
    """Change what KEY may take; what is not named stays, `none` takes a limit away."""
    stated = (tokens_per_day, tokens_per_month, money_per_day, money_per_month, requests_per_minute, expires)
    if stated == (None,) * len(stated):
        raise click.UsageError(
            "name a limit: --tokens-per-day, --tokens-per-month, --money-per-day, --money-per-month, "
            "--requests-per-minute or --expires"
        )
    with opened_database(connected(settings)) as database, database.transaction() as session:
        key = _named(session, name)
        day, month = _changed(tokens_per_day, key.day_tokens), _changed(tokens_per_month, key.month_tokens)
        if (day, month) != (key.day_tokens, key.month_tokens):
            set_key_caps(session, key.id, day_tokens=day, month_tokens=month)
        nanos = _changed(money_per_day, key.day_money), _changed(money_per_month, key.month_money)
        if nanos != (key.day_money, key.month_money):
            set_key_money(session, key.id, day_money=nanos[0], month_money=nanos[1])
        if requests_per_minute is not None:
            set_key_rate(session, key.id, _changed(requests_per_minute, None))
        if expires is not None:
            set_key_expiry(session, key.id, None if expires == "none" else timedelta(seconds=expires))
        limited = _named(session, key.id)
    terms = _limits(limited, settings.cost.currency) or ["no limits but the settings'"]
    until = "expires never" if limited.expires_at is None else f"expires {_shown(limited.expires_at)}"
    say(f"{_called(key)}: {', '.join(terms)}; {until}")


def _named(session: Session, name: str) -> KeyReport:
    found = named_keys(session, name)
    if not found:
        raise NotFound(f"no key {name}; `stoker keys list --all` shows them")
    if len(found) > 1:
        raise BadInput(f"{name} may be {', '.join(_called(key) for key in found[:5])}; write the whole id")
    return found[0]


def _changed(wish: _Number, before: int | None) -> int | None:
    if wish == "none":
        return None
    return before if wish is None else wish


def _called(key: KeyReport) -> str:
    return f"{key.id} ({key.name}) of {key.tenant}"


def _figures(key: KeyReport, settings: Settings) -> dict[str, Any]:
    times = ("created_at", "expires_at", "revoked_at", "previous_until", "last_used_at")
    nanos = {name: getattr(key, name) for name in ("day_money", "month_money")}
    amounts = {name: None if held is None else money(held) for name, held in nanos.items()}
    stated = {name: _stated(getattr(key, name)) for name in times}
    return asdict(key) | amounts | {"currency": settings.cost.currency} | stated


_COLUMNS = ("key", "name", "tenant", "state", "scopes", "limits", "last used")


def _row(key: KeyReport, settings: Settings) -> tuple[object, ...]:
    ends = f" until {key.expires_at:%Y-%m-%d}" if key.expires_at and key.state in ("living", "rotating") else ""
    used = "never" if key.last_used_at is None else _shown(key.last_used_at)
    limits = "\n".join(_limits(key, settings.cost.currency)) or "default"
    return (key.id, key.name, key.tenant, key.state + ends, " ".join(key.scopes), limits, used)


def _limits(key: KeyReport, currency: str) -> list[str]:
    """What the key states itself."""
    stated = (
        (key.requests_per_minute, "requests a minute"),
        (key.day_tokens, "tokens a day"),
        (key.month_tokens, "tokens a month"),
    )
    money = ((key.day_money, "a day"), (key.month_money, "a month"))
    return [
        *(f"{limit:,} {what}" for limit, what in stated if limit is not None),
        *(f"{shown(nanos, currency)} {per}" for nanos, per in money if nanos is not None),
    ]


def _shown(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M}"


def _stated(moment: datetime | None) -> str | None:
    return None if moment is None else moment.astimezone(UTC).isoformat(timespec="seconds")
