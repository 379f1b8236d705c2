"""Objectives on chain statistics. README.md beside this file says how to add one."""

from bebop.losses.base import ChainLoss, ChainLossOutput
from bebop.losses.by_name import LOSSES, loss_by_name
from bebop.losses.cross_entropy import CrossEntropyLoss
from bebop.losses.e2e_tv import E2ETVLoss
from bebop.losses.expected_rounds import ExpectedRoundsLoss
from bebop.losses.kl import ForwardKLLoss, ReverseKLLoss
from bebop.losses.lk import LKAlphaLoss, LKHybridLoss
from bebop.losses.realised import RealisedE2ETVLoss
from bebop.losses.tv import TVLoss
from bebop.losses.weighted_sum import WeightedSumLoss

__all__ = [
    "LOSSES",
    "ChainLoss",
    "ChainLossOutput",
    "CrossEntropyLoss",
    "E2ETVLoss",
    "ExpectedRoundsLoss",
    "ForwardKLLoss",
    "LKAlphaLoss",
    "LKHybridLoss",
    "RealisedE2ETVLoss",
    "ReverseKLLoss",
    "TVLoss",
    "WeightedSumLoss",
    "loss_by_name",
]
