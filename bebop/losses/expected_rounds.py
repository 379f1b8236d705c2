"""Target passes that a whole text takes: chains weighted by the probability that a round of drafting starts there."""

from typing import NamedTuple

import torch
from torch import Tensor

from bebop.kernels.stats import ChainStats
from bebop.losses.base import ChainLoss
from bebop.losses.chain_products import cumulative_product
from bebop.losses.realised import realised_acceptance


class Rounds(NamedTuple):
    """Of N chains, float64, 0 for chains without a valid step.

    starts: [N], omega(n), the probability that a round starts at chain n.
    remaining: [N], E(n), expected rounds from a round at chain n to the end of its response.
    next: [K+1, N], E(n + j + 1), those that are left after a round at n that accepts j drafts; 0 past the response's end.
    """

    starts: Tensor
    remaining: Tensor
    next: Tensor


def accepted_counts(accepts: Tensor, valid: Tensor) -> Tensor:
    """P(J = j) [K+1, N], j = 0..K: the probability that a round at chain n accepts j drafts, from r_k [K, N] (derived)."""
    reached = cumulative_product(torch.where(valid, accepts, 0.0))
    one = torch.ones_like(reached[:1])
    return torch.cat([one, reached]) - torch.cat([reached, 0 * one])


@torch.no_grad()
def rounds(counts: Tensor, valid: Tensor, documents: Tensor) -> Rounds:
    """Where rounds start, and how many are to come.

    A round at chain n that accepts j drafts emits j + 1 tokens, so the next starts at chain n + j + 1 of the same response:
    E(n) = 1 + sum_j P(J = j | n) E(n + j + 1), and omega(m) = sum_j P(J = j | m - j - 1) omega(m - j - 1), omega being 1
    at a response's first chain (derived).

    Args:
        counts: [K+1, N], see `accepted_counts`.
        valid: [K, N]. A response is a run of neighbouring chains of one document whose first step is valid.
        documents: [N], the document of each chain.
    """
    steps, device = len(counts) - 1, counts.device
    counts, valid, documents = counts.detach().double().cpu(), valid.cpu(), documents.cpu()
    chains = valid[0].nonzero().squeeze(1)
    starts, remaining = (torch.zeros(counts.shape[1], dtype=torch.float64) for _ in range(2))
    ahead = torch.zeros_like(counts)
    if len(chains):
        new = torch.ones(len(chains), dtype=torch.bool)
        new[1:] = (chains.diff() > 1) | (documents[chains].diff() != 0)
        response = new.cumsum(0) - 1
        place = torch.arange(len(chains)) - new.nonzero().squeeze(1)[response]
        longest = int(place.max()) + 1
        # All responses side by side, with room for what a round may emit past the end.
        moves = torch.zeros(longest, len(new.nonzero()), steps + 1, dtype=torch.float64)
        moves[place, response] = counts[:, chains].T
        alive = torch.zeros(longest, moves.shape[1], dtype=torch.float64)
        alive[place, response] = 1.0
        omega, expected = (torch.zeros(longest + steps + 1, moves.shape[1], dtype=torch.float64) for _ in range(2))
        omega[0] = 1.0
        for i in range(longest):
            omega[i + 1 : i + steps + 2] += (omega[i].unsqueeze(1) * moves[i]).T
            back = longest - 1 - i
            expected[back] = alive[back] + (moves[back].T * expected[back + 1 : back + steps + 2]).sum(0)
        starts[chains], remaining[chains] = omega[place, response], expected[place, response]
        for j in range(steps + 1):
            ahead[j, chains] = expected[place + j + 1, response]
    return Rounds(starts.to(device), remaining.to(device), ahead.to(device))


class ExpectedRoundsLoss(ChainLoss):
    """Expected target passes for a text per token of it, times about 1: K sum over responses of E(first) / valid pairs.

    E is what `rounds` computes from r_k = min(1, q_k(x)/p_k(x)). Averages over anchors weigh all alike; here an anchor
    weighs as much as rounds start there, which is more behind hard places. Wants texts sampled from the target at this
    temperature, whole and in order: chains are the anchors of `documents`, each after the one at the token before it.
    Derived; the idea of expected decoding rounds is known for block drafters.
    """

    statistics = ("log_q",)
    couples_chains = True

    def pair_loss(self, stats: ChainStats) -> Tensor:
        assert stats.documents is not None, "checked by ChainLoss"
        counts = accepted_counts(realised_acceptance(stats), stats.valid)  # [K+1, N]
        here = rounds(counts, stats.valid, stats.documents)
        # dE(first)/dP(J = j | n) = omega(n) E(n + j + 1), and E(first) = sum_n omega(n).
        weighted = (counts * (here.starts * here.next).to(counts.dtype)).sum(0)
        each = here.starts.to(counts.dtype) + weighted - weighted.detach()
        return torch.cat([len(stats.valid) * each.unsqueeze(0), torch.zeros_like(stats.log_q[1:])])
