"""What the accelerate configuration asks of a run: one process, DDP, FSDP2, DeepSpeed ZeRO-2 or ZeRO-3."""

import logging
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from torch import Tensor
from transformers.integrations import unset_hf_deepspeed_config

from bebop.errors import InputError
from bebop.machine import compute_dtype
from bebop.training.config import TrainConfig

logger = logging.getLogger(__name__)

# Others wait while one process fetches or reads a large checkpoint; NCCL's own limit is ten minutes.
_TIMEOUT = timedelta(hours=3)


def make_accelerator(config: TrainConfig) -> Accelerator:
    """The accelerator of a run, as `accelerate launch` was told.

    Raises:
        InputError: a strategy or precision that a head cannot be trained with.
    """
    accelerator = Accelerator(
        gradient_accumulation_steps=config.accumulate,
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=Path(config.output),
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # spares a copy of the gradient
            InitProcessGroupKwargs(timeout=_TIMEOUT),
        ],
    )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        _configure_deepspeed(accelerator.state.deepspeed_plugin, config, accelerator.num_processes)
    elif accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise InputError("the accelerate configuration asks for FSDP1; set fsdp_version: 2 in its fsdp_config")
    elif accelerator.distributed_type not in _KNOWN:
        known = ", ".join(kind.value for kind in _KNOWN)
        raise InputError(f"the accelerate configuration asks for {accelerator.distributed_type}; expected one of {known}")
    precision, dtype = accelerator.mixed_precision, compute_dtype(config.dtype, accelerator.device)
    if precision != "no" and (precision, dtype) != ("bf16", torch.bfloat16):
        raise InputError(
            f"the accelerate configuration has mixed_precision {precision!r}, and the run computes in "
            f"{str(dtype).removeprefix('torch.')}; set it to 'no': `dtype` alone says what the head computes in"
        )
    return accelerator


_KNOWN = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.FSDP,
    DistributedType.DEEPSPEED,
)


def _configure_deepspeed(plugin: Any, config: TrainConfig, processes: int) -> None:
    """DeepSpeed's engine scales, clips and steps by a configuration of its own, which must say what the run's says.

    Raises:
        InputError: a ZeRO stage, offloading or precision that was not meant for this.
    """
    settings = plugin.deepspeed_config
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    if stage not in (2, 3):
        raise InputError(f"the accelerate configuration has zero_stage {stage}, expected 2 or 3; for 0 and 1 use DDP")
    for precision in ("bf16", "fp16"):
        if settings.get(precision, {}).get("enabled") is True:
            raise InputError(f"the DeepSpeed configuration enables {precision}; set mixed_precision: no, see `dtype`")
    settings["train_micro_batch_size_per_gpu"] = 1  # a batch has no fixed size here; DeepSpeed only multiplies with it
    settings["gradient_accumulation_steps"] = config.accumulate
    settings["train_batch_size"] = config.accumulate * processes
    settings["gradient_clipping"] = config.max_grad_norm
    # Left set, transformers would split the backbone while it reads it; `bebop.sharding` does that under any strategy.
    unset_hf_deepspeed_config()
    settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True  # in fp32 here, whatever the name says


def splits_weights(accelerator: Accelerator) -> bool:
    """Whether the strategy splits weights over processes; then the frozen backbone is split too."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return accelerator.state.deepspeed_plugin.zero_stage == 3
    return accelerator.distributed_type == DistributedType.FSDP


def steps_in_backward(accelerator: Accelerator) -> bool:
    """Whether the last backward pass of a step updates the head too, before its gradient can be looked at."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def whole_state(accelerator: Accelerator, model: Any) -> dict[str, Tensor]:
    """The head's state dict put together from all processes, which all must call; complete on process 0."""
    return accelerator.get_state_dict(model)
