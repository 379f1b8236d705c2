"""Backbone states of a batch: computed when needed, or once for all epochs and kept in memory or on disk."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from bebop.backbone import Backbone
from bebop.data.batches import Batch, make_batch, plan_micro_batches
from bebop.data.rollouts import Rollout
from bebop.data.state_shards import StateShards, describe
from bebop.errors import InputError
from bebop.processes import from_first, gathered

_TOKENS_PER_FORWARD = 8192


class StateCache:
    """States at the head's tap for every document, in the backbone's dtype: in memory, or in files that are mapped there.

    The backbone is frozen, so its states are the same in every epoch: one pass over the data instead of one an epoch.
    They are computed in batches that depend on the rollouts alone, so that a resumed run sees the same numbers.

    Args:
        backbone, rollouts: whose states.
        progress: what to call the computation on a progress bar; no bar if None.
        directory: where the states are kept, under a name that says what they are of; only those that are not there yet are
            computed, by all processes of torch.distributed together. In memory, in each process on its own, if None.

    Raises:
        InputError: the directory cannot be written, its disk is full, or the processes do not share it.
    """

    def __init__(
        self,
        backbone: Backbone,
        rollouts: Sequence[Rollout],
        progress: str | None = None,
        directory: Path | None = None,
    ):
        plan = plan_micro_batches([len(r) for r in rollouts], _TOKENS_PER_FORWARD, backbone.packs_documents)
        if directory is not None:
            self.states = _stored_states(directory, backbone, rollouts, plan, progress)
            return
        self.states = [torch.empty(0)] * len(rollouts)
        with tqdm(total=sum(map(len, rollouts)), unit="tok", desc=progress, disable=progress is None) as bar:
            for rows in plan:
                for i, states in _document_states(backbone, rows, rollouts):
                    self.states[i] = states
                    bar.update(len(states))

    @staticmethod
    def size_in_bytes(backbone: Backbone, rollouts: Sequence[Rollout]) -> int:
        """Memory or disk space a cache of these rollouts takes."""
        return sum(len(r) for r in rollouts) * _token_bytes(backbone)

    def hidden_states(self, batch: Batch) -> Tensor:
        """[B, T, d] for a batch of the same rollouts, on the batch's device; zeros where padded."""
        width = self.states[0].shape[1]
        hidden = torch.zeros(*batch.tokens.shape, width, dtype=self.states[0].dtype)
        for b, row in enumerate(batch.documents.cpu()):
            start = 0
            for i, length in zip(*(x.tolist() for x in row.unique_consecutive(return_counts=True)), strict=True):
                if i >= 0:
                    hidden[b, start : start + length] = self.states[i]
                start += length
        return hidden.to(batch.tokens.device)


def _token_bytes(backbone: Backbone) -> int:
    return backbone.config.hidden_size * backbone.lm_head_weight.itemsize


def _document_states(
    backbone: Backbone, rows: Sequence[Sequence[int]], rollouts: Sequence[Rollout]
) -> list[tuple[int, Tensor]]:
    """Documents of a micro-batch, row by row, and their states [T, d] on the CPU."""
    batch = make_batch(rows, rollouts).to(backbone.device)
    hidden = backbone.hidden_states(batch.tokens, batch.documents, batch.positions)
    found = []
    for b, row in enumerate(rows):
        start = 0
        for i in row:
            end = start + len(rollouts[i])
            found.append((i, hidden[b, start:end].to("cpu", copy=True)))
            start = end
    return found


def _stored_states(
    directory: Path,
    backbone: Backbone,
    rollouts: Sequence[Rollout],
    plan: Sequence[list[list[int]]],
    progress: str | None,
) -> list[Tensor]:
    """States from the shards in a directory, after all processes have together computed those that are missing."""
    rank, world = _rank_and_world()
    description = from_first(lambda: describe(backbone, rollouts, _TOKENS_PER_FORWARD))
    shards = StateShards(directory, description, plan, [len(r) for r in rollouts], _token_bytes(backbone))
    with _refused_together():
        if rank == 0:
            shards.create()
    with _refused_together():
        shards.check_shared()
    share = tqdm(
        range(rank, len(shards), world), desc=f"{progress}, checksums", unit="file", delay=5, disable=progress is None
    )
    missing = sorted(chain.from_iterable(gathered([number for number in share if not shards.is_whole(number)])))
    if missing:
        with _refused_together():
            if rank == 0:
                shards.check_space(missing)
        _compute(backbone, rollouts, shards, missing, progress)
        gathered(None)  # all have written before any reads
    with _refused_together():
        states = shards.map()
    return states


def _compute(
    backbone: Backbone,
    rollouts: Sequence[Rollout],
    shards: StateShards,
    missing: Sequence[int],
    progress: str | None,
) -> None:
    """Compute and write missing shards, shared out to the processes.

    The backbone's weights may be split over the processes, which then take part in each other's forward passes: all make
    the same number, and those that have nothing left to do throw the result away.
    """
    rank, world = _rank_and_world()
    shares = [missing[process::world] for process in range(world)]
    passes = [[(number, rows) for number in share for rows in shards.micro_batches[number]] for share in shares]
    own = passes[rank]
    total = sum(map(len, rollouts))
    to_do = sum(_tokens(rows, rollouts) for share in passes for _, rows in share)
    computed: list[Tensor] = []
    with tqdm(total=total, initial=total - to_do, unit="tok", desc=progress, disable=progress is None) as bar:
        for turn in range(max(map(len, passes))):
            number, rows = own[turn] if turn < len(own) else (None, shards.micro_batches[0][0])
            found = _document_states(backbone, rows, rollouts)
            if number is not None:
                computed += [states for _, states in found]
                if turn + 1 == len(own) or own[turn + 1][0] != number:
                    shards.write(number, torch.cat(computed))
                    computed.clear()
            bar.update(sum(_tokens(share[turn][1], rollouts) for share in passes if turn < len(share)))


def _tokens(rows: Sequence[Sequence[int]], rollouts: Sequence[Rollout]) -> int:
    return sum(len(rollouts[i]) for row in rows for i in row)


def _rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextmanager
def _refused_together() -> Iterator[None]:
    """An InputError in one process is raised in all, instead of leaving the others to wait for it."""
    problem = None
    try:
        yield
    except InputError as error:
        problem = str(error)
    if problems := [p for p in gathered(problem) if p]:
        raise InputError(problems[0])
