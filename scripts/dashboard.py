"""Prints the Grafana dashboard deploy/grafana/dashboards/stoker.json from deploy/grafana/panels.toml: `make dashboard`.

Grafana's JSON is forty lines a panel, which nobody reviews; the table has what differs. `make check` holds the file to
it, and tests/test_observability.py every query to runtime/metrics.py and to a running Prometheus.
"""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path
from typing import Any, Final

PANELS: Final = Path(__file__).resolve().parent.parent / "deploy" / "grafana" / "panels.toml"
SCHEMA_VERSION: Final = 41  # Grafana 12's; 11 reads it too
COLUMNS: Final = 24  # of Grafana's grid
ROW_HEIGHT, STAT_HEIGHT, GRAPH_HEIGHT = 1, 4, 8
SOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana reads it."""
    return {
        "uid": "stoker",
        "title": "Stoker",
        "tags": ["stoker"],
        "description": "Made by `make dashboard` from deploy/grafana/panels.toml; changes made here are lost.",
        "schemaVersion": SCHEMA_VERSION,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "timezone": "browser",
        "links": [],
        "annotations": {"list": []},
        "templating": {"list": [_datasource(), _instance()]},
        "panels": _placed(tomllib.loads(PANELS.read_text(encoding="utf-8"))["row"]),
    }


def _datasource() -> dict[str, Any]:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "refresh": 1}


def _instance() -> dict[str, Any]:
    query = "label_values(stoker_engine_healthy, instance)"
    return {
        "name": "instance",
        "label": "Engine's worker",
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": "instance"},
        "definition": query,
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def _placed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All rows and panels, numbered, placed from the left and from the top; panels of a row are of one height."""
    placed: list[dict[str, Any]] = []
    top = 0
    for row in rows:
        at = {"x": 0, "y": top, "w": COLUMNS, "h": ROW_HEIGHT}
        heading = {"type": "row", "title": row["title"], "collapsed": False, "panels": []}
        placed.append({"id": len(placed) + 1, "gridPos": at} | heading)
        top, left = top + ROW_HEIGHT, 0
        height = STAT_HEIGHT if row["panel"][0].get("kind") == "stat" else GRAPH_HEIGHT
        for panel in row["panel"]:
            width = panel.get("width", 8)
            if left + width > COLUMNS:
                left, top = 0, top + height
            at = {"x": left, "y": top, "w": width, "h": height}
            placed.append({"id": len(placed) + 1, "gridPos": at} | _panel(panel))
            left += width
        top += height
    return placed


def _panel(panel: dict[str, Any]) -> dict[str, Any]:
    kind = panel.get("kind", "timeseries")
    targets = [
        {
            "refId": chr(ord("A") + number),
            "datasource": SOURCE,
            "editorMode": "code",
            "expr": query,
            "legendFormat": legend or "__auto",
            "range": kind == "timeseries",
            "instant": kind == "stat",
        }
        for number, (query, legend) in enumerate(panel["queries"])
    ]
    return {
        "type": kind,
        "title": panel["title"],
        "description": panel["says"],
        "datasource": SOURCE,
        "targets": targets,
        "fieldConfig": {
            "defaults": _stat_defaults(panel) if kind == "stat" else _graph_defaults(panel),
            "overrides": [],
        },
        "options": _stat_options() if kind == "stat" else _graph_options(),
    }


def _stat_defaults(panel: dict[str, Any]) -> dict[str, Any]:
    steps = [[None, panel.get("color", "green")], *panel.get("from", [])]
    return {
        "unit": panel.get("unit", "short"),
        "color": {"mode": "thresholds"},
        "thresholds": {"mode": "absolute", "steps": [{"value": value, "color": color} for value, color in steps]},
    }


def _graph_defaults(panel: dict[str, Any]) -> dict[str, Any]:
    is_stacked = panel.get("stacked", False)
    bounds = {"min": None if panel.get("signed") else 0, "max": panel.get("most")}
    return {
        "unit": panel.get("unit", "short"),
        "color": {"mode": "palette-classic"},
        "custom": {
            "drawStyle": "line",
            "lineWidth": 1,
            "fillOpacity": 30 if is_stacked else 5,
            "showPoints": "never",
            "spanNulls": False,
            "stacking": {"mode": "normal" if is_stacked else "none", "group": "A"},
        },
    } | {name: value for name, value in bounds.items() if value is not None}


def _stat_options() -> dict[str, Any]:
    reduced = {"calcs": ["lastNotNull"], "fields": "", "values": False}
    return {"reduceOptions": reduced, "colorMode": "value", "graphMode": "none", "textMode": "auto"}


def _graph_options() -> dict[str, Any]:
    legend = {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []}
    return {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n")
