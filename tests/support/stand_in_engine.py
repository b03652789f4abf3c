"""An engine in vLLM's place: takes vLLM's flags, serves the scripted endpoint, and keeps a journal on disk.

The supervisor starts it as it would start vLLM, through the executable that `install` writes. Each process appends
`began PROMPT TIME` and `ended PROMPT TIME` to a file of its own in --journal, so that the count of calls survives
its death. Times are CLOCK_MONOTONIC, which all processes of a machine share.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import uvloop
from aiohttp import web

from tests.support.scripted_server import Script, add_options

REPOSITORY = Path(__file__).resolve().parents[2]


def install(folder: Path, *, journal: Path, latency_s: float) -> dict[str, str]:
    """Write the executable and a checkpoint's folder; return the settings that make workers start this engine."""
    journal.mkdir(parents=True)
    checkpoint = folder / "scripted"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "none at all"}}))
    program = folder / "python"
    program.write_text(f'#!/bin/sh\ncd {REPOSITORY}\nexec {sys.executable} -m {__name__} "$@"\n')
    program.chmod(0o755)
    return {
        "STOKER_ENGINE__KIND": "vllm",
        "STOKER_ENGINE__VLLM_PYTHON": str(program),
        "STOKER_ENGINE__CHECKPOINT": str(checkpoint),
        "STOKER_ENGINE__ALIAS": "scripted",
        "STOKER_ENGINE__ARGS": f"--journal {journal} --latency-s {latency_s}",
    }


class _Journaled(Script):
    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        file = options.journal / f"{os.getpid()}-{time.monotonic_ns()}"
        self._journal = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    async def _serve(
        self, request: web.BaseRequest, path: str, body: dict[str, Any], prompts: list[str], orders: list[str]
    ) -> web.StreamResponse:
        self._note("began", prompts[0])
        response = await super()._serve(request, path, body, prompts, orders)
        self._note("ended", prompts[0])
        return response

    def _note(self, what: str, prompt: str) -> None:
        os.write(self._journal, f"{what} {prompt} {time.monotonic():.3f}\n".encode())


async def _serve_forever(options: argparse.Namespace) -> None:
    server = web.Server(_Journaled(options).handle, access_log=None, handler_cancellation=True)
    listener = await asyncio.get_running_loop().create_unix_server(server, options.uds, backlog=1024)
    async with listener:
        await listener.serve_forever()


def main() -> None:
    """Serve until killed; flags that are not ours are vLLM's."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("-m", dest="module")
    parser.add_argument("--uds", required=True)
    parser.add_argument("--journal", type=Path, required=True)
    add_options(parser)
    uvloop.run(_serve_forever(parser.parse_known_args()[0]))


if __name__ == "__main__":
    main()
