"""What an engine's counters will say: acceptance averaged over the rounds that a text really takes, not over its anchors.

A round starts behind every rejection, so hard places are over-represented in an engine's counts. Along a text that the
target sampled, the probability omega(n) that a round starts at anchor n follows from the acceptance of the text's own
tokens (`bebop.losses.expected_rounds`). Draft j is then accepted in a share of

    sum_n omega(n) reach_j(n) alpha_j(n) / sum_n omega(n),      reach_j = prod_{i<j} r_i(n)

of the rounds (derived). r_i is the probability that the text's own token was an accepted draft: min(1, q_i(x_i)/p_i(x_i))
under rejection sampling, 1[x_i = argmax q_i] for greedy drafts.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bebop.errors import InputError
from bebop.evaluation.sums import DocumentSums
from bebop.kernels.stats import ChainStats
from bebop.losses.expected_rounds import accepted_counts, rounds
from bebop.losses.realised import reach_probability, realised_acceptance

# Rules whose acceptance follows from chain statistics; `bebop.evaluation.decoding` says what they are.
RULES = ("rejection_sampling", "target_only")


class RuleAcceptance(NamedTuple):
    """Of a verification rule, each [K, N].

    alpha: probability that a draft of step k is accepted.
    accepts: r_k, the probability that the text's own token was an accepted draft.
    """

    alpha: Tensor
    accepts: Tensor

    @property
    def realised(self) -> Tensor:
        """[prod_{i<k} r_i] alpha_k, whose mean over sampled text is the probability that drafts 1..k are all accepted."""
        return reach_probability(self.accepts) * self.alpha


def acceptance_under(rule: str, stats: ChainStats) -> RuleAcceptance:
    """Acceptance of drafts under one of `RULES`."""
    if rule == "rejection_sampling":
        return RuleAcceptance(stats.alpha, realised_acceptance(stats))
    return RuleAcceptance(stats.alpha_target_only, stats.target_only_hit)


def add_engine_counts(sums: DocumentSums, name: str, stats: ChainStats, rule: str, steps: int) -> None:
    """Add what an engine with `steps` drafts a round counts on these texts.

    `{name}/j`: share of rounds in which draft j is accepted, of those that the text has room for draft j in.
    `{name}/rounds`: target passes of a response.
    """
    if stats.documents is None:
        raise ValueError("chains must say which document they belong to; set stats.documents")
    valid = stats.valid[:steps]
    alpha, accepts = (x[:steps] for x in acceptance_under(rule, stats))
    found = rounds(accepted_counts(accepts, valid), valid, stats.documents)
    # Whether there is room depends on nothing but the text before draft j, so alpha_j needs no correction for it.
    starts = torch.where(valid, found.starts, 0.0)
    for j, reached in enumerate(reach_probability(accepts).double() * alpha.double()):
        sums.add(f"{name}/{j + 1}", reached, starts[j], stats.documents)
    _, documents = stats.documents.unique(return_inverse=True)
    chains = valid[0].nonzero().squeeze(1)
    first = torch.zeros_like(valid[0])
    first[chains[documents[chains].diff(prepend=documents.new_tensor([-1])) != 0]] = True
    sums.add(f"{name}/rounds", found.remaining, first, stats.documents)


@dataclass
class EngineCounts:
    """Predicted counters, per position j = 1..K.

    Attributes:
        acceptance: share of rounds in which draft j is accepted; engines report accepted tokens per position over drafts.
        standard_error: of each, over documents.
        rounds: expected number of rounds.
    """

    acceptance: list[float]
    standard_error: list[float]
    rounds: float

    @property
    def accept_length(self) -> float:
        """Tokens a round emits, the target's own included."""
        return 1.0 + sum(self.acceptance)


def predict_engine_counts(batches: Iterable[ChainStats], rule: str = "rejection_sampling") -> EngineCounts:
    """Counters of an engine that serves the head, from chain statistics on texts that the target sampled.

    A round that the end of a text cuts short counts for the drafts that the text has room for. An engine judges drafts
    beyond the end too, so texts should be long against K.

    Args:
        batches: statistics of whole documents, with `documents` set and -1 for padding.
        rule: one of `RULES`; target_only needs alpha_target_only and target_only_hit among the statistics.

    Raises:
        InputError: no text is long enough for a whole chain.
    """
    found: list[Tensor] = []  # of each batch: [documents, K, 2], accepted drafts j and rounds
    for stats in batches:
        if stats.documents is None:
            raise ValueError("chains must say which document they belong to; set stats.documents")
        steps = len(stats.valid)
        sums = DocumentSums(int(stats.documents.max()) + 1)
        add_engine_counts(sums, "engine", stats, rule, steps)
        here = torch.stack([sums.columns[f"engine/{j + 1}"] for j in range(steps)], dim=1)
        found.append(here[here[:, 0, 1] > 0])
    accepted, started = torch.cat(found).unbind(-1) if found else torch.zeros(2, 0, 1)
    total = started.sum(0)
    if not total[-1] > 0:
        raise InputError("no response is long enough for a whole chain; use longer texts or fewer draft steps")
    share = accepted.sum(0) / total
    # A ratio of sums over documents, linearised.
    spread = (accepted - share * started).pow(2).sum(0).sqrt() / total
    return EngineCounts(share.tolist(), spread.tolist(), total[0].item())
