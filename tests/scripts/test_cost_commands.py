"""`stoker cost` on real rows."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

from click.testing import CliRunner

from models.endpoints import NANOS
from runtime.settings import CostSettings, PostgresSettings, RedisSettings, Settings
from scripts.cost_commands import cost
from store.database import Database
from store.engine_days import EngineTime, add_engine_time
from store.engines import register_engine
from store.shards import write_results
from tests.support.batches import LEASE_S, answers, chats, claimed, dispatch_all, store_batch


def test_a_batch_is_told_in_a_table_a_sentence_and_as_json(
    database: Database, postgres_url: str, redis_url: str, tmp_path: Path
) -> None:
    batch_id = store_batch(database, tmp_path, chats(2))
    claim = claimed(database, dispatch_all(database)[0])
    with database.transaction() as session:
        own = register_engine(session, {"kind": "vllm", "checkpoint": "qwen"})
        write_results(session, claim, answers(claim.seqs), engine_id=own, lease_s=LEASE_S)
        time = EngineTime(up_s=3600, busy_s=1800, slot_s=900, slots_s=3600)
        add_engine_time(session, own, time, cost=NANOS // 2, is_shared=False)
    settings = Settings.model_construct(
        postgres=PostgresSettings(url=postgres_url),
        redis=RedisSettings(url=redis_url),
        cost=CostSettings(managed_input_price=Decimal(100_000), managed_output_price=Decimal(100_000)),
    )
    said = CliRunner().invoke(cost, [batch_id.hex], obj=settings)
    assert said.exit_code == 0, said.output
    assert "vllm qwen" in said.output
    assert said.stdout.endswith(
        "own engines are cheaper: 0.500 USD for 10 tokens, where a managed API would have asked 1.00 USD; "
        "they were used to 25.0% and break even at 12.5%.\n"
    )
    found = json.loads(CliRunner().invoke(cost, ["--by", "day", "--json"], obj=settings).stdout)
    assert (found["total"]["cost"], found["total"]["managed"]) == (0.5, 1.0)
    assert found["engines"] == [
        {"name": "vllm qwen", "hours": 1.0, "busy": 0.5, "slots": 0.25, "gpu": None, "cost": 0.5}
    ]
