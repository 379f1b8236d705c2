"""Every measure against brute force on materialised distributions."""

import pytest
import torch

from bebop.errors import InputError
from bebop.evaluation.measures import BINS, MEASURED, add_measures, describe, describe_sources
from bebop.evaluation.sums import DocumentSums
from bebop.kernels import linear_chain_statistics
from tests.chains import make_chains

K, DOCUMENTS = 3, 4


@pytest.fixture(scope="module")
def chains():
    """Whole texts: every document's anchors in order, the last ones cut short."""
    chains = make_chains(steps=K, anchors=120, vocabulary=50, noise=0.6)
    left = 30 - torch.arange(120) % 30
    valid = torch.arange(K).unsqueeze(1) < left
    chains.documents = torch.arange(120) // 30
    chains.valid = valid
    chains.draft_hidden = chains.target_hidden[(torch.arange(120) + torch.arange(1, K + 1).unsqueeze(1)) % 123]
    generator = torch.Generator().manual_seed(5)
    chains.draft_hidden = chains.draft_hidden + 0.6 * torch.randn(chains.draft_hidden.shape, generator=generator)
    chains.target_rows = (torch.arange(120) + torch.arange(1, K + 1).unsqueeze(1)) % 123
    chains.tokens = torch.randint(0, 50, (K, 120), generator=generator)
    return chains


@pytest.fixture(scope="module")
def sums(chains):
    stats = linear_chain_statistics(
        chains.draft_hidden, chains.target_hidden, chains.weight, **chains.indices, statistics=MEASURED
    )
    stats.documents = chains.documents
    sums = DocumentSums(DOCUMENTS)
    add_measures(sums, stats)
    return sums


@pytest.fixture(scope="module")
def described(sums):
    return describe(sums, cost_ratio=0.1, resamples=200)


@pytest.fixture(scope="module")
def exact(chains):
    draft, target = chains.logits()
    q, p = draft.softmax(-1), target.softmax(-1)
    top = q.argmax(-1)
    at_text = [x.gather(-1, chains.tokens.unsqueeze(-1)).squeeze(-1) for x in (q, p)]
    return {
        "kl": (p * (p / q).log()).sum(-1),
        "reverse_kl": (q * (q / p).log()).sum(-1),
        "target_entropy": -(p * p.log()).sum(-1),
        "draft_entropy": -(q * q.log()).sum(-1),
        "top_agreement": (top == p.argmax(-1)).double(),
        "rejection_sampling": (torch.minimum(p, q).sum(-1), (at_text[0] / at_text[1]).clamp(max=1)),
        "target_only": (p.gather(-1, top.unsqueeze(-1)).squeeze(-1), (top == chains.tokens).double()),
    }


@pytest.mark.parametrize("name", ["kl", "reverse_kl", "draft_entropy", "top_agreement"])
def test_averages_per_step(name, chains, described, exact):
    for j in range(K):
        assert described[name][j].value == pytest.approx(exact[name][j][chains.valid[j]].mean().item(), abs=2e-5)


def test_where_sampling_beats_greedy_drafts(chains, described, exact):
    """Eq. 48 as the paper writes it: TV(p, q) < 1 - p(argmax q)."""
    draft, target = chains.logits()
    tv = 0.5 * (draft.softmax(-1) - target.softmax(-1)).abs().sum(-1)
    wins = tv < 1 - exact["target_only"][0]
    share = wins[chains.valid].double().mean().item()
    assert 0.1 < share < 1.0
    assert described["sampling_beats_greedy"].value == pytest.approx(share, abs=0.01)
    assert described["target_entropy"].value == pytest.approx(exact["target_entropy"][chains.valid].mean().item(), abs=1e-5)


@pytest.mark.parametrize("rule", ["rejection_sampling", "target_only"])
def test_acceptance_of_a_rule(rule, chains, described, exact):
    alpha, accepts = exact[rule]
    found = described["rules"][rule]
    for j in range(K):
        valid = chains.valid[j]
        assert found["alpha"][j].value == pytest.approx(alpha[j][valid].mean().item(), abs=1e-5)
        assert found["cumulative"][j].value == pytest.approx(alpha[: j + 1].prod(0)[valid].mean().item(), abs=1e-5)
        reach = accepts[:j].prod(0) if j else torch.ones(120)
        assert found["realised"][j].value == pytest.approx((reach * alpha[j])[valid].mean().item(), abs=1e-5)
    assert found["accept_length_realised"].value == pytest.approx(1 + sum(e.value for e in found["realised"]))
    assert found["accept_length_eq13"].value == pytest.approx(1 + sum(e.value for e in found["cumulative"]))


@pytest.mark.parametrize("rule", ["rejection_sampling", "target_only"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_served_is_what_playing_the_rounds_counts(rule, steps, chains, described, exact):
    accepts = exact[rule][1][:steps]
    valid = chains.valid[:steps]
    generator = torch.Generator().manual_seed(0)
    accepted, drafts, rounds, trials = torch.zeros(steps, dtype=torch.float64), 0, 0, 4000
    for document in range(DOCUMENTS):
        here = chains.documents == document
        r, v = accepts[:, here], valid[:, here]
        at = torch.zeros(trials, dtype=torch.int64)
        while bool((running := at < 30).any()):
            where = at[running]
            coins = torch.rand(steps, len(where), generator=generator, dtype=torch.float64)
            kept = ((coins < r[:, where]) & v[:, where]).long().cumprod(0)
            whole = v[-1, where]
            rounds += len(where)
            drafts += int(whole.sum())
            accepted += (kept * whole).sum(1)
            at[running] = where + kept.sum(0) + 1
    row = described["rules"][rule]["served"][steps - 1]
    assert row["draft_steps"] == steps
    assert row["rounds_per_response"].value == pytest.approx(rounds / DOCUMENTS / trials, rel=0.01)
    # The text here is not the target's, so what is drawn replaces alpha by r; compare the rounds, and reach where r decides.
    reach = [a.value for a in row["acceptance"]]
    assert reach == sorted(reach, reverse=True)
    length = row["accept_length"].value
    assert length == pytest.approx(1 + sum(reach))
    assert row["speed_up"].value == pytest.approx(length / (1 + 0.1 * steps))


def test_bins_hold_every_chain_once(chains, described, exact):
    entropy = exact["target_entropy"][0]
    for group in BINS:
        assert sum(row["chains"] for row in described[f"by_{group}"]) == described["chains"] == 120
    for row in described["by_entropy"]:
        inside = (entropy >= row["low"]) & (entropy < row["high"])
        assert row["chains"] == int(inside.sum())
        for rule in ("rejection_sampling", "target_only"):
            expected = exact[rule][0][0][inside].mean().item()
            assert row["rules"][rule]["alpha"].value == pytest.approx(expected, abs=1e-5)
    place = torch.arange(120) % 30
    alpha, accepts = exact["rejection_sampling"]
    length = 1 + alpha[0] + accepts[0] * alpha[1] + accepts[0] * accepts[1] * alpha[2]
    for row in described["by_position"]:
        inside = (place >= row["low"]) & (place < row["high"])
        assert row["chains"] == int(inside.sum())
        expected = length[inside & chains.valid[-1]].mean().item()
        assert row["rules"]["rejection_sampling"]["accept_length"].value == pytest.approx(expected, abs=1e-5)


def test_batches_do_not_matter(chains, sums):
    parts = DocumentSums(DOCUMENTS)
    for documents in ((0, 1), (2, 3)):
        here = torch.isin(chains.documents, torch.tensor(documents))
        stats = linear_chain_statistics(
            chains.draft_hidden[:, here],
            chains.target_hidden,
            chains.weight,
            **{name: x[:, here] for name, x in chains.indices.items()},
            statistics=MEASURED,
        )
        stats.documents = chains.documents[here]
        add_measures(parts, stats)
    assert parts.columns.keys() == sums.columns.keys()
    for name, column in sums.columns.items():
        torch.testing.assert_close(parts.columns[name], column, rtol=1e-5, atol=1e-5)


def test_sources_apart(sums):
    found = describe_sources(sums, ["math", "code", "math", "code"], cost_ratio=0.1, resamples=100)
    assert list(found) == ["code", "math"]
    assert found["math"]["documents"] == 2
    whole = describe(sums.of(torch.tensor([0, 2])), cost_ratio=0.1, resamples=100)
    assert found["math"]["rules"]["target_only"]["alpha"] == whole["rules"]["target_only"]["alpha"]


def test_texts_too_short_for_a_chain_are_refused():
    with pytest.raises(InputError, match="no response is long enough"):
        describe(DocumentSums(3), cost_ratio=0.1)
