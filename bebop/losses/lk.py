"""LK hybrid: KL where the draft is far from the target, TV where it is close. What starts a head from nothing."""

import torch
from torch import Tensor

from bebop.kernels.linear_chain import DEFAULT_CHUNK_BYTES
from bebop.kernels.stats import ChainStats
from bebop.losses.base import ChainLoss
from bebop.losses.step_weights import geometric_step_weights


class LKHybridLoss(ChainLoss):
    """w_k [lambda KL(p, q) + (1 - lambda)(1 - alpha)] with lambda = exp(-eta alpha), alpha not differentiated there.

    Where p and q hardly overlap the TV gradient vanishes (it is proportional to q where q < p) and KL takes over.
    Source: Samarin et al., arXiv 2602.23881, with their eta = 3 and step weights 0.8^(k-1).

    Args:
        temperature, chunk_bytes: as for every `ChainLoss`.
        eta: how fast lambda falls with alpha.
        step_decay: ratio of successive step weights, which have mean 1.
    """

    statistics = ("alpha", "kl")

    def __init__(
        self,
        temperature: float = 1.0,
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
        eta: float = 3.0,
        step_decay: float = 0.8,
    ):
        super().__init__(temperature, chunk_bytes)
        self.eta = eta
        self.step_decay = step_decay

    def pair_loss(self, stats: ChainStats) -> Tensor:
        share = torch.exp(-self.eta * stats.alpha.detach())
        mixed = share * stats.kl + (1.0 - share) * (1.0 - stats.alpha)
        return geometric_step_weights(self.step_decay, mixed) * mixed
