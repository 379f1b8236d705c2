"""Sums of objectives, at the cost of one."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bebop.kernels.stats import STATISTICS, ChainStats
from bebop.losses.base import ChainLoss


class WeightedSumLoss(ChainLoss):
    """sum_i weight_i loss_i, with one lm_head product per step however many terms.

    Only where a term couples chains does each differentiable statistic take a product of its own.

    Args:
        terms: pairs of weight and objective; the objectives' own temperature and other common options are not used.
        **common: as for every `ChainLoss`.
    """

    def __init__(self, *, terms: Sequence[tuple[float, ChainLoss]], **common):
        super().__init__(**common)
        self.terms = tuple(terms)
        self.statistics = tuple(name for name in STATISTICS if any(name in loss.statistics for _, loss in self.terms))
        self.couples_chains = any(loss.couples_chains for _, loss in self.terms)

    def pair_loss(self, stats: ChainStats) -> Tensor:
        return torch.stack([weight * loss.pair_loss(stats) for weight, loss in self.terms]).sum(0)
