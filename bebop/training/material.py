"""The frozen model and the rollouts of a run, read and checked before anything is written."""

import logging
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from bebop.backbone import Backbone, resolve_checkpoint
from bebop.data.rollouts import Rollout, check_rollouts_of, read_rollouts, split_held_out
from bebop.data.states import StateCache
from bebop.errors import InputError
from bebop.machine import compute_dtype
from bebop.training.config import TrainConfig
from bebop.training.distribution import splits_weights

logger = logging.getLogger(__name__)


@dataclass
class Material:
    """What runs that differ in their objective have in common."""

    backbone: Backbone
    dtype: torch.dtype
    train: list[Rollout]
    held_out: list[Rollout]
    train_states: StateCache | None = None
    held_out_states: StateCache | None = None

    @classmethod
    def load(cls, config: TrainConfig, accelerator: Accelerator) -> "Material":
        """Read and check model and rollouts of a configuration; every process calls.

        Raises:
            InputError: they are missing or damaged, do not belong together, or are too few or too short to train on.
        """
        header, rollouts = read_rollouts(config.rollouts)
        dtype = compute_dtype(config.dtype, accelerator.device)
        with accelerator.local_main_process_first():  # one process fetches from a hub, the others find it fetched
            directory = resolve_checkpoint(config.backbone)
        backbone = Backbone.load(str(directory), dtype, accelerator.device, splits_weights(accelerator))
        names = " ".join(config.rollouts)
        check_rollouts_of(backbone, names, header, rollouts, config.max_length)
        if header.temperature != config.temperature:
            logger.warning(
                "rollouts were sampled at temperature %s and are scored at %s: the realised estimates are biased",
                header.temperature,
                config.temperature,
            )
        material = cls(backbone, dtype, *split_held_out(rollouts, config.held_out_share))
        for side, documents in (("training", material.train), ("held-out", material.held_out)):
            if not documents:
                raise InputError(
                    f"{names}: of {len(rollouts)} rollouts none is {side} at held_out_share {config.held_out_share}; "
                    "sample more rollouts or change the share"
                )
            if (longest := max(len(r.response_ids) for r in documents)) <= config.draft_steps:
                raise InputError(
                    f"{names}: the longest {side} response has {longest} tokens, too few for {config.draft_steps} draft "
                    f"steps, which take {config.draft_steps + 1}; sample longer responses or lower draft_steps"
                )
        return material
