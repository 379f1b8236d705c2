"""Cross entropy on the text's own tokens: the usual MTP loss, here to compare with."""

from torch import Tensor

from bebop.kernels.stats import ChainStats
from bebop.losses.base import ChainLoss
from bebop.losses.step_weights import geometric_step_weights


class CrossEntropyLoss(ChainLoss):
    """-sum_k w_k log q_k(x) per chain, in nats, w_k proportional to step_decay^(k-1) and summing to 1 (FastMTP).

    Args:
        step_decay: 0.6 as in FastMTP (arXiv 2509.18362); 1 weighs all steps alike.
        **common: as for every `ChainLoss`.
    """

    statistics = ("log_q",)

    def __init__(self, *, step_decay: float = 0.6, **common):
        super().__init__(**common)
        self.step_decay = step_decay

    def pair_loss(self, stats: ChainStats) -> Tensor:
        return -geometric_step_weights(self.step_decay, stats.log_q) * stats.log_q
