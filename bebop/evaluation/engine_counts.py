"""What an engine's counters will say: acceptance averaged over the rounds that a text really takes, not over its anchors.

A round starts behind every rejection, so hard places are over-represented in an engine's counts. Along a text that the
target sampled, the probability omega(n) that a round starts at anchor n follows from the acceptance of the text's own
tokens (`bebop.losses.expected_rounds`). Draft j is then accepted in a share of

    sum_n omega(n) reach_j(n) alpha_j(n) / sum_n omega(n),      reach_j = prod_{i<j} min(1, q_i(x_i)/p_i(x_i))

of the rounds (derived).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from bebop.errors import InputError
from bebop.kernels.stats import ChainStats
from bebop.losses.expected_rounds import accepted_counts, rounds
from bebop.losses.realised import reach_probability, realised_acceptance


@dataclass
class EngineCounts:
    """Predicted counters, per position j = 1..K.

    Attributes:
        acceptance: share of rounds in which draft j is accepted; engines report accepted tokens per position over drafts.
        standard_error: of each, over documents.
        rounds: expected number of rounds that these rest on.
    """

    acceptance: list[float]
    standard_error: list[float]
    rounds: float

    @property
    def accept_length(self) -> float:
        """Tokens a round emits, the target's own included."""
        return 1.0 + sum(self.acceptance)


def predict_engine_counts(batches: Iterable[ChainStats]) -> EngineCounts:
    """Counters of an engine that serves the head, from chain statistics on texts that the target sampled.

    Chains that the end of a text cuts short are left out; texts should be long against K.

    Args:
        batches: statistics of whole documents, with `documents` set and -1 for padding.

    Raises:
        InputError: no text is long enough for a whole chain.
    """
    accepted: list[Tensor] = []  # per batch [documents, K]
    started: list[Tensor] = []  # [documents]
    for stats in batches:
        if stats.documents is None:
            raise ValueError("chains must say which document they belong to; set stats.documents")
        accepts = realised_acceptance(stats)
        starts = rounds(accepted_counts(accepts, stats.valid), stats.valid, stats.documents).starts
        starts = torch.where(stats.valid[-1], starts, 0.0)
        weighted = (starts * reach_probability(accepts).double() * stats.alpha.double()).T.cpu()  # [N, K]
        _, document = stats.documents.cpu().unique(return_inverse=True)
        count = int(document.max()) + 1
        accepted.append(torch.zeros(count, weighted.shape[1], dtype=torch.float64).index_add_(0, document, weighted))
        started.append(torch.zeros(count, dtype=torch.float64).index_add_(0, document, starts.cpu()))
    per_document, total = torch.cat(accepted), torch.cat(started)
    if not total.sum() > 0:
        raise InputError("no response is long enough for a whole chain; use longer texts or fewer draft steps")
    share = per_document.sum(0) / total.sum()
    # A ratio of sums over documents, linearised.
    spread = (per_document - share * total.unsqueeze(1)).pow(2).sum(0).sqrt() / total.sum()
    return EngineCounts(share.tolist(), spread.tolist(), total.sum().item())
