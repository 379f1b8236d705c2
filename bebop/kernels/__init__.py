"""The fused lm_head and chain-statistics op. Knows nothing of objectives or models."""

from bebop.kernels.linear_chain import linear_chain_loss, linear_chain_statistics
from bebop.kernels.stats import STATISTICS, ChainStats

__all__ = ["STATISTICS", "ChainStats", "linear_chain_loss", "linear_chain_statistics"]
