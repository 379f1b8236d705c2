"""Random chains: everything a `ChainLoss` takes, with drafts near the target, cut-short chains and unused anchors."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bebop.kernels import ChainStats
from bebop.kernels.reference import chain_statistics
from bebop.losses import ChainLoss, WeightedSumLoss, loss_by_name


@dataclass
class Chains:
    draft_hidden: Tensor  # [K, N, d]
    target_hidden: Tensor  # [M, d]
    weight: Tensor  # [V, d]
    target_rows: Tensor  # [K, N]
    tokens: Tensor  # [K, N]
    valid: Tensor  # [K, N]
    documents: Tensor  # [N]

    @property
    def arguments(self) -> dict[str, Tensor]:
        """What a `ChainLoss` takes besides the hidden states and the weight."""
        return {**self.indices, "documents": self.documents}

    @property
    def indices(self) -> dict[str, Tensor]:
        return {"target_rows": self.target_rows, "tokens": self.tokens, "valid": self.valid}

    def logits(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """Draft (differentiable in draft_hidden) and target logits [K, N, V]."""
        weight = self.weight.to(dtype)
        draft = torch.where(self.valid.unsqueeze(-1), self.draft_hidden.to(dtype), 0.0)
        return draft @ weight.T, (self.target_hidden.to(dtype) @ weight.T)[self.target_rows]

    def oracle(self, temperature: float | Tensor = 1.0, top_k: int | None = None) -> ChainStats:
        """ChainStats in float64."""
        safe = self.safe()
        return chain_statistics(*safe.logits(), safe.tokens, safe.valid, temperature, safe.documents, top_k)

    def safe(self) -> "Chains":
        """The same with indices that point somewhere where nothing is valid."""
        rows, tokens = (x.masked_fill(~self.valid, 0) for x in (self.target_rows, self.tokens))
        return replace(self, target_rows=rows, tokens=tokens)


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
    documents = torch.arange(anchors) // 13
    return Chains(draft_hidden, target_hidden, weight, target_rows, tokens, valid, documents)


def oracle_gradient(
    chains: Chains, loss_fn: ChainLoss, temperature: float | Tensor = 1.0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Loss and gradient [K, N, d] by plain autograd on materialised logits; in float64 that is the oracle."""
    safe = chains.safe()
    draft = safe.draft_hidden = chains.draft_hidden.detach().to(dtype).requires_grad_()
    options = {"terms": loss_fn.terms} if isinstance(loss_fn, WeightedSumLoss) else {}
    loss = type(loss_fn).from_logits(
        *safe.logits(dtype),
        tokens=safe.tokens,
        valid=safe.valid,
        documents=safe.documents,
        temperature=temperature,
        top_k=loss_fn.top_k,
        **options,
    )
    loss.backward()
    return loss.detach(), draft.grad


def run(chains: Chains, name: str = "e2e_tv", temperature: float | torch.Tensor = 1.0, **options):
    """Loss, gradient and statistics of the fused op."""
    draft = chains.draft_hidden.detach().clone().requires_grad_()
    loss_fn = loss_by_name(name, **options)
    loss, stats = loss_fn(draft, chains.target_hidden, chains.weight, **chains.arguments, temperature=temperature)
    loss.backward()
    return loss.detach(), draft.grad, stats


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()
