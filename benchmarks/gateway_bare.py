"""What benchmarks/gateway.py sets the gateway against: the same HTTP stack with nothing behind it.

    python -m benchmarks.gateway_bare PORT FILE

It answers polls with the batches of a file, made into JSON by the same models, and throws uploads away. No key, no
Postgres, no Redis.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from pydantic import TypeAdapter

from api.objects import BatchObject, Listing

app = FastAPI()
LISTED: list[BatchObject] = []


@app.get("/healthz")
def healthz() -> dict[str, Any]:
    """That it is up."""
    return {}


@app.get("/v1/batches")
def list_all_batches(limit: int = 20) -> Listing[BatchObject]:
    """The first page."""
    return Listing(data=LISTED[:limit], first_id=LISTED[0].id, last_id=LISTED[-1].id, has_more=True)


@app.get("/v1/batches/{batch_id}")
def retrieve_batch(batch_id: str) -> BatchObject:
    """One of them, whichever is asked for."""
    return LISTED[0].model_copy(update={"id": batch_id})


@app.post("/v1/files")
async def create_file(request: Request) -> dict[str, Any]:
    """Throw it away."""
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
    return {"bytes": size}


if __name__ == "__main__":
    LISTED += TypeAdapter(list[BatchObject]).validate_json(Path(sys.argv[2]).read_bytes())
    uvicorn.run(app, port=int(sys.argv[1]), loop="uvloop", http="httptools", log_config=None, access_log=False)
