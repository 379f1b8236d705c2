"""What all objectives share: an objective is the loss of every (step, chain) pair as a function of chain statistics."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bebop.kernels.inputs import check_temperature
from bebop.kernels.linear_chain import DEFAULT_CHUNK_BYTES, linear_chain_loss, linear_chain_statistics
from bebop.kernels.reference import chain_statistics
from bebop.kernels.stats import ChainStats


class ChainLossOutput(NamedTuple):
    """loss: scalar; stats: detached `ChainStats` [K, N] of the same call, for logging."""

    loss: Tensor
    stats: ChainStats


class ChainLoss(nn.Module):
    """Base of the objectives; a subclass defines `pair_loss` and names the `statistics` it reads.

    The loss is the sum of `pair_loss` over valid (step, chain) pairs divided by a normaliser, by default their number.

    Args:
        temperature: divides draft and target logits; the temperature at which the head will serve.
        chunk_bytes: budget for the logits of one chunk.
        top_k: restrict the vocabulary to the target's top_k tokens, an approximation to study, not to train with;
            see `bebop.kernels.linear_chain_loss`.
        vocabulary_group: the processes over which the lm_head is split by rows, if it is; see there.

    Attributes:
        statistics: names of the statistics that `pair_loss` reads; log_p is always there.
        couples_chains: whether `pair_loss` of a chain depends on other chains. It is then called once with all N chains,
            and the op keeps K N d numbers for each of alpha, kl, reverse_kl and log_q in `statistics`.
    """

    statistics: tuple[str, ...] = ("alpha",)
    couples_chains = False

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
        top_k: int | None = None,
        vocabulary_group: dist.ProcessGroup | None = None,
    ):
        super().__init__()
        self.temperature = temperature
        self.chunk_bytes = chunk_bytes
        self.top_k = top_k
        self.vocabulary_group = vocabulary_group

    def pair_loss(self, stats: ChainStats) -> Tensor:
        """Loss of every pair [K, N], a differentiable function of `stats`; what it says of invalid pairs is ignored."""
        raise NotImplementedError

    @torch.compiler.disable  # a graph break: the work depends on which pairs are valid
    def forward(
        self,
        draft_hidden: Tensor,
        target_hidden: Tensor,
        lm_head_weight: Tensor,
        *,
        target_rows: Tensor,
        tokens: Tensor,
        valid: Tensor,
        documents: Tensor | None = None,
        normaliser: Tensor | float | None = None,
        temperature: float | Tensor | None = None,
    ) -> ChainLossOutput:
        """Loss straight from hidden states, without logits of more than one chunk.

        Args:
            draft_hidden: [K, N, d], the head's output at step k of chain n.
            target_hidden: [M, d], the backbone's states after its final norm.
            lm_head_weight: [V, d], frozen.
            target_rows: [K, N] int64, the row of `target_hidden` that predicts the same token as step k of chain n.
            tokens: [K, N] int64, that token in the text.
            valid: [K, N] bool, which pairs count; valid steps of a chain are a prefix.
            documents: [N] int64, the document of each chain; only objectives that couple chains need it. Chains of a
                document then stand in the order of their anchors, next to each other.
            normaliser: divides the sum over valid pairs; their number if None. With gradient accumulation or data
                parallelism pass the number of valid pairs of the whole optimiser step.
            temperature: in place of the constructor's; [N] for one per chain.

        Raises:
            ValueError: arguments that do not fit, see `bebop.kernels.linear_chain_loss`.
        """
        self._check_documents(documents, valid)
        if any(p.requires_grad for p in self.parameters()):
            raise ValueError(f"{type(self).__name__} has parameters that require grad; an objective gets none for them")
        options = {
            "target_rows": target_rows,
            "tokens": tokens,
            "valid": valid,
            "statistics": self.statistics,
            "temperature": self.temperature if temperature is None else temperature,
            "chunk_bytes": self.chunk_bytes,
            "top_k": self.top_k,
            "vocabulary_group": self.vocabulary_group,
        }
        if not self.couples_chains:
            loss, stats = linear_chain_loss(
                draft_hidden, target_hidden, lm_head_weight, objective=self.pair_loss, normaliser=normaliser, **options
            )
            return ChainLossOutput(loss, stats)
        stats = linear_chain_statistics(draft_hidden, target_hidden, lm_head_weight, **options)
        stats.documents = documents
        return ChainLossOutput(self._mean(stats, normaliser), stats.detach())

    @classmethod
    def from_logits(
        cls,
        draft_logits: Tensor,
        target_logits: Tensor,
        *,
        tokens: Tensor | None = None,
        valid: Tensor | None = None,
        documents: Tensor | None = None,
        normaliser: Tensor | float | None = None,
        temperature: float | Tensor = 1.0,
        **options,
    ) -> Tensor:
        """The same loss from materialised logits [K, N, V], by plain autograd: for small vocabularies and tests.

        A class method: the temperature and other options are given here, and those of an instance do not matter. `tokens`
        [K, N] is needed by objectives that read the text (cross entropy); `options` go to the objective's constructor.

        Returns:
            the loss, a scalar.

        Raises:
            ValueError: shapes that do not fit, or tokens that are missing.
        """
        if draft_logits.ndim != 3 or draft_logits.shape != target_logits.shape:
            raise ValueError(
                f"draft_logits {tuple(draft_logits.shape)} and target_logits {tuple(target_logits.shape)} do not fit; "
                "expected [K, N, V] both (for target logits [M, V] pass target_logits[target_rows])"
            )
        for name, x, dtype in (("tokens", tokens, torch.int64), ("valid", valid, torch.bool)):
            if x is not None and (x.shape != draft_logits.shape[:2] or x.dtype != dtype):
                found = f"{x.dtype} {tuple(x.shape)}"
                raise ValueError(f"{name} is {found}, expected {dtype} {tuple(draft_logits.shape[:2])} ([K, N])")
        if valid is not None and bool((valid[1:] & ~valid[:-1]).any()):
            raise ValueError(
                "valid has a chain whose valid steps are not a prefix; a chain may be cut short, not interrupted"
            )
        counted = torch.ones_like(draft_logits[..., 0], dtype=torch.bool) if valid is None else valid
        for name, x in (("draft_logits", draft_logits), ("target_logits", target_logits)):
            if not bool(x.detach().amax(-1)[counted].isfinite().all()):
                raise ValueError(f"{name} of valid pairs hold NaN or inf")
        if tokens is not None and bool((counted & ((tokens < 0) | (tokens >= draft_logits.shape[-1]))).any()):
            raise ValueError(f"tokens of valid pairs are out of range, expected 0 to {draft_logits.shape[-1] - 1}")
        check_temperature(temperature, draft_logits.shape[1])
        objective = cls(**options)
        if tokens is None and "log_q" in objective.statistics:
            raise ValueError(f"{cls.__name__} reads the text's tokens; pass tokens=[K, N]")
        objective._check_documents(documents, draft_logits[..., 0])
        stats = chain_statistics(draft_logits, target_logits, tokens, valid, temperature, documents, objective.top_k)
        return objective._mean(stats, normaliser)

    def _mean(self, stats: ChainStats, normaliser: Tensor | float | None) -> Tensor:
        if normaliser is None:
            normaliser = stats.valid.sum().clamp(min=1)
        pair_loss = self.pair_loss(stats.named(self.statistics))
        if pair_loss.shape != stats.valid.shape:
            raise ValueError(
                f"pair_loss returned shape {tuple(pair_loss.shape)}, expected {tuple(stats.valid.shape)} (K, N)"
            )
        return torch.where(stats.valid, pair_loss, 0.0).sum() / normaliser

    def _check_documents(self, documents: Tensor | None, chains: Tensor) -> None:
        if documents is None and self.couples_chains:
            raise ValueError(f"{type(self).__name__} follows the chains of a document; pass documents=[N]")
        if documents is not None and (documents.shape != chains.shape[1:] or documents.dtype != torch.int64):
            found = f"{documents.dtype} {tuple(documents.shape)}"
            raise ValueError(f"documents is {found}, expected int64 [N] = {tuple(chains.shape[1:])}")
