import pytest
import torch

from bebop.kernels import ChainStats
from bebop.losses import RealisedE2ETVLoss
from bebop.losses.expected_rounds import ExpectedRoundsLoss, accepted_counts, rounds
from tests.chains import make_chains

K = 3


def make_texts(lengths: list[int], seed: int = 0):
    """r_k, valid and documents of the chains of whole texts, one after another, with a prompt's invalid chains between."""
    generator = torch.Generator().manual_seed(seed)
    accepts, valid, documents = [], [], []
    for number, length in enumerate(lengths):
        # Chain n of a text may draft tokens n + 1 .. n + K, of `length` that follow its first.
        left = torch.arange(length, 0, -1)
        valid.append(torch.arange(K).unsqueeze(1) < left)
        accepts.append(torch.rand(K, length, dtype=torch.float64, generator=generator))
        documents.append(torch.full((length,), number))
    return torch.cat(accepts, 1), torch.cat(valid, 1), torch.cat(documents)


def simulate(accepts: torch.Tensor, valid: torch.Tensor, trials: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds per text and how often one starts at each chain, by playing rounds over a single text."""
    generator = torch.Generator().manual_seed(1)
    length = accepts.shape[1]
    at = torch.zeros(trials, dtype=torch.int64)
    count, started = torch.zeros(trials), torch.zeros(length)
    while bool((at < length).any()):
        here = at[at < length]
        count[at < length] += 1
        started += torch.bincount(here, minlength=length)
        coins = torch.rand(K, len(here), generator=generator, dtype=torch.float64)
        accepted = ((coins < accepts[:, here]) & valid[:, here]).long().cumprod(0).sum(0)
        at[at < length] = here + accepted + 1
    return count, started / trials


def test_rounds_are_those_of_playing_the_game():
    accepts, valid, documents = make_texts([12])
    starts, remaining, _ = rounds(accepted_counts(accepts, valid), valid, documents)
    count, started = simulate(accepts, valid, 200_000)
    assert abs(count.mean() - remaining[0]) < 4 * count.std() / len(count) ** 0.5
    torch.testing.assert_close(started.double(), starts, atol=5e-3, rtol=0)
    torch.testing.assert_close(starts.sum(), remaining[0])


def test_texts_do_not_mix():
    """Two texts side by side, with nothing between but the change of document, give what each gives alone."""
    accepts, valid, documents = make_texts([5, 9, 1])
    together = rounds(accepted_counts(accepts, valid), valid, documents)
    for number in range(3):
        here = documents == number
        alone = rounds(accepted_counts(accepts[:, here], valid[:, here]), valid[:, here], documents[here])
        for mine, other in zip(alone, together, strict=True):
            torch.testing.assert_close(mine, other[..., here])


def test_a_gap_ends_a_response():
    """Several turns of one conversation: what stands between them is not drafted, and each turn starts a round."""
    accepts, valid, _ = make_texts([4, 4])
    between = torch.zeros(K, 3, dtype=torch.bool)
    valid = torch.cat([valid[:, :4], between, valid[:, 4:]], 1)
    accepts = torch.cat([accepts[:, :4], between.double(), accepts[:, 4:]], 1)
    starts, remaining, _ = rounds(accepted_counts(accepts, valid), valid, torch.zeros(11, dtype=torch.int64))
    assert starts[0] == starts[7] == 1
    assert not starts[4:7].any()
    assert not remaining[4:7].any()


def test_adjoining_texts_have_their_own_gradients():
    """With nothing between them: what is left of one text does not look into the next."""
    accepts, valid, documents = make_texts([5, 9])

    def loss(log_q):
        stats = ChainStats(valid, documents, log_q=log_q, log_p=torch.zeros_like(log_q))
        return torch.where(valid, ExpectedRoundsLoss().pair_loss(stats), 0.0).sum()

    torch.autograd.gradcheck(loss, accepts.clamp(0.05, 0.95).log().requires_grad_())


def test_far_from_the_text_the_gradient_is_finite():
    """exp(log q - log p) overflows where the text is off the target's distribution; nothing may come of it."""
    log_q = torch.full((K, 4), -0.1).requires_grad_()
    valid, documents = torch.ones(K, 4, dtype=torch.bool), torch.zeros(4, dtype=torch.int64)
    for objective in (ExpectedRoundsLoss(), RealisedE2ETVLoss()):
        alpha = torch.full((K, 4), 0.5)
        stats = ChainStats(valid, documents, log_q=log_q, log_p=torch.full((K, 4), -100.0), alpha=alpha)
        (gradient,) = torch.autograd.grad(objective.pair_loss(stats).sum(), log_q)
        assert not gradient.any()


def test_gradient_is_that_of_the_linear_system():
    """E = (I - A)^-1 1 with A[n, n + j + 1] = P(J = j | n), differentiated by autograd through the solver."""
    accepts, valid, documents = make_texts([14])
    log_p = torch.zeros(K, 14, dtype=torch.float64)
    log_q = accepts.log().requires_grad_()

    stats = ChainStats(valid, documents, log_q=log_q, log_p=log_p)
    loss = torch.where(valid, ExpectedRoundsLoss().pair_loss(stats), 0.0).sum()
    counts = accepted_counts(torch.where(log_q < log_p, (log_q - log_p).exp(), 1.0), valid)
    matrix = sum(torch.diag_embed(counts[j, : 14 - j - 1], offset=j + 1) for j in range(K + 1))
    system = torch.eye(14, dtype=torch.float64) - matrix
    expected = K * torch.linalg.solve(system, torch.ones(14, dtype=torch.float64))[0]
    torch.testing.assert_close(loss, expected)
    (mine,), (other,) = (torch.autograd.grad(x, log_q) for x in (loss, expected))
    torch.testing.assert_close(mine, other)


@pytest.mark.parametrize(("accept", "tokens_per_round"), [(0.0, 1), (1.0, K + 1)])
def test_ends_of_the_scale(accept, tokens_per_round):
    _, valid, documents = make_texts([400])
    counts = accepted_counts(torch.full((K, 400), accept, dtype=torch.float64), valid)
    assert rounds(counts, valid, documents).remaining[0] == 400 / tokens_per_round


def test_nothing_valid():
    chains = make_chains()
    chains.valid[:] = False
    draft = chains.draft_hidden.requires_grad_()
    loss = ExpectedRoundsLoss()(draft, chains.target_hidden, chains.weight, **chains.arguments).loss
    loss.backward()
    assert loss == 0
    assert not draft.grad.any()
