"""Which implementation of the row passes runs: Triton on a GPU, PyTorch everywhere else."""

import functools
import importlib.util
import logging
import os
from types import ModuleType

import torch

from bebop.kernels import rows_torch

logger = logging.getLogger(__name__)


def triton_unavailable_reason(device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Why rows of logits of this dtype on this device are not worked on by Triton; None if they are.

    TRITON_INTERPRET=1, set before triton is imported, brings the kernels to a CPU: slow, for tests.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if dtype == torch.float64:
        return "float64 rows are for tests only"
    if device.type != "cuda" and not interpreted:
        return f"triton does not run on {device.type}"
    return None


def row_passes(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """`rows_triton` or `rows_torch`; the choice is logged once."""
    reason = triton_unavailable_reason(device, dtype)
    _log_choice(device.type, reason)
    if reason is not None:
        return rows_torch
    from bebop.kernels import rows_triton

    return rows_triton


@functools.cache
def _log_choice(device: str, reason: str | None) -> None:
    logger.info("row passes on %s: %s", device, f"PyTorch, as {reason}" if reason else "Triton")
