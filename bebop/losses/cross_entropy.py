"""Cross entropy on the text's own tokens: the usual MTP loss, here to compare with."""

from torch import Tensor

from bebop.kernels.linear_chain import DEFAULT_CHUNK_BYTES
from bebop.kernels.stats import ChainStats
from bebop.losses.base import ChainLoss
from bebop.losses.step_weights import geometric_step_weights


class CrossEntropyLoss(ChainLoss):
    """-sum_k w_k log q_k(x) per chain, in nats, w_k proportional to step_decay^(k-1) and summing to 1 (FastMTP).

    Args:
        temperature, chunk_bytes: as for every `ChainLoss`.
        step_decay: 0.6 as in FastMTP (arXiv 2509.18362); 1 weighs all steps alike.
    """

    statistics = ("log_q",)

    def __init__(self, temperature: float = 1.0, chunk_bytes: int = DEFAULT_CHUNK_BYTES, step_decay: float = 0.6):
        super().__init__(temperature, chunk_bytes)
        self.step_decay = step_decay

    def pair_loss(self, stats: ChainStats) -> Tensor:
        return -geometric_step_weights(self.step_decay, stats.log_q) * stats.log_q
