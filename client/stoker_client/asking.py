"""All that a run may be asked for, and the checks that need no row and no gateway."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from decimal import Decimal
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from stoker_client.errors import BadInput
from stoker_client.forms import Form, form_of
from stoker_client.gateway import Place
from stoker_client.lines import LineForm
from stoker_client.prompts import Template
from stoker_client.tables import Table, check_columns, is_frame, kept

WINDOW: Final = re.compile(r"[1-9][0-9]{0,7}s|[1-9][0-9]{0,5}m|[1-9][0-9]{0,3}h|[1-9][0-9]{0,2}d")
_ANSWERED: Final = ("answer",)
_COUNTED: Final = ("error", "prompt_tokens", "completion_tokens", "source")
_CHOICES: Final = {
    "cache": (None, "off", "exact", "semantic"),
    "trust": (None, "own", "external"),
    "priority": (None, "low", "normal", "high"),
    "errors": ("column", "raise"),
}


@dataclass(frozen=True, slots=True)
class Asked:
    """The arguments of run(), which documents them. `rows` are kept as they were when it was made."""

    rows: Any
    _: KW_ONLY
    prompt: str | None = None
    system: str | None = None
    labels: Sequence[str] | None = None
    schema: Any = None
    regex: str | None = None
    model: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = 0
    cache: Literal["off", "exact", "semantic"] | None = None
    window: str = "24h"
    priority: Literal["low", "normal", "high"] | None = None
    budget_tokens: int | None = None
    trust: Literal["own", "external"] | None = None
    budget_money: Decimal | float | str | None = None
    skip_nulls: bool = False
    result_prefix: str = ""
    errors: Literal["column", "raise"] = "column"
    resume: bool = True
    base_url: str | None = None
    api_key: str | None = field(default=None, repr=False)
    progress: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", kept(self.rows))


def check_options(asked: Asked) -> None:
    """Raises BadInput for an option that is not among its choices, or out of bounds."""
    for name, choices in _CHOICES.items():
        if getattr(asked, name) not in choices:
            allowed = ", ".join(str(choice) for choice in choices)
            raise BadInput(f"{name}: is {getattr(asked, name)!r}; it must be one of {allowed}")
    if not WINDOW.fullmatch(asked.window):
        raise BadInput(f"window: is {asked.window!r}; write 90m, 24h or 7d")
    for name in ("max_output_tokens", "budget_tokens"):
        value = getattr(asked, name)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise BadInput(f"{name}: is {value!r}; it must be a whole number of at least 1")
    for name in ("prompt", "system", "model", "regex"):
        value = getattr(asked, name)
        if value is not None and (not isinstance(value, str) or not value):
            raise BadInput(f"{name}: is {value!r}; it must be a text that is not empty")


def template_for(asked: Asked, table: Table) -> Template | None:
    """The prompt's template, whose slots the table has; None where the rows themselves are prompts."""
    if asked.prompt is None:
        if table.names is None:
            return None
        raise BadInput(f"prompt: is missing; write one with a column in it, such as {{{(table.names or ['text'])[0]}}}")
    template = Template(asked.prompt)
    if not template.slots:
        there = "the text" if table.names is None else f"a column ({', '.join(table.names[:20])})"
        raise BadInput(f"prompt: has no slot, so every row would ask the same; write {{name}} where {there} goes")
    if table.names is not None:
        check_columns(table, template.slots)
    elif len(template.slots) > 1:
        raise BadInput(
            f"prompt: has the slots {', '.join(template.slots)}, and each row is one text; leave one, or pass dicts"
        )
    return template


def checked_form(asked: Asked, table: Table) -> Form:
    """The answers' form, whose result columns fit beside the table's own."""
    form = form_of(labels=asked.labels, schema=asked.schema, regex=asked.regex)
    if not is_frame(asked.rows):
        return form
    ours = [*_ANSWERED, *(name for name, _ in form.fields), *_COUNTED]
    if twice := [name for at, name in enumerate(ours) if name in ours[:at]]:
        raise BadInput(f"schema: the property {twice[0]} has the name of another result column; rename it")
    taken = [asked.result_prefix + name for name in ours if asked.result_prefix + name in (table.names or [])]
    if taken:
        raise BadInput(
            f"rows: there is a column {', '.join(taken)} already; pass result_prefix='llm_', which goes before every "
            "result column, or rename yours"
        )
    return form


def line_form(asked: Asked, *, model: str, form: Form, template: Template | None) -> LineForm:
    """What all lines share."""
    body: dict[str, Any] = {"model": model}
    for name, value in (
        ("temperature", asked.temperature),
        ("max_tokens", asked.max_output_tokens),
        ("response_format", form.response_format),
    ):
        if value is not None:
            body[name] = value
    return LineForm(
        body=body,
        system="\n\n".join(filter(None, (asked.system, form.instruction))) or None,
        template=template,
        states_variables=asked.cache == "semantic",
    )


def create_body(asked: Asked, *, form: Form, lines: LineForm) -> dict[str, Any]:
    """The body that creates the batch, but for its file."""
    stoker = {
        "cache": asked.cache,
        "template": asked.prompt if lines.states_variables else None,
        "priority": asked.priority,
        "budget_tokens": asked.budget_tokens,
        "trust": asked.trust,
        "budget_money": None if asked.budget_money is None else str(asked.budget_money),
        "validate_answers": True if form.schema is not None else None,
    }
    return {
        "endpoint": "/v1/chat/completions",
        "completion_window": asked.window,
        "stoker": {name: value for name, value in stoker.items() if value is not None},
    }


def stated_place(asked: Asked) -> Place | None:
    """The gateway that the arguments or the environment name; None: an embedded one. Raises BadInput."""
    url = asked.base_url or os.environ.get("STOKER_URL")
    if not url:
        if asked.api_key:
            raise BadInput("base_url: is missing beside api_key; pass it, or set STOKER_URL")
        return None
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
        raise BadInput("base_url: must be the gateway's address, such as http://127.0.0.1:8080/v1")
    key = (asked.api_key or os.environ.get("STOKER_API_KEY") or "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise BadInput(f"api_key: is {'not a key' if key else 'missing'}; pass it, or set STOKER_API_KEY")
    path = parts.path.rstrip("/")
    path = path if path.endswith("/v1") else f"{path}/v1"
    return Place(url=f"{parts.scheme}://{parts.netloc}{path}", api_key=key)
