"""LK losses (Samarin et al., arXiv 2602.23881): acceptance whose gradient does not vanish where it is small."""

import torch
from torch import Tensor

from bebop.kernels.stats import ChainStats
from bebop.losses.base import ChainLoss
from bebop.losses.step_weights import geometric_step_weights


class LKAlphaLoss(ChainLoss):
    """-mean_k log alpha_k per chain: the TV gradient divided by alpha."""

    def pair_loss(self, stats: ChainStats) -> Tensor:
        # alpha is 0 where it underflows; its gradient is 0 there too.
        return -stats.alpha.clamp(min=torch.finfo(stats.alpha.dtype).tiny).log()


class LKHybridLoss(ChainLoss):
    """w_k [lambda KL(p, q) + (1 - lambda)(1 - alpha)] with lambda = exp(-eta alpha), alpha not differentiated there.

    KL where the draft is far from the target, TV where it is close. Where p and q hardly overlap the TV gradient vanishes
    (it is proportional to q where q < p) and KL takes over, so this starts a head from nothing.
    Source: Samarin et al., arXiv 2602.23881, with their eta = 3 and step weights 0.8^(k-1).

    Args:
        eta: how fast lambda falls with alpha.
        step_decay: ratio of successive step weights, which have mean 1.
        **common: as for every `ChainLoss`.
    """

    statistics = ("alpha", "kl")

    def __init__(self, *, eta: float = 3.0, step_decay: float = 0.8, **common):
        super().__init__(**common)
        self.eta = eta
        self.step_decay = step_decay

    def pair_loss(self, stats: ChainStats) -> Tensor:
        share = torch.exp(-self.eta * stats.alpha.detach())
        mixed = share * stats.kl + (1.0 - share) * (1.0 - stats.alpha)
        return geometric_step_weights(self.step_decay, mixed) * mixed
