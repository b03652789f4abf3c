"""Asking a real engine that a test has planned."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from inference.endpoint import Endpoint, Reply
from inference.engines import EnginePlan
from inference.supervisor import EngineSupervisor


def answer_of(plan: EnginePlan, *, log: Path) -> Reply:
    """What the engine says to a chat; it is up for that alone."""
    with EngineSupervisor(plan, log_file=log, start_timeout_s=240, stall_s=120) as engine:
        reply = asyncio.run(_ask(plan))
    assert engine.pid is None
    return reply


async def _ask(plan: EnginePlan) -> Reply:
    body = {"model": plan.alias, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8}
    async with Endpoint(plan.url, api_key=None, timeout_s=60, connections=1) as endpoint:
        return await endpoint.post("/v1/chat/completions", json.dumps(body).encode(), request_id="hello")
