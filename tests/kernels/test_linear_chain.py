import dataclasses

import pytest
import torch

from bebop.kernels import STATISTICS, linear_chain_statistics
from bebop.kernels.lm_head import LmHead
from bebop.kernels.stats import DIFFERENTIABLE
from bebop.losses import LOSSES, E2ETVLoss, loss_by_name
from tests.chains import make_chains, oracle_gradient, relative_error, run

every_loss = pytest.mark.parametrize("name", [*LOSSES, "e2e_tv + 0.3 ce + 0.2 reverse_kl", "expected_rounds + 0.5 tv"])


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Each case compiles its own graphs: after a few, torch.compile would fall back to eager and hide the compiled pass."""
    torch.compiler.reset()


@every_loss
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_loss_and_gradient_equal_the_oracle(name, dtype):
    chains = make_chains(dtype=dtype, vocabulary=4099, anchors=70)
    loss, gradient, _ = run(chains, name, temperature=0.7, chunk_bytes=4099 * 4 * 4 * 30)
    expected_loss, expected_gradient = oracle_gradient(chains, loss_by_name(name), temperature=0.7)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]
    assert abs(loss - expected_loss) < (1e-12 if dtype == torch.float64 else 1e-6) * max(1, abs(expected_loss))
    assert gradient.dtype == dtype
    assert relative_error(gradient, expected_gradient) < tolerance
    assert not gradient[~chains.valid].any(), "masked pairs, NaN inside, have zero gradient"


@every_loss
def test_gradcheck(name):
    chains = make_chains(dtype=torch.float64, anchors=5, vocabulary=23, size=4)
    chains.draft_hidden[~chains.valid] = 0.0
    loss_fn = loss_by_name(name)

    def function(draft):
        return loss_fn(draft, chains.target_hidden, chains.weight, **chains.arguments).loss

    if name == "lk_hybrid":  # its mixing weight is not differentiated, so finite differences do not apply
        expected = oracle_gradient(chains, loss_fn)[1]
        assert relative_error(run(chains, name)[1], expected) < 1e-12
    else:
        torch.autograd.gradcheck(function, chains.draft_hidden.requires_grad_())


@pytest.mark.parametrize("vocabulary", [257, 4099, 49_152, 151_936, 248_320])
@pytest.mark.parametrize("steps", [1, 3])
def test_real_vocabularies(vocabulary, steps):
    """At most twice the error of plain PyTorch in the same precision, against the float64 oracle.

    With a floor: a token whose log q and log p agree to rounding may fall on either side of the tie, in plain PyTorch too,
    and moves the gradient by its q. Which tokens do is luck.
    """
    chains = make_chains(steps=steps, anchors=9, vocabulary=vocabulary)
    loss, gradient, _ = run(chains)
    expected_loss, expected_gradient = oracle_gradient(chains, E2ETVLoss())
    plain_loss, plain_gradient = oracle_gradient(chains, E2ETVLoss(), dtype=torch.float32)
    assert abs(loss - expected_loss) <= max(2 * abs(plain_loss - expected_loss), 1e-6)
    assert relative_error(gradient, expected_gradient) <= max(2 * relative_error(plain_gradient, expected_gradient), 2e-4)


@pytest.mark.parametrize("steps", [1, 5, 7])
@pytest.mark.parametrize("anchors_per_chunk", [1, 7, 64, 1000])
def test_result_does_not_depend_on_the_chunks(steps, anchors_per_chunk):
    chains = make_chains(steps=steps, anchors=150, vocabulary=101, dtype=torch.float64)
    loss, gradient, stats = run(chains, chunk_bytes=101 * 8 * (steps + 1) * anchors_per_chunk)
    expected_loss, expected_gradient = oracle_gradient(chains, E2ETVLoss())
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(gradient, expected_gradient)
    assert stats.alpha.shape == (steps, 150)


@pytest.mark.parametrize("top_k", [None, 20])
@pytest.mark.parametrize("temperature", [1.0, "per chain"])
def test_all_statistics_equal_the_oracle(temperature, top_k):
    chains = make_chains(vocabulary=4099)
    if temperature == "per chain":
        temperature = torch.linspace(0.4, 1.3, 40)
    found = linear_chain_statistics(
        chains.draft_hidden,
        chains.target_hidden,
        chains.weight,
        **chains.indices,
        statistics=tuple(set(STATISTICS) - {"log_q"}),
        temperature=temperature,
        top_k=top_k,
    )
    expected = chains.oracle(temperature, top_k)
    assert found.values.keys() == set(STATISTICS)
    for name, value in found.values.items():
        torch.testing.assert_close(value.double(), expected.values[name], atol=2e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("name", [n for n in LOSSES if n != "expected_rounds"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_deferred_statistics_compose_in_plain_autograd(name, dtype):
    """The same loss, put together by the caller from differentiable statistics, has the same gradient to rounding."""
    chains = make_chains(vocabulary=4099, anchors=70, dtype=dtype)
    loss, gradient, _ = run(chains, name)
    draft = chains.draft_hidden.detach().clone().requires_grad_()
    objective = loss_by_name(name)
    stats = linear_chain_statistics(
        draft,
        chains.target_hidden,
        chains.weight,
        **chains.indices,
        statistics=objective.statistics,
        chunk_bytes=4099 * 8 * 4 * 20,
    )
    assert {n for n, value in stats.values.items() if value.requires_grad} == set(objective.statistics) & set(DIFFERENTIABLE)
    deferred = torch.where(stats.valid, objective.pair_loss(stats), 0.0).sum() / stats.valid.sum()
    deferred.backward()
    torch.testing.assert_close(deferred.detach(), loss)
    assert relative_error(draft.grad, gradient.double()) < (1e-12 if dtype == torch.float64 else 2e-2)


@every_loss
def test_temperature_per_chain(name):
    """Chains that share target rows but not the temperature."""
    chains = make_chains(dtype=torch.float64, vocabulary=257)
    temperature = torch.linspace(0.4, 1.3, 40, dtype=torch.float64)
    loss, gradient, _ = run(chains, name, temperature=temperature)
    expected_loss, expected_gradient = oracle_gradient(chains, loss_by_name(name), temperature=temperature)
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("name", ["e2e_tv", "kl", "reverse_kl", "lk_hybrid"])
def test_top_k_equals_its_oracle(name):
    chains = make_chains(dtype=torch.float64, vocabulary=257)
    loss, gradient, _ = run(chains, name, top_k=7)
    expected_loss, expected_gradient = oracle_gradient(chains, loss_by_name(name, top_k=7))
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("steps", [5, 7])
def test_long_chains_in_fp32(steps):
    """The compiled passes, on several chunks."""
    chains = make_chains(steps=steps, anchors=90, vocabulary=4099)
    loss, gradient, stats = run(chains, chunk_bytes=4099 * 4 * (steps + 1) * 20)
    expected_loss, expected_gradient = oracle_gradient(chains, E2ETVLoss())
    assert abs(loss - expected_loss) < 1e-6
    assert relative_error(gradient, expected_gradient) < 2e-4
    assert stats.alpha.min() >= 0
    assert stats.alpha.max() <= 1


def test_normaliser():
    chains = make_chains(dtype=torch.float64)
    loss, gradient, _ = run(chains)
    pairs = chains.valid.sum()
    draft = chains.draft_hidden.detach().clone().requires_grad_()
    other = E2ETVLoss()(draft, chains.target_hidden, chains.weight, **chains.arguments, normaliser=torch.tensor(700)).loss
    other.backward()
    torch.testing.assert_close(other.detach() * 700, loss * pairs)
    torch.testing.assert_close(draft.grad * 700, gradient * pairs)


def test_vocabulary_may_be_permuted_and_padding_cut_off():
    chains = make_chains(dtype=torch.float64)
    loss, gradient, _ = run(chains, "e2e_tv + 0.5 ce")
    order = torch.randperm(257, generator=torch.Generator().manual_seed(0))
    where = order.argsort()
    padded = torch.cat([chains.weight[order], torch.full((31, 16), torch.nan, dtype=torch.float64)])
    tokens = torch.where(chains.valid, where[chains.tokens.clamp(min=0)], -7)
    other = run(dataclasses.replace(chains, weight=padded[:257], tokens=tokens), "e2e_tv + 0.5 ce")
    torch.testing.assert_close(other[0], loss)
    torch.testing.assert_close(other[1], gradient)


@pytest.mark.parametrize(
    ("name", "with_gradient", "deferred", "back"),
    [
        ("e2e_tv", True, False, 1),
        ("e2e_tv + 0.3 ce + 0.2 reverse_kl", True, False, 1),
        ("e2e_tv", False, False, 0),
        ("e2e_tv", True, True, 1),
        ("realised_e2e_tv", True, True, 2),
        ("realised_e2e_tv", False, True, 0),
    ],
)
def test_number_of_products(name, with_gradient, deferred, back, monkeypatch):
    """2K+1 with gradient and K+1 without, however many terms: rows that go through the lm_head, target rows once."""
    chains = make_chains(anchors=50)
    chains.valid[:] = True
    target_rows = torch.arange(50) + torch.arange(3).unsqueeze(1)
    chains = dataclasses.replace(chains, target_rows=target_rows, tokens=chains.tokens.clamp(min=0))
    draft = torch.randn(3, 50, 16).requires_grad_(with_gradient)
    counted = {"logits": 0, "back": 0}
    for way in counted:
        original = getattr(LmHead, way)

        def counting(self, rows, *rest, way=way, original=original):
            counted[way] += len(rows)
            return original(self, rows, *rest)

        monkeypatch.setattr(LmHead, way, counting)
    objective = loss_by_name(name)
    if deferred:
        arguments = chains.indices | {"statistics": objective.statistics}
        linear_chain_statistics(draft, chains.target_hidden, chains.weight, **arguments)
    else:
        objective(draft, chains.target_hidden, chains.weight, **chains.arguments)
    assert counted == {"logits": 3 * 50 + 52, "back": back * 3 * 50}


def test_every_objective_runs_compiled():
    """All variants together stay below the limit after which torch.compile would give up and run eagerly."""
    torch._dynamo.utils.counters.clear()
    for name in (*LOSSES, "e2e_tv + 0.3 ce + 0.2 reverse_kl", "kl + ce", "reverse_kl + ce"):
        for dtype in (torch.float32, torch.bfloat16):
            run(make_chains(dtype=dtype, anchors=30), name)
            run(make_chains(dtype=dtype, anchors=40, steps=1), name)
    for statistics in (("alpha", "kl"), ("kl", "reverse_kl", "log_q")):
        chains = make_chains()
        draft = chains.draft_hidden.clone().requires_grad_()
        linear_chain_statistics(draft, chains.target_hidden, chains.weight, **chains.indices, statistics=statistics)
    assert not any("recompile_limit" in reason for reason in torch._dynamo.utils.counters["unimplemented"])
    assert torch._dynamo.utils.counters["frames"]["ok"] > 10


def test_nothing_valid_gives_zero_connected_to_the_graph():
    chains = make_chains()
    chains.valid[:] = False
    loss, gradient, _ = run(chains)
    assert loss == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_identical_draft_and_target_are_accepted_and_have_no_gradient(dtype):
    """Ties are broken by strict "<" on both sides alike, so equal logits give exactly nothing, not rounding noise."""
    chains = make_chains(noise=0.0, dtype=dtype, vocabulary=4099)
    loss, gradient, stats = run(chains)
    assert abs(loss) < 1e-6
    assert not gradient.any()
    torch.testing.assert_close(stats.alpha[chains.valid], torch.ones_like(stats.alpha[chains.valid]))


def test_extreme_logits():
    """One-hot rows and impossible tokens: finite numbers, and alpha at its ends."""
    size = 8
    weight = 300.0 * torch.eye(size)
    target_hidden = torch.eye(size)[:3]
    draft_hidden = torch.stack([torch.eye(size)[0], torch.eye(size)[5]]).unsqueeze(0).requires_grad_()
    loss, stats = E2ETVLoss()(
        draft_hidden,
        target_hidden,
        weight,
        target_rows=torch.tensor([[0, 1]]),
        tokens=torch.tensor([[0, 1]]),
        valid=torch.ones(1, 2, dtype=torch.bool),
    )
    loss.backward()
    torch.testing.assert_close(stats.alpha, torch.tensor([[1.0, 0.0]]))
    assert torch.isfinite(draft_hidden.grad).all()


def test_without_gradient_the_gradient_is_not_computed(monkeypatch):
    chains = make_chains()
    expected = run(chains)[0]
    monkeypatch.setattr(LmHead, "back", lambda *_: pytest.fail("K+1 products are enough here"))
    with torch.no_grad():
        loss = E2ETVLoss()(chains.draft_hidden, chains.target_hidden, chains.weight, **chains.indices).loss
    assert loss == expected


def test_bitwise_deterministic():
    chains = make_chains(vocabulary=4099, dtype=torch.bfloat16)
    first, second = run(chains), run(chains)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_bf16_logits_ruin_the_gradient():
    """Why logits are fp32: the TV gradient is a step function of log q - log p, which bf16 cannot resolve near alpha = 1."""
    chains = make_chains(vocabulary=4099, anchors=100, noise=0.02, dtype=torch.bfloat16)
    expected = oracle_gradient(chains, E2ETVLoss())[1]
    ours = relative_error(run(chains)[1], expected)
    rounded = chains.safe()
    draft = rounded.draft_hidden.double().nan_to_num().requires_grad_()
    draft_logits = draft @ rounded.weight.double().T
    target_logits = (rounded.target_hidden.double() @ rounded.weight.double().T)[rounded.target_rows]
    # Straight-through rounding: the values are bf16, everything after them is float64.
    draft_logits = draft_logits + (draft_logits.bfloat16().double() - draft_logits).detach()
    E2ETVLoss.from_logits(draft_logits, target_logits.bfloat16().double(), valid=rounded.valid).backward()
    theirs = relative_error(draft.grad, expected)
    assert ours < 0.02
    assert theirs > 0.3
