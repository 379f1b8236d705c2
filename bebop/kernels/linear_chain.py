"""The fused op: hidden states of a draft chain and of the target in, loss and chain statistics out.

The logits of a chunk of anchors live in fp32 buffers of a fixed byte budget and nowhere else. Per chunk: one product for
the target rows, which all K steps share; one product per step for the draft; two row passes for the statistics [K, R];
the objective, plain autograd on those; one row pass that turns its coefficients into the logits' gradient; one product
per step back to the hidden states. 2K+1 lm_head products in all, K+1 without gradients. Possible because W is frozen.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bebop.kernels import rows_torch as row_passes
from bebop.kernels.stats import DIFFERENTIABLE, STATISTICS, ChainStats

# On a CPU the lm_head product reaches its full rate from about 128 rows on: 256 MiB are 256 anchors at K = 3, V = 49,152.
DEFAULT_CHUNK_BYTES = 256 * 2**20

Objective = Callable[[ChainStats], Tensor]


def linear_chain_loss(
    draft_hidden: Tensor,
    target_hidden: Tensor,
    weight: Tensor,
    *,
    target_rows: Tensor,
    tokens: Tensor,
    valid: Tensor,
    objective: Objective,
    statistics: tuple[str, ...] = ("alpha",),
    normaliser: Tensor | float | None = None,
    temperature: float = 1.0,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> tuple[Tensor, ChainStats]:
    """sum over valid pairs of objective(statistics) / normaliser, with gradient to `draft_hidden` alone.

    Args:
        draft_hidden: [K, N, d], the head's output at step k of chain n, as the lm_head takes it.
        target_hidden: [M, d], the target's hidden states as the lm_head takes them; detached.
        weight: [V, d], the frozen lm_head, bf16, fp16, fp32 or fp64. Hidden states are cast to its dtype for the
            products; logits are accumulated and kept in fp32 (fp64 for fp64).
        target_rows: [K, N] int64, the row of `target_hidden` that step k of chain n is judged against.
        tokens: [K, N] int64, the text's token that step k of chain n predicts.
        valid: [K, N] bool. The other arguments may hold anything, NaN included, where it is False.
        objective: maps ChainStats with tensors [K, R] to the loss of every pair [K, R]; differentiable PyTorch.
        statistics: names from `STATISTICS` to compute; `alpha`, `log_q` and `log_p` always are.
        normaliser: divides the sum; the number of valid pairs if None. Pass the count of the whole optimiser step when
            it is split over micro-batches or ranks.
        temperature: divides both sides' logits.
        chunk_bytes: budget for the logits of one chunk (one anchor at least). It assumes that neighbouring chains share
            target rows, as chains of a text do; rows that no two chains share take up to twice as much.

    Returns:
        loss: scalar, 0 connected to the graph when no pair is valid.
        stats: detached ChainStats [K, N].

    Raises:
        ValueError: shapes, dtypes, devices, rows or tokens that do not fit, or a weight that requires grad.
    """
    _check_arguments(draft_hidden, target_hidden, weight, target_rows, tokens, valid, statistics, temperature)
    if normaliser is None:
        normaliser = valid.sum().clamp(min=1)
    wants_gradient = torch.is_grad_enabled() and draft_hidden.requires_grad
    outputs = _LinearChain.apply(
        draft_hidden,
        target_hidden.detach(),
        weight,
        (target_rows, tokens, valid),
        objective,
        statistics,
        temperature,
        chunk_bytes,
        wants_gradient,
    )
    stats = ChainStats(valid, **dict(zip(_computed(statistics), outputs[1:], strict=True)))
    return outputs[0] / normaliser, stats


@torch.no_grad()
def linear_chain_statistics(
    draft_hidden: Tensor,
    target_hidden: Tensor,
    weight: Tensor,
    *,
    statistics: tuple[str, ...] = STATISTICS,
    **arguments,
) -> ChainStats:
    """Chain statistics [K, N] alone, at K+1 lm_head products. Arguments as for `linear_chain_loss`."""
    return linear_chain_loss(
        draft_hidden, target_hidden, weight, objective=lambda stats: stats.alpha, statistics=statistics, **arguments
    )[1]


def _computed(statistics: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in STATISTICS if name in statistics or name in ("alpha", "log_q", "log_p"))


class _LinearChain(torch.autograd.Function):
    """Loss and its gradient in one forward, as the logits do not outlive their chunk; backward only scales."""

    @staticmethod
    @torch.compiler.disable
    def forward(ctx, draft, target, weight, chains, objective, statistics, temperature, chunk_bytes, wants_gradient):
        # Autocast would turn the fp32 products into bf16 ones and with them the logits, which ruins the TV gradient.
        with torch.autocast(draft.device.type, enabled=False):
            loss, stats, gradient = _run(
                draft, target, weight, chains, objective, statistics, temperature, chunk_bytes, wants_gradient
            )
        ctx.save_for_backward(gradient)
        outputs = tuple(stats.values())
        ctx.mark_non_differentiable(*outputs)
        return loss, *outputs

    @staticmethod
    def backward(ctx, grad_loss, *_):
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_loss.to(gradient.dtype), *[None] * 8)


def _run(draft, target, weight, chains, objective, statistics, temperature, chunk_bytes, wants_gradient):
    steps, n = draft.shape[:2]
    vocabulary = weight.shape[0]
    accumulate = torch.float64 if weight.dtype == torch.float64 else torch.float32
    result = {name: torch.zeros(steps, n, dtype=accumulate, device=draft.device) for name in _computed(statistics)}
    gradient = torch.zeros_like(draft) if wants_gradient else None
    loss = torch.zeros((), dtype=accumulate, device=draft.device)

    # Per anchor: K+1 rows of logits, and one row of their gradient where it does not fit in a logits buffer.
    row_bytes = vocabulary * accumulate.itemsize
    spare = 0 if weight.dtype == accumulate else vocabulary * weight.dtype.itemsize
    plan = _plan_chunks(chains, max(1, chunk_bytes // ((steps + 1) * row_bytes + spare)))
    if not plan:
        return loss, result, gradient

    product = _Product(weight, accumulate)
    most_anchors = max(len(c.anchors) for c in plan)
    most_targets = max(len(c.target_rows) for c in plan)
    options = {"dtype": accumulate, "device": draft.device}
    draft_buffers = [torch.empty(most_anchors, vocabulary, **options) for _ in range(steps)]
    target_buffer = torch.empty(most_targets, vocabulary, **options)
    spare_buffer = torch.empty(most_anchors, vocabulary, dtype=weight.dtype, device=draft.device) if spare else None

    for chunk in plan:
        t = product.logits(target[chunk.target_rows], target_buffer, temperature)
        lse_t = row_passes.log_sum_exp(t)
        shape = (steps, len(chunk.anchors))
        local = {name: torch.zeros(shape, **options) for name in result}
        entropy_t = row_passes.entropy(t, lse_t) if "target_entropy" in local else None
        rows = []
        for k, step in enumerate(chunk.steps):
            if len(step.select) == 0:
                continue
            z = product.logits(draft[k, chunk.anchors[step.select]], draft_buffers[k], temperature)
            lse_z = row_passes.log_sum_exp(z)
            alpha, below = row_passes.overlap(z, t, step.target, lse_z, lse_t)
            rows.append((k, step, z, lse_z, below))
            here = (k, step.select)
            local["alpha"][here] = alpha
            local["log_q"][here] = z.gather(1, step.tokens[:, None]).squeeze(1) - lse_z
            local["log_p"][here] = t[step.target, step.tokens] - lse_t[step.target]
            if "kl" in local:
                local["kl"][here] = row_passes.kl_divergence(z, t, step.target, lse_z, lse_t)
            if entropy_t is not None:
                local["target_entropy"][here] = entropy_t[step.target]
            if "alpha_target_only" in local or "target_only_hit" in local:
                top = z.argmax(-1)
                greedy = {
                    "alpha_target_only": (t[step.target, top] - lse_t[step.target]).exp(),
                    "target_only_hit": (top == step.tokens).to(accumulate),
                }
                for name in greedy.keys() & local.keys():
                    local[name][here] = greedy[name]
        for name, value in local.items():
            result[name][:, chunk.anchors] = value

        loss_here, coefficients = _coefficients(objective, local, chunk.valid, wants_gradient)
        loss += loss_here
        if gradient is None:
            continue
        for k, step, z, lse_z, below in rows:
            c = {name: value[k, step.select] for name, value in coefficients.items()}
            out = z if spare_buffer is None else _first_rows(spare_buffer, len(z))
            row_passes.gradient(
                z, t, step.target, lse_z, lse_t, out, below, c.get("alpha"), step.tokens, c.get("kl"), c.get("log_q")
            )
            gradient[k, chunk.anchors[step.select]] = (product.back(out) / temperature).to(gradient.dtype)
    return loss, result, gradient


def _first_rows(buffer: Tensor, rows: int) -> Tensor:
    """buffer[:rows] on the same memory, but no view to autograd: torch.compile would specialise on a view's base."""
    return buffer.new_empty(0).set_(buffer.untyped_storage(), 0, (rows, buffer.shape[1]), buffer.stride())


def _coefficients(objective, local, valid, wants_gradient) -> tuple[Tensor, dict[str, Tensor]]:
    """The chunk's loss, and its derivative with respect to each statistic [K, R] that the objective uses."""
    with torch.enable_grad():
        leaves = {name: value.requires_grad_(wants_gradient and name in DIFFERENTIABLE) for name, value in local.items()}
        pair_loss = objective(ChainStats(valid, **leaves))
        if pair_loss.shape != valid.shape:
            raise ValueError(f"the objective returned shape {tuple(pair_loss.shape)}, expected {tuple(valid.shape)} (K, R)")
        loss = torch.where(valid, pair_loss, 0.0).sum()
        if not wants_gradient or not loss.requires_grad:
            return loss.detach(), {}
        inputs = {name: value for name, value in leaves.items() if value.requires_grad}
        found = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
    return loss.detach(), {name: g for name, g in zip(inputs, found, strict=True) if g is not None}


class _Product:
    """Products with the frozen lm_head: operands in its dtype, accumulation and logits in fp32 (or fp64)."""

    def __init__(self, weight: Tensor, accumulate: torch.dtype):
        self.weight = weight
        self.accumulate = accumulate
        # CPU products return their operands' dtype. fp32 copies of bf16 operands, multiplied under matmul precision
        # "medium" (bf16 products, fp32 sums), give the same exact products with fp32 output. One copy per call.
        emulated = weight.device.type == "cpu" and weight.dtype in (torch.bfloat16, torch.float16)
        self.operand = weight.float() if emulated else weight

    def logits(self, hidden: Tensor, buffer: Tensor, temperature: float) -> Tensor:
        """hidden [R, d] -> logits [R, V] / temperature, in the first R rows of buffer."""
        hidden = hidden.to(self.weight.dtype)
        out = _first_rows(buffer, len(hidden))
        # Whatever precision the caller's own products run at: these decide which tokens get gradient.
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium" if self.weight.dtype == torch.bfloat16 else "highest")
        try:
            if self.operand.dtype == self.accumulate:
                torch.mm(hidden.to(self.accumulate), self.operand.T, out=out)
            else:
                torch.mm(hidden, self.operand.T, out_dtype=self.accumulate, out=out)
        finally:
            torch.set_float32_matmul_precision(precision)
        return out.mul_(1.0 / temperature) if temperature != 1.0 else out

    def back(self, gradient: Tensor) -> Tensor:
        """gradient of logits [R, V], in the weight's dtype -> gradient of hidden [R, d]."""
        return gradient @ self.weight


@dataclass
class _Step:
    select: Tensor  # [R_k] which of the chunk's anchors have a valid step k
    target: Tensor  # [R_k] their rows within the chunk's target rows
    tokens: Tensor  # [R_k]


@dataclass
class _Chunk:
    anchors: Tensor  # [R] indices into N
    target_rows: Tensor  # [U] indices into M, each once
    valid: Tensor  # [K, R]
    steps: list[_Step]


def _plan_chunks(chains: tuple[Tensor, Tensor, Tensor], anchors_per_chunk: int) -> list[_Chunk]:
    """Which anchors and target rows make up each chunk; invalid rows are left out altogether.

    Worked out on the host with one transfer of the indices, so that the device is not waited for between chunks.
    """
    device = chains[2].device
    target_rows, tokens, valid = (x.cpu() for x in chains)
    if anchors_per_chunk >= 64:
        anchors_per_chunk -= anchors_per_chunk % 64
    plan = []
    for anchors in valid.any(0).nonzero().squeeze(1).split(anchors_per_chunk):
        valid_here = valid[:, anchors]
        targets, position = target_rows[:, anchors][valid_here].unique(return_inverse=True)
        counts = valid_here.sum(1).tolist()
        steps = [
            _Step(valid_k.nonzero().squeeze(1).to(device), at.clone().to(device), tokens_k[valid_k].to(device))
            for valid_k, at, tokens_k in zip(valid_here, position.split(counts), tokens[:, anchors], strict=True)
        ]
        plan.append(_Chunk(anchors.to(device), targets.to(device), valid_here.to(device), steps))
    return plan


def _check_arguments(draft, target, weight, target_rows, tokens, valid, statistics, temperature) -> None:
    if draft.ndim != 3 or target.ndim != 2 or weight.ndim != 2 or not draft.shape[2] == target.shape[1] == weight.shape[1]:
        raise ValueError(
            f"draft_hidden {tuple(draft.shape)}, target_hidden {tuple(target.shape)} and weight {tuple(weight.shape)} "
            "do not fit; expected [K, N, d], [M, d] and [V, d]"
        )
    for name, x, kind in (("target_rows", target_rows, "int64"), ("tokens", tokens, "int64"), ("valid", valid, "bool")):
        if x.shape != draft.shape[:2] or x.dtype != getattr(torch, kind):
            raise ValueError(f"{name} is {x.dtype} {tuple(x.shape)}, expected {kind} {tuple(draft.shape[:2])} ([K, N])")
    devices = {x.device for x in (draft, target, weight, target_rows, tokens, valid)}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, found {sorted(map(str, devices))}")
    if weight.requires_grad:
        raise ValueError("weight (the lm_head) requires grad, but the op has no gradient for it; call weight.detach()")
    if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(f"weight is {weight.dtype}; expected bf16, fp16, fp32 or fp64 (dequantise the lm_head first)")
    if unknown := set(statistics) - set(STATISTICS):
        raise ValueError(f"unknown statistics {sorted(unknown)}; known are {', '.join(STATISTICS)}")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected a number above 0 (greedy serving has no TV loss)")
    if bool((valid[1:] & ~valid[:-1]).any()):
        raise ValueError("valid has a chain whose valid steps are not a prefix; a chain may be cut short, not interrupted")
    for name, x, bound in (("target_rows", target_rows, target.shape[0]), ("tokens", tokens, weight.shape[0])):
        if bool((valid & ((x < 0) | (x >= bound))).any()):
            found = x[valid]
            raise ValueError(f"{name} of valid pairs range from {found.min()} to {found.max()}, expected 0 to {bound - 1}")
