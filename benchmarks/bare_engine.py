"""A bare vLLM, warm, that works on batch files as it is told: the other side of the end-to-end benchmark.

    .venv-vllm/bin/python benchmarks/bare_engine.py chat|run-batch --model FOLDER [the flags of our server]

Run by vLLM's own Python; it imports nothing of ours. It takes the flags that our server is started with, says what it
did not know of them, then reads one JSON line a leg from stdin, {"file": PATH}, and answers with one on stdout:
seconds, and tokens as the engine counted them. What vLLM prints goes to stderr.

`chat` is offline `LLM.chat`: the clock runs from the first conversation handed over, already parsed, to the last
answer. `run-batch` is what `vllm run-batch` does once its engine is up: its own `run_batch` with its own arguments,
from the reading of the file to the writing of the last line. The command loads an engine for every file and throws it
away; here the engine stays, and neither its start nor its first requests count. That is to the bare engine's advantage.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO


def main() -> None:
    """Start the engine, say so, and answer until stdin ends."""
    answers = _own_stdout()
    kind, flags = sys.argv[1], sys.argv[2:]
    if kind == "chat":
        _chat(flags, answers)
    else:
        asyncio.run(_run_batch(flags, answers))


def _own_stdout() -> TextIO:
    """The real stdout for the answers; from here on everybody else's is stderr, that of child processes too."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return answers


def _chat(flags: list[str], answers: TextIO) -> None:
    from vllm import LLM  # noqa: PLC0415  # takes seconds: only here
    from vllm.engine.arg_utils import EngineArgs  # noqa: PLC0415
    from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: PLC0415

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    arguments, unknown = parser.parse_known_args(flags)
    engine = LLM.from_engine_args(EngineArgs.from_cli_args(arguments))
    _say(answers, {"ready": True, "not_taken": unknown})
    for line in sys.stdin:
        _say(answers, _chat_leg(engine, Path(json.loads(line)["file"])))


def _chat_leg(engine: Any, file: Path) -> dict[str, Any]:
    bodies = [json.loads(line)["body"] for line in file.read_text().splitlines()]
    parameters = [_sampling_of(body) for body in bodies]
    conversations = [body["messages"] for body in bodies]
    started = time.monotonic()
    outputs = engine.chat(conversations, parameters, use_tqdm=False)
    seconds = time.monotonic() - started
    return {
        "seconds": seconds,
        "jobs": len(outputs),
        "prompt_tokens": sum(len(output.prompt_token_ids) for output in outputs),
        "completion_tokens": sum(len(output.outputs[0].token_ids) for output in outputs),
    }


def _sampling_of(body: dict[str, Any]) -> Any:
    from vllm import SamplingParams  # noqa: PLC0415
    from vllm.sampling_params import StructuredOutputsParams  # noqa: PLC0415

    wanted = body.get("response_format")
    return SamplingParams(
        temperature=body["temperature"],
        max_tokens=body["max_tokens"],
        ignore_eos=body.get("ignore_eos", False),
        structured_outputs=None if wanted is None else StructuredOutputsParams(json=wanted["json_schema"]["schema"]),
    )


async def _run_batch(flags: list[str], answers: TextIO) -> None:
    from vllm.entrypoints.launchers import run_batch  # noqa: PLC0415
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client  # noqa: PLC0415
    from vllm.usage.usage_lib import UsageContext  # noqa: PLC0415
    from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: PLC0415

    parser = run_batch.make_arg_parser(FlexibleArgumentParser())
    arguments, unknown = parser.parse_known_args(["-i", "none", "-o", "none", *flags])
    run_batch.validate_run_batch_args(arguments)
    async with build_async_engine_client(arguments, usage_context=UsageContext.OPENAI_BATCH_RUNNER) as client:
        _say(answers, {"ready": True, "not_taken": unknown})
        while line := await asyncio.to_thread(sys.stdin.readline):
            arguments.input_file = json.loads(line)["file"]
            arguments.output_file = f"{arguments.input_file}.out"
            started = time.monotonic()
            await run_batch.run_batch(client, arguments)
            seconds = time.monotonic() - started
            _say(answers, {"seconds": seconds} | _counted(Path(arguments.output_file)))


def _counted(output: Path) -> dict[str, int]:
    bodies = [json.loads(line)["response"]["body"] for line in output.open()]
    output.unlink()
    return {
        "jobs": len(bodies),
        "prompt_tokens": sum(body["usage"]["prompt_tokens"] for body in bodies),
        "completion_tokens": sum(body["usage"]["completion_tokens"] for body in bodies),
    }


def _say(answers: TextIO, what: dict[str, Any]) -> None:
    answers.write(json.dumps(what) + "\n")


if __name__ == "__main__":
    main()
