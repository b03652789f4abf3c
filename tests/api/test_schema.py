"""The API against its own description: schemathesis sends what the schema allows and what it does not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import openai

from models.states import Scope
from pipeline.keys import issue_key
from store.database import Database
from tests.support.gateway_process import GatewayProcess

# Identifiers of what is there, and what no schema can say: that a file of purpose `batch` must end in .jsonl, and which
# hosts a webhook may have. Where a wrong id is to be tried, the stated one would stand in its place. That no worker
# answers single requests here; and what of their bodies is not described, as engines differ in it.
CONFIG = """
[parameters]
"path.batch_id" = "{batch}"
"path.file_id" = "{file}"

[checks]
enabled = true

[[operations]]
include-name = ["POST /v1/files", "POST /v1/batches"]
[operations.checks.positive_data_acceptance]
enabled = false

[[operations]]
include-name = ["POST /v1/chat/completions", "POST /v1/completions", "POST /v1/embeddings"]
[operations.checks.not_a_server_error]
enabled = false
[operations.checks.positive_data_acceptance]
enabled = false

[[operations]]
include-name = "GET /v1/stoker/batches/{{batch_id}}/jobs/{{line}}"
[operations.checks.negative_data_rejection]
enabled = false
"""
LINE = {
    "custom_id": "a",
    "method": "POST",
    "url": "/v1/chat/completions",
    "body": {"model": "m", "messages": [{"role": "user", "content": "hello"}]},
}


def test_every_answer_is_as_the_description_says(
    database: Database, postgres_url: str, redis_url: str, tmp_path: Path
) -> None:
    with database.transaction() as session:
        key = issue_key(session, tenant="local", name="all", scopes=tuple(Scope), requests_per_minute=1_000_000).key
    env = {
        "STOKER_POSTGRES__URL": postgres_url,
        "STOKER_BROKER__URL": "memory://",
        "STOKER_REDIS__URL": redis_url,
        "STOKER_HOME": str(tmp_path),
        "STOKER_GATEWAY__WRONG_KEYS_PER_MINUTE": "1000000",
    }
    with (
        GatewayProcess(env=env, folder=tmp_path) as gateway,
        openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=key.text) as client,
    ):
        file = client.files.create(file=("in.jsonl", json.dumps(LINE).encode()), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
        config = tmp_path / "schemathesis.toml"
        config.write_text(CONFIG.format(batch=batch.id, file=f"file-{batch.id.removeprefix('batch_')}-output"))
        ended = subprocess.run(
            [
                Path(sys.executable).with_name("schemathesis"),
                *("--config-file", config, "run", f"{gateway.url}/openapi.json"),
                *("-H", f"Authorization: Bearer {key.text}"),
                *("--max-examples", "10", "--seed", "1", "--suppress-health-check", "all"),
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
    print(ended.stdout[-6000:])
    assert ended.returncode == 0, ended.stdout[-6000:]
