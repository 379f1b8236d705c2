import pytest
import torch

from bebop.errors import InputError
from bebop.evaluation.engine_counts import predict_engine_counts
from bebop.kernels import ChainStats
from tests.losses.test_expected_rounds import K, make_texts


def stats_of(accepts, valid, documents) -> ChainStats:
    """Chains on which draft k is accepted with the same probability whatever the text says."""
    log_q = torch.where(valid, accepts.log(), 0.0)
    return ChainStats(valid, documents, alpha=torch.where(valid, accepts, 0.0), log_q=log_q, log_p=torch.zeros_like(log_q))


def test_counts_are_those_of_playing_the_rounds():
    accepts, valid, documents = make_texts([60, 45, 80], seed=3)
    found = predict_engine_counts([stats_of(accepts, valid, documents)])
    generator = torch.Generator().manual_seed(0)
    accepted, drafts = torch.zeros(K), torch.zeros(K)
    for number in range(3):
        here = documents == number
        r, room = accepts[:, here], valid[:, here]
        at = torch.zeros(4000, dtype=torch.int64)
        while bool((running := at < here.sum()).any()):
            where = at[running]
            coins = torch.rand(K, len(where), generator=generator, dtype=torch.float64)
            kept = ((coins < r[:, where]) & room[:, where]).long().cumprod(0)
            drafts += room[:, where].sum(1)
            accepted += kept.sum(1)
            at[running] = where + kept.sum(0) + 1
    torch.testing.assert_close(torch.tensor(found.acceptance), accepted / drafts, atol=5e-3, rtol=0)
    assert found.accept_length == pytest.approx(1 + (accepted / drafts).sum().item(), abs=0.01)


def test_hard_places_count_more_than_their_share():
    """Half the anchors accept always, half never: the uniform mean is 1/2, but rounds crowd where nothing is accepted."""
    accepts, valid, documents = make_texts([400])
    accepts = (torch.arange(400) // 20 % 2).double().expand(K, -1).clone()
    found = predict_engine_counts([stats_of(accepts, valid, documents)])
    assert found.acceptance[0] < 0.3


def test_batches_do_not_matter():
    texts = [make_texts([40], seed=s) for s in range(3)]
    apart = predict_engine_counts([stats_of(*t) for t in texts])
    accepts, valid = (torch.cat([t[i] for t in texts], 1) for i in (0, 1))
    together = predict_engine_counts([stats_of(accepts, valid, torch.arange(3).repeat_interleave(40))])
    assert together.acceptance == pytest.approx(apart.acceptance)
    assert together.standard_error == pytest.approx(apart.standard_error)
    assert all(error > 0 for error in apart.standard_error)


def test_texts_too_short_for_a_chain_are_refused():
    accepts, valid, documents = make_texts([2])
    with pytest.raises(InputError, match="long enough"):
        predict_engine_counts([stats_of(accepts, valid, documents)])
