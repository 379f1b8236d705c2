"""Weights of the draft steps, for losses that add up steps."""

import torch
from torch import Tensor


def geometric_step_weights(decay: float, like: Tensor) -> Tensor:
    """w_k proportional to decay^(k-1) with mean 1 over the K steps of `like` [K, N]; returns [K, 1].

    FastMTP (arXiv 2509.18362) trains with decay 0.6.
    """
    weights = decay ** torch.arange(like.shape[0], dtype=like.dtype, device=like.device)
    return (weights / weights.mean()).unsqueeze(1)
