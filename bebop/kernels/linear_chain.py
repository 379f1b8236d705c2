"""The fused op: hidden states of a draft chain and of the target in, loss or chain statistics out.

The logits of a chunk of chains live in one fp32 buffer of a fixed byte budget and nowhere else. Per chunk: one product for
the target rows, which all K steps share, and for the draft rows; row passes for the statistics; a row pass that turns
coefficients, the derivatives of a loss with respect to the statistics, into the logits' gradient; one product back
to the hidden states. 2K+1 lm_head products in all, K+1 without gradients. Possible because W is frozen.

Two modes share all that. `linear_chain_loss` evaluates the objective, plain autograd on [K, R] tensors, chunk by chunk, and
so knows the coefficients while the logits exist. `linear_chain_statistics` returns the statistics [K, N] as
differentiable tensors; it keeps the gradient of each, K N d numbers, and its backward only scales their rows.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from bebop.kernels.chunked_op import ChunkedOp, Objective
from bebop.kernels.inputs import ChainInputs
from bebop.kernels.stats import DIFFERENTIABLE, ChainStats

# At K = 3 and V = 151,936 room for 192 chains on a CPU and 128 with a bf16 lm_head on a GPU: products of hundreds of rows.
DEFAULT_CHUNK_BYTES = 512 * 2**20


@torch.compiler.disable  # a graph break: chunks depend on which pairs are valid
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
    temperature: float | Tensor = 1.0,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    top_k: int | None = None,
    vocabulary_group: dist.ProcessGroup | None = None,
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
        objective: maps ChainStats with tensors [K, R] to the loss of every pair [K, R]; differentiable PyTorch. Tensors
            that it closes over get no gradient.
        statistics: names from `STATISTICS` to compute. `alpha`, `log_q` and `log_p` always are, but the objective's
            derivative is taken only with respect to those named here.
        normaliser: divides the sum; the number of valid pairs if None. Pass the count of the whole optimiser step when
            it is split over micro-batches or ranks.
        temperature: divides both sides' logits; a number, or [N], one per chain.
        chunk_bytes: budget for the logits of one chunk (one chain at least).
        top_k: compute alpha, KL both ways, entropies and argmax on the target's top_k most likely tokens only, p and q
            renormalised there (log_q and log_p stay those of the whole vocabulary). An approximation with which the
            draft's mass elsewhere goes unseen: for studying what it does, not for training.
        vocabulary_group: the processes over which the lm_head is split by rows, `weight` being this process's part, in
            order of rank. All other arguments must be the same on all of them; so are all results.

    Returns:
        loss: scalar, 0 connected to the graph when no pair is valid.
        stats: detached ChainStats [K, N].

    Raises:
        ValueError: shapes, dtypes, devices, rows or tokens that do not fit, NaN or inf in what counts, a weight that
            requires grad.
    """
    inputs = ChainInputs(draft_hidden, target_hidden, weight, target_rows, tokens, valid, temperature)
    op = ChunkedOp(inputs, statistics, chunk_bytes, top_k, vocabulary_group)
    if normaliser is None:
        normaliser = valid.sum().clamp(min=1)
    elif isinstance(normaliser, Tensor) and normaliser.numel() != 1:
        raise ValueError(f"normaliser is a tensor {tuple(normaliser.shape)}, expected one number above 0")
    elif not isinstance(normaliser, Tensor) and not normaliser > 0:
        raise ValueError(f"normaliser is {normaliser}, expected a number above 0")
    loss, *values = _ChainLoss.apply(draft_hidden, op, objective, normaliser)
    return loss, ChainStats(valid, **dict(zip(op.names, values, strict=True)))


@torch.compiler.disable
def linear_chain_statistics(
    draft_hidden: Tensor,
    target_hidden: Tensor,
    weight: Tensor,
    *,
    target_rows: Tensor,
    tokens: Tensor,
    valid: Tensor,
    statistics: tuple[str, ...] = ("alpha",),
    temperature: float | Tensor = 1.0,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    top_k: int | None = None,
    vocabulary_group: dist.ProcessGroup | None = None,
) -> ChainStats:
    """Chain statistics [K, N]; those of `statistics` that can be are differentiable in `draft_hidden`.

    For losses in plain autograd, and for objectives that couple chains. Costs K+1 lm_head products, and K more and K N d
    numbers of memory for each of alpha, kl, reverse_kl and log_q in `statistics` if `draft_hidden` requires grad and
    gradients are enabled. Arguments and errors as for `linear_chain_loss`.
    """
    inputs = ChainInputs(draft_hidden, target_hidden, weight, target_rows, tokens, valid, temperature)
    kept = tuple(name for name in DIFFERENTIABLE if name in statistics)
    op = ChunkedOp(inputs, statistics, chunk_bytes, top_k, vocabulary_group, kept)
    values = _ChainStatistics.apply(draft_hidden, op)
    return ChainStats(valid, **dict(zip(op.names, values, strict=True)))


class _ChainLoss(torch.autograd.Function):
    """Loss and its gradient in one forward, as the logits do not outlive their chunk; backward only scales."""

    @staticmethod
    def forward(ctx, draft: Tensor, op: ChunkedOp, objective: Objective, normaliser: Tensor | float):
        loss, stats, gradient = op.loss(objective, normaliser)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(*stats.values())
        return loss, *stats.values()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        (gradient,) = ctx.saved_tensors
        return gradient * grad_loss.to(gradient.dtype), None, None, None


class _ChainStatistics(torch.autograd.Function):
    """Statistics, with the gradient of each that is kept. Right because W is frozen: scaling rows commutes with G W."""

    @staticmethod
    def forward(ctx, draft: Tensor, op: ChunkedOp):
        stats, gradients = op.statistics()
        ctx.names, ctx.kept = tuple(stats), tuple(gradients)
        ctx.save_for_backward(op.inputs.valid, *gradients.values())
        ctx.mark_non_differentiable(*(value for name, value in stats.items() if name not in gradients))
        return tuple(stats.values())

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        valid, *gradients = ctx.saved_tensors
        incoming = dict(zip(ctx.names, grads, strict=True))
        # What flows back to invalid pairs may be NaN; their rows are 0.
        scales = [torch.where(valid, incoming[name], 0.0).unsqueeze(-1) for name in ctx.kept]
        total = torch.empty_like(gradients[0])
        for k in range(len(total)):  # step by step, as the products are wider than low-precision gradients
            total[k] = sum(scale[k] * gradient[k] for scale, gradient in zip(scales, gradients, strict=True))
        return total, None
