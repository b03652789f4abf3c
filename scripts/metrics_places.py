"""At which port each process that a command starts answers /metrics: the one that is set, and those after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from runtime.errors import BadInput
from runtime.settings import METRICS_PARTS, MetricsPart, Settings
from scripts.embedded import is_answering

_LAST_PORT: Final = 65_535


def require_metrics_ports(settings: Settings) -> None:
    """Raise BadInput if metrics are wanted and one of their ports cannot be had."""
    first, host = settings.metrics.port, settings.metrics.host
    if first is None:
        return
    ports = range(first, first + len(METRICS_PARTS))
    taken = [port for port in ports if port > _LAST_PORT or is_answering(host, port)]
    if taken:
        raise BadInput(
            f"STOKER_METRICS__PORT: the ports {ports[0]} to {ports[-1]} are needed, of which "
            f"{', '.join(map(str, taken))} cannot be had; set another one, or none for no metrics"
        )


def with_metrics_of(settings: Settings, part: MetricsPart) -> Settings:
    """Settings of a part, with its own port."""
    port = settings.metrics.port
    if port is None:
        return settings
    metrics = settings.metrics.model_copy(update={"port": port + METRICS_PARTS.index(part)})
    return settings.model_copy(update={"metrics": metrics})


def metrics_told(settings: Settings, parts: Sequence[MetricsPart]) -> str:
    """A line that says where these parts answer; empty where metrics are off."""
    if settings.metrics.port is None:
        return ""
    places = {part: with_metrics_of(settings, part).metrics for part in parts}
    told = ", ".join(f"http://{place.host}:{place.port}/metrics ({part})" for part, place in places.items())
    return f"metrics: {told}\n"
