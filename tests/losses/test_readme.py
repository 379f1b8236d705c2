import re
from pathlib import Path

import torch

import bebop.losses
from tests.chains import make_chains, oracle_gradient


def test_the_readmes_example_works_as_it_stands():
    text = (Path(bebop.losses.__file__).parent / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    namespace = {}
    exec(code, namespace)
    loss_class = namespace["WholeChainLoss"]
    chains = make_chains(dtype=torch.float64)
    draft = chains.draft_hidden.requires_grad_()
    loss, _ = loss_class()(draft, chains.target_hidden, chains.weight, **chains.indices)
    loss.backward()
    expected_loss, expected_gradient = oracle_gradient(chains, loss_class())
    torch.testing.assert_close(loss.detach(), expected_loss)
    torch.testing.assert_close(draft.grad, expected_gradient)
