"""Webhooks that tell of a batch's end: signed as Standard Webhooks says, sent at least once, tried for some hours.

It must not send inside a transaction. A delivery is taken by lease, sent, and recorded after: if its sender dies, or
Postgres is away then, it goes out again under the same id, by which receivers tell repeats.
"""

from __future__ import annotations

import base64
import email.utils
import hashlib
import hmac
import json
import random
import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from datetime import timedelta
from typing import Final
from uuid import UUID

from models.names import batch_name
from models.states import DeliveryState
from runtime.clock import utc_now
from runtime.errors import Permanent, Transient
from runtime.logs import get_logger
from runtime.metrics import WEBHOOKS
from runtime.public_http import (
    REDIRECTS,
    Address,
    Errand,
    answer_to,
    drain,
    is_public,
    read_target,
    shown,
    stated_address,
)
from runtime.settings import Settings
from store.database import Database
from store.deliveries import TakenDelivery, Tried, record, signing_secrets, take_due

log = get_logger(__name__)

TRY_S: Final = 15.0  # a try in all, from the name's resolution on
LEASE: Final = timedelta(seconds=60)  # a try, a resolver that hangs, and the record after them
PLACES: Final = 16  # tries at once in a round
TENANT_PLACES: Final = 4  # a tenant with as many under way waits, so that slow receivers leave places for the others
ROUND_S: Final = 5.0  # a round takes no more after this
LOOK_S: Final = 0.5  # and looks this often for new ones while slow ones are under way
# Waits of at most 4 s, 16 s, 64 s, … between tries: with 8 tries 6 hours at most, 3 on average.
BASE_S: Final = 4
CAP_S: Final = 21_600.0
RETRY_AFTER_CAP_S: Final = 3600.0
DEATHS_BORNE: Final = 3  # senders that died with it, beyond the tries
URL_CHARS: Final = 2048
ERROR_CHARS: Final = 300
_ENDS_IT: Final = ("bad_url", "private_address")  # all else may be mended within hours, an expired certificate too
_GONE: Final = 410
_OUTCOMES: Final = {
    DeliveryState.DELIVERED: "delivered",
    DeliveryState.PENDING: "again",
    DeliveryState.FAILED: "failed",
}
_UNFIT: Final = re.compile(r"[\x00-\x20\x7f\ud800-\udfff]")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")  # a receiver's words are anything, and Postgres takes no NUL


def check_url(url: str, settings: Settings) -> str | None:
    """What is wrong with a webhook's URL, as far as can be told without resolving it; None if nothing."""
    if len(url) > URL_CHARS or _UNFIT.search(url):
        return f"{url[:60]!r}… has spaces, control characters or over {URL_CHARS} characters; correct it"
    try:
        target = read_target(url)
    except Permanent as error:
        return str(error)
    if settings.gateway.webhook_private:
        return None
    if target.scheme != "https":
        remedy = "use https, or run the gateway with STOKER_GATEWAY__WEBHOOK_PRIVATE=true"
        return f"{shown(target)} is not https, over which webhooks go; {remedy}"
    address = stated_address(target)
    if address is not None and not is_public(address):
        return f"{shown(target)} is at no public address; {_errand(settings, TRY_S).instead}"
    return None


def event_name(delivery_id: UUID) -> str:
    """`evt_01a2…`: the event's id in its body and in `webhook-id`."""
    return f"evt_{delivery_id.hex}"


def secret_text(secret: bytes) -> str:
    """`whsec_…`, as receivers are given it."""
    return f"whsec_{base64.b64encode(secret).decode()}"


def body_of(taken: TakenDelivery) -> bytes:
    """The event as OpenAI's clients read it; the same bytes at every try."""
    event = {
        "id": event_name(taken.id),
        "object": "event",
        "type": taken.event,
        "created_at": int(taken.created_at.timestamp()),
        "data": {"id": batch_name(taken.batch_id)},
    }
    return json.dumps(event, separators=(",", ":")).encode()


def signature(secrets: Sequence[bytes], *, name: str, timestamp: int, body: bytes) -> str:
    """The `webhook-signature` header: a signature by each secret; a receiver is content with one of them."""
    signed = f"{name}.{timestamp}.".encode() + body
    digests = (hmac.digest(secret, signed, hashlib.sha256) for secret in secrets)
    return " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests)


def deliver_due(database: Database, settings: Settings, *, try_s: float = TRY_S) -> int:
    """One round: send what is due, and what becomes due meanwhile; how many tries it made.

    It takes ROUND_S + `try_s` at most, and a resolver's time. Several may run at once: each delivery is taken by one.
    If it dies, what it had taken is due again after its lease. Raises ServiceUnreachable where Postgres is away.
    """
    tries = 0
    until = time.monotonic() + ROUND_S
    running: dict[Future[Tried], TakenDelivery] = {}
    with ThreadPoolExecutor(PLACES, thread_name_prefix="webhook") as pool:
        while True:
            is_open = time.monotonic() < until
            for taken, secrets in _taken(database, running.values()) if is_open else ():
                running[pool.submit(_try, taken, secrets, settings, try_s)] = taken
                tries += 1
            if not running:
                return tries
            done, _ = wait(running, timeout=LOOK_S if is_open else None, return_when=FIRST_COMPLETED)
            with database.transaction() as session:
                for future in done:
                    record(session, running.pop(future), future.result())
            for future in done:
                WEBHOOKS.add(1, outcome=_OUTCOMES[future.result().state])


def _taken(database: Database, running: Iterable[TakenDelivery]) -> list[tuple[TakenDelivery, list[bytes]]]:
    """More deliveries for the free places, each with what it is to be signed with."""
    places = Counter(taken.tenant for taken in running)
    free = PLACES - places.total()
    if not free:
        return []
    full = [tenant for tenant, count in places.items() if count >= TENANT_PLACES]
    with database.transaction() as session:
        taken = take_due(session, limit=free, lease=LEASE, per_tenant=TENANT_PLACES, without=full)
        secrets = {tenant: signing_secrets(session, tenant) for tenant in sorted({one.tenant for one in taken})}
    return [(one, secrets[one.tenant]) for one in taken]


def _try(taken: TakenDelivery, secrets: Sequence[bytes], settings: Settings, try_s: float) -> Tried:
    problem = check_url(taken.url, settings)
    if problem is None and taken.tries > settings.gateway.webhook_tries + DEATHS_BORNE:
        problem = f"taken {taken.tries} times by senders that died or hung; see the gateway's log"
    if problem is not None:
        return _failed(taken, problem)
    try:
        return _posted(taken, secrets, settings, try_s)
    except Permanent as error:
        if error.code in _ENDS_IT:
            return _failed(taken, str(error))
        return _later(taken, settings, str(error))
    except Transient as error:
        return _later(taken, settings, str(error))


def _posted(taken: TakenDelivery, secrets: Sequence[bytes], settings: Settings, try_s: float) -> Tried:
    target = read_target(taken.url)
    name, timestamp, body = event_name(taken.id), int(time.time()), body_of(taken)
    headers = {
        "Content-Type": "application/json",
        "webhook-id": name,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": signature(secrets, name=name, timestamp=timestamp, body=body),
    }
    end = time.monotonic() + try_s
    with answer_to("POST", target, _errand(settings, try_s), end=end, headers=headers, body=body) as answer:
        status, said = answer.status, f"{shown(target)} answered {answer.status} {answer.reason}"
        wish_s = _seconds(answer.headers.get("Retry-After", ""))
        drain(answer)
    if 200 <= status < 300:
        return Tried(DeliveryState.DELIVERED, status)
    if status == _GONE:
        return _failed(taken, f"{said}: it wants no more of them", status=status)
    if status in REDIRECTS:
        said += ": redirects are not followed; give the address they lead to"
    return _later(taken, settings, said, status=status, wish_s=wish_s)


def _later(
    taken: TakenDelivery, settings: Settings, error: str, *, status: int | None = None, wish_s: float = 0.0
) -> Tried:
    """Another try, by exponential backoff with full jitter as in pipeline/retry.py; or the end of them."""
    if taken.tries >= settings.gateway.webhook_tries:
        return _failed(taken, error, status=status)
    wait_s = random.uniform(0, min(CAP_S, BASE_S**taken.tries))  # noqa: S311  # jitter, not a secret
    wait_s = max(wait_s, min(wish_s, RETRY_AFTER_CAP_S))
    return Tried(DeliveryState.PENDING, status, _brief(error), timedelta(seconds=wait_s))


def _failed(taken: TakenDelivery, error: str, *, status: int | None = None) -> Tried:
    log.warning("webhook not delivered", batch=batch_name(taken.batch_id), tries=taken.tries, error=error)
    return Tried(DeliveryState.FAILED, status, _brief(error))


def _brief(error: str) -> str:
    return _CONTROL.sub("?", error)[:ERROR_CHARS]


def _errand(settings: Settings, try_s: float) -> Errand:
    return Errand(
        _anywhere if settings.gateway.webhook_private else is_public,
        instead="give a public one (STOKER_GATEWAY__WEBHOOK_PRIVATE allows others)",
        within=f"{try_s:g} s",
        later="",
    )


def _anywhere(_: Address) -> bool:
    return True


def _seconds(wish: str) -> float:
    """A Retry-After header, either form, as seconds from now; 0 if it says nothing."""
    if wish.isdecimal():
        return float(wish)
    try:
        moment = email.utils.parsedate_to_datetime(wish)
    except (ValueError, OverflowError):
        return 0.0
    return 0.0 if moment.tzinfo is None else (moment - utc_now()).total_seconds()
