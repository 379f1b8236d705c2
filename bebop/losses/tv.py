"""Per-step total-variation loss."""

from torch import Tensor

from bebop.kernels.stats import ChainStats
from bebop.losses.base import ChainLoss


class TVLoss(ChainLoss):
    """mean_k (1 - alpha_k) per chain: every step's total variation, alike (Eq. 10 of arXiv 2606.12370)."""

    def pair_loss(self, stats: ChainStats) -> Tensor:
        return 1.0 - stats.alpha
