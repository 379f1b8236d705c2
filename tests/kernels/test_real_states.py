"""What bf16 logits do to the TV gradient on the states of a real language model, so that nobody brings them back."""

import pytest
import torch

from bebop.backbone import Backbone, load_tokenizer
from bebop.heads.targets import chain_targets
from bebop.losses import E2ETVLoss
from tests.chains import Chains, oracle_gradient
from tests.demo import demo_backbone

STEPS = 3
WORDS = """The lighthouse keeper counted ships every evening and wrote the number in a book. In winter there were few, and
he had time to read; in summer the book filled up, with fishing boats at dawn and ferries at noon. One night the lamp went
out. He climbed the stairs in the dark, found the spare wick by touch, and had the light burning again before the ten
o'clock boat from the islands came around the point. Nobody on board noticed, and in the book he wrote only the number."""


@pytest.fixture(scope="module")
def text() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids [T] of some English, the demo backbone's states [T, d] at its lm_head, and the lm_head in bf16."""
    path = demo_backbone()
    backbone = Backbone.load(str(path), torch.float32)
    tokens = torch.tensor([load_tokenizer(path).encode(WORDS)])
    everything = torch.zeros_like(tokens)
    with torch.no_grad():
        tapped = backbone.hidden_states(tokens, everything, torch.arange(tokens.shape[1]).unsqueeze(0))
        return tokens, backbone.target_hidden(tapped)[0].bfloat16(), backbone.lm_head_weight.detach().bfloat16()


def make_real_chains(text, noise: float) -> Chains:
    """Drafts that miss the target's states by `noise` of their length, at random."""
    tokens, target, weight = text
    documents = torch.zeros_like(tokens)
    rows, next_tokens, valid = chain_targets(tokens, documents, torch.ones_like(tokens, dtype=torch.bool), STEPS)
    off = torch.randn(STEPS, len(target), target.shape[1], generator=torch.Generator().manual_seed(0))
    draft = target[rows].float() * (1 + noise * off)
    return Chains(draft.bfloat16(), target, weight, rows, next_tokens, valid, documents[0])


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def test_bf16_logits_ruin_the_gradient_of_a_good_draft(text):
    chains = make_real_chains(text, noise=0.01)
    expected = oracle_gradient(chains, E2ETVLoss())[1]
    draft = chains.draft_hidden.clone().requires_grad_()
    loss, stats = E2ETVLoss()(draft, chains.target_hidden, chains.weight, **chains.arguments)
    loss.backward()
    assert 0.97 < stats.alpha[stats.valid].mean() < 0.995

    # The best case for bf16 logits: exact products, rounded once, everything after that in float64.
    safe = chains.safe()
    rounded = chains.draft_hidden.double().requires_grad_()
    safe.draft_hidden = rounded
    draft_logits, target_logits = safe.logits()
    draft_logits = draft_logits + (draft_logits.bfloat16().double() - draft_logits).detach()
    E2ETVLoss.from_logits(draft_logits, target_logits.bfloat16().double(), valid=chains.valid).backward()

    ours, theirs = error(draft.grad, expected), error(rounded.grad, expected)
    print(
        f"relative gradient error at alpha {stats.alpha[stats.valid].mean():.3f}: ours {ours:.1e}, bf16 logits {theirs:.2f}"
    )
    assert ours < 4e-3
    assert theirs > 0.3
