"""The frozen model and the rollouts of a run, read and checked before anything is written."""

import logging
from dataclasses import dataclass
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
        name, directory: of the backbone's checkpoint; its weights may not be in the directory yet.
        dtype: that backbone and head compute in.
        train, held_out: rollouts.
        train_states, held_out_states: of the backbone, if they are kept.
    """

    name: str
    directory: Path
    dtype: torch.dtype
    train: list[Rollout]
    held_out: list[Rollout]
    train_states: StateCache | None = None
    held_out_states: StateCache | None = None
    _backbone: Backbone | None = None

    @classmethod
    def read(cls, config: TrainConfig, accelerator: Accelerator) -> "Material":
        """Read and check a configuration's rollouts, and all of its model but the weights, which are not fetched yet.

        Every process calls.

        Raises:
            InputError: they are missing or damaged, do not belong together, or are too few or too short to train on.
        """
        header, rollouts = read_rollouts(config.rollouts)
        with accelerator.local_main_process_first():  # one process fetches from a hub, the others find it fetched
            directory = resolve_checkpoint(config.backbone, weights=False)
        names = " ".join(config.rollouts)
        check_rollouts_of(directory, names, header, rollouts, config.max_length)
        train, held_out = split_held_out(rollouts, config.held_out_share)
        if problem := next(split_problems(names, train, held_out, config.draft_steps), None):
            raise InputError(problem)
        if header.temperature != config.temperature:
            logger.warning(
                "rollouts were sampled at temperature %s and are scored at %s: the realised estimates are biased",
                header.temperature,
                config.temperature,
            )
        dtype = compute_dtype(config.dtype, accelerator.device)
        return cls(config.backbone, directory, dtype, train, held_out)

    def load_backbone(self, accelerator: Accelerator) -> None:
        """Load the backbone, unless it is there; every process calls.

        Raises:
            InputError: as of `Backbone.load`.
        """
        if self._backbone is None:
            with accelerator.local_main_process_first():
                resolve_checkpoint(self.name)
            self._backbone = Backbone.load(self.name, self.dtype, accelerator.device, splits_weights(accelerator))

    @property
    def backbone(self) -> Backbone:
        """The frozen model; `load_backbone` goes before."""
        assert self._backbone is not None
        return self._backbone
