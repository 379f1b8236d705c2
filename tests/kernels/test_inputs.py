import pytest
import torch

from bebop.kernels import linear_chain_loss
from bebop.losses import E2ETVLoss
from tests.chains import make_chains


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"weight": c.weight.clone().requires_grad_()}, "requires grad"),
        (lambda c: {"weight": c.weight.to(torch.float8_e4m3fn)}, "expected bf16, fp16, fp32 or fp64"),
        (lambda c: {"weight": c.weight[:, :3]}, "do not fit"),
        (lambda c: {"tokens": torch.where(c.valid, 257, 0)}, "tokens of valid pairs range from 257 to 257"),
        (lambda c: {"target_rows": torch.where(c.valid, -1, 0)}, "target_rows of valid pairs range from -1"),
        (lambda c: {"tokens": c.tokens.float()}, "expected int64"),
        (lambda c: {"valid": c.valid[:2]}, r"expected bool \(3, 40\)"),
        (lambda c: {"valid": ~c.valid}, "not a prefix"),
        (lambda c: {"temperature": 0.0}, "temperature is 0.0"),
        (lambda c: {"temperature": torch.ones(3)}, r"expected a number or \[N\] = \(40,\)"),
        (lambda c: {"temperature": torch.zeros(40)}, "expected above 0"),
        (lambda c: {"statistics": ("alhpa",)}, "unknown statistics"),
        (lambda c: {"top_k": 0}, "top_k is 0"),
        (lambda c: {"top_k": 5, "statistics": ("log_q",)}, "does not read log_q"),
        (lambda c: {"weight": c.weight.index_fill(0, torch.tensor(3), torch.nan)}, "weight holds NaN or inf"),
        (lambda c: {"target_hidden": c.target_hidden.index_fill(0, torch.tensor(9), torch.inf)}, "target_hidden in rows"),
        (lambda c: {"draft_hidden": torch.full_like(c.draft_hidden, -torch.inf)}, "draft_hidden of valid pairs holds"),
        (lambda c: {"objective": lambda stats: stats.alpha.sum()}, "the objective returned shape"),
        (
            lambda c: {
                "objective": lambda stats: stats.alpha.detach(),
                "draft_hidden": c.draft_hidden.clone().requires_grad_(),
            },
            "the objective has no gradient",
        ),
        (lambda c: {"statistics": "alpha"}, "statistics is the string 'alpha'"),
        (lambda c: {"normaliser": 0.0}, "normaliser is 0.0"),
        (lambda c: {"normaliser": torch.ones(3)}, r"normaliser is a tensor \(3,\)"),
        (lambda c: {"temperature": [1.0]}, r"temperature is \[1.0\]"),
        (lambda c: {"weight": c.weight.half(), "draft_hidden": c.draft_hidden * 1e6}, "logits are not finite although"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    chains = make_chains()
    arguments = {
        "draft_hidden": chains.draft_hidden,
        "target_hidden": chains.target_hidden,
        "weight": chains.weight,
        "objective": lambda stats: 1 - stats.alpha,
        **chains.indices,
    }
    with pytest.raises(ValueError, match=message):
        linear_chain_loss(**(arguments | change(chains)))


def test_what_an_objective_does_not_name_it_cannot_read():
    """It would train on a part of its gradient."""
    chains = make_chains()
    draft = chains.draft_hidden.clone().requires_grad_()
    arguments = (draft, chains.target_hidden, chains.weight)
    with pytest.raises(AttributeError, match="'log_q' was not asked for"):
        linear_chain_loss(*arguments, **chains.indices, objective=lambda stats: 1 - stats.alpha - stats.log_q)
    loss_fn = E2ETVLoss()
    loss_fn.weight = torch.nn.Parameter(torch.ones(()))
    with pytest.raises(ValueError, match="parameters that require grad"):
        loss_fn(*arguments, **chains.arguments)
