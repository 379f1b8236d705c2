"""The op in somebody's trainer: autocast, matmul precision, torch.compile, gradient checkpointing, repeated backward."""

import pytest
import torch

from bebop.losses import E2ETVLoss, loss_by_name
from tests.chains import make_chains, relative_error, run


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Each case compiles its own graphs: after a few, torch.compile would fall back to eager and hide the compiled pass."""
    torch.compiler.reset()


def test_scalar_backward_scales_and_may_be_repeated():
    chains = make_chains()
    once = run(chains)[1]
    draft = chains.draft_hidden.clone().requires_grad_()
    loss, _ = E2ETVLoss()(draft, chains.target_hidden, chains.weight, **chains.indices)
    (3 * loss).backward(retain_graph=True)
    (2 * loss).backward()
    torch.testing.assert_close(draft.grad, 5 * once)


def test_autocast_does_not_reach_the_logits():
    """bf16 logits would put the relative error of the gradient at 0.2 and more; see test_bf16_logits_ruin_the_gradient."""
    chains = make_chains(vocabulary=4099)
    plain = run(chains)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = run(chains)
    assert torch.equal(plain[0], mixed[0])
    assert torch.equal(plain[1], mixed[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("interface", ["old", "new"])
def test_callers_matmul_precision_is_neither_used_nor_changed(dtype, interface):
    """In a trainer that sets "medium" or "high" for its own fp32 products, the gradient would be off by a tenth.

    (Only on a CPU with bf16 units does the first assertion see it.)
    """
    chains = make_chains(vocabulary=4099, dtype=dtype, size=64)
    expected = run(chains)
    before = torch.backends.mkldnn.matmul.fp32_precision
    legacy = torch.get_float32_matmul_precision() if interface == "old" else None
    try:
        if interface == "old":
            torch.set_float32_matmul_precision("medium")
        else:
            torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        during = torch.backends.mkldnn.matmul.fp32_precision
        found = run(chains)
        assert torch.backends.mkldnn.matmul.fp32_precision == during
        if interface == "old":
            assert torch.get_float32_matmul_precision() == "medium"
    finally:
        if legacy is not None:
            torch.set_float32_matmul_precision(legacy)
        torch.backends.mkldnn.matmul.fp32_precision = before
    assert relative_error(found[1], expected[1].double()) < 1e-2
    assert abs(found[0] - expected[0]) < 1e-6


def test_works_inside_a_compiled_step():
    chains = make_chains(size=16)
    layer = torch.nn.Linear(16, 16)
    loss_fn = E2ETVLoss()
    inputs = chains.draft_hidden.nan_to_num()

    def step():
        return loss_fn(layer(inputs), chains.target_hidden, chains.weight, **chains.indices).loss

    step().backward()
    expected, layer.weight.grad = layer.weight.grad, None
    torch.compile(step)().backward()
    torch.testing.assert_close(layer.weight.grad, expected)


def test_a_coupled_objective_inside_a_compiled_step():
    """Its recursion over the texts must not be unrolled into the graph: other lengths would compile anew."""
    layer = torch.nn.Linear(16, 16)
    loss_fn = loss_by_name("expected_rounds")

    def step(chains):
        return loss_fn(layer(chains.draft_hidden.nan_to_num()), chains.target_hidden, chains.weight, **chains.arguments).loss

    compiled = torch.compile(step, dynamic=True)
    for anchors in (40, 60):
        torch.testing.assert_close(compiled(make_chains(anchors=anchors)), step(make_chains(anchors=anchors)))


def test_behind_a_checkpointed_head():
    """Gradient checkpointing runs the head twice and must not disturb the op, whose backward may come much later."""
    chains = make_chains(size=16)
    layer = torch.nn.Linear(16, 16)
    inputs = chains.draft_hidden.nan_to_num().requires_grad_()

    def step(head):
        return E2ETVLoss()(head(inputs), chains.target_hidden, chains.weight, **chains.arguments).loss

    step(layer).backward()
    expected, layer.weight.grad = layer.weight.grad, None
    step(lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)).backward()
    assert torch.equal(layer.weight.grad, expected)
