"""The row passes in PyTorch: rows of logits in, one number per row (or the rows' gradient) out.

Row r compares draft logits z[r] with target logits t[index[r]], both [*, V] in fp32 (fp64 in tests), after both are
multiplied by scale[r], the inverse temperature. Each pass is compiled where torch.compile has what it needs (several times
faster than eager on a CPU), and runs eagerly otherwise. `rows_triton.py` has the same functions. They know nothing of
objectives: the gradient pass takes coefficients.
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
            # Objectives differ in which coefficients they have: more variants than torch's default limit of 8.
            with torch._dynamo.config.patch(recompile_limit=64):
                return compiled(rows, *args)
        if reason is not None and rows.dtype == torch.float32:
            _warn_eager(reason)
        return function(rows, *args)

    return dispatch


@_row_pass
def log_sum_exp(x: Tensor, index: Tensor, scale: Tensor) -> Tensor:
    """log sum_v exp(scale[r] x[index[r], v]): [U, V], [R], [R] -> [R] in float64.

    The sum is accumulated in float64 too: torch.compile adds a row up lane by lane, and in fp32 the error of that, 3e-6 at
    V = 151,936, is enough to put ten times as many tokens on the wrong side of q < p as the rounding of the logits does.
    """
    x = x[index] * scale[:, None]
    highest = x.amax(-1)
    return highest.double() + (x - highest[:, None]).exp().sum(-1, dtype=torch.float64).log()


def statistics(
    z: Tensor, t: Tensor, index: Tensor, scale: Tensor, lse_z: Tensor, lse_t: Tensor, names: tuple[str, ...]
) -> dict[str, Tensor]:
    """Sums over the vocabulary [R] by name: those of `names` among alpha, kl, reverse_kl, target_entropy, draft_entropy.

    `below`, the draft's mass where q < p, comes with alpha. The log-sum-exps are float64.
    """
    rows = (z, t, index, scale, *_in_dtype_of(z, lse_z, lse_t))
    found = {name: one_pass(*rows) for name, one_pass in _SUMS.items() if name in names}
    if "alpha" in names:
        found["alpha"], found["below"] = _overlap(*rows)
    return found


def _in_dtype_of(z: Tensor, lse_z: Tensor, lse_t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both log-sum-exps and their difference, which is small where the draft is good, and rounded only here."""
    return lse_z.to(z.dtype), lse_t.to(z.dtype), (lse_z - lse_t).to(z.dtype)


def _log_q(z: Tensor, scale: Tensor, lse_z: Tensor) -> Tensor:
    return z * scale[:, None] - lse_z[:, None]


def _log_p(t: Tensor, index: Tensor, scale: Tensor, lse_t: Tensor) -> Tensor:
    return t[index] * scale[:, None] - lse_t[:, None]


def _log_ratio(z: Tensor, t: Tensor, index: Tensor, scale: Tensor, gap: Tensor) -> Tensor:
    """log(q/p). Its sign decides ties: equal logits give exactly 0, and q < p is strict."""
    return (z - t[index]) * scale[:, None] - gap[:, None]


@_row_pass
def _overlap(z, t, index, scale, lse_z, lse_t, gap):
    is_below = _log_ratio(z, t, index, scale, gap) < 0
    smaller = torch.where(is_below, _log_q(z, scale, lse_z), _log_p(t, index, scale, lse_t)).exp()
    return smaller.sum(-1), torch.where(is_below, smaller, 0.0).sum(-1)


@_row_pass
def _kl(z, t, index, scale, lse_z, lse_t, gap):
    p = _log_p(t, index, scale, lse_t).exp()
    return -torch.where(p > 0, p * _log_ratio(z, t, index, scale, gap), 0.0).sum(-1)


@_row_pass
def _reverse_kl(z, t, index, scale, lse_z, lse_t, gap):
    q = _log_q(z, scale, lse_z).exp()
    return torch.where(q > 0, q * _log_ratio(z, t, index, scale, gap), 0.0).sum(-1)


@_row_pass
def _target_entropy(z, t, index, scale, lse_z, lse_t, gap):
    log_p = _log_p(t, index, scale, lse_t)
    p = log_p.exp()
    return -torch.where(p > 0, p * log_p, 0.0).sum(-1)


@_row_pass
def _draft_entropy(z, t, index, scale, lse_z, lse_t, gap):
    log_q = _log_q(z, scale, lse_z)
    q = log_q.exp()
    return -torch.where(q > 0, q * log_q, 0.0).sum(-1)


_SUMS = {
    "kl": _kl,
    "reverse_kl": _reverse_kl,
    "target_entropy": _target_entropy,
    "draft_entropy": _draft_entropy,
}


def gradient(
    z: Tensor,
    t: Tensor,
    index: Tensor,
    scale: Tensor,
    lse_z: Tensor,
    lse_t: Tensor,
    out: Tensor,
    tokens: Tensor,
    on_q: Tensor,
    on_below: Tensor | None,
    on_p: Tensor | None,
    on_log_ratio: Tensor | None,
    on_token: Tensor | None,
) -> None:
    """Write q (on_q + on_below 1[q < p] + on_log_ratio log(q/p)) + on_p p + on_token 1[v = token] into out [R, V].

    All closed forms are of this shape, see `chunked_op.row_coefficients`. Coefficients are [R], None where they are all
    0; tokens [R] are columns, -1 for none. out has any dtype and may be z itself.
    """
    rows = (z, t, index, scale, *_in_dtype_of(z, lse_z, lse_t))
    _gradient(*rows, out, tokens, on_q, on_below, on_p, on_log_ratio, on_token)


@_row_pass
def _gradient(z, t, index, scale, lse_z, lse_t, gap, out, tokens, on_q, on_below, on_p, on_log_ratio, on_token):
    q = _log_q(z, scale, lse_z).exp()
    log_ratio = _log_ratio(z, t, index, scale, gap)
    factor = on_q[:, None]
    if on_below is not None:
        factor = factor + torch.where(log_ratio < 0, on_below[:, None], 0.0)
    if on_log_ratio is not None:
        factor = factor + on_log_ratio[:, None] * torch.where(q > 0, log_ratio, 0.0)
    g = q * factor
    if on_p is not None:
        g = g + on_p[:, None] * _log_p(t, index, scale, lse_t).exp()
    if on_token is not None:
        is_token = torch.arange(z.shape[1], device=z.device) == tokens[:, None]
        g = g + on_token[:, None] * is_token.to(q.dtype)
    out.copy_(g)
