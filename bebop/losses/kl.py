"""Kullback-Leibler divergences between target and draft: distillation with the full vocabulary."""

from torch import Tensor

from bebop.kernels.stats import ChainStats
from bebop.losses.base import ChainLoss


class ForwardKLLoss(ChainLoss):
    """mean_k KL(p_k, q_k) per chain, in nats."""

    statistics = ("kl",)

    def pair_loss(self, stats: ChainStats) -> Tensor:
        return stats.kl


class ReverseKLLoss(ChainLoss):
    """mean_k KL(q_k, p_k) per chain, in nats."""

    statistics = ("reverse_kl",)

    def pair_loss(self, stats: ChainStats) -> Tensor:
        return stats.reverse_kl
