"""The frozen model and the rollouts of a run, read and checked before anything is written."""

import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator

from bebop.backbone import Backbone, resolve_checkpoint
from bebop.data.rollouts import Rollout, check_rollouts_of, read_rollouts, split_held_out, split_problems
from bebop.data.states import StateCache
from bebop.errors import InputError
from bebop.machine import compute_dtype
from bebop.training.config import TrainConfig
from bebop.training.distribution import splits_weights

logger = logging.getLogger(__name__)


@dataclass
class Material:
    """What runs that differ in their objective have in common.

    Attributes:
        directory: of the backbone's checkpoint.
        dtype: that backbone and head compute in.
        train, held_out: rollouts.
        train_states, held_out_states: of the backbone, if they are kept.
        backbone: once it is loaded.
    """

    directory: Path
    dtype: torch.dtype
    train: list[Rollout]
    held_out: list[Rollout]
    train_states: StateCache | None = None
    held_out_states: StateCache | None = None
    backbone: Backbone = field(init=False)

    @classmethod
    def read(cls, config: TrainConfig, accelerator: Accelerator) -> "Material":
        """Read and check a configuration's rollouts, and all of its model but the weights; every process calls.

        Raises:
            InputError: they are missing or damaged, do not belong together, or are too few or too short to train on.
        """
        header, rollouts = read_rollouts(config.rollouts)
        with accelerator.local_main_process_first():  # one process fetches from a hub, the others find it fetched
            directory = resolve_checkpoint(config.backbone)
        names = " ".join(config.rollouts)
        check_rollouts_of(directory, names, header, rollouts, config.max_length)
        if problem := next(split_problems(names, rollouts, config.held_out_share, config.draft_steps), None):
            raise InputError(problem)
        if header.temperature != config.temperature:
            logger.warning(
                "rollouts were sampled at temperature %s and are scored at %s: the realised estimates are biased",
                header.temperature,
                config.temperature,
            )
        dtype = compute_dtype(config.dtype, accelerator.device)
        return cls(directory, dtype, *split_held_out(rollouts, config.held_out_share))

    def load_backbone(self, accelerator: Accelerator) -> None:
        """Load the backbone, unless it is there; every process calls.

        Raises:
            InputError: as of `Backbone.load`.
        """
        if not hasattr(self, "backbone"):
            split = splits_weights(accelerator)
            self.backbone = Backbone.load(str(self.directory), self.dtype, accelerator.device, split)
