"""What decides which data a run sees at which step, and what it trains on: a checkpoint resumes with the same alone."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from accelerate import Accelerator

from bebop.data.rollouts import digest
from bebop.errors import InputError
from bebop.processes import gathered
from bebop.training.config import TrainConfig
from bebop.training.distribution import splits_weights
from bebop.training.material import Material

_ORDER = ("seed", "accumulate", "tokens_per_micro_batch", "draft_steps", "temperature")
_PLACES = ("backbone", "rollouts", "output", "head", "states_directory", "resume")


def position_of(config: TrainConfig, accelerator: Accelerator, data: Material) -> dict[str, Any]:
    """All of it but the backbone's weights, which are not read for this."""
    return {
        "rollouts": digest(data.train),
        "held-out rollouts": digest(data.held_out),
        "processes": accelerator.num_processes,
        "dtype": str(data.dtype).removeprefix("torch."),
        **{key: getattr(config, key) for key in _ORDER},
    }


def settings(config: TrainConfig) -> dict[str, Any]:
    """What processes must agree on besides: everything but places, which may differ between nodes."""
    return {key: value for key, value in asdict(config).items() if key not in _PLACES}


def check_agreement(accelerator: Accelerator, position: Mapping[str, Any]) -> None:
    """Refuse processes that see different files, or were started differently; all must call.

    Raises:
        InputError: names process and key.
    """
    for process, other in enumerate(gathered(position)):
        for key, value in other.items():
            if value != position[key]:
                raise InputError(
                    f"process {process} has {key} = {value}, process {accelerator.process_index} has {position[key]}; "
                    "all must see the same files and be started alike"
                )


def backbone_hash(accelerator: Accelerator, checksums: Mapping[str, str]) -> str:
    """One hash of all weights; every process calls with the checksums of those that lie on it."""
    mine = hashlib.sha256(json.dumps(checksums).encode()).hexdigest()
    if splits_weights(accelerator):
        mine = hashlib.sha256("".join(gathered(mine)).encode()).hexdigest()
    return mine[:16]
