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
    temperature: float = 1.0,
) -> ChainStats:
    """Statistics of K draft steps for N chains from materialised logits.

    Args:
        draft_logits: [K, N, V], differentiable.
        target_logits: [K, N, V], detached here.
        tokens: [K, N] int64, the text's own token that step k of chain n predicts; without it there is no `log_q`/`log_p`.
        valid: [K, N] bool, which pairs count; all if None. Rows of invalid pairs may hold anything, NaN included.
        temperature: both sides are divided by it before the softmax.

    Source: alpha is Eq. 2 and 8 of arXiv 2606.12370, alpha_target_only Eq. 1, the rest are textbook definitions.
    """
    if valid is None:
        valid = torch.ones(draft_logits.shape[:2], dtype=torch.bool, device=draft_logits.device)
    rows = valid.unsqueeze(-1)
    # A softmax in bf16 would be as harmful as logits in bf16.
    draft_logits, target_logits = (x if x.dtype == torch.float64 else x.float() for x in (draft_logits, target_logits))
    log_q = torch.log_softmax(torch.where(rows, draft_logits, 0.0) / temperature, dim=-1)
    log_p = torch.log_softmax(torch.where(rows, target_logits.detach(), 0.0) / temperature, dim=-1)
    q, p = log_q.exp(), log_p.exp()
    # Strict "<" decides ties everywhere in bebop: at q == p the gradient of min(p, q) with respect to q is 0.
    alpha = torch.where(log_q < log_p, q, p).sum(-1)
    # 0 log 0 = 0: a token the target never emits does not count, whatever the draft says.
    kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
    entropy = -torch.where(p > 0, p * log_p, 0.0).sum(-1)
    top = draft_logits.detach().argmax(-1)
    target_only = p.gather(-1, top.unsqueeze(-1)).squeeze(-1)

    values = {"alpha": alpha, "kl": kl, "target_entropy": entropy, "alpha_target_only": target_only}
    if tokens is not None:
        at = torch.where(valid, tokens, 0).unsqueeze(-1)
        values |= {"log_q": log_q.gather(-1, at).squeeze(-1), "log_p": log_p.gather(-1, at).squeeze(-1)}
        values["target_only_hit"] = (top == tokens).to(p.dtype)
    return ChainStats(valid, **{name: torch.where(valid, value, 0.0) for name, value in values.items()})
