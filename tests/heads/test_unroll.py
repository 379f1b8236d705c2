import dataclasses

import pytest
import torch
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

import bebop.heads.unroll as unroll_module
from bebop.backbone import Backbone
from bebop.heads.head import MTPHead
from bebop.heads.loading import head_for
from bebop.heads.targets import chain_targets
from tests.heads.engine_drafter import draft_chain
from tests.tiny_models import CONFIGS, make_backbone, scramble

STEPS = 4
LENGTHS = (9, 6)


@pytest.fixture(params=CONFIGS)
def kind(request):
    return request.param


@pytest.fixture
def backbone(kind, tmp_path) -> Backbone:
    return make_backbone(tmp_path, kind)


@pytest.fixture
def head(backbone) -> MTPHead:
    head = MTPHead(backbone.head_config, backbone.family)
    scramble(head, seed=5)
    return head.eval()


def batch(lengths, padding=2, seed=0):
    """One packed row of documents and padding: tokens, documents, positions [1, T]."""
    generator = torch.Generator().manual_seed(seed)
    documents = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)] + [torch.full((padding,), -1)])
    positions = torch.cat([torch.arange(n) for n in lengths] + [torch.zeros(padding, dtype=torch.long)])
    tokens = torch.randint(3, 131, (len(documents),), generator=generator)
    return tokens[None], documents[None], positions[None]


@torch.no_grad()
def largest_difference(head, backbone, lengths=LENGTHS) -> float:
    """Between the unroll over a packed row and the engine's chains, over all valid (step, anchor) pairs."""
    tokens, documents, positions = batch(lengths)
    hidden = torch.randn(1, tokens.shape[1], 32, generator=torch.Generator().manual_seed(1))
    embeddings = backbone.embed(tokens)
    unrolled = head(hidden, embeddings, documents, positions, STEPS)[:, 0]
    valid = chain_targets(tokens, documents, documents >= 0, STEPS).valid
    worst, start = 0.0, 0
    for length in lengths:
        for anchor in range(length - 2):
            steps = int(valid[:, start + anchor].sum())
            assert steps == min(STEPS, length - anchor - 2)
            document = slice(start, start + length)
            chain = draft_chain(head, hidden[0, document], embeddings[0, document], anchor, steps)
            worst = max(worst, (chain - unrolled[:steps, start + anchor]).abs().max().item())
        start += length
    return worst


def test_unroll_equals_an_engines_chain_for_every_anchor(head, backbone):
    assert largest_difference(head, backbone) < 1e-5


@pytest.mark.parametrize("wrong", ["concatenation", "positions", "recycled state", "mask"])
def test_the_comparison_notices_what_goes_wrong_in_practice(head, backbone, wrong, monkeypatch):
    """Each is a defect that was shipped by some project and cost acceptance without any error."""
    if wrong == "concatenation":
        flipped = dataclasses.replace(head.family, hidden_first=not head.family.hidden_first)
        original = MTPHead.step
        monkeypatch.setattr(MTPHead, "step", lambda self, *a: _with_family(self, flipped, original, *a))
    elif wrong == "positions":
        # One shift for all entries is no error under RoPE; failing to advance from step to step is.
        original = MTPHead.step
        monkeypatch.setattr(MTPHead, "step", lambda self, h, e, p, m, c: original(self, h, e, batch(LENGTHS)[2], m, c))
    elif wrong == "recycled state":
        original = MTPHead.step
        monkeypatch.setattr(MTPHead, "step", lambda self, *a: _before_final_norm(self, original, *a))
    else:
        monkeypatch.setattr(
            unroll_module,
            "_chain_mask",
            lambda head, documents, step: (
                torch.ones(documents.shape[1], documents.shape[1], dtype=torch.bool).tril().repeat(1, step)[None, None]
            ),
        )
    assert largest_difference(head, backbone) > 1e-2


def _with_family(head, family, step, *arguments):
    original, head.family = head.family, family
    try:
        return step(head, *arguments)
    finally:
        head.family = original


def _before_final_norm(head, step, *arguments):
    caught = []
    handle = head.part(head.family.final_norm).register_forward_pre_hook(lambda _, x: caught.append(x[0]))
    step(head, *arguments)
    handle.remove()
    return caught[0]


@torch.no_grad()
def test_tap_is_the_state_the_family_names(backbone):
    """Pre-norm where post-norm is meant costs most of the acceptance: the two must differ, and each be what it says."""
    tokens, documents, positions = batch((9,), padding=0)
    output = backbone.decoder(tokens, output_hidden_states=True)
    tapped = backbone.hidden_states(tokens, documents, positions)
    target = backbone.target_hidden(tapped)
    torch.testing.assert_close(target, output.last_hidden_state)
    torch.testing.assert_close(target @ backbone.lm_head_weight.T, backbone.model(tokens).logits)
    is_post_norm = torch.allclose(tapped, target)
    assert is_post_norm == (backbone.family.name != "mimo")


@pytest.mark.parametrize("kind", ["qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"], indirect=True)
@torch.no_grad()
def test_native_head_equals_transformers_mtp_model(kind, tmp_path):
    """transformers' own reader of native heads: first step of every anchor, from the same checkpoint."""
    backbone = make_backbone(tmp_path, kind, native_head=True)
    head, origin = head_for(backbone)
    assert origin == "checkpoint"
    tokens, documents, positions = batch((11,), padding=0)
    hidden = backbone.hidden_states(tokens, documents, positions)
    ours = head(hidden, backbone.embed(tokens), documents, positions, 1)[0]

    theirs = MtpModel.from_pretrained(backbone.model)
    # It numbers the pair (h_i, x_{i+1}) i+1 instead of i, which RoPE does not see.
    state = theirs.forward_layer(0, hidden[:, :-1], positions[:, 1:], MtpCache(), input_ids=tokens[:, 1:])
    torch.testing.assert_close(ours[:, :-1], state, atol=1e-5, rtol=1e-5)


def test_gradient_flows_along_the_chain_and_not_into_the_backbone(head, backbone):
    tokens, documents, positions = batch((8,), padding=0)
    hidden = backbone.hidden_states(tokens, documents, positions)
    outputs = head(hidden, backbone.embed(tokens), documents, positions, 3)
    # The last step alone reaches every parameter and, through the recycled states, step 1's keys of other anchors.
    outputs[2, :, :4].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in head.named_parameters() if "experts" not in n)
    assert all(p.grad is None for p in backbone.model.parameters())
    assert not hidden.requires_grad


@pytest.mark.parametrize("kind", ["qwen2"], indirect=True)
@torch.no_grad()
def test_block_mask_gives_the_same_chains_as_the_dense_mask(head, backbone):
    """FlexAttention's block mask is for GPUs; on the CPU it runs forward only, which is enough to compare."""
    tokens, documents, positions = batch((70, 60), padding=3)
    hidden = torch.randn(1, tokens.shape[1], 32)
    flexible = MTPHead(backbone.head_config, backbone.family, attention="flex_attention").eval()
    flexible.load_state_dict(head.state_dict())
    arguments = (hidden, backbone.embed(tokens), documents, positions, 3)
    torch.testing.assert_close(flexible(*arguments), head(*arguments), atol=1e-5, rtol=1e-5)
