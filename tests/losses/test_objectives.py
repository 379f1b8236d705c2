import pytest
import torch

from bebop.kernels.reference import chain_statistics
from bebop.losses import (
    LOSSES,
    CrossEntropyLoss,
    E2ETVLoss,
    ExpectedRoundsLoss,
    ForwardKLLoss,
    LKAlphaLoss,
    LKHybridLoss,
    RealisedE2ETVLoss,
    ReverseKLLoss,
    TVLoss,
    WeightedSumLoss,
    loss_by_name,
)

K, N, V = 4, 6, 11


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    draft, target = (2 * torch.randn(K, N, V, dtype=torch.float64, generator=generator) for _ in range(2))
    return draft.requires_grad_(), target


DOCUMENTS = torch.zeros(N, dtype=torch.int64)


@pytest.fixture
def tokens():
    return torch.randint(0, V, (K, N), generator=torch.Generator().manual_seed(1))


def test_e2e_tv_is_eq_13(logits):
    draft, target = logits
    q, p = draft.softmax(-1), target.softmax(-1)
    alpha = torch.minimum(p, q).sum(-1)
    chain = 1 - (alpha[0] + alpha[0] * alpha[1] + alpha[0] * alpha[1] * alpha[2] + alpha.prod(0)) / K
    torch.testing.assert_close(E2ETVLoss.from_logits(draft, target), chain.mean())


def test_gradients_are_the_closed_forms(logits, tokens):
    """Eq. 11 of arXiv 2606.12370 for TV, and for e2e TV the same row gradient times c_k, without any division."""
    draft, target = logits
    q, p = draft.detach().softmax(-1), target.softmax(-1)
    below = q < p
    tv_row = -q * (below.double() - (q * below).sum(-1, keepdim=True))
    alpha = torch.minimum(p, q).sum(-1)
    suffix = torch.ones(N, dtype=torch.float64)
    c = torch.zeros(K, N, dtype=torch.float64)
    for k in reversed(range(K)):
        c[k] = alpha[:k].prod(0) * suffix
        suffix = 1 + alpha[k] * suffix
    one_hot = torch.nn.functional.one_hot(tokens, V)
    weights = 0.6 ** torch.arange(K, dtype=torch.float64)
    weights = (weights / weights.sum())[:, None, None]
    expected = {
        TVLoss: tv_row / K,
        E2ETVLoss: c.unsqueeze(-1) * tv_row / K,
        ForwardKLLoss: (q - p) / K,
        CrossEntropyLoss: weights * (q - one_hot),
        ReverseKLLoss: q * ((q / p).log() - (q * (q / p).log()).sum(-1, keepdim=True)) / K,
        LKAlphaLoss: tv_row / alpha.unsqueeze(-1) / K,
    }
    for loss, gradient in expected.items():
        (found,) = torch.autograd.grad(loss.from_logits(draft, target, tokens=tokens), draft)
        torch.testing.assert_close(found, gradient / N, msg=loss.__name__)


def test_lk_hybrid_goes_from_kl_to_tv(logits):
    draft, target = logits
    far = LKHybridLoss(eta=0.0, step_decay=1.0)
    near = LKHybridLoss(eta=1e9, step_decay=1.0)
    stats = chain_statistics(draft, target)
    torch.testing.assert_close(far.pair_loss(stats), stats.kl)
    torch.testing.assert_close(near.pair_loss(stats), 1 - stats.alpha)


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if not loss.couples_chains])
def test_a_chain_cut_short_counts_its_valid_steps(name, logits, tokens):
    """The valid pairs' losses are those of the full chain; the mean is over them alone, and NaN elsewhere does not leak."""
    draft, target = logits
    valid = torch.ones(K, N, dtype=torch.bool)
    valid[2:, 0] = False
    whole = LOSSES[name]().pair_loss(chain_statistics(draft, target, tokens))
    broken = draft.masked_fill(~valid.unsqueeze(-1), torch.nan)
    loss = LOSSES[name].from_logits(broken, target, tokens=tokens, valid=valid)
    torch.testing.assert_close(loss, whole[valid].mean())


@pytest.mark.parametrize("name", LOSSES)
def test_invariances(name, logits, tokens):
    """A permuted vocabulary or a constant added to the logits changes nothing; row gradients sum to zero."""
    draft, target = logits
    loss = LOSSES[name].from_logits(draft, target, tokens=tokens, documents=DOCUMENTS)
    (gradient,) = torch.autograd.grad(loss, draft)
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(K, N, dtype=torch.float64))
    order = torch.randperm(V, generator=torch.Generator().manual_seed(2))
    where = order.argsort()
    torch.testing.assert_close(
        LOSSES[name].from_logits(draft[..., order], target[..., order], tokens=where[tokens], documents=DOCUMENTS), loss
    )
    torch.testing.assert_close(LOSSES[name].from_logits(draft + 5, target - 3, tokens=tokens, documents=DOCUMENTS), loss)


def test_loss_is_what_rejection_sampling_does(logits):
    """K (1 - loss) is the mean number of accepted drafts, counted by simulating rejection sampling, when acceptance at
    one step does not depend on another's: here the distributions of a step are fixed."""
    draft, target = (x.detach()[:, 0] for x in logits)
    q, p = draft.softmax(-1), target.softmax(-1)
    trials = 200_000
    generator = torch.Generator().manual_seed(3)
    drafts = torch.stack([torch.multinomial(q[k], trials, replacement=True, generator=generator) for k in range(K)])
    ratio = (p / q).gather(1, drafts)
    accepted = torch.rand(K, trials, dtype=torch.float64, generator=generator) < ratio
    counted = accepted.long().cumprod(0).sum(0).double()
    expected = K * (1 - E2ETVLoss.from_logits(draft.unsqueeze(1), target.unsqueeze(1)))
    assert abs(counted.mean() - expected) < 4 * counted.std() / trials**0.5


def test_logits_that_do_not_fit_are_refused(logits):
    draft, target = logits
    with pytest.raises(ValueError, match=r"target_logits\[target_rows\]"):
        E2ETVLoss.from_logits(draft, target[0])
    valid = torch.ones(K, N, dtype=torch.bool)
    valid[1] = False
    with pytest.raises(ValueError, match="not a prefix"):
        E2ETVLoss.from_logits(draft, target, valid=valid)


def test_text_is_asked_for_where_it_is_needed(logits):
    with pytest.raises(ValueError, match="CrossEntropyLoss reads the text's tokens"):
        CrossEntropyLoss.from_logits(*logits)


def test_realised_e2e_multiplies_what_the_text_says(logits, tokens):
    draft, target = logits
    q, p = (x.softmax(-1) for x in (draft, target))
    alpha = torch.minimum(p, q).sum(-1)
    ratio = (q / p).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    reach = torch.ones(N, dtype=torch.float64)
    accepted = 0
    for k in range(K):
        accepted = accepted + reach * alpha[k]
        reach = reach * ratio[k].clamp(max=1)
    expected = (1 - accepted / K).mean()
    found = RealisedE2ETVLoss.from_logits(draft, target, tokens=tokens)
    torch.testing.assert_close(found, expected)
    for mine, other in zip(*(torch.autograd.grad(x, draft) for x in (found, expected)), strict=True):
        torch.testing.assert_close(mine, other)


def test_realised_e2e_is_unbiased_where_eq_13_is_not():
    """A text of two drafted tokens whose second step is easy only after one of the first tokens. Over all texts, weighted
    by how often the target writes them, realised e2e is the share of drafts rejection sampling accepts; Eq. 13's is not."""
    p1, q1 = torch.tensor([0.5, 0.5]).double(), torch.tensor([0.9, 0.1]).double()
    p2 = torch.tensor([[0.9, 0.1], [0.5, 0.5]]).double()  # by first token
    q2 = torch.tensor([[0.9, 0.1], [0.01, 0.99]]).double()
    texts = [(a, b) for a in range(2) for b in range(2)]
    weight = torch.tensor([p1[a] * p2[a, b] for a, b in texts])
    draft = torch.stack([torch.stack([q1, q2[a]]) for a, _ in texts], dim=1).log()
    target = torch.stack([torch.stack([p1, p2[a]]) for a, _ in texts], dim=1).log()
    tokens = torch.tensor(texts).T
    stats = chain_statistics(draft, target, tokens)
    realised = ((1 - RealisedE2ETVLoss().pair_loss(stats)).sum(0) * weight).sum()
    eq_13 = ((1 - E2ETVLoss().pair_loss(stats)).sum(0) * weight).sum()
    first = torch.minimum(p1, q1)  # an accepted first draft is a with probability min(p, q)(a)
    truth = first.sum() + (first * torch.minimum(p2, q2).sum(-1)).sum()
    torch.testing.assert_close(realised, truth)
    assert abs(eq_13 - truth) > 0.01


def test_sums_by_name(logits, tokens):
    draft, target = logits
    loss = loss_by_name("e2e_tv + 0.1 ce+ 2*kl", temperature=0.7)
    assert isinstance(loss, WeightedSumLoss)
    assert loss.temperature == 0.7
    assert set(loss.statistics) == {"alpha", "kl", "log_q"}
    stats = chain_statistics(draft, target, tokens)
    parts = [LOSSES[name]().pair_loss(stats) for name in ("e2e_tv", "ce", "kl")]
    torch.testing.assert_close(loss.pair_loss(stats), parts[0] + 0.1 * parts[1] + 2 * parts[2])
    assert type(loss_by_name("tv")) is TVLoss
    assert loss_by_name("tv + 0.5 expected_rounds").couples_chains
    for bad in ("", "e2etv", "e2e_tv +", "0 ce", "-1 ce", "ce ce", "1e999 ce"):
        with pytest.raises(ValueError, match=r"is no objective|has weight"):
            loss_by_name(bad)


def test_expected_rounds_wants_documents(logits, tokens):
    with pytest.raises(ValueError, match=r"pass documents=\[N\]"):
        ExpectedRoundsLoss.from_logits(*logits, tokens=tokens)
    with pytest.raises(ValueError, match=r"documents is torch.int64 \(3,\)"):
        ExpectedRoundsLoss.from_logits(*logits, tokens=tokens, documents=DOCUMENTS[:3])


def test_from_logits_refuses_what_the_fused_call_refuses(logits, tokens):
    draft, target = logits
    for change, message in (
        ({"temperature": 0.0}, "expected above 0"),
        ({"temperature": torch.ones(K, N)}, "expected a number or"),
        ({"tokens": tokens + V}, "out of range"),
        ({"tokens": tokens.int()}, "expected torch.int64"),
        ({"valid": torch.ones(K, N)}, "expected torch.bool"),
        ({"draft_logits": draft * torch.nan}, "draft_logits of valid pairs hold NaN"),
    ):
        arguments = {"draft_logits": draft, "target_logits": target, "tokens": tokens} | change
        with pytest.raises(ValueError, match=message):
            CrossEntropyLoss.from_logits(**arguments)
