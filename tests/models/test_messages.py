"""Messages between processes of two versions."""

from __future__ import annotations

from models.messages import RunShard


def test_a_field_that_a_newer_version_adds_is_none_to_this_one() -> None:
    known = {"shard_id": 7, "batch_id": "0193"}
    assert RunShard.model_validate({**known, "added_later": True}) == RunShard.model_validate(known)
