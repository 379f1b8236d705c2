"""Rollouts from a server: it answers prompts that are given, or writes them too."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from bebop.data.generate import chat_openings
from bebop.data.progress import RolloutBar
from bebop.data.prompts import Prompt, unanswered
from bebop.data.rollouts import Rollout
from bebop.data.server import Completions, Server, serve_all
from bebop.errors import InputError

_PROMPTS_TRIED = 400  # before a model whose prompts never end is given up


@dataclass
class ServerSampling:
    """How a server is to sample.

    Attributes:
        server: of the model.
        vocab_size: token ids are below it.
        temperature: of the answers; the one the head will serve at.
        stop: tokens that end an answer.
        max_response_tokens: most tokens of an answer.
        concurrency: requests at once.
        seed: of vLLM's sampling; SGLang goes by its own.
    """

    server: Server
    vocab_size: int
    temperature: float
    stop: Sequence[int]
    max_response_tokens: int
    concurrency: int
    seed: int


def answer_prompts_on_server(
    sampling: ServerSampling, prompts: Sequence[Prompt], written: Counter[int], keep: Callable[[int, Rollout], None]
) -> None:
    """Let a server answer prompts that are given. Shows a progress bar.

    Args:
        sampling: with which server, and how.
        prompts: each as often as it is to be answered.
        written: rollouts there are from an earlier run of the same settings, by prompt number.
        keep: called with the prompt's number and the rollout, in the order in which answers arrive.

    Raises:
        InputError: the server fails for good, refuses a request, or answers without token ids.
    """
    wanted = unanswered(prompts, written)
    seed = _seeds(sampling.seed, written)
    with RolloutBar(len(prompts), wanted.count(False)) as bar:

        async def answer(completions: Completions, index: int) -> None:
            prompt = prompts[index]
            keep(prompt.number, await _answer(completions, sampling, prompt, sampling.stop, seed(index), bar))

        items = [index for index, is_wanted in enumerate(wanted) if is_wanted]
        serve_all(sampling.server, sampling.vocab_size, sampling.concurrency, items, answer)


def generate_rollouts_on_server(
    sampling: ServerSampling,
    tokenizer: Any,
    *,
    count: int,
    prompt_temperature: float,
    max_prompt_tokens: int,
    written: Counter[int],
    keep: Callable[[int, Rollout], None],
) -> None:
    """Let the model on a server hold conversations with itself, as `bebop.data.generate.generate_rollouts` does in process.

    Other than there, a prompt in which the model uses an end token that does not end a user's turn is thrown away.

    Args:
        sampling: with which server, and how.
        tokenizer: of the model, with a chat template.
        count: how many rollouts, those of `written` included.
        prompt_temperature: of the prompts.
        max_prompt_tokens: most new tokens of a prompt; those that do not end by then are thrown away.
        written, keep: as for `answer_prompts_on_server`.

    Raises:
        InputError: as of `answer_prompts_on_server`, there is no chat template, or the model's prompts never end.
    """
    before, after = chat_openings(tokenizer)
    stop = sorted({after[0], *sampling.stop})
    seed = _seeds(sampling.seed, written)
    tried = 0
    any_ended = bool(written)
    with RolloutBar(count, written.total()) as bar:

        async def write_prompt(completions: Completions, number: int) -> Prompt:
            nonlocal tried, any_ended
            attempt = 0
            while any_ended or tried < _PROMPTS_TRIED:
                tried += 1
                attempt += 1
                text = await completions.sample(
                    before,
                    temperature=prompt_temperature,
                    max_tokens=max_prompt_tokens,
                    stop=after[:1],
                    seed=seed(number, attempt),
                )
                bar.sampled(len(text))
                if text[-1] == after[0] and len(text) > 1:
                    any_ended = True
                    return Prompt(number, before + text[:-1] + after)
            raise InputError(
                f"of {tried} prompts that the model wrote none ended within {max_prompt_tokens} tokens; "
                "raise max_prompt_tokens or use an instruction-tuned model"
            )

        async def write(completions: Completions, number: int) -> None:
            prompt = await write_prompt(completions, number)
            keep(number, await _answer(completions, sampling, prompt, stop, seed(number), bar))

        items = [number for number in range(count) if number not in written]
        serve_all(sampling.server, sampling.vocab_size, sampling.concurrency, items, write)


async def _answer(
    completions: Completions, sampling: ServerSampling, prompt: Prompt, stop: Sequence[int], seed: int, bar: RolloutBar
) -> Rollout:
    answer = await completions.sample(
        prompt.ids, temperature=sampling.temperature, max_tokens=sampling.max_response_tokens, stop=stop, seed=seed
    )
    bar.sampled(len(answer))
    bar.update()
    return prompt.answered(answer, stop)


def _seeds(seed: int, written: Counter[int]) -> Callable[..., int]:
    """Seeds of requests, by what tells them apart.

    They differ from those of an earlier run, which may have taken any of the requests for one prompt: the same seed again
    would give an answer that is there.
    """
    start = written.total()
    return lambda *which: Random(f"{seed} {start} {which}").getrandbits(53)
