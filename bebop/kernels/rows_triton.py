"""The row passes in Triton, function by function those of `rows_torch.py`, where their formulas are documented.

One program per row and pass walks over tiles of the vocabulary (the gradient pass has a program per tile). Loads are
upcast to fp32, so logits may be bf16, fp16 or fp32; row offsets are int64, as rows times vocabulary overflows int32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tile of the vocabulary and warps of the reductions and of the gradient: 16 and 8 elements a thread, with which no variant
# spills registers on sm_80, sm_90 or sm_100 (tests/kernels/compiled_rows.py). Twice as wide, some do.
REDUCTION = {"BLOCK": 4096, "num_warps": 8}
GRADIENT = {"BLOCK": 2048, "num_warps": 8}


@triton.jit
def log_sum_exp_kernel(x, index, scale, highest_out, total_out, V, stride_x, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    x += tl.load(index + row).to(tl.int64) * stride_x
    s = tl.load(scale + row)
    columns = tl.arange(0, BLOCK)
    highest = -float("inf")
    total = tl.full((), 0.0, tl.float64)
    for start in range(0, V, BLOCK):
        at = start + columns
        value = tl.load(x + at, mask=at < V, other=-float("inf")).to(tl.float32) * s
        new = tl.maximum(highest, tl.max(value, 0))
        # While everything so far is -inf, -inf - -inf would be NaN.
        safe = tl.where(new == -float("inf"), 0.0, new)
        total = total * tl.exp(highest - safe).to(tl.float64) + tl.sum(tl.exp(value - safe), 0).to(tl.float64)
        highest = new
    tl.store(highest_out + row, highest)
    tl.store(total_out + row, total)


@triton.jit
def statistics_kernel(
    z, t, index, scale, lse_z, lse_t, gap,
    alpha, below, kl, reverse_kl, target_entropy, draft_entropy,
    V, stride_z, stride_t,
    ALPHA: tl.constexpr, KL: tl.constexpr, REVERSE_KL: tl.constexpr,
    TARGET_ENTROPY: tl.constexpr, DRAFT_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    z += row.to(tl.int64) * stride_z
    t += tl.load(index + row).to(tl.int64) * stride_t
    s = tl.load(scale + row)
    from_z = tl.load(lse_z + row)
    from_t = tl.load(lse_t + row)
    between = tl.load(gap + row)
    columns = tl.arange(0, BLOCK)
    sum_alpha = 0.0
    sum_below = 0.0
    sum_kl = 0.0
    sum_reverse = 0.0
    sum_p = 0.0
    sum_q = 0.0
    for start in range(0, V, BLOCK):
        at = start + columns
        # Past the end both are -inf: no mass.
        z_row = tl.load(z + at, mask=at < V, other=-float("inf")).to(tl.float32)
        t_row = tl.load(t + at, mask=at < V, other=-float("inf")).to(tl.float32)
        log_q = z_row * s - from_z
        log_p = t_row * s - from_t
        log_ratio = (z_row - t_row) * s - between
        p = tl.exp(log_p)
        q = tl.exp(log_q)
        if ALPHA:
            sum_alpha += tl.sum(tl.where(log_ratio < 0, q, p), 0)
            sum_below += tl.sum(tl.where(log_ratio < 0, q, 0.0), 0)
        if KL:
            sum_kl -= tl.sum(tl.where(p > 0, p * log_ratio, 0.0), 0)
        if REVERSE_KL:
            sum_reverse += tl.sum(tl.where(q > 0, q * log_ratio, 0.0), 0)
        if TARGET_ENTROPY:
            sum_p -= tl.sum(tl.where(p > 0, p * log_p, 0.0), 0)
        if DRAFT_ENTROPY:
            sum_q -= tl.sum(tl.where(q > 0, q * log_q, 0.0), 0)
    if ALPHA:
        tl.store(alpha + row, sum_alpha)
        tl.store(below + row, sum_below)
    if KL:
        tl.store(kl + row, sum_kl)
    if REVERSE_KL:
        tl.store(reverse_kl + row, sum_reverse)
    if TARGET_ENTROPY:
        tl.store(target_entropy + row, sum_p)
    if DRAFT_ENTROPY:
        tl.store(draft_entropy + row, sum_q)


@triton.jit
def gradient_kernel(
    z, t, index, scale, lse_z, lse_t, gap, out, tokens, on_q, on_below, on_p, on_log_ratio, on_token,
    V, stride_z, stride_t, stride_out,
    BELOW: tl.constexpr, P: tl.constexpr, LOG_RATIO: tl.constexpr, TOKEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < V
    z += row.to(tl.int64) * stride_z
    t += tl.load(index + row).to(tl.int64) * stride_t
    out += row.to(tl.int64) * stride_out
    s = tl.load(scale + row)
    z_row = tl.load(z + at, mask=inside, other=-float("inf")).to(tl.float32)
    t_row = tl.load(t + at, mask=inside, other=-float("inf")).to(tl.float32)
    log_ratio = (z_row - t_row) * s - tl.load(gap + row)
    q = tl.exp(z_row * s - tl.load(lse_z + row))
    factor = tl.zeros_like(q) + tl.load(on_q + row)
    if BELOW:
        factor += tl.where(log_ratio < 0, tl.load(on_below + row), 0.0)
    if LOG_RATIO:
        factor += tl.load(on_log_ratio + row) * tl.where(q > 0, log_ratio, 0.0)
    g = q * factor
    if P:
        g += tl.load(on_p + row) * tl.exp(t_row * s - tl.load(lse_t + row))
    if TOKEN:
        g += tl.where(at == tl.load(tokens + row), tl.load(on_token + row), 0.0)
    tl.store(out + at, g.to(out.dtype.element_ty), mask=inside)


def log_sum_exp(x: Tensor, index: Tensor, scale: Tensor) -> Tensor:
    highest = torch.empty(len(index), dtype=torch.float32, device=x.device)
    total = torch.empty_like(highest, dtype=torch.float64)
    with _device(x):
        log_sum_exp_kernel[(len(index),)](x, index, scale, highest, total, x.shape[1], x.stride(0), **REDUCTION)
    return highest.double() + total.log()


def statistics(
    z: Tensor, t: Tensor, index: Tensor, scale: Tensor, lse_z: Tensor, lse_t: Tensor, names: tuple[str, ...]
) -> dict[str, Tensor]:
    sums = ("alpha", "kl", "reverse_kl", "target_entropy", "draft_entropy")
    wanted = [name for name in sums if name in names]
    found = {name: torch.empty_like(scale) for name in (*wanted, *(["below"] if "alpha" in wanted else []))}
    outputs = [found.get(name) for name in ("alpha", "below", "kl", "reverse_kl", "target_entropy", "draft_entropy")]
    with _device(z):
        statistics_kernel[(len(z),)](
            z, t, index, scale, *_in_float(lse_z, lse_t), *outputs, z.shape[1], z.stride(0), t.stride(0),
            *(name in wanted for name in sums), **REDUCTION,
        )  # fmt: skip
    return found


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
    coefficients = (on_below, on_p, on_log_ratio, on_token)
    with _device(z):
        gradient_kernel[(len(z), triton.cdiv(z.shape[1], GRADIENT["BLOCK"]))](
            z, t, index, scale, *_in_float(lse_z, lse_t), out, tokens, on_q, *coefficients,
            z.shape[1], z.stride(0), t.stride(0), out.stride(0),
            *(c is not None for c in coefficients), **GRADIENT,
        )  # fmt: skip


def _in_float(lse_z: Tensor, lse_t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return lse_z.float(), lse_t.float(), (lse_z - lse_t).float()


def _device(x: Tensor):
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device_of(x)
