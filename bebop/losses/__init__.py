"""Objectives on chain statistics. README.md beside this file says how to add one."""

from bebop.losses.base import ChainLoss, ChainLossOutput
from bebop.losses.cross_entropy import CrossEntropyLoss
from bebop.losses.e2e_tv import E2ETVLoss
from bebop.losses.kl import ForwardKLLoss
from bebop.losses.lk import LKHybridLoss
from bebop.losses.tv import TVLoss

# The names used by configuration files and the command line.
LOSSES: dict[str, type[ChainLoss]] = {
    "e2e_tv": E2ETVLoss,
    "tv": TVLoss,
    "ce": CrossEntropyLoss,
    "kl": ForwardKLLoss,
    "lk_hybrid": LKHybridLoss,
}

__all__ = [
    "LOSSES",
    "ChainLoss",
    "ChainLossOutput",
    "CrossEntropyLoss",
    "E2ETVLoss",
    "ForwardKLLoss",
    "LKHybridLoss",
    "TVLoss",
]
