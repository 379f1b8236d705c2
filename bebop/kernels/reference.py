"""The float64 oracle: every chain statistic as the obvious formula on materialised softmaxes.

Everything that is fused is tested against this file, and `ChainLoss.from_logits` is this file plus an objective.
It is plain PyTorch and differentiable; the target is detached.
"""

import torch
from torch import Tensor

from bebop.kernels.stats import ChainStats


def chain_statistics(
    draft_logits: Tensor,
    target_logits: Tensor,
    tokens: Tensor | None = None,
    valid: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    documents: Tensor | None = None,
    top_k: int | None = None,
) -> ChainStats:
    """Statistics of K draft steps for N chains from materialised logits.

    Args:
        draft_logits: [K, N, V], differentiable.
        target_logits: [K, N, V], detached here.
        tokens: [K, N] int64, the text's own token that step k of chain n predicts; without it there is no `log_q`/`log_p`.
        valid: [K, N] bool, which pairs count; all if None. Rows of invalid pairs may hold anything, NaN included.
        temperature: a number, or [N], one per chain; both sides are divided by it before the softmax.
        documents: [N] int64, handed on.
        top_k: restrict both distributions to the target's most likely tokens and renormalise them there, except for log_q
            and log_p; an approximation, see `linear_chain_loss`.

    Source: alpha is Eq. 2 and 8 of arXiv 2606.12370, alpha_target_only Eq. 1, the rest are textbook definitions.
    """
    if valid is None:
        valid = torch.ones(draft_logits.shape[:2], dtype=torch.bool, device=draft_logits.device)
    rows = valid.unsqueeze(-1)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(draft_logits).unsqueeze(-1)
    # A softmax in bf16 would be as harmful as logits in bf16.
    draft_logits, target_logits = (x if x.dtype == torch.float64 else x.float() for x in (draft_logits, target_logits))
    z = torch.where(rows, draft_logits, 0.0) / temperature
    t = torch.where(rows, target_logits.detach(), 0.0) / temperature
    log_q_full, log_p_full = torch.log_softmax(z, dim=-1), torch.log_softmax(t, dim=-1)
    log_q, log_p = log_q_full, log_p_full
    if top_k is not None:
        outside = t < t.topk(min(top_k, t.shape[-1])).values[..., -1:]
        log_q, log_p = (torch.log_softmax(x.masked_fill(outside, -torch.inf), dim=-1) for x in (z, t))
    q, p = log_q.exp(), log_p.exp()
    # Strict "<" decides ties everywhere in bebop: at q == p the gradient of min(p, q) with respect to q is 0.
    alpha = torch.where(log_q < log_p, q, p).sum(-1)
    values = {
        "alpha": alpha,
        "kl": _weighted(p, log_p - log_q),
        "reverse_kl": _weighted(q, log_q - log_p),
        "target_entropy": -_weighted(p, log_p),
        "draft_entropy": -_weighted(q, log_q),
    }
    top = log_q.detach().argmax(-1)
    values["alpha_target_only"] = p.gather(-1, top.unsqueeze(-1)).squeeze(-1)
    values["top_agreement"] = (top == log_p.argmax(-1)).to(p.dtype)
    if tokens is not None:
        at = torch.where(valid, tokens, 0).unsqueeze(-1)
        values["log_q"] = log_q_full.gather(-1, at).squeeze(-1)
        values["log_p"] = log_p_full.gather(-1, at).squeeze(-1)
        values["target_only_hit"] = (top == tokens).to(p.dtype)
    return ChainStats(valid, documents, **{name: torch.where(valid, value, 0.0) for name, value in values.items()})


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    """sum_v weights_v values_v with 0 log 0 = 0: what has no mass does not count."""
    return (weights * torch.where(weights > 0, values, 0.0)).sum(-1)
