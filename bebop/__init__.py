"""bebop trains multi-token-prediction (MTP) heads for speculative decoding."""

from bebop.losses import CrossEntropyLoss, E2ETVLoss, ForwardKLLoss, LKHybridLoss, TVLoss

__version__ = "0.1.0"

__all__ = ["CrossEntropyLoss", "E2ETVLoss", "ForwardKLLoss", "LKHybridLoss", "TVLoss", "__version__"]
