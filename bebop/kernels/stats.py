"""The few numbers per draft step through which a chain of drafts meets an objective."""

from dataclasses import dataclass, fields

from torch import Tensor

# What the op can compute per (step, chain) pair. The first group carries gradient to the draft.
DIFFERENTIABLE = ("alpha", "kl", "log_q")
STATISTICS = (*DIFFERENTIABLE, "log_p", "target_entropy", "alpha_target_only", "target_only_hit")


@dataclass
class ChainStats:
    """Statistics of K draft steps of N chains, each tensor [K, N] in fp32 (fp64 for fp64 inputs), 0 where not valid.

    With p and q the target's and the draft's next-token distributions at a step and x the text's own token there:

    Attributes:
        valid: bool, which pairs count. Valid steps of a chain are a prefix: a chain may be cut short, not interrupted.
        alpha: probability that rejection sampling accepts the draft, sum_v min(p_v, q_v) (Eq. 8 of arXiv 2606.12370).
        log_q: log q(x), in nats.
        log_p: log p(x), in nats.
        kl: KL(p, q), in nats; None unless asked for.
        target_entropy: entropy of p, in nats; None unless asked for.
        alpha_target_only: p(argmax q), acceptance of greedy drafts (Eq. 1); None unless asked for.
        target_only_hit: 1 where x = argmax q, else 0; None unless asked for.
    """

    valid: Tensor
    alpha: Tensor
    log_q: Tensor | None = None
    log_p: Tensor | None = None
    kl: Tensor | None = None
    target_entropy: Tensor | None = None
    alpha_target_only: Tensor | None = None
    target_only_hit: Tensor | None = None

    def present(self) -> dict[str, Tensor]:
        """The statistics that were computed, by name."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not None and f.name != "valid"}

    def detach(self) -> "ChainStats":
        """The same numbers without their graph."""
        return ChainStats(self.valid, **{name: value.detach() for name, value in self.present().items()})
