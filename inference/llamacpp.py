"""A llama.cpp HTTP server in the foreground: the engine of a machine without a GPU.

    python -m inference.llamacpp --checkpoint FILE.gguf --uds /run/engine.sock --alias small

It speaks the OpenAI protocol (/v1/chat/completions, /v1/completions, /v1/embeddings, /v1/models) and has
/health (503 until the checkpoint is loaded) and /metrics. It must not do what its caller can: restart itself,
choose the checkpoint, ask for a key. Without a key it belongs on a unix socket or on loopback.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import stat
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

# 64 chats of 32 tokens (prompts of 50), SmolLM2-135M Q4_1, two quiet cores, two threads, two runs each:
# 8 slots 105 and 129 tokens/s, 16 slots 127 and 137, 32 slots 118 and 118: 8 and 16 are hardly apart.
DEFAULT_SLOTS = 16
DEFAULT_CONTEXT_PER_SLOT_TOKENS = 2048
EXIT_CANNOT_START = 2
UDS_SUFFIX = ".sock"  # llama.cpp takes a host for a unix socket only when it ends so
LOG_ERRORS_ONLY = 1  # llama.cpp's scale; at 3, its default, every request writes ten lines
# llama.cpp would keep up to 8 GiB of past prompts. The run above (distinct prompts, 16 slots): 138 tokens/s
# with them (one run), 127 and 137 without. A slot still reuses what its last prompt and the next share.
PROMPT_CACHE_MIB = 0


@dataclass(frozen=True, slots=True)
class Options:
    """What a server is started with. `uds` wins over `host` and `port`."""

    checkpoint: Path
    alias: str
    host: str
    port: int
    uds: Path | None
    slots: int
    context_per_slot_tokens: int
    threads: int
    embeddings: bool


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT, which end the process with 0; return 2 when the server cannot start.

    A signal during loading ends the process at once, by that signal: nothing has been served by then.
    """
    options = parse(arguments)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own handler would wait for the end of loading
    try:
        serve(options)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"llama.cpp cannot start: {error}", file=sys.stderr)  # noqa: T201
    return EXIT_CANNOT_START


def parse(arguments: Sequence[str] | None) -> Options:
    """The options on the command line; ends the process with usage and status 2 when they are wrong."""
    parser = argparse.ArgumentParser(prog="python -m inference.llamacpp", description="Serve a GGUF checkpoint.")
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE.gguf")
    parser.add_argument("--alias", required=True, help="the name that requests use for the checkpoint")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="required without --uds")
    parser.add_argument("--uds", type=Path, metavar="PATH.sock", help="a unix socket instead of a port")
    parser.add_argument("--slots", type=_positive, default=DEFAULT_SLOTS, help="requests computed at a time")
    parser.add_argument("--context-per-slot", type=_positive, default=DEFAULT_CONTEXT_PER_SLOT_TOKENS)
    parser.add_argument("--threads", type=_positive, default=os.cpu_count() or 1)
    parser.add_argument("--embeddings", action="store_true", help="serve /v1/embeddings instead of generation")
    found = parser.parse_args(arguments)
    if (found.uds is None) == (found.port == 0):
        parser.error("give one of --uds and --port")
    if found.uds is not None and found.uds.suffix != UDS_SUFFIX:
        parser.error(f"--uds must end in {UDS_SUFFIX}")
    return Options(
        checkpoint=found.checkpoint,
        alias=found.alias,
        host=found.host,
        port=found.port,
        uds=None if found.uds is None else found.uds.absolute(),
        slots=found.slots,
        context_per_slot_tokens=found.context_per_slot,
        threads=found.threads,
        embeddings=found.embeddings,
    )


def serve(options: Options) -> NoReturn:
    """Load the checkpoint and serve until a signal, which cuts off what is in flight and ends the process.

    Closing the server properly waits for the requests in flight (58 s measured): whoever stops an engine has
    stopped asking it, and there is nothing on disk that could be left half written.
    """
    if not options.checkpoint.is_file():
        raise FileNotFoundError(f"no checkpoint at {options.checkpoint}")
    if options.uds is not None:
        _free(options.uds)
        os.umask(0o077)  # llama.cpp makes the socket: only our own user may connect
    server = _loaded(options)  # noqa: F841
    asked_to_stop = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        asked_to_stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask)
    asked_to_stop.wait()
    if options.uds is not None:
        options.uds.unlink(missing_ok=True)
    os._exit(0)


def _loaded(options: Options) -> object:
    """The server, once the checkpoint is loaded (until then it answers 503); it runs while this lives."""
    # Heavy: 100 MB of code, which a caller that only wants the defaults above does not need.
    import xllamacpp  # noqa: PLC0415

    params = xllamacpp.CommonParams()
    params.model.path = str(options.checkpoint)
    params.model_alias = {options.alias}
    if options.uds is None:
        params.hostnames, params.port = [options.host], options.port
    else:
        params.hostnames = [str(options.uds)]
    params.n_parallel = options.slots
    params.n_threads_http = max(64, 8 * options.slots)  # a waiting request holds one: /health must not wait behind it
    params.n_ctx = options.slots * options.context_per_slot_tokens
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    params.cache_ram_mib = PROMPT_CACHE_MIB
    params.endpoint_metrics = True
    params.endpoint_slots = params.ui = False
    params.cors_origins = ""  # else a web page in a browser on this machine could use the engine
    params.verbosity = LOG_ERRORS_ONLY
    if options.embeddings:
        params.embedding = True
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
        params.n_batch = params.n_ubatch = options.context_per_slot_tokens  # a text is embedded in one step
    return xllamacpp.Server(params)


def _free(uds: Path) -> None:
    """Remove the socket that a killed server left; raise OSError if one still answers or it is no socket."""
    if not uds.exists():
        return
    if not stat.S_ISSOCK(uds.stat().st_mode):
        raise FileExistsError(f"{uds} is not a socket")
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(str(uds))
        except ConnectionRefusedError:
            uds.unlink()
            return
    raise FileExistsError(f"another server listens on {uds}")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


if __name__ == "__main__":
    sys.exit(main())
