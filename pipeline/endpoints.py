"""The directory of registered endpoints: those of `stoker endpoints add` and those of the file, and where keys are.

A key is read where it is needed and goes nowhere else: it is in no row, message or log.
"""

from __future__ import annotations

import os
import re
import stat
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from inference.endpoint import Endpoint
from models.endpoints import EndpointSpec
from models.states import Trust
from runtime.errors import BadInput
from runtime.logs import get_logger
from runtime.settings import Settings
from store.database import Database, Session
from store.endpoints import endpoint_rows
from store.engines import register_engine

log = get_logger(__name__)

KIND: Final = "endpoint"  # of their rows among the engines
REREAD_S: Final = 30.0  # how often each process of a worker looks which there are
LONGEST_KEY_BYTES: Final = 16 * 1024
KEY_REMEDY: Final = (
    "put it into an environment variable or a file of the worker, and name that one: --key-env NAME or --key-file PATH "
    "(key_env, key_file)"
)
_FORMS: Final = {
    "name": "write small letters, digits and . _ - after the first one",
    "url": "write http://host:port/v1, on one line",
    "key_env": f"this is no variable's name; {KEY_REMEDY}",
}
_KEYS_THEMSELVES: Final = frozenset({"key", "api_key", "token", "secret", "password"})
# How the keys of well-known providers begin, as far as a variable's name could look so: gsk_, hf_, sk_, xai_, AIza…
_LIKE_A_KEY: Final = re.compile(r"(gsk|hf|sk|xai|pplx|nvapi|r8|fw)_[A-Za-z0-9_]{16,}$|AIza[A-Za-z0-9_]{16,}$")
# What of a specification says who answered and what that costs; limits and weights may change without a new row.
_LASTING: Final = frozenset({"name", "url", "models", "serves", "trust", "prices", "hour_price"})


@dataclass(frozen=True, slots=True)
class KnownEndpoint:
    """An endpoint and where it is stated: `file` is None for one that was added by the command."""

    spec: EndpointSpec
    file: Path | None = None

    @property
    def place(self) -> str:
        """Where people find it."""
        return "`stoker endpoints list`" if self.file is None else str(self.file)


def known_endpoints(database: Database, settings: Settings) -> list[EndpointSpec]:
    """Every registered endpoint, by name.

    Raises BadInput where the file cannot be used, a row is of another version, or a name is taken twice.
    """
    return [known.spec for known in directory(database, settings)]


def directory(database: Database, settings: Settings) -> list[KnownEndpoint]:
    """Every registered endpoint and where it is stated, by name; raises BadInput as known_endpoints does."""
    with database.transaction() as session:
        rows = endpoint_rows(session)
    found: dict[str, KnownEndpoint] = {}
    for known in [*_added(rows), *endpoints_in(settings.endpoints.file)]:
        other = found.setdefault(known.spec.name, known)
        if other is not known:
            both = " and ".join(dict.fromkeys((other.place, known.place)))
            raise BadInput(f"the endpoint {known.spec.name} is stated twice, in {both}; rename or remove one of them")
    return [found[name] for name in sorted(found)]


def endpoints_in(file: Path | None) -> list[KnownEndpoint]:
    """The `[[endpoint]]` tables of a TOML file; a relative key_file is beside it. None: there is no file.

    Raises BadInput naming file, table and field.
    """
    if file is None:
        return []
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise BadInput(f"{file} cannot be read: {reason}; look at STOKER_ENDPOINTS__FILE") from error
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"{file} is no TOML: {error}; see examples/endpoints.toml") from error
    unknown = sorted(set(tables) - {"endpoint"})
    listed = tables.get("endpoint", [])
    if unknown or not isinstance(listed, list):
        raise BadInput(f"{file}: {', '.join(unknown) or 'endpoint'} is not expected; write [[endpoint]] tables only")
    return [_of_file(file, number, table) for number, table in enumerate(listed, start=1)]


def read_endpoint(fields: Mapping[str, Any], *, place: str) -> EndpointSpec:
    """The endpoint that these fields state. Raises BadInput naming `place`, field and remedy, never a value."""
    if stated := sorted(_KEYS_THEMSELVES & set(fields)):
        raise BadInput(f"{place}: {stated[0]}: a key is never stated itself; {KEY_REMEDY}")
    try:
        spec = EndpointSpec.model_validate(fields)
    except ValidationError as error:
        raise BadInput(f"{place}: {_faults(error)}; see docs/endpoints.md") from None  # its text shows what was given
    try:
        Endpoint(spec.url, api_key=None, timeout_s=1.0, connections=1)
    except BadInput as error:
        raise BadInput(f"{place}: url: {error}") from error
    needed = {"input", "output"} if spec.serves == "generation" else {"input"}
    if spec.trust is Trust.EXTERNAL and (unstated := sorted(needed - spec.prices.model_fields_set)):
        raise BadInput(
            f"{place}: prices.{unstated[0]}: an external endpoint states what it asks for a million tokens, so that no "
            "money is spent without a budget: --input-price and --output-price (prices.input, prices.output), 0 where "
            "it asks nothing"
        )
    if spec.key_env is not None and _LIKE_A_KEY.match(spec.key_env):
        raise BadInput(f"{place}: key_env: this looks like a key itself, not like a variable's name; {KEY_REMEDY}")
    return spec


def key_of(spec: EndpointSpec) -> str | None:
    """The key of an endpoint, from the environment or its file; None where it states neither.

    Raises BadInput naming the variable or the file, never what is in it.
    """
    if spec.key_env is not None:
        key = os.environ.get(spec.key_env, "").strip()
        if not key:
            raise BadInput(f"the endpoint {spec.name} has its key in {spec.key_env}, which is not set here; export it")
        return _fit_for_a_header(key, name=spec.name, place=spec.key_env)
    if spec.key_file is not None:
        return _fit_for_a_header(_read_key(spec.key_file, name=spec.name), name=spec.name, place=str(spec.key_file))
    return None


@dataclass(frozen=True, slots=True)
class KeyedEndpoint:
    """An endpoint and its key, which was found here or is not needed."""

    spec: EndpointSpec
    key: str | None = field(repr=False)

    def connect(
        self, *, timeout_s: float, connections: int, first_byte_s: float | None = None, idle_s: float | None = None
    ) -> Endpoint:
        """A connection as jobs have it: external ones stream. Raises BadInput for a key that no header may have."""
        return Endpoint(
            self.spec.url,
            api_key=self.key,
            timeout_s=timeout_s,
            connections=connections,
            auth=self.spec.auth,
            is_shared=True,
            streams=self.spec.trust is Trust.EXTERNAL,
            first_byte_s=first_byte_s,
            idle_s=idle_s,
        )


def with_keys(specs: Iterable[EndpointSpec]) -> list[KeyedEndpoint]:
    """Those whose keys can be read here; the log says which cannot, and why."""
    found = []
    for spec in specs:
        try:
            found.append(KeyedEndpoint(spec, key_of(spec)))
        except BadInput as error:
            log.error("endpoint_unusable", endpoint=spec.name, error=str(error))
    return found


def register_endpoint(session: Session, spec: EndpointSpec, *, currency: str) -> int:
    """The id under which results name this endpoint, as `register_engine` gives it; another price is another row."""
    lasting = spec.model_dump(mode="json", include=set(_LASTING), exclude_none=True)
    return register_engine(session, {"kind": KIND, "currency": currency, **lasting})


def _added(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> list[KnownEndpoint]:
    return [
        KnownEndpoint(read_endpoint(spec, place=f"the endpoint {name} (`stoker endpoints remove {name}` ends it)"))
        for name, spec in rows
    ]


def _of_file(file: Path, number: int, table: object) -> KnownEndpoint:
    name = table.get("name") if isinstance(table, dict) else None
    place = f"{file}: endpoint {name if isinstance(name, str) and name.isprintable() else number}"
    if not isinstance(table, dict):
        raise BadInput(f"{place} is no table; write [[endpoint]]")
    spec = read_endpoint(table, place=place)
    if spec.key_file is not None and not spec.key_file.is_absolute():
        spec = spec.model_copy(update={"key_file": file.resolve().parent / spec.key_file})
    return KnownEndpoint(spec, file)


def _faults(error: ValidationError) -> str:
    """What is wrong with which field; a value may be a secret in a wrong place."""
    told = []
    for fault in error.errors():
        field = ".".join(str(part) for part in fault["loc"])
        message = _FORMS.get(field, fault["msg"]) if fault["type"] == "string_pattern_mismatch" else fault["msg"]
        told.append(f"{field}: {message}" if field else message)
    return "; ".join(told)


def _read_key(file: Path, *, name: str) -> str:
    try:
        with file.open("rb") as opened:
            if stat.S_IMODE(os.fstat(opened.fileno()).st_mode) & stat.S_IROTH:
                log.warning("key_file_open_to_all", endpoint=name, file=str(file), advice=f"chmod 600 {file}")
            content = opened.read(LONGEST_KEY_BYTES + 1)
    except OSError as error:
        raise BadInput(
            f"the endpoint {name} has its key in {file}, which cannot be read here: {error.strerror}; "
            "put it there, for its owner only"
        ) from error
    try:
        key = content.decode("ascii").strip()
    except UnicodeDecodeError:
        key = ""
    if not key or len(content) > LONGEST_KEY_BYTES:
        raise BadInput(f"the endpoint {name} has its key in {file}, which holds none; put one line of text there")
    return key


def _fit_for_a_header(key: str, *, name: str, place: str) -> str:
    if not (key.isascii() and key.isprintable()):
        raise BadInput(f"the key of the endpoint {name} in {place} has characters that no header may have; look at it")
    return key
