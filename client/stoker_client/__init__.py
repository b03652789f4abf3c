"""Run a prompt over every row of a DataFrame, a table or a list, on a Stoker gateway.

import stoker_client
answered = stoker_client.run(frame, prompt="Classify: {text}", labels=["bug", "praise"])
"""

from stoker_client.answers import Answer
from stoker_client.batch import Batch
from stoker_client.errors import (
    BadInput,
    BatchFailed,
    JobsFailed,
    NoGateway,
    Problem,
    Refused,
    StokerClientError,
)
from stoker_client.running import run, run_async, submit

__all__ = [
    "Answer",
    "BadInput",
    "Batch",
    "BatchFailed",
    "JobsFailed",
    "NoGateway",
    "Problem",
    "Refused",
    "StokerClientError",
    "run",
    "run_async",
    "submit",
]
