"""bebop trains multi-token-prediction (MTP) heads for speculative decoding."""

from bebop.losses import (
    CrossEntropyLoss,
    E2ETVLoss,
    ExpectedRoundsLoss,
    ForwardKLLoss,
    LKAlphaLoss,
    LKHybridLoss,
    RealisedE2ETVLoss,
    ReverseKLLoss,
    TVLoss,
    WeightedSumLoss,
    loss_by_name,
)

__version__ = "0.1.0"

__all__ = [
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
    "__version__",
    "loss_by_name",
]
