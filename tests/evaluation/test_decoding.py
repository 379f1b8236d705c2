"""The reference decoder writes what the target would, and counts what is predicted."""

import math

import pytest
import torch

from bebop.backbone import Backbone
from bebop.data.rollouts import Rollout
from bebop.errors import InputError
from bebop.evaluation.acceptance import chain_statistics_of
from bebop.evaluation.decoding import VERIFICATION_RULES, speculative_decode
from bebop.evaluation.engine_counts import predict_engine_counts
from bebop.heads.loading import head_for
from tests.tiny_models import make_backbone


def make_pair(directory, kind: str, **options):
    backbone = make_backbone(directory, kind, native_head=True, **options)
    head, origin = head_for(backbone)
    assert origin == "checkpoint"
    return head, backbone


def exact_texts(backbone: Backbone, prompt: list[int], length: int, temperature: float) -> torch.Tensor:
    """Probability of every text of `length` tokens behind the prompt, [V^length], by enumeration."""
    texts, log_p = torch.tensor([prompt]), torch.zeros(1)
    for _ in range(length):
        with torch.no_grad():
            step = (backbone.model(texts).logits[:, -1] / temperature).log_softmax(-1)
        vocabulary = step.shape[1]
        log_p = (log_p.unsqueeze(1) + step).flatten()
        new = torch.arange(vocabulary).repeat(len(texts)).unsqueeze(1)
        texts = torch.cat([texts.repeat_interleave(vocabulary, 0), new], dim=1)
    return log_p.exp()


@pytest.mark.parametrize(
    ("kind", "rule"), [*(("qwen2", rule) for rule in VERIFICATION_RULES), ("qwen3_5_text", "rejection_sampling")]
)
def test_output_is_distributed_as_the_targets(kind, rule, tmp_path):
    """Chi-square over 100,000 texts of four tokens, the first without drafts, against enumeration."""
    vocabulary, length, temperature, samples, batch = 7, 4, 0.8, 100_000, 20_000
    # transformers' linear attention without its kernels pads a prompt to 64 tokens.
    small = {"linear_num_key_heads": 1, "linear_num_value_heads": 1} if kind == "qwen3_5_text" else {}
    head, backbone = make_pair(tmp_path, kind, vocab_size=vocabulary, **small)
    prompt = [3, 1, 5]
    expected = exact_texts(backbone, prompt, length, temperature) * samples
    counts = torch.zeros(vocabulary**length)
    place = vocabulary ** torch.arange(length - 1, -1, -1)
    refused = 0
    for seed in range(samples // batch):
        decoded = speculative_decode(
            head, backbone, [prompt] * batch, steps=2, max_tokens=length, temperature=temperature, rule=rule, seed=seed
        )
        counts += torch.bincount(torch.tensor(decoded.texts) @ place, minlength=vocabulary**length)
        refused += decoded.rounds[0] - decoded.accepted[0]
    assert 0.05 * samples < refused, "nothing tests what replaces a refused draft"
    often = expected >= 5
    cells = [*zip(counts[often], expected[often], strict=True), (counts[~often].sum(), expected[~often].sum())]
    chi_square = sum((c - e) ** 2 / e for c, e in cells if e > 0).item()
    freedom = len(cells) - 1
    # Wilson and Hilferty's approximation of the 99.9 percent point.
    bound = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi_square < bound


@pytest.mark.parametrize("rule", VERIFICATION_RULES)
@pytest.mark.parametrize("kind", ["qwen2", "llama", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"])
def test_greedy_text_is_that_of_generate(kind, rule, tmp_path):
    """Token by token, for prompts of several lengths at once."""
    head, backbone = make_pair(tmp_path, kind)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 131, (n,), generator=generator).tolist() for n in (5, 9, 1)]
    decoded = speculative_decode(head, backbone, prompts, steps=3, max_tokens=24, temperature=0.0, rule=rule)
    for prompt, text in zip(prompts, decoded.texts, strict=True):
        alone = backbone.model.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert text == alone[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("kind", "rule", "stop"),
    [
        ("qwen2", "rejection_sampling", []),
        ("qwen2", "rejection_sampling", [4, 7]),
        ("qwen2", "target_only", []),
        ("qwen3_5_text", "rejection_sampling", []),
        ("qwen3_next", "rejection_sampling", []),
    ],
)
def test_counts_are_the_predicted_ones(kind, rule, stop, tmp_path):
    """Decoder and evaluator share no code of the unroll: caches here, a mask over all anchors there.

    With stop tokens texts are short, and rounds that reach over their ends are many.
    """
    steps = 3
    head, backbone = make_pair(tmp_path, kind, vocab_size=13)
    generator = torch.Generator().manual_seed(2)
    prompts = torch.randint(0, 13, (3000 if stop else 96, 6), generator=generator).tolist()
    decoded = speculative_decode(head, backbone, prompts, steps=steps, max_tokens=100, temperature=1.0, rule=rule, stop=stop)
    if stop:
        assert torch.tensor([len(text) for text in decoded.texts]).float().mean() < 20
    texts = [Rollout(p, t) for p, t in zip(prompts, decoded.texts, strict=True)]
    predicted = predict_engine_counts(
        chain_statistics_of(head, backbone, texts, steps=steps, temperature=1.0, compute_dtype=torch.float32), rule
    )
    assert decoded.rounds[-1] > 3000
    for j in range(steps):
        share = decoded.acceptance[j]
        error = (predicted.standard_error[j] ** 2 + share * (1 - share) / decoded.rounds[j]) ** 0.5
        assert abs(share - predicted.acceptance[j]) < 3 * error, f"draft {j + 1}"


def test_stop_tokens_end_a_text(tmp_path):
    head, backbone = make_pair(tmp_path, "qwen2", vocab_size=13)
    prompts = [[1, 2, 3]] * 40
    texts = speculative_decode(head, backbone, prompts, steps=2, max_tokens=40, temperature=1.0, stop=[4]).texts
    assert all(4 not in text[:-1] for text in texts)
    assert all(text[-1] == 4 or len(text) == 40 for text in texts)
    assert len({len(text) for text in texts}) > 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "typical"}, "unknown verification rule 'typical'"),
        ({"prompts": [[1], []]}, "an empty one"),
        ({"max_tokens": 300}, "the model takes 256"),
        ({"max_tokens": 4}, "raise it to 5"),
        ({"steps": 0}, "steps is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"stop": range(13)}, "no text was long enough"),
    ],
)
def test_what_cannot_be_decoded_is_said(change, message, tmp_path):
    head, backbone = make_pair(tmp_path, "qwen2", vocab_size=13)
    arguments = {"prompts": [[1]], "steps": 3, "max_tokens": 20, "temperature": 1.0} | change
    with pytest.raises(InputError, match=message):
        speculative_decode(head, backbone, arguments.pop("prompts"), **arguments)
