"""What answers our jobs: kind, version, flags and checkpoint of an engine, kept so that a manifest can say it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from inference.endpoint import Endpoint
from inference.engines import EnginePlan
from runtime.errors import ServiceUnreachable, StokerError
from runtime.settings import Settings
from store.database import Database
from store.engines import register_engine


@dataclass(frozen=True, slots=True)
class EngineIdentity:
    """`label` for people, `models` the aliases that jobs may use, `description` for the manifest."""

    label: str
    models: list[str]
    description: Mapping[str, Any]

    @property
    def is_engine(self) -> bool:
        """Whether there is one at all."""
        return bool(self.description)


def identify_endpoint(url: str, *, plan: EnginePlan | None, settings: Settings) -> EngineIdentity:
    """Ask the engine for its version and models; raises ServiceUnreachable naming its URL if it does not answer.

    An empty `url` is that of a worker without an engine.
    """
    version, models = _asked(url, settings.engine.api_key, "STOKER_ENGINE__URL") if url else (None, [])
    if settings.embeddings.url is not None:
        models += _asked(settings.embeddings.url, settings.embeddings.api_key, "STOKER_EMBEDDINGS__URL")[1]
    if not url:
        return EngineIdentity("no engine", models, {})
    described = dict(plan.description) if plan else {"kind": "external", "url": url}
    version = described.get("version") or version
    label = f"{described['kind']} {version or 'of unknown version'}"
    return EngineIdentity(label, models, {**described, "version": version})


def register(settings: Settings, identity: EngineIdentity) -> int:
    """The id under which results name this engine."""
    database = Database(settings.require_postgres())
    try:
        with database.transaction() as session:
            return register_engine(session, dict(identity.description))
    finally:
        database.close()


def _asked(url: str, api_key: str | None, setting: str) -> tuple[str | None, list[str]]:
    try:
        return asyncio.run(_ask(url, api_key))
    except StokerError as error:
        raise ServiceUnreachable(f"the engine at {url} does not answer: {error}; check {setting}") from error


async def _ask(url: str, api_key: str | None) -> tuple[str | None, list[str]]:
    async with Endpoint(url, api_key=api_key, timeout_s=10.0, connections=1) as endpoint:
        return await endpoint.version(), await endpoint.served_models()
