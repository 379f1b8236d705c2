import pytest
import torch

from bebop.losses import E2ETVLoss
from tests.chains import make_chains


def train(top_k: int | None) -> tuple[float, float]:
    """Mean alpha that the loss reports and mean alpha over the whole vocabulary, after descending on the drafts' states."""
    chains = make_chains(size=32, vocabulary=2000, noise=1.0)
    draft = chains.draft_hidden.nan_to_num().requires_grad_()
    loss_fn = E2ETVLoss(top_k=top_k)
    optimizer = torch.optim.Adam([draft], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        loss, reported = loss_fn(draft, chains.target_hidden, chains.weight, **chains.arguments)
        loss.backward()
        optimizer.step()
    true = E2ETVLoss()(draft.detach(), chains.target_hidden, chains.weight, **chains.arguments).stats
    return tuple(s.alpha[s.valid].mean().item() for s in (reported, true))


def test_top_k_does_not_see_where_the_draft_goes():
    """What is restricted to the target's most likely tokens says nothing of the mass elsewhere: the loss all but
    vanishes, while what an engine would accept stays far behind."""
    reported, true = train(top_k=8)
    reported_full, true_full = train(top_k=None)
    assert true_full == pytest.approx(reported_full, abs=0.02)
    print(f"alpha reported {reported:.2f}, true {true:.2f}; with the whole vocabulary {reported_full:.2f}, {true_full:.2f}")
    assert reported > 0.9
    assert true < reported - 0.2
    assert true < true_full - 0.2
