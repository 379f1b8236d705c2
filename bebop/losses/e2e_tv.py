"""End-to-end multi-step total-variation loss: the share of drafts that rejection sampling does not accept."""

from torch import Tensor

from bebop.kernels.stats import ChainStats
from bebop.losses.base import ChainLoss
from bebop.losses.chain_products import cumulative_product


class E2ETVLoss(ChainLoss):
    """1 - (1/K) sum_j prod_{i<=j} alpha_i per chain (Eq. 13 of arXiv 2606.12370).

    prod_{i<=j} alpha_i is the probability that draft j is reached and accepted, so a chain's loss is one minus its
    expected number of accepted drafts over K. A chain cut short by the end of its text counts its valid steps only.
    """

    def pair_loss(self, stats: ChainStats) -> Tensor:
        return 1.0 - cumulative_product(stats.alpha)
