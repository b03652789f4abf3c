"""/v1/files: uploads and downloads that stream, their limits, and what is left of those that fail."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from api.gateway import Gateway
from models.states import Scope
from pipeline.validate import free_blobs, sweep_blobs
from runtime.errors import BlobGone
from runtime.settings import GatewaySettings
from store.blobs import Blobs, BlobWriter
from tests.api.conftest import ClientOf
from tests.support.batches import execute

LINE = json.dumps(
    {
        "custom_id": "a",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hello"}]},
    }
).encode()


def upload(client: TestClient, content: bytes, name: str = "in.jsonl", **fields: str) -> Any:
    return client.post("/v1/files", files={"file": (name, content)}, data={"purpose": "batch", **fields})


def blobs_in(gateway: Gateway) -> list[str]:
    return sorted(path.name for path in Path(gateway.blobs.url).iterdir())


def test_an_upload_comes_back_as_it_was(client: TestClient, gateway: Gateway) -> None:
    content = LINE + b"\n\xff\x00\r\n--boundary-like--\r\n" * 1000
    made = upload(client, content, "ein name.jsonl")
    assert made.status_code == 200, made.text
    file = made.json()
    assert (file["object"], file["bytes"], file["purpose"], file["status"]) == (
        "file",
        len(content),
        "batch",
        "processed",
    )
    assert file["filename"] == "ein name.jsonl" and file["stoker"]["sha256"] == hashlib.sha256(content).hexdigest()
    assert client.get(f"/v1/files/{file['id']}").json() == file
    answer = client.get(f"/v1/files/{file['id']}/content")
    assert answer.content == content and answer.headers["content-length"] == str(len(content))
    assert blobs_in(gateway) == [file["id"]]


@pytest.mark.parametrize(
    ("name", "fields", "param"),
    [
        ("in.txt", {}, "file"),
        ("in.jsonl", {"purpose": "assistants"}, "purpose"),
        ("in.jsonl", {"colour": "red"}, "colour"),
        ("in.jsonl", {"expires_after[anchor]": "created_at", "expires_after[seconds]": "60"}, "expires_after"),
        ("in.jsonl", {"expires_after[seconds]": "7200"}, "expires_after"),
        ("in.jsonl", {"purpose": "x" * 5000}, "purpose"),
    ],
)
def test_a_form_that_is_wrong_is_refused_by_field_and_leaves_nothing(
    client: TestClient, gateway: Gateway, name: str, fields: dict[str, str], param: str
) -> None:
    answer = upload(client, LINE, name, **fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert blobs_in(gateway) == []
    assert client.get("/v1/files").json()["data"] == []


@pytest.mark.parametrize(
    ("content_type", "body", "status"),
    [
        ("application/json", b"{}", 415),
        ("multipart/form-data", b"", 415),
        ("multipart/form-data; boundary=b", b"nothing of a form", 400),
        ("multipart/form-data; boundary=b", b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\ncut', 400),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nx\r\n--b--\r\n',
            400,
        ),
    ],
    ids=["json", "no boundary", "no form", "cut off", "no file"],
)
def test_a_body_that_is_no_whole_form_leaves_nothing(
    client: TestClient, gateway: Gateway, content_type: str, body: bytes, status: int
) -> None:
    answer = client.post("/v1/files", content=body, headers={"Content-Type": content_type})
    assert answer.status_code == status and answer.json()["error"]["message"]
    assert blobs_in(gateway) == []


class TestLimits:
    @pytest.fixture
    def gateway_settings(self) -> GatewaySettings:
        return GatewaySettings(file_bytes=1000, tenant_bytes=1500, uploads=2, tenant_uploads=1, request_bytes=2000)

    def test_a_file_beyond_the_limit_is_refused_while_it_comes(self, client: TestClient, gateway: Gateway) -> None:
        answer = upload(client, b"x" * 1001)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "file_too_large")
        assert upload(client, b"x" * 1000).status_code == 200
        assert upload(client, b"x" * 501).status_code == 413, "the tenant's room"
        assert upload(client, b"x" * 500).status_code == 200
        full = upload(client, b"x")
        assert (full.status_code, full.json()["error"]["code"]) == (413, "storage_full")
        assert len(blobs_in(gateway)) == 2

    def test_one_tenant_has_its_places_and_all_have_theirs(self, client: TestClient, gateway: Gateway) -> None:
        slots = gateway.upload_slots
        with slots.taken("one"):
            with pytest.raises(Exception, match="at once"), slots.taken("one"):
                pass
            with slots.taken("two"), pytest.raises(Exception, match="at once"), slots.taken("three"):
                pass
        with slots.taken("three"):
            pass

    def test_any_other_body_has_its_limit_stated_or_not(self, client: TestClient) -> None:
        body = b'{"metadata": {"a": "' + b"x" * 3000 + b'"}}'
        stated = client.post("/v1/batches", content=body, headers={"Content-Type": "application/json"})
        unstated = client.post("/v1/batches", content=iter([body]), headers={"Content-Type": "application/json"})
        for answer in (stated, unstated):
            assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


def test_files_are_listed_by_page_order_and_purpose(client: TestClient) -> None:
    ids = [upload(client, LINE, f"{number}.jsonl").json()["id"] for number in range(5)]
    other = upload(client, LINE, purpose="user_data").json()["id"]
    page = client.get("/v1/files", params={"limit": 2, "purpose": "batch"}).json()
    assert ([file["id"] for file in page["data"]], page["has_more"]) == ([ids[4], ids[3]], True)
    rest = client.get("/v1/files", params={"limit": 3, "purpose": "batch", "after": ids[3]}).json()
    assert ([file["id"] for file in rest["data"]], rest["has_more"]) == ([ids[2], ids[1], ids[0]], False)
    upwards = client.get("/v1/files", params={"order": "asc", "after": ids[3]}).json()
    assert [file["id"] for file in upwards["data"]] == [ids[4], other]
    assert client.get("/v1/files", params={"after": "file-00"}).status_code == 404
    assert client.get("/v1/files", params={"limit": 0}).json()["error"]["param"] == "limit"


def test_a_deleted_or_expired_file_is_gone_and_its_bytes_with_it(client: TestClient, gateway: Gateway) -> None:
    deleted, expired, kept = (
        upload(client, LINE, **{"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}).json()["id"]
        for _ in range(3)
    )
    assert client.delete(f"/v1/files/{deleted}").json() == {"id": deleted, "object": "file", "deleted": True}
    execute(gateway.database, f"UPDATE files SET expires_at = now() WHERE id = '{expired}'")
    for gone in (deleted, expired):
        assert client.get(f"/v1/files/{gone}").status_code == 404
        assert client.get(f"/v1/files/{gone}/content").status_code == 404
        assert client.delete(f"/v1/files/{gone}").status_code == 404
    assert [file["id"] for file in client.get("/v1/files").json()["data"]] == [kept]
    assert free_blobs(gateway.database, gateway.blobs) == 2
    assert blobs_in(gateway) == [kept]


def test_a_file_of_another_tenant_is_not_there(client: TestClient, client_of: ClientOf) -> None:
    file = upload(client, LINE).json()["id"]
    other = client_of(tenant="other")
    for answer in (
        other.get(f"/v1/files/{file}"),
        other.get(f"/v1/files/{file}/content"),
        other.get(f"/v1/files/{file}/estimate"),
        other.delete(f"/v1/files/{file}"),
        other.get("/v1/files", params={"after": file}),
    ):
        assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found_error")
    assert other.get("/v1/files").json()["data"] == []
    assert client.get(f"/v1/files/{file}").status_code == 200
    reader = client_of(scopes=(Scope.READ,))
    assert reader.delete(f"/v1/files/{file}").status_code == 403


def test_an_estimate_tells_tokens_or_what_is_wrong_before_the_file_is_a_batch(client: TestClient) -> None:
    lines = b"\n".join(LINE.replace(b'"a"', b'"%d"' % number) for number in range(3))
    good = upload(client, lines).json()["id"]
    found = client.get(f"/v1/files/{good}/estimate").json()
    assert (found["lines"], found["most_output_tokens"], found["models"]) == (3, 27, {"m": 3})
    assert found["estimated_prompt_tokens"] > 0 and found["problems"] == []
    assert client.get(f"/v1/files/{good}").json()["stoker"]["estimate"] == found
    bad = upload(client, LINE + b"\n" + LINE + b"\n{").json()["id"]
    wrong = client.get(f"/v1/files/{bad}/estimate").json()
    assert [(one["code"], one["line"]) for one in wrong["problems"]] == [
        ("duplicate_custom_id", 2),
        ("invalid_json_line", 3),
    ]


def test_a_folder_that_takes_no_more_is_said_so(client: TestClient, gateway: Gateway) -> None:
    Path(gateway.blobs.url).rmdir()
    answer = upload(client, LINE)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
    assert client.get("/v1/files").json()["data"] == []


def test_what_a_killed_upload_left_is_swept_when_it_is_old(client: TestClient, gateway: Gateway) -> None:
    kept = upload(client, LINE).json()["id"]
    folder = Path(gateway.blobs.url)
    nobodys, young = f"file-{1:032x}", f"file-{2:032x}.partial"
    (folder / "folder").mkdir()
    for name, age_s in ((kept, 1e6), (nobodys, 1e6), (f"{nobodys}.partial", 1e6), (young, 10), ("others.parquet", 1e6)):
        (folder / name).touch()
        os.utime(folder / name, (time.time() - age_s,) * 2)
    assert sweep_blobs(gateway.database, gateway.blobs) == 2
    assert blobs_in(gateway) == sorted([kept, young, "others.parquet", "folder"])


def test_blobs_may_be_anywhere_that_fsspec_reaches() -> None:
    blobs = Blobs("memory://stoker-blobs")
    writer = BlobWriter(blobs, "one")
    writer.write(b"some ")
    writer.write(memoryview(b"bytes"))
    writer.commit()
    assert b"".join(blobs.pieces("one")) == b"some bytes"
    with blobs.local_copy("one") as path:
        assert path.read_bytes() == b"some bytes"
    left = BlobWriter(blobs, "two")
    left.write(b"x")
    left.discard()
    blobs.delete("one")
    blobs.delete("one")
    with pytest.raises(BlobGone):
        next(blobs.pieces("one"))
    assert blobs.older_than(-60.0) == []


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("../../x.jsonl", "x.jsonl"),
        ("/etc/x.jsonl", "x.jsonl"),
        ("..\\..\\x.jsonl", "x.jsonl"),
        ("a\0b.jsonl", "ab.jsonl"),
        ("..", ".."),  # only shown
        ("y" * 300 + ".jsonl", None),
    ],
)
def test_a_name_leads_nowhere(client: TestClient, gateway: Gateway, name: str, shown: str | None) -> None:
    folder = Path(gateway.blobs.url)
    around = sorted(folder.parent.iterdir())
    body = (
        b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nuser_data\r\n'
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="' + name.encode() + b'"\r\n\r\nx\r\n--b--\r\n'
    )
    made = client.post("/v1/files", content=body, headers={"Content-Type": "multipart/form-data; boundary=b"})
    assert made.status_code == 200, made.text
    file = made.json()
    assert blobs_in(gateway) == [file["id"]], "stored under an id of ours"
    assert sorted(folder.parent.iterdir()) == around
    assert file["filename"] == shown or (shown is None and len(file["filename"]) <= 255)
    answer = client.get(f"/v1/files/{file['id']}/content")
    assert not set(answer.headers["content-disposition"]) & set("/\\\0\r\n")
