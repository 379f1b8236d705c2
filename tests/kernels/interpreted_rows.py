"""The Triton row passes under triton's interpreter; test_rows_triton.py runs this file in a process of its own."""

import pytest
import torch

from bebop.kernels import rows_torch, rows_triton
from bebop.kernels.rows import row_passes, triton_unavailable_reason
from bebop.losses import LOSSES, E2ETVLoss, loss_by_name
from tests.chains import make_chains, oracle_gradient

SUMS = ("alpha", "kl", "reverse_kl", "target_entropy", "draft_entropy")
NAMES = [*LOSSES, "e2e_tv + 0.3 ce + 0.2 reverse_kl"]


def make_rows(vocabulary: int, dtype: torch.dtype, rows: int = 5, targets: int = 3):
    """Logits of uneven width in a wider buffer, as a chunk's, with -inf columns and a one-hot row."""
    generator = torch.Generator().manual_seed(vocabulary)
    z = (3 * torch.randn(rows, vocabulary + 13, generator=generator)).to(dtype)[:, :vocabulary]
    t = (3 * torch.randn(targets, vocabulary + 5, generator=generator)).to(dtype)[:, :vocabulary]
    z[:, 1::17] = t[:, 1::17] = -torch.inf
    z[0] = -torch.inf
    z[0, 2] = 4.0
    z[1] = t[1]
    index = torch.tensor([0, 1, 2, 0, 1])[:rows]
    scale = torch.tensor([1.0, 0.5, 2.0, 1.0, 1.25])[:rows]
    return z, t, index, scale


def double(*tensors):
    return (x.double() if x.is_floating_point() else x for x in tensors)


def test_the_dispatcher_takes_triton():
    assert triton_unavailable_reason(torch.device("cpu")) is None
    assert row_passes(torch.device("cpu"), torch.float32) is rows_triton
    assert row_passes(torch.device("cpu"), torch.float64) is rows_torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary", [19, 257, 4099, 8192, 49_152])
def test_row_passes_equal_float64(vocabulary, dtype):
    z, t, index, scale = make_rows(vocabulary, dtype)
    each = torch.arange(len(z))
    lse_z = rows_triton.log_sum_exp(z, each, scale)
    lse_t = rows_triton.log_sum_exp(t, index, scale)
    exact = list(double(z, t, index, scale))
    expected_z = rows_torch.log_sum_exp(exact[0], each, exact[3])
    expected_t = rows_torch.log_sum_exp(exact[1], index, exact[3])
    torch.testing.assert_close(lse_z, expected_z, rtol=0, atol=2e-6)
    torch.testing.assert_close(lse_t, expected_t, rtol=0, atol=2e-6)

    # The same log-sum-exps for both from here on: a tie must not fall to different sides.
    arguments = (z, t, index, scale, lse_z, lse_t)
    found = rows_triton.statistics(*arguments, SUMS)
    expected = rows_torch.statistics(*double(*arguments), SUMS)
    assert found.keys() == expected.keys()
    # One-hot drafts have infinite KL from a target that is not, in both.
    for name in found:
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-5, atol=1e-5, msg=name)

    on_q, on_below, on_p, on_log_ratio, on_token = torch.randn(5, len(z), generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([2, 5, -1, vocabulary - 1, 0])
    for terms in ((None,) * 4, (on_below, None, None, None), (on_below, on_p, on_log_ratio, on_token)):
        out = torch.empty_like(z, dtype=torch.float32)
        rows_triton.gradient(*arguments, out, tokens, on_q, *terms)
        wanted = torch.empty_like(out, dtype=torch.float64)
        in_double = [None if term is None else term.double() for term in terms]
        rows_torch.gradient(*double(*arguments), wanted, tokens, on_q.double(), *in_double)
        torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-6)


def test_gradient_in_place_and_in_bf16():
    z, t, index, scale = make_rows(4099, torch.float32)
    lse_z, lse_t = (rows_triton.log_sum_exp(x, i, scale) for x, i in ((z, torch.arange(len(z))), (t, index)))
    arguments = (torch.zeros(5, dtype=torch.int64), torch.ones(5), torch.ones(5), None, None, None)
    out = torch.empty(len(z), 4099)
    rows_triton.gradient(z, t, index, scale, lse_z, lse_t, out, *arguments)
    low = torch.empty(len(z), 4099, dtype=torch.bfloat16)
    rows_triton.gradient(z, t, index, scale, lse_z, lse_t, low, *arguments)
    torch.testing.assert_close(low.float(), out, rtol=2**-7, atol=0)
    rows_triton.gradient(z, t, index, scale, lse_z, lse_t, z, *arguments)
    assert torch.equal(z, out)


def test_equal_rows_have_no_gradient():
    z, t, index, scale = make_rows(4099, torch.float32)
    z = t[index].clone()
    lse = rows_triton.log_sum_exp(z, torch.arange(len(z)), scale)
    sums = rows_triton.statistics(z, t, index, scale, lse, lse, ("alpha",))
    assert not sums["below"].any()


@pytest.mark.parametrize("name", NAMES)
def test_the_op_equals_the_oracle(name):
    chains = make_chains(anchors=12, vocabulary=4099)
    draft = chains.draft_hidden.clone().requires_grad_()
    loss, _ = loss_by_name(name, temperature=0.7)(draft, chains.target_hidden, chains.weight, **chains.arguments)
    loss.backward()
    expected_loss, expected_gradient = oracle_gradient(chains, loss_by_name(name), temperature=0.7)
    assert abs(loss - expected_loss) < 1e-5 * max(1, abs(expected_loss))
    torch.testing.assert_close(draft.grad.double(), expected_gradient, rtol=1e-4, atol=1e-7)


def test_a_real_vocabulary():
    chains = make_chains(anchors=2, vocabulary=151_936)
    draft = chains.draft_hidden.clone().requires_grad_()
    E2ETVLoss()(draft, chains.target_hidden, chains.weight, **chains.arguments).loss.backward()
    expected = oracle_gradient(chains, E2ETVLoss())[1]
    assert ((draft.grad - expected).norm() / expected.norm()) < 5e-4


def test_bitwise_deterministic():
    def once():
        chains = make_chains(anchors=6, vocabulary=4099)
        draft = chains.draft_hidden.clone().requires_grad_()
        E2ETVLoss()(draft, chains.target_hidden, chains.weight, **chains.arguments).loss.backward()
        return draft.grad

    assert torch.equal(once(), once())
