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

    Each epoch is shuffled anew by seed and epoch. What does not fill a step at its end opens the next epoch's first.

    Raises:
        InputError: there are too few documents for a single step.
    """
    needed = accumulate * processes
    epoch = 0
    waiting: list[list[list[int]]] = []
    while True:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        plan = plan_micro_batches(lengths, tokens_per_micro_batch, pack, generator)
        if epoch == 0 and len(plan) < needed:
            raise InputError(
                f"the training rollouts fill {len(plan)} micro-batches of {tokens_per_micro_batch} tokens, but a step takes "
                f"{needed} (accumulate x processes); lower tokens_per_micro_batch or accumulate"
            )
        waiting += plan
        while len(waiting) >= needed:
            step, waiting = waiting[:needed], waiting[needed:]
            yield step[process * accumulate : (process + 1) * accumulate]
        epoch += 1
