"""The row passes in PyTorch: a chunk of logits in, one number per row (or the row's gradient) out.

Rows of student logits z and target logits t are fp32 and already divided by the temperature. Each function is
compiled where torch.compile has what it needs (it fuses the whole row pass, several times faster than eager on a CPU), and
runs eagerly otherwise. They know nothing of objectives: the gradient pass takes coefficients.
"""

import functools
import importlib.util
import logging
import os
import shutil

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def compile_unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the row passes run eagerly for such tensors; None if they are compiled."""
    if dtype != torch.float32:
        return f"{dtype} rows are for tests only"
    if device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        return "no C++ compiler found (install g++, or set CXX)"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


@functools.cache
def _warn_eager(reason: str) -> None:
    logger.warning("bebop's row passes run uncompiled, several times slower: %s", reason)


def _row_pass(function):
    compiled = torch.compile(function, dynamic=True)

    @functools.wraps(function)
    def dispatch(rows: Tensor, *args):
        reason = compile_unavailable_reason(rows.device, rows.dtype)
        # A size of 1 would be compiled anew for every combination of sizes, and one row costs nothing.
        if reason is None and all(x.shape[0] > 1 for x in (rows, *args) if isinstance(x, Tensor)):
            return compiled(rows, *args)
        if reason is not None and rows.dtype == torch.float32:
            _warn_eager(reason)
        return function(rows, *args)

    return dispatch


@_row_pass
def log_sum_exp(z: Tensor) -> Tensor:
    """log sum_v exp z_v of every row: [R, V] -> [R]."""
    return torch.logsumexp(z, dim=-1)


@_row_pass
def overlap(z: Tensor, t: Tensor, index: Tensor, lse_z: Tensor, lse_t: Tensor) -> tuple[Tensor, Tensor]:
    """alpha = sum_v min(p, q), and S = the draft's mass where q < p.

    z is [R, V], t is [U, V] and row r of z is compared with row index[r] of t; lse_z [R], lse_t [U]. Returns two [R].
    """
    log_q = z - lse_z[:, None]
    log_p = (t - lse_t[:, None])[index]
    smaller = torch.minimum(log_q, log_p).exp()
    return smaller.sum(-1), torch.where(log_q < log_p, smaller, 0.0).sum(-1)


@_row_pass
def kl_divergence(z: Tensor, t: Tensor, index: Tensor, lse_z: Tensor, lse_t: Tensor) -> Tensor:
    """KL(p, q) of every row, with 0 log 0 = 0. Shapes as in `overlap`; returns [R]."""
    log_q = z - lse_z[:, None]
    log_p = (t - lse_t[:, None])[index]
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


@_row_pass
def entropy(t: Tensor, lse_t: Tensor) -> Tensor:
    """Entropy of every row's softmax, in nats: [U, V], [U] -> [U]."""
    log_p = t - lse_t[:, None]
    p = log_p.exp()
    return -torch.where(p > 0, p * log_p, 0.0).sum(-1)


@_row_pass
def gradient(
    z: Tensor,
    t: Tensor,
    index: Tensor,
    lse_z: Tensor,
    lse_t: Tensor,
    out: Tensor,
    below: Tensor,
    c_alpha: Tensor | None,
    tokens: Tensor,
    c_kl: Tensor | None,
    c_log_q: Tensor | None,
) -> None:
    """Write sum_s c_s ds/dz for s in (alpha, KL, log q(x)) into out [R, V], in out's dtype; out may be z itself.

    below is S of `overlap`; tokens [R] the text's tokens x; a coefficient [R] is None where the objective has no such
    term. With strict "<" for ties (Eq. 11 of arXiv 2606.12370 for alpha, textbook for the others):

        dalpha/dz_j = q_j (1[q_j < p_j] - S),   dKL/dz_j = q_j - p_j,   dlog q(x)/dz_j = 1[j = x] - q_j.
    """
    log_q = z - lse_z[:, None]
    log_p = (t - lse_t[:, None])[index]
    q = log_q.exp()
    g = torch.zeros_like(q)
    if c_alpha is not None:
        g = q * (c_alpha[:, None] * ((log_q < log_p).to(q.dtype) - below[:, None]))
    if c_kl is not None:
        g = g + c_kl[:, None] * (q - log_p.exp())
    if c_log_q is not None:
        is_token = torch.arange(z.shape[1], device=z.device) == tokens[:, None]
        g = g + c_log_q[:, None] * (is_token.to(q.dtype) - q)
    out.copy_(g)
