"""Where spans go over HTTP: an address, headers and what its service wants besides, for each setting of trace.to.

No key may get into a message.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

from runtime.errors import BadInput
from runtime.settings import TraceSettings, without_secrets
from runtime.tracing import Value

_ADDRESSES: Final = {
    "langsmith": "https://api.smith.langchain.com/otel/v1/traces",
    "weave": "https://trace.wandb.ai/otel/v1/traces",
    "langfuse": "https://cloud.langfuse.com/api/public/otel/v1/traces",
}
# What puts a batch's traces together where session.id does not.
_SESSIONS: Final = {"langsmith": ("langsmith.metadata.session_id",), "weave": ("wandb.thread_id",)}


@dataclass(frozen=True, slots=True)
class Target:
    """A receiver. `sessions`: attributes that it groups by, besides the common one."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    resource: Mapping[str, Value] = field(default_factory=dict)
    sessions: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its address, fit for logs."""
        return without_secrets(self.url)


def target_of(settings: TraceSettings) -> Target:
    """The receiver that these name. Raises BadInput with the setting that is missing or wrong."""
    url = settings.url or _ADDRESSES.get(settings.to)
    if url is None:
        raise BadInput("STOKER_TRACE__URL is not set; an otlp receiver's is such as http://collector:4318/v1/traces")
    if not url.startswith(("http://", "https://")):
        raise BadInput("STOKER_TRACE__URL must begin with http:// or https://, such as http://collector:4318/v1/traces")
    if settings.to == "otlp" and urlsplit(url).path in ("", "/"):
        url = f"{url.rstrip('/')}/v1/traces"  # as OTEL_EXPORTER_OTLP_ENDPOINT is meant
    return Target(url, _headers(settings), _resource(settings), _SESSIONS.get(settings.to, ()))


def _headers(settings: TraceSettings) -> dict[str, str]:
    key = settings.api_key
    if settings.to == "otlp":
        return {} if key is None else {"Authorization": f"Bearer {key}"}
    if key is None:
        raise BadInput(f"STOKER_TRACE__API_KEY is not set; {settings.to} takes no spans without one")
    if settings.to == "langsmith":
        return {"x-api-key": key} | ({} if settings.project is None else {"Langsmith-Project": settings.project})
    if settings.to == "weave":
        return {"wandb-api-key": key}
    if ":" not in key:
        raise BadInput("STOKER_TRACE__API_KEY must be Langfuse's two keys as pk-lf-…:sk-lf-…")
    basic = base64.b64encode(key.encode()).decode()
    return {"Authorization": f"Basic {basic}", "x-langfuse-ingestion-version": "4"}


def _resource(settings: TraceSettings) -> dict[str, Value]:
    if settings.to != "weave":
        return {}
    entity, slash, project = (settings.project or "").partition("/")
    if not (entity and slash and project):
        raise BadInput("STOKER_TRACE__PROJECT must be W&B's entity/project, such as my-team/batches")
    return {"wandb.entity": entity, "wandb.project": project}
