"""LoRA adapters that an engine serves beside its checkpoint, each under a name that jobs may give as `model`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from inference.checkpoints import digest_of
from runtime.errors import BadInput

# The ranks that vLLM 0.32 has kernels for; room is reserved for the largest of all adapters.
RANKS: Final = (1, 8, 16, 32, 64, 128, 256, 320, 512)
MOST_AT_ONCE: Final = 8  # chosen: adapters whose jobs run together; each takes room beside the weights
_UNFIT: Final = frozenset("=, \t\n{}")
_WEIGHTS: Final = ("adapter_model.safetensors", "adapter_model.bin")


def adapter_flags(adapters: Mapping[str, Path], *, alias: str) -> list[str]:
    """The flags of vLLM that serve these adapters; none without any.

    Raises BadInput naming the adapter for a folder that holds none, or a name that cannot be one.
    """
    if not adapters:
        return []
    for name in adapters:
        if not name or _UNFIT & set(name) or name == alias:
            raise BadInput(
                f"STOKER_ENGINE__ADAPTERS: {name!r} cannot be the name of an adapter; write one without spaces, "
                f"commas and =, that is not {alias}"
            )
    rank = max(_rank(name, folder) for name, folder in adapters.items())
    return [
        "--enable-lora",
        "--max-loras",
        str(min(len(adapters), MOST_AT_ONCE)),
        "--max-cpu-loras",
        str(len(adapters)),
        "--max-lora-rank",
        str(next(size for size in RANKS if size >= rank)),
        "--lora-modules",
        *(f"{name}={folder}" for name, folder in sorted(adapters.items())),
    ]


def adapter_digests(adapters: Mapping[str, Path]) -> dict[str, str]:
    """What decides each one's answers beside the checkpoint, as `digest_of`."""
    return {name: digest_of(folder) for name, folder in sorted(adapters.items())}


def _rank(name: str, folder: Path) -> int:
    """The largest rank in an adapter, by its configuration."""
    told = f"STOKER_ENGINE__ADAPTERS: {name}: {folder}"
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        rank = max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])
    except OSError as error:
        raise BadInput(f"{told} holds no adapter_config.json: name the folder that PEFT saved") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadInput(f"{told}: adapter_config.json states no rank `r`: name the folder that PEFT saved") from error
    if not any((folder / weights).is_file() for weights in _WEIGHTS):
        raise BadInput(f"{told} holds no {_WEIGHTS[0]}: name the folder that PEFT saved")
    if not 1 <= rank <= RANKS[-1]:
        raise BadInput(f"{told} has the rank {rank}; vLLM takes 1 to {RANKS[-1]}")
    return rank
