"""Acceptance of a head on held-out rollouts, from the same chain statistics as training, without gradients."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from bebop.backbone import Backbone
from bebop.data.batches import make_batch, plan_micro_batches
from bebop.data.rollouts import Rollout
from bebop.data.states import StateCache
from bebop.errors import InputError
from bebop.evaluation.engine_counts import acceptance_under
from bebop.heads.draft import draft
from bebop.heads.head import MTPHead
from bebop.kernels.linear_chain import DEFAULT_CHUNK_BYTES, linear_chain_statistics
from bebop.kernels.stats import ChainStats

# What `pair_values` reads besides alpha, log q and log p.
EVALUATED = ("kl", "target_entropy", "alpha_target_only", "target_only_hit")


@dataclass
class Acceptance:
    """What a head's drafts are worth, per draft step j = 1..K.

    Attributes:
        chains: chains with a first draft.
        alpha: mean acceptance probability of step j under rejection sampling.
        cumulative: mean of prod_{i<=j} alpha_i (Eq. 12 of arXiv 2606.12370), along the text.
        realised: mean of [prod_{i<j} min(1, q_i(x_i)/p_i(x_i))] alpha_j: on text sampled from the target at this
            temperature an unbiased estimate of the probability that drafts 1..j are all accepted; `cumulative` is not one
            where acceptance at one step goes with acceptance at the next (derived in docs/theory.md).
        alpha_target_only: mean p(argmax q), acceptance of greedy drafts (Eq. 1).
        realised_target_only: as `realised`, for greedy drafts: [prod_{i<j} 1(x_i = argmax q_i)] p(argmax q_j).
        kl: mean KL(p, q), nats.
        target_entropy: mean entropy of the target over all judged tokens, nats.
    """

    chains: int
    alpha: list[float]
    cumulative: list[float]
    realised: list[float]
    alpha_target_only: list[float]
    realised_target_only: list[float]
    kl: list[float]
    target_entropy: float

    @property
    def accept_length(self) -> float:
        """Expected tokens per target pass under rejection sampling, the bonus token included (realised estimate)."""
        return 1.0 + sum(self.realised)

    @property
    def accept_length_target_only(self) -> float:
        """The same for greedy drafts."""
        return 1.0 + sum(self.realised_target_only)

    @property
    def accept_length_eq13(self) -> float:
        """1 + sum_j prod_{i<=j} alpha_i, what the end-to-end TV loss of Eq. 13 maximises."""
        return 1.0 + sum(self.cumulative)


def pair_values(stats: ChainStats) -> dict[str, Tensor]:
    """What is averaged over valid pairs for each step: tensors [K, N] under the names of `Acceptance`."""
    sampled = acceptance_under("rejection_sampling", stats)
    values = {"alpha": stats.alpha, "cumulative": stats.alpha.cumprod(0), "realised": sampled.realised}
    if "target_only_hit" in stats.values:
        greedy = acceptance_under("target_only", stats)
        values |= {"alpha_target_only": greedy.alpha, "realised_target_only": greedy.realised}
    return values | {name: stats.values[name] for name in ("kl", "target_entropy") if name in stats.values}


def sums_over_pairs(stats: ChainStats) -> dict[str, Tensor]:
    """`pair_values` added up over the valid pairs of each step, [K] float64, and "pairs", how many there are."""
    sums = {name: torch.where(stats.valid, value.double(), 0.0).sum(1) for name, value in pair_values(stats).items()}
    return sums | {"pairs": stats.valid.sum(1).double()}


def summarise(batches: Iterable[ChainStats], accelerator: Accelerator | None = None) -> Acceptance:
    """Acceptance over all chains of all batches.

    Args:
        batches: their statistics; at least one.
        accelerator: adds up what its processes have, each of batches of its own; None: these are all.

    Raises:
        InputError: no valid pair at all, or none at some step.
    """
    sums: dict[str, Tensor] = {}
    for stats in batches:
        sums = {name: sums.get(name, 0) + value for name, value in sums_over_pairs(stats).items()}
    if accelerator is not None:
        sums = {name: accelerator.reduce(value, "sum") for name, value in sums.items()}
    sums = {name: value.cpu() for name, value in sums.items()}
    count = sums.pop("pairs")
    if bool((count == 0).any()):
        raise InputError(
            "the held-out rollouts have no response long enough for every draft step; hold out more or lower draft_steps"
        )
    means = {name: (total / count).tolist() for name, total in sums.items() if name != "target_entropy"}
    return Acceptance(chains=int(count[0]), target_entropy=(sums["target_entropy"].sum() / count.sum()).item(), **means)


def chain_statistics_of(
    head: MTPHead,
    backbone: Backbone,
    rollouts: Sequence[Rollout],
    *,
    steps: int,
    temperature: float,
    **options: Any,
) -> Iterator[ChainStats]:
    """Chain statistics of all anchors of the rollouts, batch by batch. Arguments as for `chain_statistics_at`."""
    for stats in chain_statistics_at(head, backbone, rollouts, steps=steps, temperatures=(temperature,), **options):
        yield stats[0]


@torch.no_grad()
def chain_statistics_at(
    head: MTPHead,
    backbone: Backbone,
    rollouts: Sequence[Rollout],
    *,
    steps: int,
    temperatures: Sequence[float],
    compute_dtype: torch.dtype,
    statistics: tuple[str, ...] = EVALUATED,
    tokens_per_micro_batch: int = 4096,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    states: StateCache | None = None,
    progress: str | None = None,
    process: int = 0,
    processes: int = 1,
) -> Iterator[list[ChainStats]]:
    """Chain statistics of all anchors of the rollouts at several temperatures, batch by batch.

    Backbone and head run once; the lm_head takes K+1 products a chain for every temperature.

    Args:
        head, backbone: the pair that is to serve.
        rollouts: sampled from this backbone; realised estimates are unbiased only at the temperature they were sampled at.
        steps: K.
        temperatures: of target and draft.
        compute_dtype: bf16 or fp32, of the head.
        statistics: those wanted besides alpha, log q and log p.
        tokens_per_micro_batch, chunk_bytes: what is in memory at once.
        states: the backbone's states of these rollouts, if they are at hand.
        progress: what to call this on a progress bar; no bar if None.
        process, processes: which of the processes that share the batches this is. All make the same number of passes, as
            they must where weights are split over them; one that has no batch left returns statistics without valid pairs.

    Returns:
        for every batch the statistics at each temperature, with `documents` set: indices of rollouts, -1 where padded.
    """
    plan = plan_micro_batches([len(r) for r in rollouts], tokens_per_micro_batch, backbone.packs_documents)
    own = plan[process::processes]
    passes = own + plan[:1] * (math.ceil(len(plan) / processes) - len(own))
    was_training = head.training
    head.eval()
    try:
        for number, rows in enumerate(tqdm(passes, desc=progress, unit="batch", disable=progress is None)):
            batch = make_batch(rows, rollouts).to(backbone.device)
            hidden, target, targets = draft(
                head,
                backbone,
                states.hidden_states(batch)
                if states
                else backbone.hidden_states(batch.tokens, batch.documents, batch.positions),
                tokens=batch.tokens,
                documents=batch.documents,
                positions=batch.positions,
                supervised=batch.supervised,
                steps=steps,
                compute_dtype=compute_dtype,
            )
            found = [
                linear_chain_statistics(
                    hidden,
                    target,
                    backbone.lm_head_weight,
                    **targets._asdict(),
                    statistics=statistics,
                    temperature=temperature,
                    chunk_bytes=chunk_bytes,
                )
                for temperature in temperatures
            ]
            for stats in found:
                stats.documents = batch.documents.reshape(-1)
                if number >= len(own):
                    stats.valid = torch.zeros_like(stats.valid)
            yield found
    finally:
        head.train(was_training)


def evaluate(
    head: MTPHead,
    backbone: Backbone,
    rollouts: Sequence[Rollout],
    *,
    accelerator: Accelerator | None = None,
    **options: Any,
) -> Acceptance:
    """Acceptance of the head's drafts on the backbone's own rollouts. Arguments as for `chain_statistics_of`.

    With an accelerator its processes share the batches, and all get the same result.
    """
    if accelerator is not None:
        options |= {"process": accelerator.process_index, "processes": accelerator.num_processes}
    return summarise(chain_statistics_of(head, backbone, rollouts, **options), accelerator)
