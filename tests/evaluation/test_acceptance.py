import pytest
import torch

from bebop.data.states import StateCache
from bebop.errors import InputError
from bebop.evaluation.acceptance import EVALUATED, evaluate, pair_values, summarise
from bebop.heads.loading import head_for
from bebop.kernels import linear_chain_statistics
from tests.chains import make_chains
from tests.rollouts import self_generated
from tests.tiny_models import make_backbone


def stats_of(chains):
    return linear_chain_statistics(
        chains.draft_hidden, chains.target_hidden, chains.weight, **chains.indices, statistics=EVALUATED
    )


def test_summary_does_not_depend_on_the_batches():
    whole = summarise([stats_of(make_chains(seed=1)), stats_of(make_chains(seed=2))])
    parts = [stats_of(make_chains(seed=s)) for s in (1, 2)]
    counts = [p.valid.sum(1) for p in parts]
    for j in range(3):
        expected = sum(p.alpha[j].sum() for p in parts) / sum(c[j] for c in counts)
        assert whole.alpha[j] == pytest.approx(expected.item())
    assert whole.accept_length == pytest.approx(1 + sum(whole.realised))
    assert whole.chains == sum(c[0] for c in counts)


def test_realised_estimate_is_unbiased_where_eq_13_is_not():
    """Text sampled from the target, acceptance of step 2 going with the token of step 1: a two-token world counted exactly.

    p = (1/2, 1/2), q = (1/4, 3/4) at step 1; at step 2 the draft is perfect after token 0 and useless after token 1.
    """
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    alpha_1, alpha_2 = 0.75, torch.tensor([1.0, 0.0])
    accepted_token = torch.minimum(p, q)  # probability that step 1 accepts, by token
    truth = (accepted_token * alpha_2).sum().item()
    realised = sum(p[x] * min(1, q[x] / p[x]) * alpha_2[x] for x in (0, 1))
    eq_13 = sum(p[x] * alpha_1 * alpha_2[x] for x in (0, 1))
    assert realised.item() == pytest.approx(truth)
    assert eq_13.item() != pytest.approx(truth, abs=0.1)

    from bebop.kernels import ChainStats

    stats = ChainStats(
        valid=torch.ones(2, 2, dtype=torch.bool),
        alpha=torch.stack([torch.tensor([alpha_1, alpha_1]), alpha_2]),
        log_q=torch.stack([q.log(), torch.zeros(2)]),
        log_p=torch.stack([p.log(), torch.zeros(2)]),
    )
    values = pair_values(stats)
    assert (p * values["realised"][1]).sum().item() == pytest.approx(truth)
    assert (p * values["cumulative"][1]).sum().item() == pytest.approx(eq_13.item())


def test_target_only_counts_greedy_drafts():
    chains = make_chains(vocabulary=40)
    stats = stats_of(chains)
    chains.target_rows.masked_fill_(~chains.valid, 0)
    draft, target = chains.logits()
    p = target.softmax(-1)
    top = draft.argmax(-1)
    at_top = p.gather(-1, top.unsqueeze(-1)).squeeze(-1)
    found = summarise([stats])
    for j in range(3):
        hits = (top[:j] == chains.tokens[:j]).all(0).double()
        valid = chains.valid[j]
        assert found.alpha_target_only[j] == pytest.approx(at_top[j][valid].mean().item(), abs=1e-5)
        assert found.realised_target_only[j] == pytest.approx((hits * at_top[j])[valid].mean().item(), abs=1e-5)


def test_no_chain_long_enough_is_refused():
    chains = make_chains()
    chains.valid[2] = False
    with pytest.raises(InputError, match="long enough for every draft step"):
        summarise([stats_of(chains)])


@pytest.mark.parametrize("kind", ["qwen2", "qwen3_5_text"])
def test_cached_states_give_the_same_acceptance(kind, tmp_path):
    backbone = make_backbone(tmp_path, kind)
    head, _ = head_for(backbone)
    rollouts = self_generated(20)
    options = {"steps": 3, "temperature": 0.8, "compute_dtype": torch.float32, "tokens_per_micro_batch": 100}
    direct = evaluate(head, backbone, rollouts, **options)
    cached = evaluate(head, backbone, rollouts, states=StateCache(backbone, rollouts), **options)
    assert cached.alpha == pytest.approx(direct.alpha, abs=1e-5)
    assert cached.realised == pytest.approx(direct.realised, abs=1e-5)
    assert head.training
