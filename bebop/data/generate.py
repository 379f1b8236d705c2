"""Rollouts from the backbone itself: it writes the prompts and answers them, in batches.

The prompts follow Magpie (arXiv 2406.08464): an instruction-tuned model that is given its chat template up to the opening of
the user's turn goes on with something a user might say.

Tokens are drawn from the softmax of logits over temperature. What a model's generation_config.json says of top-k, top-p or
penalties is left aside; its end tokens count.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from bebop.data.progress import RolloutBar
from bebop.data.prompts import Prompt
from bebop.data.rollouts import Rollout
from bebop.errors import InputError
from bebop.sampling import draw

_MARK = "\u2402bebop\u2402"


class _Dialogues:
    """A batch of dialogues as they are written, token by token: the user's turn, the opening of the answer, the answer.

    All start from the same tokens and so stay of equal length, which spares the padding mask and a second prefill.
    """

    def __init__(self, size: int, opening: list[int], stop: list[int], most: tuple[int, int], device: torch.device):
        self.stop = torch.tensor(stop, device=device)  # tokens that end an answer
        self.opening = torch.tensor(opening, device=device)  # the first token ends the turn
        self.most = most
        self.prompt_tokens = torch.zeros(size, dtype=torch.long, device=device)  # the end of turn included
        self.opening_tokens = torch.zeros_like(self.prompt_tokens)  # 0 while the user speaks
        self.response_tokens = torch.zeros_like(self.prompt_tokens)
        self.done = torch.zeros(size, dtype=torch.bool, device=device)

    @property
    def answering(self) -> Tensor:
        return self.opening_tokens == len(self.opening)

    def append(self, sampled: Tensor) -> Tensor:
        """The tokens that come next, [size]: the sampled ones, or the opening of the answer where that is being written."""
        asking, answering = self.opening_tokens == 0, self.answering
        opening = ~asking & ~answering
        tokens = torch.where(opening, self.opening[self.opening_tokens.clamp(max=len(self.opening) - 1)], sampled)
        ends_turn = tokens == self.opening[0]
        self.prompt_tokens += asking & ~self.done
        self.response_tokens += answering & ~self.done
        self.opening_tokens += opening | (asking & ends_turn)
        too_long = asking & ~ends_turn & (self.prompt_tokens >= self.most[0])
        empty = asking & ends_turn & (self.prompt_tokens == 1)
        ends_answer = torch.isin(tokens, self.stop) | (self.response_tokens >= self.most[1])
        self.done |= too_long | empty | (answering & ends_answer)
        return tokens


@torch.no_grad()
def _write_dialogues(
    model: Any,
    before: list[int],
    after: list[int],
    stop: list[int],
    size: int,
    temperatures: tuple[float, float],
    most: tuple[int, int],
    generator: torch.Generator,
    progress: Callable[[float, int], None],
) -> Iterator[tuple[int, list[int], list[int]]]:
    """Row, prompt and answer of those of `size` dialogues that got that far; half an answer counts half for progress."""
    device = model.device
    dialogues = _Dialogues(size, after, stop, most, device)
    both = torch.tensor(temperatures, device=device)
    texts = torch.tensor([before] * size, device=device)
    running = torch.arange(size, device=device)  # dialogues still in the cache
    cache = DynamicCache(config=model.config.get_text_config())
    inputs = texts
    while not bool(dialogues.done.all()):
        logits = model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        sampled = torch.full((size,), after[0], device=device)
        temperature = both[dialogues.answering.long()[running]]
        sampled[running] = draw(torch.softmax(logits.float() / temperature.unsqueeze(1), dim=-1), generator)
        tokens = dialogues.append(sampled)
        texts = torch.cat([texts, tokens.unsqueeze(1)], dim=1)
        alive = ~dialogues.done[running]
        if alive.sum() <= 0.9 * len(running):  # dropping rows copies the cache: not for every one
            cache.reorder_cache(alive.nonzero().squeeze(1))  # type: ignore[arg-type]
            running = running[alive]
        inputs = tokens[running].unsqueeze(1)
        answers = torch.where(dialogues.done, dialogues.answering, dialogues.response_tokens / most[1]).sum().item()
        progress(answers, len(running))
    for row, (text, asked, answered) in enumerate(
        zip(texts.tolist(), dialogues.prompt_tokens.tolist(), dialogues.response_tokens.tolist(), strict=True)
    ):
        if answered:
            start = len(before) + asked - 1 + len(after)
            yield row, text[:start], text[start : start + answered]


def chat_openings(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens before a user's text, and between it and the answer (the first ends the turn), by the chat template.

    Raises:
        InputError: the tokenizer has no chat template, or one that does not keep the user's text in one piece.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "the tokenizer has no chat template, so the model cannot write prompts; use an instruction-tuned model"
        )
    try:
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # templates raise what they like
        raise InputError(f"the chat template does not take a user's message ({error}); mend chat_template") from error
    if rendered.count(_MARK) != 1:
        raise InputError("the chat template does not contain the user's text exactly once")
    before, after = (tokenizer.encode(part, add_special_tokens=False) for part in rendered.split(_MARK))
    return before, after


def check_openings(
    tokenizer: Any, max_prompt_tokens: int, max_response_tokens: int, max_length: int
) -> tuple[list[int], list[int]]:
    """`chat_openings` for turns of these lengths.

    Raises:
        InputError: as of `chat_openings`, or a model that takes `max_length` tokens has no room for the turns.
    """
    before, after = chat_openings(tokenizer)
    longest = len(before) + max_prompt_tokens + len(after) + max_response_tokens
    if longest > max_length:
        raise InputError(f"prompt and answer may take {longest} tokens with the chat template, the model takes {max_length}")
    return before, after


def generate_rollouts(
    model: Any,
    tokenizer: Any,
    *,
    count: int,
    temperature: float,
    stop: Sequence[int],
    prompt_temperature: float = 1.0,
    max_prompt_tokens: int = 64,
    max_response_tokens: int = 256,
    batch_size: int = 128,
    seed: int = 0,
    written: Counter[int] | None = None,
) -> Iterator[tuple[int, Rollout]]:
    """Conversations that the model holds with itself, in token ids, sampled without top-k or top-p.

    Prompts that do not end within `max_prompt_tokens`, or are empty, are thrown away; answers that do not end within
    `max_response_tokens` are kept, with finish_reason "length". Shows a progress bar with the time left. A run that goes on
    writes what it would have written without a stop.

    Args:
        model, tokenizer: a causal language model with a chat template.
        count: how many rollouts, those of `written` included.
        temperature: of the answers; the one the head will serve at.
        stop: tokens that end an answer, besides the one that ends a turn in the chat template.
        prompt_temperature: of the prompts.
        max_prompt_tokens, max_response_tokens: most new tokens of the two turns.
        batch_size: sequences sampled at once.
        seed: of all sampling.
        written: rollouts there are from an earlier run of the same settings, by prompt number.

    Yields:
        The number of the prompt, those thrown away counted, and the rollout.

    Raises:
        InputError: the texts may be longer than the model takes, it has no chat template, or its prompts never end.
    """
    written = Counter(written)
    most = model.config.get_text_config().max_position_embeddings
    before, after = check_openings(tokenizer, max_prompt_tokens, max_response_tokens, most)
    stop = sorted({after[0], *stop})
    done = written.total()
    # The last batch may be written in part: its seed gives the same dialogues again.
    batch_number = max(written, default=0) // batch_size
    with RolloutBar(count, done) as bar:
        while done < count:
            generator = torch.Generator(model.device).manual_seed(seed * 1_000_003 + batch_number)
            first = batch_number * batch_size
            batch_number += 1
            bar.begin_batch(done - sum(number >= first for number in written))
            limits = (max_prompt_tokens, max_response_tokens)
            for row, prompt, response in _write_dialogues(
                model, before, after, stop, batch_size, (prompt_temperature, temperature), limits, generator, bar.show_batch
            ):
                if done < count and first + row not in written:
                    yield first + row, Prompt(first + row, prompt).answered(response, stop)
                    done += 1
            if done == 0 and batch_number == 3:
                raise InputError(
                    f"of {3 * batch_size} prompts that the model wrote none ended within {max_prompt_tokens} tokens; "
                    "raise max_prompt_tokens or use an instruction-tuned model"
                )
