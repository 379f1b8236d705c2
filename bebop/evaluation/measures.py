"""What a head is worth on a set of rollouts: every measure an average over chains, summed per document in one pass."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bebop.errors import InputError
from bebop.evaluation.engine_counts import RULES, acceptance_under, add_engine_counts
from bebop.evaluation.entropy import add_moments, line_of_moments
from bebop.evaluation.sums import DocumentSums, Resampled, estimate
from bebop.kernels.stats import ChainStats

# What `add_measures` reads besides alpha, log q and log p.
MEASURED = (
    "kl", "reverse_kl", "target_entropy", "draft_entropy", "alpha_target_only", "target_only_hit", "top_agreement",
)  # fmt: skip
PER_STEP = ("kl", "reverse_kl", "target_entropy", "draft_entropy", "top_agreement")
# Bins of chains: by the target's entropy where the first draft is judged, in nats; by that token's place in the response.
BINS: dict[str, tuple[float, ...]] = {
    "entropy": (0.0, 0.05, 0.2, 0.5, 1.0, 2.0, 3.0, 4.5, math.inf),
    "position": (0, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, math.inf),
}


def add_measures(sums: DocumentSums, stats: ChainStats) -> None:
    """Add the chains of a batch; `stats` with the statistics of `MEASURED` and `documents` set."""
    assert stats.documents is not None
    valid, documents, steps = stats.valid, stats.documents, len(stats.valid)
    first, whole = valid[0], valid[-1]
    for name in PER_STEP:
        for j in range(steps):
            sums.add(f"{name}/{j + 1}", stats.values[name][j], valid[j], documents)
    every = documents.repeat(steps)
    sums.add("target_entropy", stats.target_entropy.flatten(), valid.flatten(), every)
    sampling_wins = (stats.alpha > stats.alpha_target_only).float()  # TV(p, q) < 1 - p(argmax q), Eq. 48
    sums.add("sampling_beats_greedy", sampling_wins.flatten(), valid.flatten(), every)

    groups = {
        "entropy": _bins(stats.target_entropy[0], "entropy"),
        "position": _bins(_place_in_response(first, documents), "position"),
    }
    for group, chosen in groups.items():
        for b in chosen[first].unique().tolist():
            sums.add(f"{group}/{b}/target_entropy", stats.target_entropy[0], first & (chosen == b), documents)
    for rule in RULES:
        acceptance = acceptance_under(rule, stats)
        along, realised = acceptance.alpha.cumprod(0), acceptance.realised
        for j in range(steps):
            sums.add(f"{rule}/alpha/{j + 1}", acceptance.alpha[j], valid[j], documents)
            sums.add(f"{rule}/cumulative/{j + 1}", along[j], valid[j], documents)
            sums.add(f"{rule}/realised/{j + 1}", realised[j], valid[j], documents)
            add_engine_counts(sums, f"{rule}/engine-{j + 1}", stats, rule, j + 1)
        add_moments(sums, f"{rule}/draft_1", stats.target_entropy[0], acceptance.alpha[0], first, documents)
        add_moments(sums, f"{rule}/chain", stats.target_entropy.mean(0), 1 + along.sum(0), whole, documents)
        for group, chosen in groups.items():
            for b in chosen[first].unique().tolist():
                here = chosen == b
                sums.add(f"{group}/{b}/{rule}/alpha", acceptance.alpha[0], first & here, documents)
                sums.add(f"{group}/{b}/{rule}/length", 1 + realised.sum(0), whole & here, documents)


def _bins(values: Tensor, group: str) -> Tensor:
    edges = torch.tensor(BINS[group][1:-1], dtype=values.dtype, device=values.device)
    return torch.bucketize(values, edges, right=True)


def _place_in_response(first: Tensor, documents: Tensor) -> Tensor:
    """[N], how many supervised tokens of its document stand before the one that a chain's first draft predicts."""
    chains = first.nonzero().squeeze(1)
    place = torch.zeros(len(first), device=first.device)
    starts = documents[chains].diff(prepend=documents.new_tensor([-1])) != 0
    each = torch.arange(len(chains), device=first.device)
    place[chains] = (each - each[starts][starts.cumsum(0) - 1]).float()
    return place


def describe(sums: DocumentSums, *, cost_ratio: float, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """All measures, ready for JSON; those with uncertainty are `Estimate`s: value, and a 95 percent interval.

    Args:
        sums: filled by `add_measures`.
        cost_ratio: seconds of a draft step over seconds of a target pass; a round of k drafts costs 1 + k times that.
        resamples, seed: of the bootstrap over documents.

    Raises:
        InputError: no response is long enough for a chain of all draft steps.
    """
    steps = sum(name.startswith("kl/") for name in sums.columns)
    averages = Resampled(sums, resamples, seed)
    if not steps or not averages.weight(f"kl/{steps}"):
        raise InputError("no response is long enough for a chain of all draft steps; use longer texts or fewer steps")
    result: dict[str, Any] = {
        "documents": sums.documents,
        "chains": int(averages.weight("kl/1")),
        "target_entropy": estimate(averages["target_entropy"]),
        "sampling_beats_greedy": estimate(averages["sampling_beats_greedy"]),
        **{name: [estimate(averages[f"{name}/{j}"]) for j in range(1, steps + 1)] for name in PER_STEP[:2]},
        "draft_entropy": [estimate(averages[f"draft_entropy/{j}"]) for j in range(1, steps + 1)],
        "top_agreement": [estimate(averages[f"top_agreement/{j}"]) for j in range(1, steps + 1)],
        "rules": {rule: _describe_rule(averages, rule, steps, cost_ratio) for rule in RULES},
    }
    return result | {f"by_{group}": describe_bins(averages, group) for group in BINS}


def describe_bins(averages: Resampled, group: str) -> list[dict[str, Any]]:
    """Acceptance in every bin of `BINS[group]` that has chains."""
    edges = BINS[group]
    return [
        {"low": edges[b], "high": edges[b + 1]} | _describe_bin(averages, f"{group}/{b}")
        for b in range(len(edges) - 1)
        if averages.weight(f"{group}/{b}/target_entropy")
    ]


def _describe_rule(averages: Resampled, rule: str, steps: int, cost_ratio: float) -> dict[str, Any]:
    def per_step(name: str, depth: int) -> list[Tensor]:
        return [averages[f"{rule}/{name}/{j}"] for j in range(1, depth + 1)]

    alpha, cumulative, realised = (per_step(name, steps) for name in ("alpha", "cumulative", "realised"))
    served = []
    for k in range(1, steps + 1):
        counts = per_step(f"engine-{k}", k)
        length = 1 + torch.stack(counts).sum(0)
        served.append(
            {
                "draft_steps": k,
                "acceptance": [estimate(c) for c in counts],
                "accept_length": estimate(length),
                "rounds_per_response": estimate(averages[f"{rule}/engine-{k}/rounds"]),
                "speed_up": estimate(length / (1 + k * cost_ratio)),
            }
        )
    return {
        "alpha": [estimate(a) for a in alpha],
        "cumulative": [estimate(c) for c in cumulative],
        "realised": [estimate(r) for r in realised],
        "accept_length_eq13": estimate(1 + torch.stack(cumulative).sum(0)),
        "accept_length_realised": estimate(1 + torch.stack(realised).sum(0)),
        "served": served,
        "draft_1_by_entropy": line_of_moments(averages, f"{rule}/draft_1"),
        "chain_by_entropy": line_of_moments(averages, f"{rule}/chain"),
    }


def _describe_bin(averages: Resampled, name: str) -> dict[str, Any]:
    rules = {}
    for rule in RULES:
        rules[rule] = {"alpha": estimate(averages[f"{name}/{rule}/alpha"])}
        if averages.weight(f"{name}/{rule}/length"):  # some chain is whole
            rules[rule]["accept_length"] = estimate(averages[f"{name}/{rule}/length"])
    return {
        "chains": int(averages.weight(f"{name}/target_entropy")),
        "target_entropy": estimate(averages[f"{name}/target_entropy"]),
        "rules": rules,
    }


def describe_sources(sums: DocumentSums, sources: Sequence[str], **options: Any) -> dict[str, Any]:
    """`describe` for the documents of each source; those whose responses are all too short are left out."""
    found = {}
    for source in sorted(set(sources)):
        part = sums.of(torch.tensor([s == source for s in sources]))
        try:
            found[source] = describe(part, **options)
        except InputError:
            continue
    return found
