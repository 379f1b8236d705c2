"""Random chains: everything a `ChainLoss` takes, with drafts near the target, cut-short chains and unused anchors."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bebop.kernels.reference import chain_statistics
from bebop.losses import ChainLoss


@dataclass
class Chains:
    draft_hidden: Tensor  # [K, N, d]
    target_hidden: Tensor  # [M, d]
    weight: Tensor  # [V, d]
    target_rows: Tensor  # [K, N]
    tokens: Tensor  # [K, N]
    valid: Tensor  # [K, N]

    @property
    def indices(self) -> dict[str, Tensor]:
        return {"target_rows": self.target_rows, "tokens": self.tokens, "valid": self.valid}

    def logits(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """Draft (differentiable in draft_hidden) and target logits [K, N, V]."""
        weight = self.weight.to(dtype)
        draft = torch.where(self.valid.unsqueeze(-1), self.draft_hidden.to(dtype), 0.0)
        return draft @ weight.T, (self.target_hidden.to(dtype) @ weight.T)[self.target_rows]

    def oracle(self, temperature: float = 1.0):
        """ChainStats in float64."""
        return chain_statistics(*self.logits(), self.tokens, self.valid, temperature)


def make_chains(
    steps: int = 3,
    anchors: int = 40,
    size: int = 16,
    vocabulary: int = 257,
    dtype: torch.dtype = torch.float32,
    noise: float = 0.3,
    seed: int = 0,
) -> Chains:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows = anchors + steps
    target_hidden = normal(rows, size).to(dtype)
    weight = (normal(vocabulary, size) * (2.0 / size**0.5)).to(dtype)
    target_rows = torch.arange(anchors) + torch.arange(1, steps + 1).unsqueeze(1)
    target_rows = target_rows % rows
    lengths = torch.randint(0, steps + 1, (anchors,), generator=generator)
    lengths[::2] = steps
    valid = torch.arange(steps).unsqueeze(1) < lengths
    draft_hidden = (target_hidden[target_rows].float() + noise * normal(steps, anchors, size)).to(dtype)
    draft_hidden[~valid] = torch.nan  # what is masked may hold anything
    tokens = torch.randint(0, vocabulary, (steps, anchors), generator=generator)
    tokens[~valid] = -7
    target_rows = target_rows.masked_fill(~valid, 10**9)
    chains = Chains(draft_hidden, target_hidden, weight, target_rows, tokens, valid)
    return chains


def oracle_gradient(
    chains: Chains, loss_class: type[ChainLoss], temperature: float = 1.0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Loss and gradient [K, N, d] by plain autograd on materialised logits; in float64 that is the oracle."""
    safe = Chains(
        chains.draft_hidden.detach().to(dtype).requires_grad_(),
        chains.target_hidden,
        chains.weight,
        chains.target_rows.masked_fill(~chains.valid, 0),
        chains.tokens.masked_fill(~chains.valid, 0),
        chains.valid,
    )
    loss = loss_class.from_logits(*safe.logits(dtype), tokens=safe.tokens, valid=safe.valid, temperature=temperature)
    loss.backward()
    return loss.detach(), safe.draft_hidden.grad
