"""Acceptance along the text itself, where e2e TV multiplies expectations."""

import torch
from torch import Tensor

from bebop.kernels.stats import ChainStats
from bebop.losses.base import ChainLoss
from bebop.losses.chain_products import cumulative_product


def realised_acceptance(stats: ChainStats) -> Tensor:
    """r_k = min(1, q_k(x)/p_k(x)) [K, N]: the probability that the text's own token was an accepted draft (derived).

    1 where a pair is not valid. Ties by strict "<", as everywhere: no gradient at q(x) = p(x).
    """
    return torch.where(stats.log_q < stats.log_p, stats.log_q - stats.log_p, 0.0).exp()


def reach_probability(accepts: Tensor) -> Tensor:
    """prod_{i<k} accepts_i [K, N]: the probability that step k of a chain is reached."""
    return cumulative_product(torch.cat([torch.ones_like(accepts[:1]), accepts[:-1]]))


class RealisedE2ETVLoss(ChainLoss):
    """1 - (1/K) sum_j [prod_{i<j} min(1, q_i(x_i)/p_i(x_i))] alpha_j per chain (derived).

    On text sampled from the target at this temperature an unbiased estimate of the share of drafts that are not accepted;
    Eq. 13's product is none where acceptance at one step goes with acceptance at the next. Where q(x) < p(x) it also
    rewards raising q(x), which makes reaching the later steps more likely.
    """

    statistics = ("alpha", "log_q")

    def pair_loss(self, stats: ChainStats) -> Tensor:
        return 1.0 - reach_probability(realised_acceptance(stats)) * stats.alpha
