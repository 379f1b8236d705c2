from collections import Counter
from itertools import islice

import pytest
import torch

from bebop.data.answer import answer_prompts
from bebop.data.prompts import Prompt
from tests.tiny_models import make_model


def prompts_of(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        Prompt(i, torch.randint(8, 120, (length,), generator=generator).tolist(), f"source {i}")
        for i, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("kind", ["qwen2", "llama", "qwen3_5_text"])
@torch.no_grad()
def test_prompts_of_unequal_length_are_answered_as_if_alone(kind):
    """At a temperature near 0 every token is the argmax given the prompt and what follows it, without padding: mask,
    positions, the states of linear attention and dropped rows are right."""
    model = make_model(kind).eval()
    prompts = prompts_of([1, 2, 3, 5, 9, 17, 30, 31])
    ends = list(range(0, 131, 9))
    rollouts = dict(answer_prompts(model, prompts, temperature=1e-5, stop=ends, max_response_tokens=12, batch_size=8))
    assert sorted(rollouts) == list(range(8))
    assert len({len(r.response_ids) for r in rollouts.values()}) > 2
    for prompt in prompts:
        rollout = rollouts[prompt.number]
        assert (rollout.prompt_ids, rollout.source) == (prompt.ids, prompt.source)
        ids = torch.tensor([prompt.ids + rollout.response_ids])
        assert model(ids).logits[0, len(prompt.ids) - 1 : -1].argmax(-1).tolist() == rollout.response_ids
        assert not set(ends) & set(rollout.response_ids[:-1])
        ended = rollout.response_ids[-1] in ends
        assert rollout.finish_reason == ("stop" if ended else "length")
        assert ended or len(rollout.response_ids) == 12


@torch.no_grad()
def test_answers_follow_the_models_distribution_whatever_its_generation_config_says():
    """Chi-square of second tokens, from prompts of unequal length in one batch, against the model on each alone."""
    model = make_model("qwen2").eval()
    config = model.generation_config
    config.top_k, config.top_p, config.min_p, config.repetition_penalty = 1, 0.1, 0.9, 5.0
    prompts, temperature, n = prompts_of([2, 11]), 1.5, 6000
    rollouts = answer_prompts(model, prompts * n, temperature=temperature, stop=[], max_response_tokens=2, batch_size=2 * n)
    counts = {0: torch.zeros(131, 131), 1: torch.zeros(131, 131)}
    for number, rollout in rollouts:
        counts[number][tuple(rollout.response_ids)] += 1
    for prompt in prompts:
        ids = torch.tensor([[*prompt.ids, first] for first in range(131)])
        logits = model(ids).logits / temperature
        first, second = logits[0, -2].softmax(-1), logits[:, -1].softmax(-1)
        expected = n * (first.unsqueeze(1) * second).sum(0)
        observed = counts[prompt.number].sum(0)
        likely = expected >= 5
        chi_square = ((observed - expected)[likely] ** 2 / expected[likely]).sum()
        freedom = int(likely.sum()) - 1
        assert freedom > 50
        assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("stopped_after", [3, 17])
def test_a_run_that_goes_on_writes_what_is_missing(stopped_after):
    model = make_model("qwen2").eval()
    prompts = [prompt for prompt in prompts_of(range(1, 11)) for _ in range(3)]
    options = {"temperature": 1.0, "stop": [2], "max_response_tokens": 6, "batch_size": 4}
    whole = list(answer_prompts(model, prompts, **options))
    first = list(islice(answer_prompts(model, prompts, **options), stopped_after))
    rest = list(answer_prompts(model, prompts, **options, written=Counter(number for number, _ in first)))
    assert first + rest == whole
    assert Counter(number for number, _ in whole) == Counter(dict.fromkeys(range(10), 3))
