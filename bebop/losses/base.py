"""What all objectives share: an objective is the loss of every (step, chain) pair as a function of chain statistics."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from bebop.kernels.linear_chain import DEFAULT_CHUNK_BYTES, linear_chain_loss
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
    """

    statistics: tuple[str, ...] = ("alpha",)

    def __init__(self, temperature: float = 1.0, chunk_bytes: int = DEFAULT_CHUNK_BYTES):
        super().__init__()
        self.temperature = temperature
        self.chunk_bytes = chunk_bytes

    def pair_loss(self, stats: ChainStats) -> Tensor:
        """Loss of every pair [K, N], a differentiable function of `stats`; what it says of invalid pairs is ignored."""
        raise NotImplementedError

    def forward(
        self,
        draft_hidden: Tensor,
        target_hidden: Tensor,
        lm_head_weight: Tensor,
        *,
        target_rows: Tensor,
        tokens: Tensor,
        valid: Tensor,
        normaliser: Tensor | float | None = None,
    ) -> ChainLossOutput:
        """Loss straight from hidden states, without logits of more than one chunk.

        Args:
            draft_hidden: [K, N, d], the head's output at step k of chain n.
            target_hidden: [M, d], the backbone's states after its final norm.
            lm_head_weight: [V, d], frozen.
            target_rows: [K, N] int64, the row of `target_hidden` that predicts the same token as step k of chain n.
            tokens: [K, N] int64, that token in the text.
            valid: [K, N] bool, which pairs count; valid steps of a chain are a prefix.
            normaliser: divides the sum over valid pairs; their number if None. With gradient accumulation or data
                parallelism pass the number of valid pairs of the whole optimiser step.

        Raises:
            ValueError: arguments that do not fit, see `bebop.kernels.linear_chain_loss`.
        """
        loss, stats = linear_chain_loss(
            draft_hidden,
            target_hidden,
            lm_head_weight,
            target_rows=target_rows,
            tokens=tokens,
            valid=valid,
            objective=self.pair_loss,
            statistics=self.statistics,
            normaliser=normaliser,
            temperature=self.temperature,
            chunk_bytes=self.chunk_bytes,
        )
        return ChainLossOutput(loss, stats)

    @classmethod
    def from_logits(
        cls,
        draft_logits: Tensor,
        target_logits: Tensor,
        *,
        tokens: Tensor | None = None,
        valid: Tensor | None = None,
        normaliser: Tensor | float | None = None,
        temperature: float = 1.0,
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
        if valid is not None and bool((valid[1:] & ~valid[:-1]).any()):
            raise ValueError(
                "valid has a chain whose valid steps are not a prefix; a chain may be cut short, not interrupted"
            )
        objective = cls(temperature=temperature, **options)
        if tokens is None and "log_q" in cls.statistics:
            raise ValueError(f"{cls.__name__} reads the text's tokens; pass tokens=[K, N]")
        stats = chain_statistics(draft_logits, target_logits, tokens, valid, temperature)
        if normaliser is None:
            normaliser = stats.valid.sum().clamp(min=1)
        return torch.where(stats.valid, objective.pair_loss(stats), 0.0).sum() / normaliser
