from collections import Counter
from itertools import islice

import pytest
import torch

from bebop.data.generate import chat_openings, generate_rollouts
from bebop.errors import InputError
from bebop.sampling import draw
from tests.rollouts import CHAT_TEMPLATE, make_tokenizer
from tests.tiny_models import make_model

EOS, USER, ASSISTANT, END = 2, 128, 129, 130


def test_draw_follows_the_distribution():
    """Chi-square over 200,000 draws, an impossible token among the candidates."""
    logits = torch.tensor([1.0, 0.0, -torch.inf, 2.0, -1.0])
    temperature = 0.7
    n = 200_000
    p = (logits / temperature).softmax(0)
    tokens = draw(p.expand(n, -1), torch.Generator().manual_seed(0))
    counts = torch.bincount(tokens, minlength=5)
    assert counts[2] == 0
    possible = p > 0
    chi_square = ((counts - n * p)[possible] ** 2 / (n * p)[possible]).sum()
    assert chi_square < 16.3  # 99.9 percent point for 3 degrees of freedom


@pytest.fixture
def model():
    model = make_model("qwen2", eos_token_id=EOS, max_position_embeddings=512)
    # A model that talks: every state likes to end the turn now and then.
    with torch.no_grad():
        model.lm_head.weight[:] *= 0.3
    return model


def test_chat_openings():
    before, after = chat_openings(make_tokenizer(CHAT_TEMPLATE))
    assert before == [USER]
    assert after == [END, ASSISTANT]


def generate(model, tokenizer=None, **options):
    return generate_rollouts(model, tokenizer or make_tokenizer(CHAT_TEMPLATE), stop=[EOS], **options)


def test_rollouts_have_the_templates_form(model):
    rollouts = list(
        generate(
            model,
            count=50,
            temperature=1.0,
            max_prompt_tokens=60,
            max_response_tokens=30,
            batch_size=64,
        )
    )
    assert len(rollouts) == 50
    for _, rollout in rollouts:
        prompt = rollout.prompt_ids
        assert prompt[0] == USER
        assert prompt[-2:] == [END, ASSISTANT]
        assert END not in prompt[:-2]
        assert 1 <= len(prompt) - 3 < 60
        assert 1 <= len(rollout.response_ids) <= 30
        assert not {END, EOS} & set(rollout.response_ids[:-1])
        assert rollout.finish_reason == ("stop" if rollout.response_ids[-1] in (END, EOS) else "length")
    # An answer ends at any of the model's end tokens, as in an engine, and at the template's.
    assert {END, EOS} <= {r.response_ids[-1] for _, r in rollouts}
    assert {r.finish_reason for _, r in rollouts} == {"stop", "length"}


@torch.no_grad()
def test_responses_are_the_models_own_distribution(model):
    """Greedy in the limit of low temperature: every response token is the argmax given what stands before it. This holds
    only if cache, positions and dropped rows are right for every row and step."""
    rollouts = generate(
        model,
        count=20,
        temperature=1e-4,
        max_prompt_tokens=40,
        max_response_tokens=12,
        batch_size=48,
    )
    checked = Counter()
    for _, rollout in rollouts:
        ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
        start = len(rollout.prompt_ids)
        best = model(ids).logits[0, start - 1 : -1].argmax(-1)
        assert best.tolist() == rollout.response_ids
        checked["tokens"] += len(rollout.response_ids)
    assert checked["tokens"] > 50


def test_seed_decides(model):
    def first(seed):
        return next(generate(model, count=5, temperature=1.0, batch_size=32, seed=seed))

    assert first(1) == first(1)
    assert first(1) != first(2)


@pytest.mark.parametrize("stopped_after", [3, 20])
def test_a_run_that_goes_on_writes_what_is_missing(model, stopped_after):
    """The batch in which it stopped, the first or a later one, is sampled again from the same seed."""
    options = {"count": 40, "temperature": 1.0, "batch_size": 16, "max_response_tokens": 20}
    whole = list(generate(model, **options))
    first = list(islice(generate(model, **options), stopped_after))
    rest = list(generate(model, **options, written=Counter(number for number, _ in first)))
    assert first + rest == whole
    assert len({number for number, _ in whole}) == 40


def test_more_tokens_than_the_model_takes_are_refused(model):
    with pytest.raises(InputError, match="may take 867 tokens with the chat template, the model takes 512"):
        next(generate(model, count=1, temperature=1.0, max_response_tokens=800))


def test_model_without_a_chat_template_is_refused(model):
    with pytest.raises(InputError, match="no chat template"):
        next(generate(model, make_tokenizer(), count=1, temperature=1.0))


def test_model_that_never_ends_a_prompt_is_refused(model):
    with torch.no_grad():
        model.lm_head.weight[END] = 0
        model.model.embed_tokens.weight[:] *= 20
        model.lm_head.weight *= 20
    with pytest.raises(InputError, match="none ended within 2 tokens"):
        next(generate(model, count=1, temperature=1.0, max_prompt_tokens=2, batch_size=4))
