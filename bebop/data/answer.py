"""Answers of the backbone to prompts that are given, in batches."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import DynamicCache

from bebop.data.progress import RolloutBar
from bebop.data.prompts import Prompt, unanswered
from bebop.data.rollouts import Rollout
from bebop.sampling import draw

# Prompts are sorted by length, for little padding, within this many batches: the file keeps roughly their order.
_BATCHES_SORTED = 16


def answer_prompts(
    model: Any,
    prompts: Sequence[Prompt],
    *,
    temperature: float,
    stop: Sequence[int],
    max_response_tokens: int = 256,
    batch_size: int = 128,
    seed: int = 0,
    written: Counter[int] | None = None,
) -> Iterator[tuple[int, Rollout]]:
    """The model's answers to prompts that are given, sampled without top-k or top-p. Shows a progress bar.

    Args:
        model: a causal language model.
        prompts: of any lengths, as often as they are to be answered.
        temperature, stop, max_response_tokens, batch_size, seed, written: as for `generate_rollouts`.

    Yields:
        The number of the prompt and the rollout.
    """
    span = _BATCHES_SORTED * batch_size
    plan = [
        prompt for i in range(0, len(prompts), span) for prompt in sorted(prompts[i : i + span], key=lambda p: -len(p.ids))
    ]
    wanted = unanswered(plan, Counter(written))
    done = wanted.count(False)
    with RolloutBar(len(plan), done) as bar:
        for batch_number, start in enumerate(range(0, len(plan), batch_size)):
            batch, wanted_now = plan[start : start + batch_size], wanted[start : start + batch_size]
            if not any(wanted_now):
                continue
            generator = torch.Generator(model.device).manual_seed(seed * 1_000_003 + batch_number)
            bar.begin_batch(done - wanted_now.count(False))
            answers = _answer(
                model, [prompt.ids for prompt in batch], stop, temperature, max_response_tokens, generator, bar.show_batch
            )
            for prompt, answer, is_wanted in zip(batch, answers, wanted_now, strict=True):
                if is_wanted:
                    yield prompt.number, prompt.answered(answer, stop)
                    done += 1


@torch.no_grad()
def _answer(
    model: Any,
    prompts: list[list[int]],
    stop: Sequence[int],
    temperature: float,
    most: int,
    generator: torch.Generator,
    progress: Callable[[float, int], None],
) -> list[list[int]]:
    """An answer to every prompt; they stand in a batch with padding on the left."""
    device, size = model.device, len(prompts)
    longest = max(len(prompt) for prompt in prompts)
    inputs = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    padding = torch.tensor([[longest - len(prompt)] for prompt in prompts], device=device)
    real = torch.arange(longest, device=device) >= padding  # of the rows still in the cache
    positions = (real.cumsum(1) - 1).clamp(min=0)
    ends = torch.tensor(stop, dtype=torch.long, device=device)
    answers = torch.zeros(size, most, dtype=torch.long, device=device)
    lengths = torch.zeros(size, dtype=torch.long, device=device)
    running = torch.arange(size, device=device)
    done = torch.zeros(size, dtype=torch.bool, device=device)
    cache = DynamicCache(config=model.config.get_text_config())
    for step in range(most):
        logits = model(
            inputs,
            attention_mask=real.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        tokens = draw(torch.softmax(logits.float() / temperature, dim=-1), generator)
        answers[running, step] = tokens
        lengths[running] += ~done[running]
        done[running] |= torch.isin(tokens, ends)
        progress(torch.where(done, 1.0, lengths / most).sum().item(), len(running))
        alive = ~done[running]
        if not bool(alive.any()):
            break
        if alive.sum() <= 0.9 * len(running):  # dropping rows copies the cache: not for every one
            cache.reorder_cache(alive.nonzero().squeeze(1))  # type: ignore[arg-type]
            running, tokens, real, positions = running[alive], tokens[alive], real[alive], positions[alive]
        inputs = tokens.unsqueeze(1)
        real = torch.cat([real, real.new_ones(len(real), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return [answer[:length] for answer, length in zip(answers.tolist(), lengths.tolist(), strict=True)]
