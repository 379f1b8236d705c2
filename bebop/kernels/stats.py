"""The few numbers per draft step through which a chain of drafts meets an objective."""

from torch import Tensor

# What the op can compute per (step, chain) pair. The first group carries gradient to the draft.
DIFFERENTIABLE = ("alpha", "kl", "reverse_kl", "log_q")
STATISTICS = (
    *DIFFERENTIABLE, "log_p", "target_entropy", "draft_entropy", "alpha_target_only", "target_only_hit", "top_agreement",
)  # fmt: skip


class ChainStats:
    """Statistics of K draft steps of N chains, each tensor [K, N] in fp32 (fp64 for fp64 inputs), 0 where not valid.

    Holds those that were asked for; reading another raises AttributeError and says so. With p and q the target's and the
    draft's next-token distributions at a step and x the text's own token there:

    Attributes:
        valid: bool, which pairs count. Valid steps of a chain are a prefix: a chain may be cut short, not interrupted.
        documents: [N] int64, which document each chain belongs to, or None; only objectives that couple chains need it.
        alpha: probability that rejection sampling accepts the draft, sum_v min(p_v, q_v) (Eq. 8 of arXiv 2606.12370).
        log_q: log q(x), in nats.
        log_p: log p(x), in nats.
        kl: KL(p, q), in nats.
        reverse_kl: KL(q, p), in nats.
        target_entropy: entropy of p, in nats.
        draft_entropy: entropy of q, in nats.
        alpha_target_only: p(argmax q), acceptance of greedy drafts (Eq. 1).
        target_only_hit: 1 where x = argmax q, else 0.
        top_agreement: 1 where argmax p = argmax q, else 0.
        values: the statistics that were computed, by name.
    """

    alpha: Tensor
    log_q: Tensor
    log_p: Tensor
    kl: Tensor
    reverse_kl: Tensor
    target_entropy: Tensor
    draft_entropy: Tensor
    alpha_target_only: Tensor
    target_only_hit: Tensor
    top_agreement: Tensor

    def __init__(self, valid: Tensor, documents: Tensor | None = None, **values: Tensor):
        self.valid = valid
        self.documents = documents
        self.values = values

    def __getattr__(self, name: str) -> Tensor:
        if name in STATISTICS and name not in self.values:
            raise AttributeError(f"statistic {name!r} was not asked for; name it in the objective's `statistics`")
        if name not in STATISTICS:
            raise AttributeError(f"ChainStats has no {name!r}; the statistics are {', '.join(STATISTICS)}")
        return self.values[name]

    def named(self, statistics: tuple[str, ...]) -> "ChainStats":
        """Without what can carry gradient but is not named, so that no objective trains on a part of its gradient."""
        values = {k: v for k, v in self.values.items() if k in statistics or k not in DIFFERENTIABLE}
        return ChainStats(self.valid, self.documents, **values)

    def detach(self) -> "ChainStats":
        """The same numbers without their graph, for logging."""
        return ChainStats(self.valid, self.documents, **{name: value.detach() for name, value in self.values.items()})
