"""Which micro-batches a process sees at which optimiser step: a function of seed and step, so that a run can resume."""

from collections.abc import Iterator, Sequence

import torch

from bebop.data.batches import plan_micro_batches
from bebop.errors import InputError


def schedule(
    lengths: Sequence[int],
    *,
    tokens_per_micro_batch: int,
    pack: bool,
    accumulate: int,
    processes: int,
    process: int,
    seed: int,
) -> Iterator[list[list[list[int]]]]:
    """For every optimiser step, without end, this process's micro-batches (rows of document indices).

    Each epoch is shuffled anew by seed and epoch. Micro-batches at its end that do not fill a step are left out.

    Raises:
        InputError: there are too few documents for a single step.
    """
    needed = accumulate * processes
    epoch = 0
    while True:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        plan = plan_micro_batches(lengths, tokens_per_micro_batch, pack, generator)
        if len(plan) < needed:
            raise InputError(
                f"the training rollouts fill {len(plan)} micro-batches of {tokens_per_micro_batch} tokens, but a step takes "
                f"{needed} (accumulate x processes); lower tokens_per_micro_batch or accumulate"
            )
        for first in range(0, len(plan) - needed + 1, needed):
            mine = first + process * accumulate
            yield plan[mine : mine + accumulate]
        epoch += 1
