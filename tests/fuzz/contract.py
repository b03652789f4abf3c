"""The HTTP contract under any order of requests: what hypothesis does to a real gateway, and what must hold.

Two tenants upload, create, cancel, look and delete, with right, wrong, foreign and odd ids and bodies. Every answer has
the contract's headers, and every one from 400 on its envelope; none is a defect of ours; nothing of one tenant is there
for the other; what was uploaded is what comes back.
"""

from __future__ import annotations

import http.client
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final
from urllib.parse import quote, urlencode, urlsplit

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, multiple, rule

from api.errors import MESSAGE_CHARACTERS, PARAM_CHARACTERS
from models.lines import ENDPOINTS
from tests.fuzz.target import strict

HEADERS: Final = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
KINDS: Final = frozenset(
    {
        *("invalid_request_error", "authentication_error", "permission_error", "not_found_error"),
        *("rate_limit_error", "server_error"),
    }
)
SINGLE: Final = ENDPOINTS  # that no worker answers here: 503 is their right answer
BOUNDARY: Final = "b"


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back; header names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """Its body's value."""
        return strict(self.body)


@dataclass(slots=True)
class Door:
    """A gateway, a key for each of two tenants, and what was counted of its answers."""

    url: str
    keys: tuple[str, str]
    statuses: Counter[int] = field(default_factory=Counter)
    sequences: int = 0

    def ask(
        self,
        method: str,
        path: str,
        *,
        tenant: int | None,
        body: bytes | None = None,
        kind: str = "application/json",
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Send a request and hold its answer to what holds for every one."""
        parts = urlsplit(self.url)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
        sent = {"Content-Type": kind, **(headers or {})}
        if tenant is not None:
            sent["Authorization"] = f"Bearer {self.keys[tenant]}"
        try:
            connection.request(method, path, body=body, headers=sent)
            came = connection.getresponse()
            answer = Answer(came.status, {name.lower(): value for name, value in came.getheaders()}, came.read())
        finally:
            connection.close()
        self.statuses[answer.status] += 1
        _check(answer, method, path)
        return answer


def _check(answer: Answer, method: str, path: str) -> None:
    told = f"{method} {path}: {answer.status} {answer.body[:500]!r}"
    is_single = path.partition("?")[0] in SINGLE
    assert answer.status < 500 or (is_single and answer.status == 503), told
    assert answer.headers["x-request-id"].startswith("req_"), told
    if path.startswith("/v1/"):
        assert HEADERS.items() <= answer.headers.items(), told
    if answer.status >= 400 and method != "HEAD":
        error = answer.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}, told
        assert error["type"] in KINDS, told
        assert 0 < len(error["message"]) <= MESSAGE_CHARACTERS, told
        assert len(error["param"] or "") <= PARAM_CHARACTERS, told
        assert "Traceback" not in error["message"], told


texts = st.text(max_size=30)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=6,
)
tenants = st.integers(0, 1)
lines = st.fixed_dictionaries(
    {
        "custom_id": st.integers(0, 3).map(str) | texts,
        "method": st.just("POST"),
        "url": st.sampled_from(ENDPOINTS[:1]) | st.sampled_from(ENDPOINTS),
        "body": st.fixed_dictionaries(
            {"model": st.just("m") | texts, "messages": st.just([{"role": "user", "content": "x"}])},
            optional={"prompt": texts, "input": texts, "max_tokens": json_values, "response_format": json_values},
        ),
    },
    optional={"stoker": json_values | st.fixed_dictionaries({"cache": st.sampled_from(["off", "exact"])})},
)
contents = st.lists(lines.map(json.dumps).map(str.encode) | st.binary(max_size=40), max_size=4).map(b"\n".join)
names = st.just("in.jsonl") | st.text(max_size=20).map(lambda name: name + ".jsonl") | texts
extras = st.fixed_dictionaries(
    {},
    optional={
        **{name: json_values for name in ("cache", "template", "collection", "model", "labels", "webhook", "x")},
        "priority": st.sampled_from(["low", "normal", "high"]) | json_values,
        "weight": st.floats() | st.just(2),
        "budget_tokens": st.integers(),
        "budget_money": st.floats() | st.just("1.5"),
        "max_output_tokens": st.integers(-1, 2**40),
        "validate_answers": st.booleans(),
        "trust": st.sampled_from(["own", "external"]),
    },
)
members = st.fixed_dictionaries(
    {},
    optional={
        "completion_window": st.sampled_from(["24h", "1s", "999d", "0h", "99999999s"]) | texts,
        "endpoint": st.sampled_from(ENDPOINTS) | json_values,
        "metadata": st.dictionaries(texts, texts, max_size=3) | json_values,
        "output_expires_after": st.just({"anchor": "created_at", "seconds": 3600}) | json_values,
        "stoker": extras | json_values,
        "x": json_values,
    },
)
queries = st.dictionaries(
    st.sampled_from(["limit", "after", "order", "purpose", "after_line", "outcome", "by", "days", "batch_id", "x"]),
    st.integers(-1, 2**40).map(str)
    | st.sampled_from(["asc", "batch", "failed", "waiting", "key", "batch_" + "0" * 32])
    | texts,
    max_size=3,
)
ODD_IDS: Final = st.sampled_from(
    [
        *("file-" + "0" * 32, "file-" + "0" * 32 + "-output", "file-x-output", "batch_" + "0" * 32, "batch_x", "%00"),
        *("..", "batch_" + "F" * 32, "0", "a" * 300, "%ff", "%2e%2e%2f", "batch_" + "0" * 32 + "/jobs/99999999999"),
    ]
)
OF_FILES: Final = ("", "/content", "/estimate", "/x")
OF_BATCHES: Final = ("", "/cancel", "/resume", "/retry")
INSPECTED: Final = ("", "/jobs", "/jobs/1", "/jobs/0", "/jobs/x")
PLACES: Final = (
    *("/v1/files", "/v1/batches", "/v1/models", *ENDPOINTS, "/v1/stoker/me", "/v1/stoker/workers", "/v1/stoker/costs"),
    *(
        "/v1/stoker/namespaces",
        "/v1/stoker/budgets",
        "/v1/stoker/deliveries",
        "/v1/",
        "/healthz",
        "/openapi.json",
        "/v2",
    ),
)
METHODS: Final = ("GET", "POST", "DELETE", "PUT", "PATCH", "HEAD", "OPTIONS")


class Contract(RuleBasedStateMachine):
    """Any order of requests; `door` is a subclass's."""

    door: ClassVar[Door]
    files, batches, gone = Bundle("files"), Bundle("batches"), Bundle("gone")

    @initialize()
    def count(self) -> None:
        self.door.sequences += 1

    @rule(target=files, tenant=tenants, content=contents, name=names, more=st.dictionaries(texts, texts, max_size=2))
    def upload(self, tenant: int, content: bytes, name: str, more: dict[str, str]) -> Any:
        fields = {"purpose": "batch", **{key: value for key, value in more.items() if key != "file"}}
        sent = _form(fields, content=content, name=name)
        answer = self.door.ask(
            "POST", "/v1/files", tenant=tenant, body=sent, kind=f"multipart/form-data; boundary={BOUNDARY}"
        )
        assert answer.status in (200, 400, 413, 429)
        if answer.status != 200:
            return multiple()
        assert answer.json()["bytes"] == len(content)
        assert answer.json()["filename"].endswith(".jsonl")
        return tenant, answer.json()["id"], content

    @rule(target=batches, file=files, tenant=tenants, more=members, key=st.none() | st.sampled_from(["k1", "k2"]))
    def create(self, file: tuple[int, str, bytes], tenant: int, more: dict[str, Any], key: str | None) -> Any:
        owner, name, _ = file
        body = {"input_file_id": name, "endpoint": ENDPOINTS[0], "completion_window": "24h", **more}
        headers = {} if key is None else {"Idempotency-Key": key}
        sent = json.dumps(body).encode()
        answer = self.door.ask("POST", "/v1/batches", tenant=tenant, body=sent, headers=headers)
        assert answer.status in (200, 400, 404, 413, 422)
        if answer.status != 200:
            return multiple()
        assert tenant == owner
        assert answer.json()["input_file_id"] == name
        return tenant, answer.json()["id"]

    @rule(file=files, tenant=tenants, part=st.sampled_from(OF_FILES), query=queries)
    def look_at_a_file(self, file: tuple[int, str, bytes], tenant: int, part: str, query: dict[str, str]) -> None:
        owner, name, content = file
        path = f"/v1/files/{name}{part}"
        answer = self.door.ask("GET", _with(path, query), tenant=tenant)
        if owner != tenant:
            assert answer.status in (400, 404)
        elif part in ("", "/content") and not query:
            assert answer.status == 200
        if answer.status == 200 and part == "/content":
            assert answer.body == content

    @rule(batch=batches, tenant=tenants, part=st.sampled_from(OF_BATCHES))
    def act_on_a_batch(self, batch: tuple[int, str], tenant: int, part: str) -> None:
        owner, name = batch
        answer = self.door.ask("POST" if part else "GET", f"/v1/batches/{name}{part}", tenant=tenant)
        told = f"{'own' if owner == tenant else 'foreign'} batch{part}: {answer.status} {answer.body[:300]!r}"
        assert answer.status in ((200, 409) if owner == tenant else (404,)), told
        if owner == tenant and not part:
            assert answer.json()["id"] == name

    @rule(batch=batches, tenant=tenants, part=st.sampled_from(INSPECTED), query=queries)
    def look_at_a_batch(self, batch: tuple[int, str], tenant: int, part: str, query: dict[str, str]) -> None:
        owner, name = batch
        answer = self.door.ask("GET", _with(f"/v1/stoker/batches/{name}{part}", query), tenant=tenant)
        assert answer.status in ((200, 400, 404) if owner == tenant else (400, 404))

    @rule(batch=batches, tenant=tenants, part=st.sampled_from(["input", "output", "errors"]), query=queries)
    def read_a_batchs_file(self, batch: tuple[int, str], tenant: int, part: str, query: dict[str, str]) -> None:
        owner, name = batch
        path = f"/v1/files/file-{name.removeprefix('batch_')}-{part}/content"
        answer = self.door.ask("GET", _with(path, query), tenant=tenant)
        assert answer.status in ((200, 400, 404) if owner == tenant else (400, 404))

    @rule(target=gone, file=consumes(files))
    def delete(self, file: tuple[int, str, bytes]) -> tuple[int, str]:
        owner, name, _ = file
        assert self.door.ask("DELETE", f"/v1/files/{name}", tenant=1 - owner).status == 404
        assert self.door.ask("DELETE", f"/v1/files/{name}", tenant=owner).status == 200
        return owner, name

    @rule(file=gone, part=st.sampled_from(OF_FILES))
    def look_at_a_deleted_file(self, file: tuple[int, str], part: str) -> None:
        assert self.door.ask("GET", f"/v1/files/{file[1]}{part}", tenant=file[0]).status == 404

    @rule(tenant=tenants, query=queries, place=st.sampled_from(["/v1/files", "/v1/batches"]))
    def list_all(self, tenant: int, query: dict[str, str], place: str) -> None:
        answer = self.door.ask("GET", _with(place, query), tenant=tenant)
        if answer.status == 200:
            ids = [one["id"] for one in answer.json()["data"]]
            assert len(ids) == len(set(ids))
            if not query and place == "/v1/files":
                other = {one["id"] for one in self.door.ask("GET", place, tenant=1 - tenant).json()["data"]}
                assert other.isdisjoint(ids)

    @rule(
        tenant=st.none() | tenants,
        method=st.sampled_from(METHODS),
        place=st.sampled_from(PLACES),
        odd=st.none() | ODD_IDS | texts.map(lambda text: quote(text, safe="")),
        query=queries,
        body=st.binary(max_size=100) | json_values.map(lambda value: json.dumps(value).encode()),
        kind=st.sampled_from(["application/json", "multipart/form-data; boundary=b", "text/plain", "x"]),
    )
    def do_anything(
        self,
        tenant: int | None,
        method: str,
        place: str,
        odd: str | None,
        query: dict[str, str],
        body: bytes,
        kind: str,
    ) -> None:
        path = _with(place if odd is None else f"{place}/{odd}", query)
        answer = self.door.ask(method, path, tenant=tenant, body=body, kind=kind)
        if tenant is None and place.startswith("/v1/"):
            assert answer.status in (400, 401, 404, 405, 413, 415)


def machine_of(door: Door) -> type[Contract]:
    """The machine of this gateway."""
    return type("Machine", (Contract,), {"door": door})


def _with(path: str, query: Mapping[str, str]) -> str:
    return f"{path}?{urlencode(query, errors='replace')}" if query else path


def _form(fields: Mapping[str, str], *, content: bytes, name: str) -> bytes:
    """A multipart body as browsers write it."""
    said = name.encode("utf-8", "replace").replace(b"\r", b"%0D").replace(b"\n", b"%0A").replace(b'"', b"%22")
    parts = [
        b'--b\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n'
        % (
            key.encode("utf-8", "replace").replace(b"\r", b"").replace(b"\n", b"").replace(b'"', b"%22"),
            value.encode("utf-8", "replace"),
        )
        for key, value in fields.items()
    ]
    file = b'--b\r\nContent-Disposition: form-data; name="file"; filename="%b"\r\n\r\n%b\r\n--b--\r\n' % (said, content)
    return b"".join(parts) + file
